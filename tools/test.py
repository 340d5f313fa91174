# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tests a checkpoint with the metric of its config (mmdet, mmseg, mmdet3d or mmpretrain).

python tools/test.py configs/quick_start/<name>.py work_dirs/<name>/epoch_1.pth
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from mmengine.registry import METRICS
from mmengine.runner import Runner

from mmdcnv4.checks.checkpoints import check_checkpoint
from mmdcnv4.cli.arguments import add_common_arguments
from mmdcnv4.cli.config import apply_map_cache, apply_show, apply_tta, dump_metric, load_config
from mmdcnv4.cli.distributed import leave_distributed
from mmdcnv4.cli.explain import explain
from mmdcnv4.cli.runner import build_runner


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Test a model.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='also write the predictions there')
    parser.add_argument('--show', action='store_true', help='show predictions on the screen')
    parser.add_argument('--show-dir', help='folder to save pictures of the predictions in')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per shown picture')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation, as tta_model and tta_pipeline say')
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> dict:
    """Tests; returns the values of the metric."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        cfg = load_config(args)
    with explain(cfg, args.debug):
        check_checkpoint(args.checkpoint, 'checkpoint')
        cfg.load_from = args.checkpoint
        apply_show(cfg, args.show, args.show_dir, args.wait_time)
        if args.tta:
            apply_tta(cfg)
        else:
            apply_map_cache(cfg)
        dump = None if args.out is None else dump_metric(cfg, args.out)
        runner: Runner = build_runner(cfg, ('test',), args.allow_mismatch)
        if dump is not None:
            runner.test_evaluator.metrics.append(METRICS.build(dump))
        return runner.test()


if __name__ == '__main__':
    main()
    leave_distributed()
