# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of a run."""

from .progress import ProgressBarHook
from .run_checks import RunChecksHook
from .temperature import TemperatureAnnealingHook

__all__ = ['ProgressBarHook', 'RunChecksHook', 'TemperatureAnnealingHook']
