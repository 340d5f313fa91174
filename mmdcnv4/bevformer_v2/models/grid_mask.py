# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""GridMask: blanks squares of the training images.

Source:   "GridMask Data Augmentation", Chen et al., 2020, arXiv:2001.04086, with the settings of
          BEVFormer: bars are kept, the squares between them become zero.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class GridMask(nn.Module):
    """Zeroes squares on a grid of random period and place; does nothing in evaluation mode.

    Args:
        prob: probability that a batch is masked.
        ratio: width of the kept bars over the period.
    """

    def __init__(self, prob: float = 0.7, ratio: float = 0.5) -> None:
        super().__init__()
        self.prob, self.ratio = prob, ratio

    def _bars(self, length: int, period: int, width: int, device: torch.device) -> Tensor:
        """Whether a row (or column) lies on a bar, shape (length,)."""
        start = random.randrange(period)
        # the grid is that of a canvas half as large again, cropped to its middle
        position = torch.arange(length, device=device) + (int(1.5 * length) - length) // 2
        return (position >= start) & ((position - start) % period < width)

    def forward(self, images: Tensor) -> Tensor:
        """Masks images (..., H, W), all alike."""
        if not self.training or random.random() > self.prob:
            return images
        height, width = images.shape[-2:]
        period = random.randrange(2, max(height, 3))
        bar = min(max(int(self.ratio * period + 0.5), 1), period - 1)
        keep = (self._bars(height, period, bar, images.device)[:, None]
                | self._bars(width, period, bar, images.device)[None])
        return images * keep
