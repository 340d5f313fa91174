# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A weighted cross entropy for segmentors that pixels without a label cannot break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import user_arguments


@MODELS.register_module()
class WeightedCrossEntropy(nn.Module):
    """Cross entropy with a weight per class: sum(w * loss) / sum(w) over the pixels with a label.

    mmsegmentation 1.2's `CrossEntropyLoss` looks up the weight of `ignore_index` as of a class, and
    fails on every image that is padded, has void pixels, or is read with `reduce_zero_label`.
    Without such pixels both give the same value.

    Args:
        class_weight: one per class, not negative.
        loss_weight: factor on the loss.
        loss_name: under which a head reports it; must begin with `loss_`.

    Raises:
        ValueError: the message names the argument, the rule and the value.
    """

    class_weight: Tensor

    @user_arguments()
    def __init__(self, class_weight: Sequence[float], loss_weight: float = 1.0,
                 loss_name: str = 'loss_ce') -> None:
        super().__init__()
        # on the CPU, where values can be read; the rest of the model may be on the meta device
        weights = torch.as_tensor(class_weight, dtype=torch.float32, device='cpu')
        if weights.dim() != 1 or not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError('WeightedCrossEntropy: class_weight must be numbers >= 0, one per '
                             f'class, got {class_weight}')
        # not in the state dict, which stays that of a model with another loss
        self.register_buffer('class_weight', weights, persistent=False)
        self.loss_weight, self.loss_name = loss_weight, loss_name

    def forward(self, logits: Tensor, labels: Tensor, weight: Optional[Tensor] = None,
                ignore_index: int = 255) -> Tensor:
        """The loss of a batch; zero where no pixel has a label of positive weight.

        Args:
            logits: shape (N, classes, H, W).
            labels: shape (N, H, W), 0 ... classes - 1 or `ignore_index`.
            weight: of the pixels, shape (N, H, W); None for 1. It is not part of the divisor.
            ignore_index: the label of pixels without one.

        Raises:
            ValueError: there is another number of classes than of weights.
        """
        if logits.shape[1] != len(self.class_weight):
            raise ValueError(f'WeightedCrossEntropy: class_weight must have {logits.shape[1]} '
                             f'values, one per class, got {len(self.class_weight)}')
        dtype = torch.promote_types(logits.dtype, torch.float32)  # a sum over pixels
        class_weight = self.class_weight.to(dtype)
        losses = F.cross_entropy(logits.to(dtype), labels, class_weight,
                                 ignore_index=ignore_index, reduction='none')
        if weight is not None:
            losses = losses * weight
        is_labelled = labels != ignore_index
        total = (class_weight[labels.masked_fill(~is_labelled, 0)] * is_labelled).sum()
        return self.loss_weight * losses.sum() / total.clamp(min=torch.finfo(dtype).tiny)
