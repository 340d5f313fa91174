# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of the released BEVFormer v2 (mmdetection3d 0.17) for this package.

python tools/model_converters/bevformer_v2.py bevformerv2-r50-t2-24ep.pth converted.pth

Names change, and so do the box branches: mmdetection3d 1.x swaps length and width, and counts yaw
counter-clockwise from x where 0.x counted clockwise from -y (yaw_new = -yaw_old - pi/2).
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from mmdcnv4.models.checkpoint import find_state_dict, read_file

HEAD = r'pts_bbox_head\.'
MONO = r'fcos3d_bbox_head\.'
TRANSFORMER = HEAD + r'transformer\.'
# patterns of old names and what they become, the first match counts; None: left out
RULES: tuple[tuple[str, Optional[str]], ...] = (
    (r'img_(backbone|neck)\.', r'img_\1.'),
    (HEAD + r'(bev_embedding|positional_encoding)\.', r'bev_encoder.\1.'),
    (TRANSFORMER + r'level_embeds$', 'bev_encoder.level_embed'),
    (TRANSFORMER + r'cams_embeds$', 'bev_encoder.cam_embed'),
    (TRANSFORMER + r'encoder\.layers\.(\d+)\.attentions\.0\.', r'bev_encoder.layers.\1.self_attn.'),
    (TRANSFORMER + r'encoder\.layers\.(\d+)\.attentions\.1\.deformable_attention\.',
     r'bev_encoder.layers.\1.cross_attn.deform.'),
    (TRANSFORMER + r'encoder\.layers\.(\d+)\.attentions\.1\.',
     r'bev_encoder.layers.\1.cross_attn.'),
    (TRANSFORMER + r'encoder\.layers\.(\d+)\.ffns\.0\.', r'bev_encoder.layers.\1.ffn.'),
    (TRANSFORMER + r'encoder\.layers\.(\d+)\.norms\.', r'bev_encoder.layers.\1.norms.'),
    (TRANSFORMER + r'fusion\.layers\.(\d+)\.downsample\.(?:0|conv)\.',
     r'temporal_fusion.blocks.\1.downsample.0.'),
    (TRANSFORMER + r'fusion\.layers\.(\d+)\.downsample\.(?:1|bn)\.',
     r'temporal_fusion.blocks.\1.downsample.1.'),
    (TRANSFORMER + r'fusion\.layers\.', 'temporal_fusion.blocks.'),
    (TRANSFORMER + r'fusion\.layer_norm\.0\.', 'temporal_fusion.proj.'),
    (TRANSFORMER + r'fusion\.layer_norm\.1\.', 'temporal_fusion.norm.'),
    (TRANSFORMER + r'decoder\.layers\.(\d+)\.attentions\.0\.', r'bev_head.layers.\1.self_attn.'),
    (TRANSFORMER + r'decoder\.layers\.(\d+)\.attentions\.1\.', r'bev_head.layers.\1.cross_attn.'),
    (TRANSFORMER + r'decoder\.layers\.(\d+)\.ffns\.0\.', r'bev_head.layers.\1.ffn.'),
    (TRANSFORMER + r'decoder\.layers\.(\d+)\.norms\.', r'bev_head.layers.\1.norms.'),
    (TRANSFORMER + r'reference_points\.', 'bev_head.reference.'),
    (HEAD + r'(query_embedding|cls_branches|reg_branches)\.', r'bev_head.\1.'),
    (HEAD + r'code_weights$', None),
    (MONO + r'fcos[23]d_head\.(cls|box2d|box3d)_tower\.(\d+)\.norm\.(\d+)\.',
     r'perspective_head.towers.\1.norms.\2.\3.'),
    (MONO + r'fcos[23]d_head\.(cls|box2d|box3d)_tower\.(\d+)\.',
     r'perspective_head.towers.\1.convs.\2.'),
    (MONO + r'fcos2d_head\.cls_logits\.', 'perspective_head.predictors.cls.'),
    (MONO + r'fcos2d_head\.box2d_reg\.', 'perspective_head.predictors.box2d.'),
    (MONO + r'fcos2d_head\.centerness\.', 'perspective_head.predictors.centerness.'),
    (MONO + r'fcos2d_head\.scales_box2d_reg\.', 'perspective_head.scales.box2d.'),
    (MONO + r'fcos3d_head\.box3d_ctr\.0\.', 'perspective_head.predictors.proj_ctr.'),
    (MONO + r'fcos3d_head\.box3d_conf\.0\.', 'perspective_head.predictors.conf3d.'),
    (MONO + r'fcos3d_head\.box3d_(quat|depth|size)\.0\.', r'perspective_head.predictors.\1.'),
    (MONO + r'fcos3d_head\.scales_conf\.', 'perspective_head.scales.conf3d.'),
    (MONO + r'fcos3d_head\.scales_(proj_ctr|size|depth)\.', r'perspective_head.scales.\1.'),
    # gathered into one tensor
    (MONO + r'fcos3d_head\.offsets_depth\.(\d+)\.bias$', r'perspective_head.depth_offsets.\1'),
    (MONO + r'attr_logits\.', 'perspective_head.predictors.attr.'),
    (MONO + r'speed\.', 'perspective_head.predictors.speed.'),
    # tables that the settings of the head hold here
    (MONO + r'.*(?:per_level|canon_box_sizes|pixels_per_level)$', None),
)
REG_OUTPUT = re.compile(r'bev_head\.reg_branches\.\d+\.4\.(weight|bias)$')


def rename(name: str) -> Optional[str]:
    """The new name, None for what is left out.

    Raises:
        ValueError: no rule knows the name.
    """
    for pattern, replacement in RULES:
        if re.match(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name, count=1)
    raise ValueError(f'bevformer_v2: the checkpoint must have the layout of the released '
                     f'BEVFormer v2, got the unknown name {name!r}')


def turn_boxes(rows: Tensor) -> Tensor:
    """Rows of a box branch (10, ...) in the box convention of mmdetection3d 1.x."""
    rows = rows[[0, 1, 3, 2, 4, 5, 7, 6, 8, 9]].clone()  # width, length; sin, cos
    rows[6:8] *= -1
    return rows


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under new names, with box branches in the new convention.

    Raises:
        ValueError: a name is unknown, or two names become one.
    """
    converted: dict[str, Tensor] = {}
    for old, tensor in state_dict.items():
        name = rename(old)
        if name is None:
            continue
        if name in converted:
            raise ValueError(f'bevformer_v2: two tensors become {name!r}, the second is {old!r}')
        if REG_OUTPUT.match(name):
            tensor = turn_boxes(tensor)
        if name.startswith('perspective_head.scales.'):
            tensor = tensor.reshape(())
        converted[name] = tensor
    prefix = 'perspective_head.depth_offsets.'
    levels = sorted((name for name in converted if name.startswith(prefix)),
                    key=lambda name: int(name[len(prefix):]))
    if levels:
        converted[prefix[:-1]] = torch.cat([converted.pop(name).reshape(1) for name in levels])
    return converted


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads one file, weights only, and writes another."""
    parser = argparse.ArgumentParser(description='Convert a released BEVFormer v2 checkpoint.')
    parser.add_argument('source', help='released checkpoint')
    parser.add_argument('target', help='file to write')
    args = parser.parse_args(argv)
    if Path(args.target).is_dir():
        parser.error(f'the target must be a file, got the folder {args.target}')
    if not Path(args.target).absolute().parent.is_dir():
        parser.error(f'the folder of the target {args.target} does not exist')
    try:
        weights = find_state_dict(read_file(args.source), args.source)
        converted = convert({re.sub(r'^(module\.)+', '', key): value
                             for key, value in weights.items()})
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f'error: {error}') from error
    torch.save(dict(state_dict=converted), args.target)
    print(f'{len(converted)} tensors are in {args.target}')


if __name__ == '__main__':
    main()
