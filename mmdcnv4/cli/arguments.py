# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the command line that several tools share, under their OpenMMLab names."""

from __future__ import annotations

import argparse
from typing import Any, Optional

from mmengine.config import DictAction


class OptionsAction(DictAction):
    """KEY=VALUE pairs as a dict, the values as Python reads them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: Optional[str] = None) -> None:
        """Adds the pairs, and names what is none."""
        for value in values:
            if '=' not in value:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, RecursionError):  # what MMEngine makes of brackets and of dicts
            raise argparse.ArgumentError(
                self, 'a value must be a number, a text, "[a,b]" or "(a,b)"; a dict is set entry '
                f'by entry, KEY.ENTRY=VALUE; got {values}') from None


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every program that reads a config."""
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, metavar='KEY=VALUE',
                        help='override entries of the config, e.g. train_cfg.max_epochs=1 '
                        'model.backbone.init_cfg=None data.list="[1,2]"')
    parser.add_argument('--debug', action='store_true',
                        help='show the traceback of every error')


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every program that tests or resumes a checkpoint."""
    parser.add_argument('--allow-mismatch', action='store_true',
                        help='go on with a checkpoint whose tensors do not all fit the model')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and testing share, under their OpenMMLab names."""
    add_config_arguments(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument('--data-root', metavar='FOLDER',
                        help='folder of the data in place of data_root of the config: of all '
                        'datasets and of the annotation files of the metrics')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; '
                        'default: work_dir of the config, else work_dirs/<name of the config>')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        default='none', help='what started the processes')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help='set by some launchers')
