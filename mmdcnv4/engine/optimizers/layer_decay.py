# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Optimiser constructor with a learning rate that falls from the head to the stem.

Source:   the layer-wise decay of "BEiT", Bao et al., ICLR 2022, arXiv:2106.08254, with the rules
          of the FlashInternImage recipes (arXiv:2401.06197, appendix) for which parameter belongs
          to which layer.
Differs:  the backbone may have any name and any wrapper; depths are read from the model; wrong
          settings are errors; `head_embed_decay` switches off a rule that looks unintended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ...errors import InvalidValue

_DEFAULTS: dict[str, Any] = dict(
    num_layers=None, layer_decay_rate=1.0, depths=None, offset_lr_scale=1.0, custom_keys=None,
    backbone_small_lr=False, dino_head=False, head_embed_decay=True)
_WRAPPERS = ('module', '_orig_mod')  # of DistributedDataParallel and torch.compile
_HEAD_EMBEDDINGS = tuple(f'decode_head.{name}' for name in (
    'mask_embed', 'cls_embed', 'level_embed', 'query_embed', 'query_feat'))
_NO_DECAY = ('relative_position', 'norm', 'sampling_offsets', 'pos_embed')
_REFERENCE = ('sampling_offsets', 'reference_points')


@dataclass(frozen=True)
class GroupKey:
    """What the parameters of one optimiser group share; no layer where all learn alike."""

    layer: Optional[int]
    has_decay: bool
    is_offset: bool
    is_dino_reference: bool
    custom_key: Optional[str]

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f'layer_{self.layer}']
        parts += ['decay' if self.has_decay else 'no_decay']
        parts += ['offset'] if self.is_offset else []
        parts += ['dino_reference'] if self.is_dino_reference else []
        return '_'.join(parts + ([self.custom_key] if self.custom_key else []))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class CustomLayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Groups parameters by layer; the rate is `lr * layer_decay_rate ** (num_layers + 1 - layer)`.

    Layer 0 is the stem, layer 1 + j the j-th block of the backbone in network order, layer
    `num_layers + 1` everything behind it. A stage's norm and downsample layer count as the first
    block of the next stage (for the last stage: as its own first block). Norms, biases and other
    one-dimensional parameters have no weight decay; this holds at a rate of 1.0 too.

    In a model with a `decode_head` the rules are those of the segmentation recipes, else those of
    the detection recipes; they differ in what counts as an offset predictor.

    Args:
        optim_wrapper_cfg: of mmengine, with `optimizer` holding `lr` and `weight_decay`.
        paramwise_cfg: any of

            - layer_decay_rate (float, 1.0): factor from one layer to the one before it.
            - num_layers (int): must be the sum of the depths; that sum by default.
            - depths (sequence): blocks per stage; read from the backbone by default.
            - offset_lr_scale (float, 1.0): factor for predictors of offsets.
            - custom_keys (dict): `{part of a name: dict(lr_mult=...)}`, the longest match counts.
            - backbone_small_lr (bool, False): a further 0.1 for all layers slowed by the decay.
            - dino_head (bool, False): a further 0.1 for `sampling_offsets` and
              `reference_points` outside the backbone.
            - head_embed_decay (bool, True): as in the released recipes, the level embedding, and
              the query and class embeddings of a segmentation head, belong to layer 0 and so are
              nearly frozen at a low `layer_decay_rate`. False puts them with the head.

    Raises:
        ValueError: an unknown or contradictory setting; the message names it.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None) -> None:
        given = {} if paramwise_cfg is None else dict(paramwise_cfg)
        unknown = sorted(set(given) - set(_DEFAULTS))
        if unknown:
            raise InvalidValue(f'layer decay: paramwise_cfg must have keys among '
                               f'{sorted(_DEFAULTS)}, got {unknown}')
        super().__init__(optim_wrapper_cfg, {**_DEFAULTS, **given})
        if self.base_lr is None:
            raise InvalidValue('layer decay: optim_wrapper.optimizer must set lr, got '
                               f'{self.optimizer_cfg}')

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        if not 0 < cfg['layer_decay_rate'] <= 1:
            raise InvalidValue('layer decay: layer_decay_rate must be in (0, 1], '
                               f'got {cfg["layer_decay_rate"]}')
        for key, options in (cfg['custom_keys'] or {}).items():
            if set(options) != {'lr_mult'}:
                raise InvalidValue(f'layer decay: custom_keys[{key!r}] must be dict(lr_mult=...), '
                                   f'got {options}')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: Optional[int] = None) -> None:
        """Appends the parameter groups of `module` to `params`.

        Args:
            params: groups, in the form that torch optimisers take.
            module: the whole model.
            prefix, is_dcn_module: of the base class, unused.
        """
        depths = self._resolve_depths(module)
        is_segmentor = any(_strip(name).startswith('decode_head.')
                           for name, _ in module.named_parameters())
        groups: dict[GroupKey, dict] = {}
        has_backbone = False
        for name, parameter in module.named_parameters():
            key = self._group_key(_strip(name), parameter.dim(), depths, is_segmentor)
            has_backbone |= layer_id(_strip(name), depths, False) <= sum(depths)
            if not parameter.requires_grad:
                continue
            group = groups.setdefault(key, self._new_group(key, sum(depths)))
            group['params'].append(parameter)
            group['param_names'].append(name)
        if not has_backbone:
            raise InvalidValue('layer decay: the model must have parameters named '
                               '...backbone.patch_embed..., ...backbone.levels... or '
                               '...backbone.layers..., got none')
        params.extend(groups.values())
        print_log(f'layer decay: {sum(len(group["params"]) for group in params)} parameters in '
                  f'{len(params)} groups, lr {min(group["lr"] for group in params):.3g} to '
                  f'{max(group["lr"] for group in params):.3g}', logger='current')

    def _resolve_depths(self, model: nn.Module) -> tuple[int, ...]:
        found = set(_backbone_depths(model))
        given = self.paramwise_cfg['depths']
        if given is not None and found and tuple(given) not in found:
            raise InvalidValue(f'layer decay: depths must be those of the backbone '
                               f'{sorted(found)}, got {tuple(given)}')
        if given is None and len(found) != 1:
            raise InvalidValue('layer decay: depths must be given where the model has not one '
                               f'backbone with depths, found {sorted(found)}')
        depths = tuple(given) if given is not None else found.pop()
        num_layers = self.paramwise_cfg['num_layers']
        if num_layers is not None and num_layers != sum(depths):
            raise InvalidValue(f'layer decay: num_layers must be the sum of depths {depths}, '
                               f'{sum(depths)}, got {num_layers}')
        return depths

    def _group_key(self, name: str, dim: int, depths: Sequence[int],
                   is_segmentor: bool) -> GroupKey:
        layer = (layer_id(name, depths, self.paramwise_cfg['head_embed_decay'])
                 if self.paramwise_cfg['layer_decay_rate'] < 1 else None)
        is_reference = any(part in name for part in _REFERENCE)
        in_backbone = _in_backbone(name) is not None
        is_offset = ('offset_mask' in name and 'offset_mask_dw' not in name
                     or is_reference and (in_backbone or not is_segmentor)
                     or name.endswith('offset') and not is_segmentor)
        has_decay = not (dim == 1 or name.endswith('.bias')
                         or any(part in name for part in _NO_DECAY))
        custom_keys = self.paramwise_cfg['custom_keys'] or {}
        # mmengine's order: the longest key first, then by alphabet
        matches = [key for key in sorted(sorted(custom_keys), key=len, reverse=True)
                   if key in name]
        return GroupKey(layer, has_decay, is_offset and self.paramwise_cfg['offset_lr_scale'] != 1,
                        self.paramwise_cfg['dino_head'] and is_reference and not in_backbone,
                        matches[0] if matches else None)

    def _new_group(self, key: GroupKey, num_layers: int) -> dict:
        cfg = self.paramwise_cfg
        scale = (1.0 if key.layer is None
                 else cfg['layer_decay_rate']**(num_layers + 1 - key.layer))
        if cfg['backbone_small_lr'] and scale < 1:
            scale *= 0.1
        if key.is_offset:
            scale *= cfg['offset_lr_scale']
        if key.is_dino_reference:
            scale *= 0.1
        if key.custom_key is not None:
            scale *= cfg['custom_keys'][key.custom_key]['lr_mult']
        group = dict(params=[], param_names=[], group_name=str(key), lr_scale=scale,
                     lr=self.base_lr * scale)
        if not key.has_decay:
            group['weight_decay'] = 0.0
        elif self.base_wd is not None:
            group['weight_decay'] = self.base_wd
        return group


def _strip(name: str) -> str:
    """Parameter name without the parts that wrappers add."""
    return '.'.join(part for part in name.split('.') if part not in _WRAPPERS)


def _in_backbone(name: str) -> Optional[str]:
    """Name below `backbone.`, `img_backbone.` and the like; None elsewhere."""
    parts = name.split('.')
    for index, part in enumerate(parts[:-1]):
        if part.endswith('backbone'):
            return '.'.join(parts[index + 1:])
    return None


def _backbone_depths(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for name, module in model.named_modules():
        depths: Any = getattr(module, 'depths', None)
        if depths is not None and _strip(name).split('.')[-1].endswith('backbone'):
            yield tuple(depths)


def layer_id(name: str, depths: Sequence[int], head_embed_decay: bool = True) -> int:
    """Layer of a parameter: 0 for the stem ... `sum(depths) + 1` for all behind the backbone.

    Args:
        name: of the parameter, without wrappers.
        depths: blocks per stage.
        head_embed_decay: whether embeddings of the head belong to layer 0.
    """
    inner = _in_backbone(name)
    if inner is None:
        is_embedding = 'level_embed' in name or name.startswith(_HEAD_EMBEDDINGS)
        return 0 if is_embedding and head_embed_decay else sum(depths) + 1
    parts = inner.split('.')
    if parts[0] in ('patch_embed', 'pos_embed'):
        return 0
    if parts[0] == 'layers':  # of a transformer without stages
        return 1 + int(parts[1])
    if parts[0] != 'levels':
        return sum(depths) + 1
    stage, kind = int(parts[1]), parts[2]
    before = 1 + sum(depths[:stage])
    # the index of a post-norm counts as that of a block, as in the released recipes
    if kind in ('blocks', 'post_norms'):
        return before + int(parts[3])
    return before + depths[stage] if stage + 1 < len(depths) else before
