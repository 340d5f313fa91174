# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the perspective head learns: objects of each camera, and the pixels that stand for them."""
