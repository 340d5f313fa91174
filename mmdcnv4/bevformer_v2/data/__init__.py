# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Data set and transforms of temporal multi-camera samples."""
