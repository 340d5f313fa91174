# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the synthetic rig: see `mmdcnv4/datasets/synthetic_rig.py`.

python tools/dataset_converters/synthetic_rig.py data/synthetic-rig
"""

import argparse
from pathlib import Path

from mmdcnv4.datasets.synthetic_rig import write


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write a small data set in nuScenes layout.')
    parser.add_argument('root', type=Path, help='folder to write to, usually data/synthetic-rig')
    parser.add_argument('--scenes', type=int, default=2)
    parser.add_argument('--frames', type=int, default=2, help='key frames per scene')
    parser.add_argument('--objects', type=int, default=8, help='cuboids per scene')
    parser.add_argument('--twins', action='store_true',
                        help='scenes in pairs that look the same in the last key frame and differ '
                        'in what happened before')
    return parser.parse_args()


def main() -> None:
    """Draws and writes."""
    args = parse_args()
    write(args.root, args.scenes, args.frames, args.objects, twins=args.twins)


if __name__ == '__main__':
    main()
