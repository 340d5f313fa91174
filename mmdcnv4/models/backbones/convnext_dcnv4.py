# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt whose 7x7 depthwise convolutions are DCNv4 layers.

Source:   "Efficient Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197, table 8; the
          host is that of "A ConvNet for the 2020s", Liu et al., CVPR 2022, arXiv:2201.03545.
Differs:  no code or weights of this experiment were released and the paper does not say how many
          channels a group has: 32 as in its benchmarks of the operator, no projections, since a
          depthwise convolution has none. Both are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Optional, Union

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...errors import user_arguments
from ...ops import DCNv4
from ..checkpoint import WeightRules
from ..layers.arguments import Arguments, is_number
from ..layers.backbone import Backbone
from ..layers.convnext_block import CORE_OPS, EPS, BlockOptions, ConvNeXtBlock, Downsample, Patches

_CHECK = Arguments('ConvNeXtDCNv4')
ARCH_SETTINGS: dict[str, dict[str, Any]] = {
    't': dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768)),
    's': dict(depths=(3, 3, 27, 3), channels=(96, 192, 384, 768)),
    'b': dict(depths=(3, 3, 27, 3), channels=(128, 256, 512, 1024)),
    'l': dict(depths=(3, 3, 27, 3), channels=(192, 384, 768, 1536)),
    'xl': dict(depths=(3, 3, 27, 3), channels=(256, 512, 1024, 2048)),
}
# as mmpretrain's ConvNeXt spells them, so that in a config only the type changes
_LONG_NAMES = dict(tiny='t', small='s', base='b', large='l', xlarge='xl')


def plain_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what a checkpoint of mmpretrain's ConvNeXt has and the model has not.

    Args:
        model: a ConvNeXtDCNv4.
        weights: by key.

    Returns:
        The weights without the depthwise convolutions that DCNv4 replaces, and without the norms
        of stages that are no output.
    """
    own = model.state_dict()
    kept = {key: value for key, value in weights.items()
            if key in own or not re.search(r'\.depthwise_conv\.|^norm\d\.', key)}
    count = sum('.depthwise_conv.weight' in key for key in weights.keys() - kept.keys())
    if count:
        print_log(f'ConvNeXtDCNv4: {count} depthwise convolutions of the file have no place, DCNv4 '
                  'replaces them', logger='current')
    return kept


@MODELS.register_module()
class ConvNeXtDCNv4(Backbone):
    """ConvNeXt with DCNv4, and with the other parameter names of mmpretrain's ConvNeXt.

    Feature maps have strides 4, 8, 16, 32 and are normalised; n pixels become max(n // 4, 1), then
    n // 2. The class name and the parameter names are such that the layer-wise learning rates of
    mmdet, mmseg and mmpretrain find the layers of a ConvNeXt.

    Args:
        arch: 't', 's', 'b', 'l', 'xl' (or 'tiny' ... 'xlarge'), or a dict with `depths` and
            `channels`, four numbers each.
        core_op: 'DCNv4'; 'DWConv', the original 7x7 depthwise convolution; 'SoftmaxDWConv', the
            same with a softmax over its weights (table 1 of the paper).
        stage_with_dcn: stages with DCNv4; the others have the depthwise convolution.
        group_channels: channels per group of DCNv4; divides the width of every such stage.
        kernel_size, dw_kernel_size, offset_scale, remove_center: of DCNv4; odd sizes. 3 is a
            window of 3x3.
        with_pointwise: give DCNv4 its two projections, too.
        mask_init: start of its masks: 'zero' (as published, the block starts at its bias),
            'center' (as the identity) or 'box' (as a 3x3 mean), or a number.
        drop_path_rate: largest probability with which a sample skips a block.
        layer_scale_init_value: start of the factor per channel; 0 for none.
        gap_before_final_norm: return vectors, the mean over the map before the norm, as for
            classification.
        with_cp: recompute blocks in the backward pass to save memory.
        in_channels: channels of the image.
        out_indices: stages whose maps are returned, in ascending order; the later ones are frozen.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and the first n stages.
        pretrained: see :class:`mmdcnv4.models.layers.backbone.Backbone`.
        init_cfg: None, `dict(type='Pretrained', checkpoint=path or URL)`, or initialisers of
            mmengine. A file of a plain ConvNeXt is read, too: the DCNv4 layers then keep their
            start, and its depthwise convolutions are left out.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    weight_rules = WeightRules(
        ignored=('head.',), optional=('DCNv4 and norm', r'\.dcn\.'),
        optional_alone=r'^norm[0-2]\.',  # a classifier has the last norm alone
        source='mmpretrain publishes weights of the plain ConvNeXt, which fit but for DCNv4; of '
               'ConvNeXt with DCNv4 none were released',
        adapt=plain_weights)

    @user_arguments()
    def __init__(self, arch: Union[str, dict] = 't', *, core_op: str = 'DCNv4',
                 stage_with_dcn: Sequence[bool] = (True, True, True, True),
                 group_channels: int = 32, kernel_size: int = 3,
                 dw_kernel_size: Optional[int] = None, offset_scale: float = 1.0,
                 with_pointwise: bool = False, remove_center: bool = False,
                 mask_init: Union[float, str] = 'zero', drop_path_rate: float = 0.0,
                 layer_scale_init_value: float = 1e-6, gap_before_final_norm: bool = False,
                 with_cp: bool = False, in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), frozen_stages: int = -1,
                 pretrained: Optional[str] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg=init_cfg, pretrained=pretrained)
        self.depths, self.channels = _sizes(arch)
        _CHECK.choice('core_op', core_op, CORE_OPS)
        for name, value in (('kernel_size', kernel_size), ('group_channels', group_channels),
                            ('in_channels', in_channels)):
            _CHECK.positive(name, value, Integral)
        if kernel_size % 2 == 0:
            raise _CHECK.refuse('kernel_size', 'odd', kernel_size)
        if not is_number(layer_scale_init_value) or layer_scale_init_value < 0:
            raise _CHECK.refuse('layer_scale_init_value', 'a number >= 0', layer_scale_init_value)
        _CHECK.flag('gap_before_final_norm', gap_before_final_norm)
        self.out_indices = _CHECK.out_indices(out_indices)
        self.frozen_stages = _CHECK.frozen_stages(frozen_stages)
        self.gap_before_final_norm = gap_before_final_norm
        self.in_channels = in_channels
        stage_with_dcn = _check_stages(stage_with_dcn)
        options = BlockOptions(
            core_op, group_channels, kernel_size, dw_kernel_size, offset_scale, with_pointwise,
            remove_center, mask_init, layer_scale_init_value or None, with_cp)
        rates = _CHECK.drop_path_rates(drop_path_rate, self.depths)

        self.downsample_layers = nn.ModuleList([Patches(in_channels, self.channels[0])])
        self.stages = nn.ModuleList()
        for stage, width in enumerate(self.channels):
            if stage:
                self.downsample_layers.append(Downsample(self.channels[stage - 1], width))
            here = options if stage_with_dcn[stage] or core_op != 'DCNv4' else replace(
                options, core_op='DWConv')
            if here.core_op == 'DCNv4':
                _check_groups(group_channels, width, stage)
            self.stages.append(nn.Sequential(
                *(ConvNeXtBlock(width, rate, here) for rate in rates[stage])))
            if stage in self.out_indices:
                self.add_module(f'norm{stage}', nn.LayerNorm(width, eps=EPS))
        self.layer_scale = options.layer_scale
        self._reset_parameters()
        self._freeze()

    def _reset_parameters(self) -> None:
        """Initial values: truncated normal weights, unit norms; DCNv4 layers reset themselves."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                nn.init.constant_(module.gamma, self.layer_scale or 0.0)
        self._reset_core_ops()

    def _reset_core_ops(self) -> None:
        for module in self.modules():
            if isinstance(module, DCNv4):
                module.reset_parameters()

    def _norms(self, stages: range) -> list[nn.Module]:
        return [getattr(self, f'norm{stage}') for stage in stages if stage in self.out_indices]

    def _frozen_modules(self) -> Sequence[nn.Module]:
        if self.frozen_stages < 0:
            return ()
        return (self.downsample_layers[0], *self.downsample_layers[1:self.frozen_stages],
                *self.stages[:self.frozen_stages], *self._norms(range(self.frozen_stages)))

    def _unused_modules(self) -> Sequence[nn.Module]:
        later = slice(self.out_indices[-1] + 1, None)
        return (*self.downsample_layers[later], *self.stages[later])

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter, for `LearningRateDecayOptimWrapperConstructor` of mmpretrain.

        As for any ConvNeXt: the first two stages are a layer each, three blocks of the third stage
        are one, and the last stage is one.

        Args:
            param_name: name of the parameter in the whole model.
            prefix: what stands in front of the backbone's names, as 'backbone.'.

        Returns:
            0 for the stem ... and the number of layers, whose last is all that is not in a stage.
        """
        last = 3 + -(-self.depths[2] // 3)
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        parts = name.split('.')
        if parts[0] not in ('downsample_layers', 'stages'):
            return last + 1, last + 2
        stage = int(parts[1])
        if stage == 3:
            return last, last + 2
        if parts[0] == 'downsample_layers':
            return (stage + 1 if stage else 0), last + 2
        return (3 + int(parts[2]) // 3 if stage == 2 else stage + 1), last + 2

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: images, shape (N, in_channels, H, W).

        Returns:
            One map per entry of `out_indices`, (N, C, H', W'), NCHW-contiguous, because some mmcv
            operators assume it; vectors (N, C) with `gap_before_final_norm`.

        Raises:
            ValueError: `x` has another shape, or no pixel.
        """
        self._check_images(x, self.in_channels)
        outs = []
        for index, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(downsample(x))
            if index in self.out_indices:
                norm = getattr(self, f'norm{index}')
                if self.gap_before_final_norm:
                    outs.append(norm(x.mean((1, 2))))
                else:
                    # (N, H, W, C) -> (N, C, H, W)
                    outs.append(norm(x).permute(0, 3, 1, 2).contiguous())
            if index == self.out_indices[-1]:
                break
        return tuple(outs)


def _sizes(arch: Union[str, dict]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Depths and widths."""
    if isinstance(arch, str):
        name = _LONG_NAMES.get(arch, arch)
        _CHECK.choice('arch', name, tuple(ARCH_SETTINGS))
        arch = ARCH_SETTINGS[name]
    if not isinstance(arch, dict) or set(arch) != {'depths', 'channels'}:
        raise _CHECK.refuse('arch', f'one of {tuple(ARCH_SETTINGS)} or a dict with depths and '
                            'channels', arch)
    sizes = []
    for name in ('depths', 'channels'):
        values = _CHECK.integers(name, arch[name])
        if len(values) != 4 or min(values) < 1:
            raise _CHECK.refuse(name, 'four numbers >= 1', values)
        sizes.append(values)
    return sizes[0], sizes[1]


def _check_stages(values: Any) -> tuple[bool, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != 4 or not all(
            isinstance(value, bool) for value in values):
        raise _CHECK.refuse('stage_with_dcn', 'four of True and False', values)
    return tuple(values)


def _check_groups(group_channels: int, width: int, stage: int) -> None:
    if width % group_channels:
        divisors = [size for size in range(1, width + 1) if width % size == 0]
        raise _CHECK.refuse('group_channels', f'a divisor of the width {width} of stage {stage}, '
                            f'one of {divisors}', group_channels)
