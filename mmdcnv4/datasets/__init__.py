# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets that need no download: drawn shapes, and a rig of cameras in nuScenes layout."""
