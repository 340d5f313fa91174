# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training parts that know no model: optimiser constructors and hooks."""

from .hooks import (
    CompileHook,
    InvalidLossHook,
    MultiScaleAttentionHook,
    ProgressBarHook,
    ResumableRandomnessHook,
    SafeCheckpointHook,
    TemperatureAnnealingHook,
)
from .optimizers import CustomLayerDecayOptimizerConstructor

__all__ = ['CompileHook', 'CustomLayerDecayOptimizerConstructor', 'InvalidLossHook',
           'MultiScaleAttentionHook', 'ProgressBarHook', 'ResumableRandomnessHook',
           'SafeCheckpointHook', 'TemperatureAnnealingHook']
