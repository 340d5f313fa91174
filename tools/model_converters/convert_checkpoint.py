# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Renames the parameters of a published file, where it does not load as it is.

python tools/model_converters/convert_checkpoint.py KIND SOURCE TARGET [--config CONFIG]

KIND is one of
  whole-model  a detector or segmentor of mmdet 2 / mmseg 0.x: DINO and Mask2Former are renamed;
               Mask R-CNN, Cascade R-CNN and UperNet keep their names, and lose what is no weight.
  classifier   a published ImageNet classifier of FlashInternImage, InternImage or DAT, for
               mmpretrain.
  classifier-22kto1k
               the same of ImageNet-22K, with the rows of its head that ImageNet-1K has: what the
               fine-tuning at 384 x 384 starts from. Which rows they are must be given:
               --rows FILE, one number per class, from 0 (the released programs have such a file);
               or --classes FILE_22K FILE_1K, one WordNet id per line, in the order of the head and
               of the new one. timm has both: timm/data/_info/imagenet22k_synsets.txt and
               imagenet_synsets.txt; n04399382, which the former lacks, starts at the mean.
  flash-init   an InternImage (DCNv3) file as an initialisation of FlashInternImage (DCNv4). The
               function changes: the result must be trained again.

With --config the result must fit that config's model, name by name and shape by shape. Backbones
need none of this: `init_cfg=dict(type='Pretrained', checkpoint=...)` reads the published files.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from mmdcnv4.checks.config import default_scope
from mmdcnv4.models.backbones.flash_intern_image import ARCH_SETTINGS, FlashInternImage
from mmdcnv4.models.checkpoint import find_state_dict, read_file

StateDict = dict[str, Tensor]

# (pattern, replacement) for whole models; the first that matches counts
_ENCODER = r'encoder\.layers\.(\d+)'
_DECODER = r'decoder\.layers\.(\d+)'
_DINO = (
    (r'bbox_head\.transformer\.level_embeds$', r'level_embed'),
    (r'bbox_head\.transformer\.enc_output\.', r'memory_trans_fc.'),
    (r'bbox_head\.transformer\.enc_output_norm\.', r'memory_trans_norm.'),
    (r'bbox_head\.transformer\.query_embed\.', r'query_embedding.'),
    (r'bbox_head\.label_embedding\.', r'dn_query_generator.label_embedding.'),
    (rf'bbox_head\.transformer\.{_ENCODER}\.attentions\.0\.', r'encoder.layers.\1.self_attn.'),
    (rf'bbox_head\.transformer\.{_DECODER}\.attentions\.0\.', r'decoder.layers.\1.self_attn.'),
    (rf'bbox_head\.transformer\.{_DECODER}\.attentions\.1\.', r'decoder.layers.\1.cross_attn.'),
    (r'bbox_head\.transformer\.(en|de)coder\.layers\.(\d+)\.ffns\.0\.', r'\1coder.layers.\2.ffn.'),
    (r'bbox_head\.transformer\.decoder\.ref_point_head\.0\.', r'decoder.ref_point_head.layers.0.'),
    (r'bbox_head\.transformer\.decoder\.ref_point_head\.2\.', r'decoder.ref_point_head.layers.1.'),
    (r'bbox_head\.transformer\.(en|de)coder\.', r'\1coder.'),
)
_MASK2FORMER = (
    (rf'(decode_head\.pixel_decoder\.{_ENCODER})\.attentions\.0\.', r'\1.self_attn.'),
    (rf'(decode_head\.pixel_decoder\.{_ENCODER})\.ffns\.0\.', r'\1.ffn.'),
    # cross-attention comes first in this decoder
    (r'(decode_head\.transformer_decoder\.layers\.\d+)\.attentions\.0\.', r'\1.cross_attn.'),
    (r'(decode_head\.transformer_decoder\.layers\.\d+)\.attentions\.1\.', r'\1.self_attn.'),
    (r'(decode_head\.transformer_decoder\.layers\.\d+)\.ffns\.0\.', r'\1.ffn.'),
)
_NO_TARGET = ('dcn.dw_conv.1.1.weight', 'dcn.dw_conv.1.1.bias')  # the norm of DCNv3's predictor


def _rename(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn('^' + pattern, replacement, key)
        if count:
            return renamed
    return key


def convert_whole_model(weights: Mapping[str, Tensor]) -> StateDict:
    """Names of mmdet 3 and mmseg 1 for a detector or segmentor of mmdet 2 or mmseg 0.x.

    The running averages that old hooks kept beside the weights (`ema_...`) are left out: such
    files hold the averaged weights under the plain names.
    """
    return {_rename(key, _DINO + _MASK2FORMER): value for key, value in weights.items()
            if not key.startswith('ema_')}


_CLASSIFIER = ((r'conv_head\.', 'neck.conv_head.'), (r'head\.', 'head.fc.'),
               (r'(patch_embed|levels)\.', r'backbone.\1.'))
_DAT_CLASSIFIER = ((r'cls_norm\.', 'backbone.norms.3.'), (r'cls_head\.', 'head.fc.'),
                   (r'(patch_proj|stages|down_projs)\.', r'backbone.\1.'))
_DAT_DERIVED = ('relative_position_index', 'attn_mask')  # buffers; made by the model


def convert_classifier(weights: Mapping[str, Tensor]) -> StateDict:
    """Names of mmpretrain's `ImageClassifier`, with the neck `ConvHeadNeck` but for DAT."""
    is_dat = any(key.startswith('patch_proj.') for key in weights)
    return {_rename(key, _DAT_CLASSIFIER if is_dat else _CLASSIFIER): value
            for key, value in weights.items() if not key.endswith(_DAT_DERIVED)}


def select_rows(weights: StateDict, rows: Sequence[Optional[int]]) -> StateDict:
    """The classifier with other classes: row `rows[i]` of its head becomes row i.

    None, a class that the head does not have, starts at the mean of the rows that are taken.

    Raises:
        ValueError: a row that the head does not have.
    """
    known = [row for row in rows if row is not None]
    count = weights['head.fc.weight'].shape[0]
    if not known or min(known) < 0 or max(known) >= count:
        raise ValueError(f'classifier-22kto1k: rows must be 0 to {count - 1}, the rows of the head '
                         f'in SOURCE, got {min(known, default=None)} to {max(known, default=None)}')
    result = dict(weights)
    for key in ('head.fc.weight', 'head.fc.bias'):
        mean = weights[key][known].mean(0)
        result[key] = torch.stack([mean if row is None else weights[key][row] for row in rows])
    return result


def read_rows(file: str) -> list[Optional[int]]:
    """Row numbers, one per line.

    Raises:
        ValueError: a line is not a number.
    """
    lines = Path(file).read_text().split()
    wrong = [line for line in lines if not line.isdecimal()]
    if wrong or not lines:
        raise ValueError(f'--rows {file}: must hold one number per line, got {wrong[:3]}')
    return [int(line) for line in lines]


def match_classes(old_file: str, new_file: str, rows: int) -> list[Optional[int]]:
    """Where each class of `new_file` is in `old_file`; None where it is not.

    Args:
        old_file, new_file: WordNet ids, one per line.
        rows: of the head; as many as `old_file` has lines.

    Raises:
        ValueError: another number of lines, or more than one class in a hundred is missing.
    """
    old, new = (Path(file).read_text().split() for file in (old_file, new_file))
    if len(old) != rows:
        raise ValueError(f'--classes {old_file}: must have a line for each of the {rows} rows of '
                         f'the head in SOURCE, got {len(old)}')
    position = {name: row for row, name in enumerate(old)}
    missing = [name for name in new if name not in position]
    if len(missing) * 100 > len(new) or not new:
        raise ValueError(f'--classes {new_file}: must hold classes of {old_file}, '
                         f'{len(missing)} of {len(new)} are not in it: {missing[:3]}')
    if missing:
        print(f'WARNING: {", ".join(missing)} not in {old_file}: starts at the mean of the others')
    return [position.get(name) for name in new]


def pack_offset_mask(offset: Tensor, mask: Tensor, group: int, rows: int) -> Tensor:
    """Rows of DCNv3's two predictors in the order of DCNv4's one.

    Args:
        offset: weight or bias, shape (2KG, ...).
        mask: weight or bias, shape (KG, ...).
        group: number of groups G.
        rows: P; the rows behind 3KG are zero.
    """
    packed = torch.cat([offset.unflatten(0, (group, -1)), mask.unflatten(0, (group, -1))], 1)
    padded = offset.new_zeros(rows, *offset.shape[1:])
    padded[:3 * mask.shape[0]] = packed.flatten(0, 1)
    return padded


def convert_to_flash(weights: Mapping[str, Tensor], arch: str) -> tuple[StateDict, list[str]]:
    """FlashInternImage weights that start from InternImage's.

    Args:
        weights: of an InternImage backbone or classifier.
        arch: size of both, a key of `ARCH_SETTINGS`.

    Returns:
        The weights of the backbone, and the names that have no place in it.

    Raises:
        ValueError: a tensor of the target has no source, or another shape.
    """
    with torch.device('meta'):
        own = FlashInternImage(arch).state_dict()
    groups = ARCH_SETTINGS[arch]['groups']
    result, used = {}, set()
    for key, expected in own.items():
        match = re.match(r'(levels\.(\d)\.blocks\.\d+\.dcn)\.offset_mask\.(weight|bias)$', key)
        if match:
            names = [f'{match[1]}.{part}.{match[3]}' for part in ('offset', 'mask')]
        else:
            names = [key.replace('.value_proj.', '.input_proj.')
                     .replace('.offset_mask_dw.', '.dw_conv.0.')]
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f'flash-init: SOURCE must be an InternImage {arch!r}, which has '
                             f'{missing[0]}; got none')
        tensors = [weights[name] for name in names]
        value = pack_offset_mask(*tensors, groups[int(match[2])], len(expected)) if match \
            else tensors[0]
        if value.shape != expected.shape:
            raise ValueError(f'flash-init: {key} must have shape {tuple(expected.shape)} for '
                             f'arch={arch!r}, got {tuple(value.shape)}')
        result[key] = value
        used.update(names)
    return result, sorted(set(weights) - used)


def check_fit(weights: Mapping[str, Tensor], config: str) -> str:
    """Compares names and shapes with the model of a config.

    Raises:
        ValueError: says what is missing, left over, or of another shape.
    """
    cfg = Config.fromfile(config)
    scope = default_scope(cfg)
    importlib.import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
        own = MODELS.build(cfg.model).state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    mismatched = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or mismatched:
        raise ValueError(
            f'the result must fit {config}: {len(missing)} missing {missing[:8]}, '
            f'{len(unexpected)} unexpected {unexpected[:8]}, {len(mismatched)} of another shape '
            f'{mismatched[:8]}')
    return f'{len(own)} of {len(own)} tensors fit {config}'


# beginnings of keys; a source must have all of one of the lists
_INTERN_IMAGE = ('patch_embed.', 'conv_head.', 'head.')
_DAT = ('patch_proj.', 'cls_norm.', 'cls_head.')
_NEEDED = {'classifier': (_INTERN_IMAGE, _DAT), 'classifier-22kto1k': (_INTERN_IMAGE, _DAT),
           'whole-model': (('backbone.',),)}


_CLASSIFIERS = ('classifier', 'classifier-22kto1k')


def check_source(weights: Mapping[str, Tensor], kind: str) -> None:
    """Refuses files of another kind.

    Raises:
        ValueError: names what is missing.
    """
    lacks = [[start for start in starts if not any(key.startswith(start) for key in weights)]
             for starts in _NEEDED.get(kind, ())]
    if lacks and all(lacks):
        missing = min(lacks, key=len)
        raise ValueError(f'{kind}: SOURCE must have keys that begin with {", ".join(missing)}, got '
                         f'{sorted({key.split(".")[0] for key in weights})[:8]}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', choices=('whole-model', *_CLASSIFIERS, 'flash-init'))
    parser.add_argument('source', help='published .pth or .safetensors file, or its URL')
    parser.add_argument('target', help='.pth file to write')
    parser.add_argument('--config', help='config that the result must fit')
    parser.add_argument('--arch', choices=tuple(ARCH_SETTINGS),
                        help='size of the model, for flash-init')
    parser.add_argument('--rows', metavar='FILE', help='for classifier-22kto1k')
    parser.add_argument('--classes', nargs=2, metavar=('FILE_22K', 'FILE_1K'),
                        help='for classifier-22kto1k')
    args = parser.parse_args(argv)
    if (args.kind == 'classifier-22kto1k') != ((args.rows is None) != (args.classes is None)):
        parser.error('classifier-22kto1k needs --rows or --classes; other kinds take neither')
    if (args.kind == 'flash-init') != (args.arch is not None):
        parser.error('--arch belongs to flash-init')
    if args.kind == 'flash-init' and args.config:
        parser.error('--config is for whole models')
    if Path(args.target).is_dir():
        parser.error(f'the target must be a file, got the folder {args.target}')
    if not Path(args.target).absolute().parent.is_dir():
        parser.error(f'the folder of the target {args.target} does not exist')
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads weights only, renames, checks, writes."""
    args = parse_args(argv)
    try:
        weights = {re.sub(r'^(module\.)+', '', key): value for key, value in
                   find_state_dict(read_file(args.source), args.source).items()}
        check_source(weights, args.kind)
        if args.kind == 'flash-init':
            result, left = convert_to_flash(weights, args.arch)
            head = [key for key in left if not key.startswith('levels.')]
            norms = [key for key in left if key.endswith(_NO_TARGET)]
            others = len(left) - len(head) - len(norms)
            print(f'left out: {len(norms)} tensors of the predictors\' norms, {others} others of '
                  f'the blocks, {len(head)} of the classifier.\nWARNING: this is an '
                  'initialisation. DCNv4 has no norm, activation or softmax here, so the function '
                  'of the network has changed and it must be trained again.')
            if args.arch == 'b':
                print('WARNING: InternImage-B samples with offset_scale 1.0, FlashInternImage-B '
                      'with 0.5; pass offset_scale=1.0 to keep the reach of the offsets.')
        elif args.kind in _CLASSIFIERS:
            result = convert_classifier(weights)
            if args.kind != 'classifier':
                rows = (read_rows(args.rows) if args.rows else
                        match_classes(*args.classes, rows=result['head.fc.weight'].shape[0]))
                result = select_rows(result, rows)
        else:
            result = convert_whole_model(weights)
        if args.config:
            print(check_fit(result, args.config))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f'error: {error}') from error
    torch.save(dict(state_dict=result, meta=dict(source=args.source)), args.target)
    renamed = len(set(result) - set(weights))
    print(f'{args.target}: {len(result)} tensors, {renamed} of them under a new name')


if __name__ == '__main__':
    main()
