# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets that need no download: drawn shapes, and a rig of cameras in nuScenes layout."""
