# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training parts that know no model: optimiser constructors, hooks, what the tools share."""

from . import analysis  # noqa: F401  mmengine's FLOP counter learns the operator
from .inheritance import forget_scope  # mmengine learns to read `mmdcnv4::...`
from .layer_decay import CustomLayerDecayOptimizerConstructor
from .progress import ProgressBarHook

__all__ = ['CustomLayerDecayOptimizerConstructor', 'ProgressBarHook', 'forget_scope']
