# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DAT, DAT+ and DAT++: transformers whose attention samples its keys at learned positions.

Source:   "Vision Transformer with Deformable Attention", Xia et al., CVPR 2022, arXiv:2201.00520,
          section 4; "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention",
          Xia et al., arXiv:2309.01430, section 3 and table 1.
Differs:  exactly `out_indices` are returned and normalised; any size of image works, also for DAT;
          neighbourhood attention needs no other library; unknown arguments are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Optional, Union

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import user_arguments
from ..checkpoint import WeightRules
from ..layers.arguments import Arguments, is_number
from ..layers.backbone import Backbone
from ..layers.dat_block import (
    LETTERS,
    DATStage,
    PatchEmbedding,
    PatchMerging,
    StageOptions,
    conv_downsample,
    conv_stem,
)
from ..layers.deformable_attention import POSITION_BIASES, REF_MODES, DeformableOptions
from ..layers.norm import map_norm

_CHECK = Arguments('DAT')
_V1 = dict(offset_range_factor=2.0, ref_mode='v1')
_PLUS = dict(blocks=('ND', 'ND' * 2, 'ND' * 9, 'DD'))
_PP = dict(_PLUS, use_conv_stem=True, use_dwc_mlp=True, use_lpu=True)
_SHALLOW = ('LS', 'LS', 'LD' * 3, 'LD')
_DEEP = ('LS', 'LS', 'LD' * 9, 'LD')
# Strides and kernels are those of D; in DAT it stands in the last two stages alone.
_FINE = dict(strides=(1, 1, 1, 1))
ARCH_SETTINGS: dict[str, dict[str, Any]] = {
    'dat_tiny': dict(channels=96, blocks=_SHALLOW, heads=(3, 6, 12, 24), groups=(1, 2, 3, 6),
                     **_FINE, **_V1),
    'dat_small': dict(channels=96, blocks=_DEEP, heads=(3, 6, 12, 24), groups=(1, 2, 3, 6),
                      **_FINE, **_V1),
    'dat_base': dict(channels=128, blocks=_DEEP, heads=(4, 8, 16, 32), groups=(1, 2, 4, 8),
                     **_FINE, **_V1),
    'dat_plus_tiny': dict(channels=64, heads=(2, 4, 8, 16), groups=(1, 2, 4, 8), **_PLUS),
    'dat_pp_tiny': dict(channels=64, heads=(2, 4, 8, 16), groups=(1, 2, 4, 8), **_PP),
    'dat_pp_small': dict(channels=96, heads=(3, 6, 12, 24), groups=(1, 2, 3, 6), **_PP),
    'dat_pp_base': dict(channels=128, heads=(4, 8, 16, 32), groups=(2, 4, 8, 16), **_PP),
}
# What an argument is when neither the caller nor the size table gives it.
_DEFAULTS: dict[str, Any] = dict(
    strides=(8, 4, 2, 1), offset_kernels=(9, 7, 5, 3), kernel_size=7, window_size=7, mlp_ratio=4.0,
    use_conv_stem=False, use_dwc_mlp=False, use_lpu=False, offset_range_factor=-1.0,
    ref_mode='code', position_bias='deformable', use_offsets=True, layer_scale=None)
_REQUIRED = ('channels', 'blocks', 'heads', 'groups')
_DERIVED = ('relative_position_index', 'attn_mask')  # of the size of construction; computed here
_TABLES = ('rpe_table', 'relative_position_bias_table')


def resize_bias_tables(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Brings published weights into the form of a model.

    Bias tables of another size are resized bicubically (they are of `img_size`: weights of 224
    that are fine-tuned at 384); index and mask buffers are dropped, factors per channel renamed.

    Args:
        model: a DAT.
        weights: by key.

    Returns:
        The weights for `model.load_state_dict`.
    """
    own, result, resized = model.state_dict(), {}, 0
    for key, value in weights.items():
        if key.endswith(_DERIVED):
            continue
        if '.layer_scales.' in key:
            key = key.replace('.weight', '.gamma')
        goal = own[key].shape if key in own else value.shape
        if key.endswith(_TABLES) and value.shape != goal and value.dim() == len(goal) and (
                key.endswith('rpe_table') or value.shape[1:] == goal[1:]):
            value = _resize_table(value, tuple(goal))
            resized += 1
        result[key] = value
    if resized:
        print_log(f'DAT: {resized} bias tables resized bicubically to those of the model',
                  logger='current')
    return result


def _resize_table(table: Tensor, goal: tuple[int, ...]) -> Tensor:
    """(heads, rows, columns), or (rows * columns, heads) of a square."""
    if len(goal) == 3:
        return F.interpolate(table[None], goal[1:], mode='bicubic').squeeze(0)
    old, new = (round(count**0.5) for count in (table.shape[0], goal[0]))
    square = table.t().unflatten(1, (old, old))[None]
    return F.interpolate(square, (new, new), mode='bicubic')[0].flatten(1).t()


@MODELS.register_module()
class DAT(Backbone):
    """DAT, DAT+ or DAT++, with the parameter names of the published weights.

    Feature maps have strides 4, 8, 16, 32 and widths C, 2C, 4C, 8C. Any image size works. The
    layers of stride 2 of DAT++ map n pixels to ceil(n / 2); DAT and DAT+ cut patches and map n
    pixels to max(n // 4, 1) and n // 2.

    Args:
        arch: a published size: 'dat_tiny', 'dat_small', 'dat_base', 'dat_plus_tiny',
            'dat_pp_tiny', 'dat_pp_small', 'dat_pp_base'. Arguments given in addition override
            its table (`ARCH_SETTINGS`). Without it `channels`, `blocks`, `heads` and `groups` are
            needed.
        channels: width C of the first stage.
        blocks: kinds of the blocks of the four stages, a letter per block: D deformable
            attention, N neighbourhood attention, L and S attention in windows and in shifted
            windows, P attention to a map reduced by a convolution, X a ConvNeXt block.
        heads: attention heads per stage; divide the width of the stage.
        groups: offset groups of D per stage; divide the heads.
        strides: pixels per key of D and P, per stage.
        offset_kernels: kernel of the offset network of D, per stage: odd, or the stride itself.
        kernel_size: odd window of N.
        window_size: of L and S.
        mlp_ratio: hidden width of the feed-forward network over its width.
        use_conv_stem: overlapping convolutions for the stem and between the stages instead of
            patches.
        use_dwc_mlp: a depthwise convolution in the feed-forward network.
        use_lpu: a depthwise convolution with a shortcut before every block.
        offset_range_factor: f >= 0 bounds the offsets of D by f cells of the grid; -1 leaves them
            free and clamps the positions to the map.
        ref_mode: where keys rest: 'code', as the released DAT+ and DAT++ weights expect, 'v1', as
            those of DAT, or 'paper', from corner to corner.
        position_bias: of D: 'deformable' (the default of the papers), 'fixed', 'log_cpb',
            'depthwise' or 'none'; see :mod:`mmdcnv4.models.layers.deformable_attention`.
        use_offsets: False pools the keys of D instead of sampling them, without a position bias;
            the maps must then be multiples of the strides.
        img_size: image size for which the bias tables of D are made, a multiple of 32; they are
            stretched over maps of other sizes. The published ones are of 224.
        layer_scale: initial value of a learned factor per channel on every branch; None for none.
        drop_path_rate: probability with which a sample skips a branch of the last block; it
            grows linearly from 0 in the first.
        with_cp: compute blocks again in the backward pass to save memory.
        in_channels: channels of the image.
        out_indices: stages whose maps are returned, normalised, in ascending order. Stages after
            the last one are frozen.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and the first n stages with
            their norms: no gradients and no drop path there.
        pretrained, init_cfg: see :class:`mmdcnv4.models.layers.backbone.Backbone`.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    weight_rules = WeightRules(
        ignored=('cls_norm.', 'cls_head.'), optional=('output-norm', r'^norms\.'),
        source='The DAT and DAT++ weights (dat_pp_tiny_in1k_224.pth and others) are linked by '
               'github.com/LeapLabTHU/DAT and must be downloaded by hand: put the file there',
        adapt=resize_bias_tables)

    @user_arguments()
    def __init__(self, arch: Optional[str] = None, channels: Optional[int] = None,
                 blocks: Optional[Sequence[str]] = None, heads: Optional[Sequence[int]] = None,
                 groups: Optional[Sequence[int]] = None, strides: Optional[Sequence[int]] = None,
                 offset_kernels: Optional[Sequence[int]] = None,
                 kernel_size: Optional[int] = None, window_size: Optional[int] = None,
                 mlp_ratio: Optional[float] = None, use_conv_stem: Optional[bool] = None,
                 use_dwc_mlp: Optional[bool] = None, use_lpu: Optional[bool] = None,
                 offset_range_factor: Optional[float] = None, ref_mode: Optional[str] = None,
                 position_bias: Optional[str] = None, use_offsets: Optional[bool] = None,
                 layer_scale: Optional[float] = None, img_size: int = 224,
                 drop_path_rate: float = 0.2, with_cp: bool = False, in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), frozen_stages: int = -1,
                 pretrained: Optional[str] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg=init_cfg, pretrained=pretrained)
        _CHECK.flag('with_cp', with_cp)
        size = _resolve_arch(arch, dict(
            channels=channels, blocks=blocks, heads=heads, groups=groups, strides=strides,
            offset_kernels=offset_kernels, kernel_size=kernel_size, window_size=window_size,
            mlp_ratio=mlp_ratio, use_conv_stem=use_conv_stem, use_dwc_mlp=use_dwc_mlp,
            use_lpu=use_lpu, offset_range_factor=offset_range_factor, ref_mode=ref_mode,
            position_bias=position_bias, use_offsets=use_offsets, layer_scale=layer_scale))
        _check_size(size)
        _CHECK.positive('in_channels', in_channels, Integral)
        if not is_number(img_size, Integral) or img_size < 32 or img_size % 32:
            raise _CHECK.refuse('img_size', 'a multiple of 32', img_size)
        self.out_indices = _CHECK.out_indices(out_indices)
        self.frozen_stages = _CHECK.frozen_stages(frozen_stages)
        self.depths = tuple(map(len, size['blocks']))
        drop_paths = _CHECK.drop_path_rates(drop_path_rate, self.depths)

        widths = [size['channels'] * 2**stage for stage in range(4)]
        self.in_channels = in_channels
        stem: Any = conv_stem if size['use_conv_stem'] else PatchEmbedding
        downsample: Any = conv_downsample if size['use_conv_stem'] else PatchMerging
        self.patch_proj = stem(in_channels, widths[0])
        self.down_projs = nn.ModuleList(map(downsample, widths[:3], widths[1:]))
        self.stages = nn.ModuleList(
            DATStage(widths[stage], size['blocks'][stage], drop_paths[stage],
                     _stage_options(size, stage, img_size // 2**(stage + 2), with_cp))
            for stage in range(4))
        self.norms = nn.ModuleDict({
            str(stage): map_norm(widths[stage]) for stage in self.out_indices})
        self._freeze()

    def _reset_parameters(self) -> None:
        """Initial values of torch for convolutions and linear layers, as the released code has."""
        for module in self.modules():
            reset = getattr(module, 'reset_parameters', None)
            if reset is not None:
                reset()

    def _frozen_modules(self) -> Sequence[nn.Module]:
        if self.frozen_stages < 0:
            return ()
        norms = (self.norms[key] for key in self.norms if int(key) < self.frozen_stages)
        return (self.patch_proj, *self.stages[:self.frozen_stages],
                *self.down_projs[:self.frozen_stages], *norms)

    def _unused_modules(self) -> Sequence[nn.Module]:
        last = self.out_indices[-1]
        return (*self.stages[last + 1:], *self.down_projs[last:])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: images, shape (N, in_channels, H, W).

        Returns:
            One map per entry of `out_indices`, (N, C * 2**i, about H / 2**(i + 2), about
            W / 2**(i + 2)), NCHW-contiguous because some operators of mmcv assume it.

        Raises:
            ValueError: `x` has another shape, or no pixel.
        """
        self._check_images(x, self.in_channels)
        x = self.patch_proj(x)
        outs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                outs.append(self.norms[str(index)](x).contiguous())
            if index == self.out_indices[-1]:
                break
            x = self.down_projs[index](x)
        return tuple(outs)


def _stage_options(size: Mapping[str, Any], stage: int, side: int, with_cp: bool) -> StageOptions:
    """Options of a stage whose map has `side` rows and columns at `img_size`."""
    deformable = {key: size[key] for key in (
        'offset_range_factor', 'ref_mode', 'position_bias', 'use_offsets')}
    return StageOptions(
        heads=size['heads'][stage], groups=size['groups'][stage], stride=size['strides'][stage],
        offset_kernel=size['offset_kernels'][stage], size=(side, side), with_cp=with_cp,
        deformable=DeformableOptions(**deformable), **{key: size[key] for key in (
            'kernel_size', 'window_size', 'mlp_ratio', 'use_dwc_mlp', 'use_lpu', 'layer_scale')})


def _resolve_arch(arch: Optional[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the table of `arch`, overridden by the arguments that were given."""
    if arch is not None:
        _CHECK.choice('arch', arch, tuple(ARCH_SETTINGS))
    size = {**_DEFAULTS, **(ARCH_SETTINGS[arch] if arch else {}),
            **{key: value for key, value in given.items() if value is not None}}
    missing = [key for key in _REQUIRED if key not in size]
    if missing:
        raise ValueError(f'DAT: {", ".join(missing)} must be given without arch, got None')
    return size


def _check_size(size: Mapping[str, Any]) -> None:
    _CHECK.positive('channels', size['channels'], Integral)
    if size['channels'] % 2:
        raise _CHECK.refuse('channels', 'even', size['channels'])
    blocks = size['blocks']
    if not isinstance(blocks, (list, tuple)) or len(blocks) != 4 or not all(
            isinstance(stage, str) and stage and set(stage) <= set(LETTERS) for stage in blocks):
        raise _CHECK.refuse('blocks', f'four strings of the letters {LETTERS}', blocks)
    for name in ('heads', 'groups', 'strides', 'offset_kernels'):
        values = _CHECK.integers(name, size[name])
        if len(values) != 4 or min(values) < 1:
            raise _CHECK.refuse(name, 'four numbers >= 1', values)
    _CHECK.positive('kernel_size', size['kernel_size'], Integral)
    if size['kernel_size'] % 2 == 0:
        raise _CHECK.refuse('kernel_size', 'odd', size['kernel_size'])
    _CHECK.positive('window_size', size['window_size'], Integral)
    _CHECK.positive('mlp_ratio', size['mlp_ratio'])
    factor = size['offset_range_factor']
    if not is_number(factor) or factor < 0 and factor != -1:
        raise _CHECK.refuse('offset_range_factor', '-1 or a number >= 0', factor)
    if size['layer_scale'] is not None and not is_number(size['layer_scale']):
        raise _CHECK.refuse('layer_scale', 'a number or None', size['layer_scale'])
    for name in ('use_conv_stem', 'use_dwc_mlp', 'use_lpu', 'use_offsets'):
        _CHECK.flag(name, size[name])
    _CHECK.choice('ref_mode', size['ref_mode'], REF_MODES)
    _CHECK.choice('position_bias', size['position_bias'], POSITION_BIASES)
    for stage in range(4):
        _check_stage(size, stage)


def _check_stage(size: Mapping[str, Any], stage: int) -> None:
    heads, groups = size['heads'][stage], size['groups'][stage]
    width = size['channels'] * 2**stage
    if width % heads:
        raise _CHECK.refuse(f'heads[{stage}]', f'a divisor of the width {width}', heads)
    if 'D' not in size['blocks'][stage]:
        return
    if heads % groups:
        raise _CHECK.refuse(f'groups[{stage}]', f'a divisor of the {heads} heads', groups)
    kernel, stride = size['offset_kernels'][stage], size['strides'][stage]
    if kernel % 2 == 0 and kernel != stride or kernel < stride:
        raise _CHECK.refuse(f'offset_kernels[{stage}]',
                            f'odd and not below the stride {stride}, or the stride itself', kernel)
