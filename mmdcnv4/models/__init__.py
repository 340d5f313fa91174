# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Task-neutral model parts: layers and backbones, and the reader of published weights."""
