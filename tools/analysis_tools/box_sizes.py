# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Measures the mean size of each class in an info file of mmdet3d, for BEVFormer v2.

python tools/analysis_tools/box_sizes.py data/own/infos_train.pkl

prints the entry of the config that the perspective head needs for classes that nuScenes has not.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

import mmengine

from mmdcnv4.bevformer_v2.data.sizes import mean_sizes
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import MissingFile


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Measure the mean size of each class.')
    parser.add_argument('info_file', help='of the training set, version 1.1')
    parser.add_argument('--info-classes', nargs='+', metavar='NAME',
                        help='names of the labels in their order; default: those in the file')
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measures and prints."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        try:
            infos = mmengine.load(args.info_file)
        except FileNotFoundError as error:
            raise MissingFile(f'the info file {args.info_file} does not exist.') from error
        sizes = mean_sizes(infos, args.info_classes)
    print('model = dict(perspective_head=dict(canonical_sizes=dict(  # width, length, height')
    for name, size in sizes.items():
        key = f'{name}=' if name.isidentifier() else f'**{{{name!r}: '
        end = '' if name.isidentifier() else '}'
        print(f'    {key}({", ".join(f"{side:.3f}" for side in size)}){end},')
    print(')))')


if __name__ == '__main__':
    main()
