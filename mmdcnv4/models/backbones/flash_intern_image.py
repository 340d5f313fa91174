# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""FlashInternImage and InternImage: convolutional backbones that mix positions by DCNv4 or DCNv3.

Source:   "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision
          Applications", Xiong et al., CVPR 2024, arXiv:2401.06197, section 4; the architecture
          is that of "InternImage", Wang et al., CVPR 2023, arXiv:2211.05778, section 3.2, whose
          own sizes are here too: `InternImage` has DCNv3 layers, evaluated by the DCNv4 operator.
Differs:  `arch` names the published sizes; without it `offset_scale` is 1. `layer_scale=None`
          works everywhere, `center_feature_scale` reaches the DCNv4 layers, `frozen_stages` is
          new, unknown arguments are refused, and the outputs are NCHW-contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Optional, Union

from mmengine.registry import MODELS
from torch import Tensor, nn

from ...errors import user_arguments
from ...ops import DCNv4
from ..checkpoint import FLASH_WEIGHTS
from ..layers.arguments import Arguments, is_number
from ..layers.backbone import Backbone
from ..layers.dcnv3 import ACTIVATIONS, DCNv3
from ..layers.intern_image_block import CORE_OPS, BlockOptions, DWConv, Stage, Stem

# Parameters follow the published checkpoints; B halves and L doubles the reach of the kernel.
_POST_NORM = dict(post_norm=True, layer_scale=1e-5, dw_kernel_size=3)
ARCH_SETTINGS: dict[str, dict[str, Any]] = {
    't': dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)),
    's': dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), **_POST_NORM),
    'b': dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), offset_scale=0.5,
              **_POST_NORM),
    'l': dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), offset_scale=2.0,
              dcn_output_bias=True, mlp_fc2_bias=True, **_POST_NORM),
}
# InternImage: DCNv3 predictors always have a depthwise convolution, and the last layers a bias.
_DCNV3 = dict(dw_kernel_size=3, dcn_output_bias=True, mlp_fc2_bias=True)
_DCNV3_POST_NORM = dict(_DCNV3, post_norm=True, layer_scale=1e-5)
INTERN_IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    't': dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32), **_DCNV3),
    's': dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), **_DCNV3_POST_NORM),
    'b': dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), **_DCNV3_POST_NORM),
    'l': dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), offset_scale=2.0,
              **_DCNV3_POST_NORM),
    'xl': dict(channels=192, depths=(5, 5, 24, 5), groups=(12, 24, 48, 96), offset_scale=2.0,
               **_DCNV3_POST_NORM),
    'h': dict(_DCNV3, channels=320, depths=(6, 6, 32, 6), groups=(10, 20, 40, 80),
              dw_kernel_size=5, res_post_norm=True, level2_post_norm=True,
              level2_post_norm_block_ids=(5, 11, 17, 23, 29), center_feature_scale=True),
}
# What an argument is when neither the caller nor the size table gives it.
_DEFAULTS = dict(mlp_ratio=4.0, layer_scale=None, offset_scale=1.0, post_norm=False,
                 dw_kernel_size=None, mlp_fc2_bias=False, dcn_output_bias=False,
                 level2_post_norm=False, level2_post_norm_block_ids=None, res_post_norm=False,
                 center_feature_scale=False)

@MODELS.register_module()
class FlashInternImage(Backbone):
    """FlashInternImage, with the argument names and the parameter names of its published weights.

    Feature maps have strides 4, 8, 16, 32 and widths C, 2C, 4C, 8C. Any image size works: a layer
    of stride 2 maps n pixels to ceil(n / 2).

    Args:
        arch: 't', 's', 'b' or 'l', the published sizes (`ARCH_SETTINGS`), or a dict of sizes of
            your own with their keys; all else is given by keyword. Arguments given with
            it override its table. Without it `channels`, `depths` and `groups` are needed.
        channels: width C of the first stage; even.
        depths: blocks per stage, four numbers.
        groups: DCNv4 groups per stage; each divides the width of its stage. The published sizes
            have 16 channels per group.
        mlp_ratio: hidden width of the MLP over its width.
        drop_rate: dropout after the stem and inside the MLPs.
        drop_path_rate: largest probability with which a sample skips a residual branch.
        drop_path_type: 'linear' (from 0 in the first block to `drop_path_rate` in the last one)
            or 'uniform'.
        act_layer: 'GELU', 'ReLU' or 'SiLU'.
        norm_layer: 'LN', the only one.
        layer_scale: initial value of a learned factor per channel on every branch; None for none.
            'arch' follows the size (none for T, 1e-5 for S, B and L, as for classification); the
            published detection and segmentation configs set 1.0.
        offset_scale: factor on the kernel grid and on the learned offsets of DCNv4.
        post_norm: normalise the result of a branch instead of its input. Then the feature maps
            are the unnormalised residual stream.
        dw_kernel_size: depthwise convolution before the offset predictor; None for none, 'arch'
            follows the size.
        mlp_fc2_bias, dcn_output_bias: whether the last layer of the branch has a bias.
        level2_post_norm, level2_post_norm_block_ids: one more norm after these blocks of the
            third stage.
        res_post_norm: one more norm at the end of each branch; without effect together
            with `layer_scale` or `post_norm`.
        center_feature_scale: gate between the DCNv4 output and the projected input.
        mask_init: initial value of every mask of DCNv4. 0 as published: the layers start at zero.
            With 1/9, or 'box', they start as the mean over their window, which helped a little in a
            short training from scratch (docs/convergence.md); with 'center' as the pixel itself.
            Weights that are loaded replace it.
        core_op: 'DCNv4'. For comparisons in which nothing else differs: 'DCNv3'; 'DWConv' and
            'DWConv7x7', depthwise convolutions; 'WindowAttention', attention in windows of 7x7
            pixels, shifted in every other block, with a head per group (Swin Transformer,
            arXiv:2103.14030). The options of the sampling have no effect on the last three.
        with_cp: recompute blocks in the backward pass to save memory.
        in_channels: channels of the image.
        out_indices: stages whose maps are returned, in ascending order. Stages after the
            last one are frozen.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and the first n stages: no
            gradients and no dropout there.
        pretrained: accepted because mmsegmentation passes `model.pretrained` on. A model-zoo name
            of another backbone is ignored with a warning; for weights use `init_cfg`.
        init_cfg: None, `dict(type='Pretrained', checkpoint=path or URL)` (any published layout,
            see :func:`mmdcnv4.models.checkpoint.load_pretrained`), or initialisers of mmengine.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    arch_settings = ARCH_SETTINGS

    @user_arguments()
    def __init__(self, arch: Union[str, dict, None] = None, *, channels: Optional[int] = None,
                 depths: Optional[Sequence[int]] = None, groups: Optional[Sequence[int]] = None,
                 mlp_ratio: Optional[float] = None, drop_rate: float = 0.0,
                 drop_path_rate: float = 0.2, drop_path_type: str = 'linear',
                 act_layer: str = 'GELU', norm_layer: str = 'LN',
                 layer_scale: Union[float, str, None] = 'arch',
                 offset_scale: Optional[float] = None, post_norm: Optional[bool] = None,
                 dw_kernel_size: Union[int, str, None] = 'arch',
                 mlp_fc2_bias: Optional[bool] = None, dcn_output_bias: Optional[bool] = None,
                 level2_post_norm: Optional[bool] = None,
                 level2_post_norm_block_ids: Optional[Sequence[int]] = None,
                 res_post_norm: Optional[bool] = None,
                 center_feature_scale: Optional[bool] = None,
                 mask_init: Union[float, str] = 0.0, core_op: str = 'DCNv4',
                 with_cp: bool = False, in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), frozen_stages: int = -1,
                 pretrained: Optional[str] = None,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg=init_cfg, pretrained=pretrained)
        check = Arguments(type(self).__name__)
        check.choice('core_op', core_op, CORE_OPS)
        check.choice('norm_layer', norm_layer, ('LN',))
        check.choice('act_layer', act_layer, tuple(ACTIVATIONS))
        size = _resolve_arch(check, arch, self.arch_settings, dict(
            channels=channels, depths=depths, groups=groups, mlp_ratio=mlp_ratio,
            layer_scale=layer_scale, offset_scale=offset_scale, post_norm=post_norm,
            dw_kernel_size=dw_kernel_size, mlp_fc2_bias=mlp_fc2_bias,
            dcn_output_bias=dcn_output_bias, level2_post_norm=level2_post_norm,
            level2_post_norm_block_ids=level2_post_norm_block_ids, res_post_norm=res_post_norm,
            center_feature_scale=center_feature_scale))
        if size['layer_scale'] is not None and not is_number(size['layer_scale']):
            raise check.refuse('layer_scale', "a number, None or 'arch'", size['layer_scale'])
        check.rate('drop_rate', drop_rate)
        for name, value in dict(with_cp=with_cp, **{key: size[key] for key in (
                'post_norm', 'mlp_fc2_bias', 'dcn_output_bias', 'level2_post_norm',
                'res_post_norm', 'center_feature_scale')}).items():
            check.flag(name, value)
        for name in ('mlp_ratio', 'offset_scale'):
            check.positive(name, size[name])
        check.positive('in_channels', in_channels, Integral)
        if size['dw_kernel_size'] is not None:
            check.positive('dw_kernel_size', size['dw_kernel_size'], Integral)
        channels, depths, groups = (size.pop(key) for key in ('channels', 'depths', 'groups'))
        _check_sizes(check, channels, depths, groups)
        self.channels, self.depths, self.groups = channels, tuple(depths), tuple(groups)
        self.out_indices = check.out_indices(out_indices)
        self.frozen_stages = check.frozen_stages(frozen_stages)
        post_norm_ids = _check_post_norm_ids(
            check, size.pop('level2_post_norm'), size.pop('level2_post_norm_block_ids'),
            self.depths[2])
        options = BlockOptions(core_op=core_op, drop_rate=drop_rate, act_layer=act_layer,
                               mask_init=mask_init, with_cp=with_cp, **size)
        drop_paths = check.drop_path_rates(drop_path_rate, self.depths, drop_path_type)

        self.patch_embed = Stem(in_channels, channels, act_layer)
        self.pos_drop = nn.Dropout(drop_rate)
        self.levels = nn.ModuleList(
            Stage(channels * 2**i, groups[i], drop_paths[i], options, has_downsample=i < 3,
                  post_norm_block_ids=post_norm_ids if i == 2 else ()) for i in range(4))
        self._reset_parameters()
        self._freeze()

    def _reset_parameters(self) -> None:
        """Initial values: truncated normal linears, unit norms; DCN layers reset themselves."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self._reset_core_ops()

    def _reset_core_ops(self) -> None:
        for module in self.modules():
            if isinstance(module, (DCNv4, DCNv3, DWConv)):
                module.reset_parameters()

    def _frozen_modules(self) -> Sequence[nn.Module]:
        if self.frozen_stages < 0:
            return ()
        return (self.patch_embed, self.pos_drop, *self.levels[:self.frozen_stages])

    def _unused_modules(self) -> Sequence[nn.Module]:
        last: Any = self.levels[self.out_indices[-1]]
        behind = tuple(self.levels[self.out_indices[-1] + 1:])
        return (*behind, last.downsample) if behind else ()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer of a parameter, for `LearningRateDecayOptimWrapperConstructor` of mmpretrain.

        Args:
            param_name: name of the parameter in the whole model.
            prefix: what stands in front of the backbone's names, as 'backbone.'.

        Returns:
            0 for the stem, then a layer for each block in order (a downsampling belongs to the next
            block), and the number of layers, `sum(depths) + 2`, whose last is all that is not in
            the backbone.
        """
        layers = sum(self.depths) + 2
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        parts = name.split('.')
        if parts[0] == 'patch_embed':
            return 0, layers
        if parts[0] != 'levels':
            return layers - 1, layers
        stage = int(parts[1])
        before = 1 + sum(self.depths[:stage])
        if parts[2] in ('blocks', 'post_norms'):
            return before + int(parts[3]), layers
        return before + (self.depths[stage] if stage + 1 < len(self.depths) else 0), layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: images, shape (N, in_channels, H, W).

        Returns:
            One map per entry of `out_indices`, (N, C * 2**i, ceil(H / 2**(i + 2)),
            ceil(W / 2**(i + 2))), NCHW-contiguous, because some mmcv operators
            assume it.

        Raises:
            ValueError: `x` has another shape, or no pixel.
        """
        self._check_images(x, self.patch_embed.conv1.in_channels)
        x = self.pos_drop(self.patch_embed(x))
        outs = []
        for index, level in enumerate(self.levels):
            x = level(x)
            if index in self.out_indices:
                # (N, H, W, C) -> (N, C, H, W)
                outs.append(x.permute(0, 3, 1, 2).contiguous())
            if index == self.out_indices[-1]:
                break
            downsample: Any = level.downsample
            x = downsample(x)
        return tuple(outs)


@MODELS.register_module()
class InternImage(FlashInternImage):
    """InternImage: DCNv3 in place of DCNv4, with the parameter names of its published weights.

    The masks of DCNv3 are normalised by a softmax over the taps; its predictor has a depthwise
    convolution, a norm and an activation. The DCNv4 operator evaluates it, so that no second
    kernel is needed.

    Args:
        arch: 't', 's', 'b', 'l', 'xl' or 'h' (`INTERN_IMAGE_SETTINGS`); H has more than 10**9
            parameters.
        core_op: 'DCNv3'; 'DCNv4' gives the layers of FlashInternImage in these sizes.
        options: the other arguments of :class:`FlashInternImage`, by name.
    """

    arch_settings = INTERN_IMAGE_SETTINGS
    weight_rules = FLASH_WEIGHTS._replace(
        source='The InternImage weights are published in the Hugging Face repository '
               'OpenGVLab/InternImage: put the file there')

    @user_arguments()
    def __init__(self, arch: Union[str, dict, None] = None, *, core_op: str = 'DCNv3',
                 **options: Any) -> None:
        super().__init__(arch, core_op=core_op, **options)


def _resolve_arch(check: Arguments, arch: Union[str, dict, None],
                  table: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the sizes of `arch`, overridden by the arguments that were given."""
    own: dict[str, Any] = {}
    if isinstance(arch, dict):
        if not set(arch) <= set(given):
            raise check.refuse('arch', f'a name or a dict with keys out of {tuple(given)}',
                               sorted(set(arch) - set(given)))
        own = dict(arch)
    elif arch is not None:
        if not isinstance(arch, str) or arch not in table:
            raise check.refuse('arch', f'one of {tuple(table)}, a dict or None', arch)
        own = table[arch]
    nullable = ('layer_scale', 'dw_kernel_size')  # None means none; 'arch' means not given
    explicit = {key: value for key, value in given.items()
                if (not isinstance(value, str) or value != 'arch' if key in nullable
                    else value is not None)}
    size = {**_DEFAULTS, **own, **explicit}
    missing = [key for key in ('channels', 'depths', 'groups') if key not in size]
    if missing:
        raise ValueError(f'{check.owner}: {", ".join(missing)} must be given without arch, '
                         'got None')
    return size


def _check_sizes(check: Arguments, channels: int, depths: Sequence[int],
                 groups: Sequence[int]) -> None:
    if not is_number(channels, Integral) or channels < 2 or channels % 2:
        raise ValueError(f'{check.owner}: channels must be even and >= 2, '
                         f'got {channels!r}')
    for name, values in (('depths', depths), ('groups', groups)):
        values = check.integers(name, values)
        if len(values) != 4 or min(values) < 1:
            raise ValueError(f'{check.owner}: {name} must be four numbers >= 1, '
                             f'got {values}')
    for stage, group in enumerate(groups):
        if channels * 2**stage % group:
            raise ValueError(f'{check.owner}: groups[{stage}] must divide the width of the '
                             f'stage ({channels * 2**stage}), got {group}')


def _check_post_norm_ids(check: Arguments, enabled: bool, ids: Optional[Sequence[int]],
                         depth: int) -> tuple[int, ...]:
    if not enabled:
        return ()
    ids = check.integers('level2_post_norm_block_ids', () if ids is None else ids)
    if not ids or len(set(ids)) != len(ids) or not set(ids) <= set(range(depth)):
        raise ValueError(f'{check.owner}: level2_post_norm_block_ids must be different blocks '
                         f'of the third stage (0 ... {depth - 1}), got {ids}')
    return ids
