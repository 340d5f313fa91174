# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of a run."""

from .checkpoint import SafeCheckpointHook
from .compile import CompileHook
from .invalid_loss import InvalidLossHook
from .multi_scale_attention import MultiScaleAttentionHook
from .progress import ProgressBarHook
from .randomness import ResumableRandomnessHook
from .run_checks import RunChecksHook
from .temperature import TemperatureAnnealingHook

__all__ = ['CompileHook', 'InvalidLossHook', 'MultiScaleAttentionHook', 'ProgressBarHook',
           'ResumableRandomnessHook', 'RunChecksHook', 'SafeCheckpointHook',
           'TemperatureAnnealingHook']
