# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Detector, encoder, heads and losses of BEVFormer v2."""
