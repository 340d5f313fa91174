# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose kernels are put together for every sample, steered by a token.

Source:   Dynamic Mobile-Former (DMF), "dynamic residual convolution": a kernel that is the same
          for all samples plus a weighted sum of K learned kernels. The weights come from a token
          and from the mean of the map.
Names:    attributes are those of the released state dicts.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

# On the sum of the dynamic kernels, as in the released code; the paper does not have it.
KERNEL_SCALE = 0.1


class KernelAttention(nn.Module):
    """Weights of the K kernels of every sample, each between 0 and 1; their sum is free.

    Args:
        channels: width C of the map.
        token_channels: width of the token.
        num_kernels: K.
        norm_cfg: norm between the two layers.
    """

    temperature: Tensor

    def __init__(self, channels: int, token_channels: int, num_kernels: int,
                 norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.net1 = nn.Conv2d(channels + token_channels, token_channels, 1, bias=False)
        self.bn = build_norm_layer(norm_cfg, token_channels)[1]
        self.net2 = nn.Conv2d(token_channels, num_kernels, 1, bias=False)
        # a buffer, since a compiled model would take a number for a constant
        self.register_buffer('temperature', torch.ones(()), persistent=False)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Maps (N, C, H, W) and a token (N, D) to the weights (N, K).

        Raises:
            ValueError: training statistics of a single sample.
        """
        if (isinstance(self.bn, _BatchNorm) and self.bn.training and len(x) == 1
                and not _is_synchronised()):
            raise ValueError(
                'DynamicMobileFormer: a training batch must have at least 2 images, because the '
                'batch norm of the kernel attention has one value per image and channel, got 1. '
                'If it is the last batch of an epoch, leave it out: '
                'train_dataloader=dict(drop_last=True), or in its batch_sampler. Otherwise set '
                "norm_eval=True, or norm_cfg=dict(type='SyncBN') on several devices")
        pooled = torch.cat([token, x.mean((2, 3))], dim=1)
        hidden = F.relu(self.bn(self.net1(pooled[..., None, None])))
        return torch.sigmoid(self.net2(hidden).flatten(1) / self.temperature)


def _is_synchronised() -> bool:
    return (torch.distributed.is_available() and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1)


class DynamicConv2d(nn.Module):
    """Convolution of stride 1 with one kernel per sample; the map keeps its size.

    With the weights `a` of :class:`KernelAttention`, sample n is convolved by::

        W[n] = static_weight + 0.1 * sum_k a[n, k] * weight[k]

    A 1x1 convolution is one batched matrix product over samples and groups, any other one grouped
    convolution with the samples in the groups. There is no bias.

    Args:
        in_channels, out_channels: widths.
        kernel_size: odd.
        groups: divides both widths.
        token_channels: width of the token.
        num_kernels: K.
        norm_cfg: norm of the kernel attention.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1,
                 *, token_channels: int, num_kernels: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.kernel_size, self.groups = kernel_size, groups
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.Kernel_Attention = KernelAttention(in_channels, token_channels, num_kernels, norm_cfg)
        self.static_weight = nn.Parameter(torch.empty(shape))
        self.weight = nn.Parameter(torch.empty(num_kernels, *shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: an ordinary convolution, all dynamic kernels zero."""
        nn.init.kaiming_uniform_(self.static_weight)
        nn.init.zeros_(self.weight)

    def set_temperature(self, temperature: float) -> None:
        """Divides the logits of the kernel attention from now on: a large value levels it.

        Raises:
            ValueError: the temperature is not a positive number.
        """
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not (
                0 < temperature < float('inf')):
            raise ValueError('DynamicConv2d: temperature must be a number > 0, '
                             f'got {temperature!r}')
        self.Kernel_Attention.temperature.fill_(temperature)

    def kernels(self, x: Tensor, token: Tensor) -> Tensor:
        """The kernel of every sample, (N, out_channels, in_channels / groups, k, k)."""
        attention = self.Kernel_Attention(x, token)
        dynamic = (attention @ self.weight.flatten(1)).unflatten(1, self.static_weight.shape)
        return self.static_weight + KERNEL_SCALE * dynamic

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) and a token (N, D) to (N, out_channels, H, W)."""
        kernels = self.kernels(x, token)
        if self.kernel_size == 1:
            return _pointwise(x, kernels, self.groups)
        if len(x) == 0:  # a convolution must have a group
            return F.conv2d(x, self.static_weight, padding='same', groups=self.groups)
        return _in_groups(x, kernels, self.groups)


def _pointwise(x: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """1x1 convolutions with a kernel per sample: one product for all samples and groups."""
    count, _, height, width = x.shape
    # (N, C, H, W) -> (N * G, C / G, H * W), so that the out channels are group by group, too
    columns = x.reshape(count * groups, x.shape[1] // groups, height * width)
    weights = kernels.reshape(count * groups, kernels.shape[1] // groups, kernels.shape[2])
    return torch.bmm(weights, columns).reshape(count, kernels.shape[1], height, width)


def _in_groups(x: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """Convolutions with a kernel per sample: one convolution of a single image, N * G groups."""
    count, channels, height, width = x.shape
    folded = x.reshape(1, count * channels, height, width)
    y = F.conv2d(folded, kernels.flatten(0, 1), padding=kernels.shape[-1] // 2,
                 groups=count * groups)
    return y.reshape(count, kernels.shape[1], height, width)
