# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of a run."""

from .progress import ProgressBarHook
from .temperature import TemperatureAnnealingHook

__all__ = ['ProgressBarHook', 'TemperatureAnnealingHook']
