# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Trains the model of a config of mmdet, mmseg, mmdet3d or mmpretrain.

python tools/train.py configs/quick_start/<name>.py
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from mmdcnv4.cli.arguments import add_common_arguments
from mmdcnv4.cli.config import apply_amp, apply_auto_scale_lr, apply_resume, load_config
from mmdcnv4.cli.distributed import leave_distributed
from mmdcnv4.cli.explain import explain
from mmdcnv4.cli.runner import build_runner
from mmdcnv4.cli.schedule import apply_accumulation

if TYPE_CHECKING:
    from mmengine.runner import Runner


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Train a model.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from a checkpoint; without a path from the newest in the '
                        'work directory')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the total batch size')
    parser.add_argument('--scale-warm-up', action='store_true',
                        help='a warm-up in iterations is one in updates: make it longer by '
                        'optim_wrapper.accumulative_counts')
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> 'Runner':
    """Trains; returns the runner, for programs that build on this one."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        cfg = load_config(args)
    with explain(cfg, args.debug):
        if args.amp:
            apply_amp(cfg)
        if args.auto_scale_lr:
            apply_auto_scale_lr(cfg)
        apply_accumulation(cfg, args.scale_warm_up)
        apply_resume(cfg, args.resume)
        runner = build_runner(cfg, ('train', 'val'), args.allow_mismatch)
        runner.train()
    return runner


if __name__ == '__main__':
    main()
    leave_distributed()
