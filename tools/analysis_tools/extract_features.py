# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the feature maps of a backbone for images, as the test pipeline of a config prepares them.

python tools/analysis_tools/extract_features.py images/ CONFIG CHECKPOINT --out features [--pool]

One file IMAGE.npz per image. Without --pool it holds one array per stage of `out_indices`,
`stage_0` and so on, of shape (C, H, W); with --pool one vector `mean` of the last map, (C,).
CHECKPOINT is that of the whole model, or 'none' for what the config's `init_cfg` names.

In a program of your own: `model.backbone(images)` returns the maps of a batch (N, 3, H, W) that the
model's data preprocessor has normalised.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import load_checkpoint

from mmdcnv4.checks.checkpoints import check_checkpoint
from mmdcnv4.checks.samples import check_image
from mmdcnv4.checks.weights import check_match
from mmdcnv4.cli import analysis, arguments, checkpoints, config, preflight
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def make_pipeline(cfg: Config) -> Compose:
    """The test pipeline without its annotations; a function of dict(img_path=...)."""
    steps = [step for step in config.innermost(cfg.test_dataloader.dataset).pipeline
             if not str(step.type).split('.')[-1].startswith('LoadAnno')]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return Compose([TRANSFORMS.build(step) for step in steps])


def load_model(cfg: Config, checkpoint: Optional[str], device: str) -> Any:
    """The model of a config with the weights of a checkpoint, or with those of its `init_cfg`."""
    init_cfg = cfg.model.backbone.get('init_cfg')
    model: Any = analysis.build_model(cfg)
    if checkpoint is None:
        model.backbone.init_cfg = init_cfg
        model.backbone.init_weights()
    else:
        shapes = preflight.read_shapes(checkpoint)
        checkpoints.allow_mmengine_checkpoints()
        load_checkpoint(model, checkpoint, map_location='cpu')
        check_match(model, shapes, checkpoint, cfg)
    return model.to(device).eval()


@torch.no_grad()
def extract(model: Any, pipeline: Compose, scope: str, file: Path) -> list[np.ndarray]:
    """The maps of one image, each (C, H, W), in ascending order of the stages."""
    try:
        with DefaultScope.overwrite_default_scope(scope):
            sample = pipeline(dict(img_path=str(file), img_id=0, reduce_zero_label=False,
                                   seg_fields=[]))
    except Exception:
        check_image(str(file))
        raise
    batch = model.data_preprocessor(pseudo_collate([sample]), False)
    return [features[0].float().cpu().numpy() for features in model.backbone(batch['inputs'])]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write the feature maps of a backbone.')
    parser.add_argument('images', help='image file, or folder of images')
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('checkpoint', help="checkpoint file of the model, or 'none'")
    parser.add_argument('--out', default='features', help='folder for the files')
    parser.add_argument('--pool', action='store_true', help='one vector, the mean of the last map')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu',
                        help='cpu, cuda:0, ...')
    arguments.add_config_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Extracts from every image."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        path = Path(args.images)
        files = [path] if path.is_file() else sorted(
            file for file in path.glob('*') if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f'{path} is neither an image nor a folder with images '
                            f'({", ".join(SUFFIXES)}).')
        cfg = config.read_config(args.config, args.cfg_options)
        checkpoint = None if args.checkpoint == 'none' else args.checkpoint
        check_checkpoint(checkpoint, 'checkpoint')
        preflight.check_device(args.device)
        preflight.check_folder(args.out, '--out')
        model = load_model(cfg, checkpoint, args.device)
        importlib.import_module(f'{cfg.default_scope}.datasets')  # registers the transforms
        pipeline = make_pipeline(cfg)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for file in files:
            maps = extract(model, pipeline, cfg.default_scope, file)
            arrays = (dict(mean=maps[-1].mean((1, 2))) if args.pool else
                      {f'stage_{stage}': features for stage, features in
                       zip(model.backbone.out_indices, maps)})
            np.savez(Path(args.out) / f'{file.stem}.npz', **arrays)
    shapes = ', '.join(f'{name} {array.shape}' for name, array in arrays.items())
    print(f'{len(files)} file(s) are in {args.out}; the last one holds {shapes}')


if __name__ == '__main__':
    main()
