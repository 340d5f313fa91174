# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A vision transformer whose self-attention is replaced by DCNv4.

Source:   "Efficient Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197, table 8; the
          host is DeiT, "Training data-efficient image transformers", Touvron et al., ICML 2021,
          arXiv:2012.12877. As an author of the paper states in the issues of its repository, there
          is no class token; the mean over the map takes its place.
Differs:  no code or weights of this experiment were released and the paper does not say how many
          channels a group has: 32, as in its benchmark of the operator for this very shape. Any
          image size works, and `layer_with_dcn` keeps attention in some layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Optional, Union, cast

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...errors import user_arguments
from ...ops import DCNv4
from ..checkpoint import WeightRules
from ..layers.arguments import Arguments
from ..layers.backbone import Backbone
from ..layers.vit_block import EPS, PatchEmbed, ViTLayer, resize_positions

_CHECK = Arguments('ViTDCNv4')
ARCH_SETTINGS: dict[str, dict[str, int]] = {
    't': dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768),
    's': dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
    'b': dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
}
# as mmpretrain's VisionTransformer spells them
_LONG_NAMES = {'deit-t': 't', 'deit-s': 's', 'deit-b': 'b'}
OUT_TYPES = ('featmap', 'avg_featmap')


def plain_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings the weights of mmpretrain's VisionTransformer or DeiT into the form of the model.

    The class token, its position and the attention that DCNv4 replaces are left out; positions of
    another grid are resized bicubically.

    Args:
        model: a ViTDCNv4.
        weights: by key.

    Returns:
        The weights for `model.load_state_dict`.
    """
    own = model.state_dict()
    kept = {key: value for key, value in weights.items()
            if key in own or not (key in ('cls_token', 'dist_token') or '.attn.' in key)}
    positions = kept.get('pos_embed')
    if positions is not None and positions.dim() == 3:
        extra = sum(key in weights for key in ('cls_token', 'dist_token'))
        positions = positions[:, extra:]
        side = round(positions.shape[1]**0.5)
        if positions.shape[1] == side**2 and positions.shape[1:] != own['pos_embed'].shape[1:]:
            rows, columns = cast(ViTDCNv4, model).grid
            positions = resize_positions(positions.unflatten(1, (side, side)), rows, columns)
            positions = positions.flatten(1, 2)
            print_log(f'ViTDCNv4: positions resized from {side} x {side} to {rows} x {columns}',
                      logger='current')
        kept['pos_embed'] = positions
    return kept


@MODELS.register_module()
class ViTDCNv4(Backbone):
    """Vision transformer with DCNv4, and with the other parameter names of mmpretrain's.

    All maps have the stride of the patches; n pixels become ceil(n / patch_size). For detection,
    :class:`mmdcnv4.models.layers.simple_fpn.SimpleFPN` makes a pyramid of the last map.

    Args:
        arch: 't', 's', 'b' (the sizes of DeiT; or 'deit-t' ...), or a dict with `embed_dims`,
            `num_layers`, `num_heads`, `feedforward_channels`.
        img_size: image size, or (height, width), for which positions are learned; they are
            resized for maps of other sizes.
        patch_size: side of a patch in pixels.
        layer_with_dcn: layers with DCNv4, by number; None for all. The others have attention.
        group_channels: channels per group of DCNv4; divides the width.
        kernel_size, dw_kernel_size, offset_scale, remove_center: of DCNv4; odd sizes.
        mask_init: start of its masks: 'zero' (as published, the branch starts at zero), 'center',
            'box', or a number.
        drop_path_rate: largest probability with which a sample skips a branch.
        out_type: 'featmap', or 'avg_featmap' for the means over the maps, as for classification.
        with_cp: recompute layers in the backward pass to save memory.
        in_channels: channels of the image.
        out_indices: layers whose maps are returned, in ascending order; None for the last. The map
            of the last layer is normalised, as in every ViT. Later layers are frozen.
        frozen_stages: -1 for none, 0 for patches and positions, n for the first n layers, too.
        pretrained: see :class:`mmdcnv4.models.layers.backbone.Backbone`.
        init_cfg: None, `dict(type='Pretrained', checkpoint=path or URL)`, or initialisers of
            mmengine. A file of a plain DeiT of mmpretrain is read, too: the DCNv4 layers then keep
            their start, attention and class token are left out.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    weight_rules = WeightRules(
        ignored=('head.',), optional=('DCNv4', r'\.dcn\.'),
        source='mmpretrain publishes weights of the plain DeiT, which fit but for DCNv4; of a ViT '
               'with DCNv4 none were released',
        adapt=plain_weights)

    @user_arguments()
    def __init__(self, arch: Union[str, dict] = 'b', *,
                 img_size: Union[int, Sequence[int]] = 224, patch_size: int = 16,
                 layer_with_dcn: Optional[Sequence[int]] = None, group_channels: int = 32,
                 kernel_size: int = 3, dw_kernel_size: Optional[int] = None,
                 offset_scale: float = 1.0, remove_center: bool = False,
                 mask_init: Union[float, str] = 'zero', drop_path_rate: float = 0.0,
                 out_type: str = 'featmap', with_cp: bool = False, in_channels: int = 3,
                 out_indices: Optional[Sequence[int]] = None, frozen_stages: int = -1,
                 pretrained: Optional[str] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg=init_cfg, pretrained=pretrained)
        size = _sizes(arch)
        width, layers = size['embed_dims'], size['num_layers']
        for name, value in (('patch_size', patch_size), ('group_channels', group_channels),
                            ('kernel_size', kernel_size), ('in_channels', in_channels)):
            _CHECK.positive(name, value, Integral)
        if kernel_size % 2 == 0:
            raise _CHECK.refuse('kernel_size', 'odd', kernel_size)
        if width % group_channels:
            divisors = [count for count in range(1, width + 1) if width % count == 0]
            raise _CHECK.refuse('group_channels', f'a divisor of the width {width}, one of '
                                f'{divisors}', group_channels)
        _CHECK.choice('out_type', out_type, OUT_TYPES)
        self.out_type = out_type
        self.depths = (layers,)  # as the layer-wise learning rates read it
        self.out_indices = _CHECK.out_indices(
            (layers - 1,) if out_indices is None else out_indices, layers)
        self.frozen_stages = _CHECK.frozen_stages(frozen_stages, layers)
        with_dcn = range(layers) if layer_with_dcn is None else _CHECK.integers(
            'layer_with_dcn', layer_with_dcn)
        if not set(with_dcn) <= set(range(layers)):
            raise _CHECK.refuse('layer_with_dcn', f'numbers of layers, 0 ... {layers - 1}',
                                tuple(with_dcn))
        pixels = _CHECK.integers('img_size', (img_size, img_size) if isinstance(
            img_size, Integral) else img_size)
        if len(pixels) != 2 or min(pixels) < 1:
            raise _CHECK.refuse('img_size', 'a number >= 1, or height and width', img_size)
        self.grid = (-(-pixels[0] // patch_size), -(-pixels[1] // patch_size))
        rates = _CHECK.drop_path_rates(drop_path_rate, (layers,))[0]
        dcn = dict(kernel_size=kernel_size, pad=kernel_size // 2, group=width // group_channels,
                   dw_kernel_size=dw_kernel_size, offset_scale=offset_scale,
                   remove_center=remove_center, mask_init=mask_init)

        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], width))
        self.layers = nn.ModuleList(
            ViTLayer(width, size['feedforward_channels'],
                     None if index in with_dcn else size['num_heads'], rate, dcn, with_cp)
            for index, rate in enumerate(rates))
        self.ln1 = nn.LayerNorm(width, eps=EPS)
        self._reset_parameters()
        self._freeze()

    def _reset_parameters(self) -> None:
        """Initial values: truncated normal, unit norms; DCNv4 layers reset themselves."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self._reset_core_ops()

    def _reset_core_ops(self) -> None:
        for module in self.modules():
            if isinstance(module, DCNv4):
                module.reset_parameters()

    def _frozen_modules(self) -> Sequence[nn.Module]:
        if self.frozen_stages < 0:
            return ()
        last = (self.ln1,) if self.frozen_stages == len(self.layers) else ()
        return (self.patch_embed, *self.layers[:self.frozen_stages], *last)

    def _unused_modules(self) -> Sequence[nn.Module]:
        later = tuple(self.layers[self.out_indices[-1] + 1:])
        return (*later, self.ln1) if later else ()

    def _freeze(self) -> None:
        super()._freeze()
        if self.frozen_stages >= 0:
            self.pos_embed.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter, for `LearningRateDecayOptimWrapperConstructor` of mmpretrain.

        Args:
            param_name: name of the parameter in the whole model.
            prefix: what stands in front of the backbone's names, as 'backbone.'.

        Returns:
            0 for patches and positions, then the number of the layer from 1, and the number of
            layers with these and with the last one, which is all else.
        """
        count = len(self.layers) + 2
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        parts = name.split('.')
        if parts[0] in ('patch_embed', 'pos_embed'):
            return 0, count
        return (int(parts[1]) + 1 if parts[0] == 'layers' else count - 1), count

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: images, shape (N, in_channels, H, W).

        Returns:
            One map per entry of `out_indices`, (N, C, ceil(H / patch_size),
            ceil(W / patch_size)), NCHW-contiguous, because some mmcv operators assume it; vectors
            (N, C) with `out_type='avg_featmap'`.

        Raises:
            ValueError: `x` has another shape, or no pixel.
        """
        self._check_images(x, self.patch_embed.projection.in_channels)
        x = self.patch_embed(x)  # (N, H, W, C)
        x = x + resize_positions(self.pos_embed.unflatten(1, self.grid), *x.shape[1:3])
        outs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.out_indices:
                out = self.ln1(x) if index == len(self.layers) - 1 else x
                # (N, H, W, C) -> (N, C), or (N, C, H, W)
                outs.append(out.mean((1, 2)) if self.out_type == 'avg_featmap' else
                            out.permute(0, 3, 1, 2).contiguous())
            if index == self.out_indices[-1]:
                break
        return tuple(outs)


def _sizes(arch: Union[str, dict]) -> dict[str, Any]:
    keys = tuple(ARCH_SETTINGS['b'])
    if isinstance(arch, str):
        name = _LONG_NAMES.get(arch, arch)
        _CHECK.choice('arch', name, tuple(ARCH_SETTINGS))
        arch = ARCH_SETTINGS[name]
    if not isinstance(arch, dict) or set(arch) != set(keys):
        raise _CHECK.refuse('arch', f'one of {tuple(ARCH_SETTINGS)} or a dict with {keys}', arch)
    for key, value in arch.items():
        _CHECK.positive(key, value, Integral)
    if arch['embed_dims'] % arch['num_heads']:
        raise _CHECK.refuse('num_heads', f'a divisor of embed_dims ({arch["embed_dims"]})',
                            arch['num_heads'])
    return dict(arch)
