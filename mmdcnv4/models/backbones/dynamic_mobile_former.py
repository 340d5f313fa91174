# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dynamic Mobile-Former: a light convolutional backbone whose kernels follow the image.

Source:   Dynamic Mobile-Former (DMF), written from a description of the method; where the paper
          and the released code differ, the sizes and formulas are those of the code.
Differs:  `arch` gives all three published sizes to dense prediction as well; GRN has its mean over
          the channels (`grn_mode='legacy'` for the released code's); `norm_cfg` and `norm_eval`
          replace the conversion to SyncBN; layers after the last output are frozen; unknown
          arguments are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Optional, Union

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import user_arguments
from ..checkpoint import WeightRules
from ..layers.arguments import Arguments, is_number
from ..layers.backbone import Backbone
from ..layers.dynamic_conv import DynamicConv2d
from ..layers.mobile_former import (
    GRN_MODES,
    Former,
    LightCrossAttention,
    LiteBottleneck,
    MobileFormerBlock,
    MobileFormerOptions,
    Stem,
)

_CHECK = Arguments('DynamicMobileFormer')
# (hidden, out, cross-attention heads) of every block, stage by stage; the first block of a stage
# halves the map.
ARCH_SETTINGS: dict[str, dict[str, Any]] = {
    'xxs': dict(
        stem_channels=(12, 24, 12), groups=2, ffn_ratio=3.0, end_channels=960,
        stages=(((72, 20, 2), (60, 20, 2)),
                ((120, 36, 2), (108, 36, 2)),
                ((216, 64, 2), (256, 64, 2), (384, 88, 2), (528, 88, 4)),
                ((528, 120, 4), (720, 120, 4), (720, 120, 4)))),
    'xs': dict(
        stem_channels=(16, 32, 18), groups=3, ffn_ratio=2.0, end_channels=1152,
        stages=(((108, 30, 2), (90, 30, 2)),
                ((180, 54, 2), (162, 54, 2)),
                ((324, 96, 2), (384, 96, 3), (576, 132, 3), (792, 132, 4)),
                ((792, 180, 4), (1080, 180, 6), (1080, 180, 6)))),
    's': dict(
        stem_channels=(24, 48, 24), groups=4, ffn_ratio=2.7, end_channels=1440,
        stages=(((144, 40, 2), (120, 40, 2)),
                ((240, 72, 2), (216, 72, 2)),
                ((432, 128, 2), (512, 128, 4), (768, 176, 4), (1056, 176, 4)),
                ((1056, 240, 4), (1440, 240, 8), (1440, 240, 8)))),
}
# What an argument is when neither the caller nor the size table gives it.
_DEFAULTS: dict[str, Any] = dict(groups=1, ffn_ratio=2.0, end_channels=960)
_CLASSIFIER = ('head.',)
_END_LAYERS = ('end_mobile2former.', 'end_former.', 'channel_conv.', 'bn.')
_SOURCE = ('No weights of Dynamic Mobile-Former are published: train its classifier '
           '(configs/dynamic_mobile_former) and put the checkpoint there')


@MODELS.register_module()
class DynamicMobileFormer(Backbone):
    """Dynamic Mobile-Former, with the parameter names of the released code.

    A convolutional map and a few learned tokens run in parallel. In every block the tokens read
    the map by cross-attention and mix in a transformer layer; the first token then chooses, for
    each image, the kernels of three dynamic convolutions. Feature maps have strides 4, 8, 16, 32.
    Any image size works: a layer of stride 2 maps n pixels to ceil(n / 2).

    Args:
        arch: 'xxs', 'xs' or 's', the published sizes (`ARCH_SETTINGS`). Arguments given as well
            override its table. Without it `stem_channels` and `stages` are needed.
        stem_channels: widths of the stem, and inside and after the bottleneck that follows it.
        stages: four sequences of blocks (hidden width, output width, heads of the
            cross-attention). The heads divide the width of the map that enters the block.
        groups: of the pointwise dynamic convolutions; divides all widths of the blocks and the
            last width of `stem_channels`.
        ffn_ratio: hidden width of the FFN over its width.
        num_tokens, token_channels: number and width D of the tokens.
        former_heads: of the self-attention among the tokens; None for D / 32.
        num_kernels: K, kernels of which a dynamic convolution puts its own together.
        grn_mode: 'channel' (definition of ConvNeXt V2) or 'legacy' (the released code, in which
            the layer is nearly a scale and a shift). The parameters are the same.
        class_features: whether to add what stands between the last map and the linear layers of
            the classifier. Then the last output is (N, end_channels + D).
        end_channels: width of its dynamic convolution; without `arch` 960.
        drop_path_rate: largest probability with which a sample skips a residual branch; linear
            over the blocks and the two token layers at the end of the classifier.
        norm_cfg: norm of the convolutions. Batch norm needs two images per training batch:
            those of the kernel attention see one value per image.
        norm_eval: whether batch norms keep their running statistics in training.
        with_cp: recompute blocks in the backward pass to save memory; running statistics count
            each batch once.
        in_channels: channels of the image.
        out_indices: stages whose maps are returned, in ascending order. Layers after the last of
            them are frozen. May be empty with `class_features`.
        frozen_stages: -1 or 0 for none, n for the blocks of the first n stages: no gradients,
            and evaluation mode. The stem and the tokens stay trainable, as in the released code,
            which counts from 0: its 1 is 2 here.
        pretrained, init_cfg: see :class:`mmdcnv4.models.layers.backbone.Backbone`.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    @user_arguments()
    def __init__(self, arch: Optional[str] = None, stem_channels: Optional[Sequence[int]] = None,
                 stages: Optional[Sequence[Sequence[Sequence[int]]]] = None,
                 groups: Optional[int] = None, ffn_ratio: Optional[float] = None,
                 num_tokens: int = 6, token_channels: int = 192,
                 former_heads: Optional[int] = None, num_kernels: int = 8,
                 grn_mode: str = 'channel', class_features: bool = False,
                 end_channels: Optional[int] = None, drop_path_rate: float = 0.1,
                 norm_cfg: Optional[dict[str, Any]] = None, norm_eval: bool = False,
                 with_cp: bool = False, in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), frozen_stages: int = -1,
                 pretrained: Optional[str] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg=init_cfg, pretrained=pretrained)
        size = _resolve_arch(arch, dict(
            stem_channels=stem_channels, stages=stages, groups=groups, ffn_ratio=ffn_ratio,
            end_channels=end_channels))
        _check_size(size)
        _CHECK.choice('grn_mode', grn_mode, GRN_MODES)
        _CHECK.rate('drop_path_rate', drop_path_rate)
        for name, value in dict(num_tokens=num_tokens, token_channels=token_channels,
                                num_kernels=num_kernels, in_channels=in_channels).items():
            _CHECK.positive(name, value, Integral)
        former_heads = max(token_channels // 32, 1) if former_heads is None else former_heads
        _CHECK.positive('former_heads', former_heads, Integral)
        if token_channels % former_heads:
            raise _CHECK.refuse('former_heads', f'a divisor of token_channels ({token_channels})',
                                former_heads)
        for name, value in dict(class_features=class_features, norm_eval=norm_eval,
                                with_cp=with_cp).items():
            _CHECK.flag(name, value)
        if not class_features or len(out_indices) > 0:
            out_indices = _CHECK.out_indices(out_indices)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = _CHECK.frozen_stages(frozen_stages)
        self.class_features, self.norm_eval = class_features, norm_eval
        self.weight_rules = WeightRules(
            ignored=_CLASSIFIER + (() if class_features else _END_LAYERS), source=_SOURCE)
        options = MobileFormerOptions(
            groups=size['groups'], ffn_ratio=size['ffn_ratio'], token_channels=token_channels,
            former_heads=former_heads, num_kernels=num_kernels, grn_mode=grn_mode,
            norm_cfg=_checked_norm(norm_cfg), with_cp=with_cp)

        stem, hidden, width = size['stem_channels']
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, token_channels))
        self.stem = Stem(in_channels, stem, options)
        self.lite_bottleneck = LiteBottleneck(stem, hidden, width, options)
        self.last_blocks = _last_blocks(size['stages'])
        blocks = [(stage, index, *block) for stage, sequence in enumerate(size['stages'])
                  for index, block in enumerate(sequence)]
        rates = torch.linspace(0, drop_path_rate, len(blocks) + 2, device='cpu').tolist()
        self.blocks = nn.ModuleList()
        for rate, (_, index, hidden, out, heads) in zip(rates, blocks):
            self.blocks.append(MobileFormerBlock(
                width, hidden, out, 2 if index == 0 else 1, heads, rate, options))
            width = out
        if class_features:
            self.end_mobile2former = LightCrossAttention(width, token_channels, blocks[-1][-1],
                                                         rates[-2])
            self.end_former = Former(token_channels, former_heads, rates[-1])
            self.channel_conv = options.dynamic_conv(width, size['end_channels'])
            self.bn = options.norm(size['end_channels'])
        self._reset_parameters()
        self._freeze()

    def _reset_parameters(self) -> None:
        """Initial values: of the layers by their type; dynamic convolutions reset themselves."""
        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, _BatchNorm, DynamicConv2d)):
                module.reset_parameters()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _frozen_modules(self) -> Sequence[nn.Module]:
        count = self.last_blocks[self.frozen_stages - 1] + 1 if self.frozen_stages > 0 else 0
        return tuple(self.blocks[:count])

    def _unused_modules(self) -> Sequence[nn.Module]:
        if self.class_features:
            return ()
        return tuple(self.blocks[self.last_blocks[self.out_indices[-1]] + 1:])

    def _freeze(self) -> None:
        super()._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def set_temperature(self, temperature: float) -> None:
        """Sets the temperature of all dynamic convolutions; 1 for a trained model.

        Raises:
            ValueError: the temperature is not a positive number.
        """
        for module in self.modules():
            if isinstance(module, DynamicConv2d):
                module.set_temperature(temperature)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: images, shape (N, in_channels, H, W).

        Returns:
            One map per entry of `out_indices`, (N, C_i, ceil(H / 2**(i + 2)),
            ceil(W / 2**(i + 2))), NCHW-contiguous, C_i the last width of the stage; with
            `class_features` also (N, end_channels + D).

        Raises:
            ValueError: `x` has another shape or no pixel, or is a training batch of one image.
        """
        self._check_images(x, self.stem.conv.in_channels)
        tokens = self.tokens.expand(len(x), -1, -1)
        x = self.lite_bottleneck(self.stem(x))
        outs = []
        for index, block in enumerate(self.blocks):
            x, tokens = block(x, tokens)
            if index in self.last_blocks and self.last_blocks.index(index) in self.out_indices:
                outs.append(x.contiguous())
            if not self.class_features and index == self.last_blocks[self.out_indices[-1]]:
                break
        if self.class_features:
            outs.append(self._class_features(x, tokens))
        return tuple(outs)

    def _class_features(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Maps the last map and tokens to (N, end_channels + D)."""
        token = self.end_former(self.end_mobile2former(x, tokens))[:, 0]
        x = F.gelu(self.bn(self.channel_conv(x, token)))
        return torch.cat([x.mean((2, 3)), token], dim=1)


def _resolve_arch(arch: Optional[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the table of `arch`, overridden by the arguments that were given."""
    if arch is not None:
        _CHECK.choice('arch', arch, tuple(ARCH_SETTINGS))
    size = {**_DEFAULTS, **(ARCH_SETTINGS[arch] if arch else {}),
            **{key: value for key, value in given.items() if value is not None}}
    missing = [key for key in ('stem_channels', 'stages') if key not in size]
    if missing:
        raise ValueError(f'DynamicMobileFormer: {", ".join(missing)} must be given without arch, '
                         'got None')
    return size


def _checked_norm(norm_cfg: Optional[dict[str, Any]]) -> dict[str, Any]:
    if norm_cfg is None:
        return dict(type='BN')
    kind = norm_cfg.get('type') if isinstance(norm_cfg, Mapping) else None
    if not isinstance(kind, (str, type)) or isinstance(kind, str) and not (
            isinstance(MODELS.get(kind), type)):
        raise _CHECK.refuse('norm_cfg', "the dict of a norm, e.g. dict(type='BN')", norm_cfg)
    return norm_cfg


def _is_triple(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == 3 and all(
        is_number(value, Integral) and value > 0 for value in values)


def _check_size(size: Mapping[str, Any]) -> None:
    stem, stages, groups = (size[key] for key in ('stem_channels', 'stages', 'groups'))
    _CHECK.positive('groups', groups, Integral)
    _CHECK.positive('end_channels', size['end_channels'], Integral)
    _CHECK.positive('ffn_ratio', size['ffn_ratio'])
    if not _is_triple(stem):
        raise _CHECK.refuse('stem_channels', 'three integers > 0', stem)
    if not isinstance(stages, (list, tuple)) or len(stages) != 4 or not all(
            isinstance(stage, (list, tuple)) and stage and all(map(_is_triple, stage))
            for stage in stages):
        raise _CHECK.refuse('stages', 'four sequences of blocks (hidden width, output width, heads '
                            'of the cross-attention)', stages)
    width = stem[-1]
    if width % groups:
        raise _CHECK.refuse('stem_channels[2]', f'a multiple of groups ({groups})', width)
    for stage, blocks in enumerate(stages):
        for index, (hidden, out, heads) in enumerate(blocks):
            name = f'stages[{stage}][{index}]'
            if hidden % groups or out % groups:
                raise _CHECK.refuse(name, f'widths that are multiples of groups ({groups})',
                                    (hidden, out))
            if width % heads:
                raise _CHECK.refuse(name, 'heads that divide the width of the map that enters '
                                    f'the block ({width})', heads)
            if int(out * size['ffn_ratio']) < 1:
                raise _CHECK.refuse('ffn_ratio', f'at least 1 / {out}', size['ffn_ratio'])
            width = out


def _last_blocks(stages: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """Index of the last block of each stage."""
    return tuple(sum(len(stage) for stage in stages[:end]) - 1 for end in range(1, 5))
