# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training parts that know no model: optimiser constructors and hooks."""

from . import flops  # noqa: F401  mmengine's FLOP counter learns the operator
from .hooks import ProgressBarHook, TemperatureAnnealingHook
from .inheritance import forget_scope  # mmengine learns to read `mmdcnv4::...`
from .optimizers import CustomLayerDecayOptimizerConstructor

__all__ = ['CustomLayerDecayOptimizerConstructor', 'ProgressBarHook', 'TemperatureAnnealingHook',
           'forget_scope']
