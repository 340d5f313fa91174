# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Where the tests of BEVFormer v2 find things."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'bevformer_v2'
TINY = CONFIGS / 'bevformer-v2_flash-intern-image-mini_t2_1xb1-100e_synthetic-rig.py'
