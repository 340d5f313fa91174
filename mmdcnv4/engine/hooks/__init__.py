# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of a run."""

from .multi_scale_attention import MultiScaleAttentionHook
from .progress import ProgressBarHook
from .run_checks import RunChecksHook
from .temperature import TemperatureAnnealingHook

__all__ = ['MultiScaleAttentionHook', 'ProgressBarHook', 'RunChecksHook',
           'TemperatureAnnealingHook']
