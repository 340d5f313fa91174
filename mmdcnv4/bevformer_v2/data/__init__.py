# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dataset and transforms of temporal multi-camera samples."""
