# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the synthetic rig: see `mmdcnv4/datasets/synthetic_rig.py`.

python tools/dataset_converters/synthetic_rig.py data/synthetic-rig
python tools/dataset_converters/synthetic_rig.py data/own-rig --cameras 4 --classes car tram tree
"""

import argparse
from pathlib import Path

from mmdcnv4.datasets.synthetic_rig import CAMERAS, SCENES, write


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Write a small dataset in nuScenes layout.')
    parser.add_argument('root', type=Path, help='folder to write to, usually data/synthetic-rig')
    parser.add_argument('--scenes', type=int, default=2)
    parser.add_argument('--frames', type=int, default=2, help='key frames per scene')
    parser.add_argument('--objects', type=int, default=8, help='cuboids per scene')
    parser.add_argument('--twins', action='store_true',
                        help='scenes in pairs that look the same in the last key frame and differ '
                        'in what happened before')
    parser.add_argument('--cameras', type=int, default=len(CAMERAS),
                        help='in a ring; other numbers than six have names of their own')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help='names of the classes, in the order of their labels; those of '
                        'nuScenes by default')
    parser.add_argument('--version', choices=SCENES, default='v1.0-mini',
                        help='of the tables, which tells the split of the scenes')
    return parser.parse_args()


def main() -> None:
    """Draws and writes."""
    args = parse_args()
    try:
        path = write(args.root, args.scenes, args.frames, args.objects, twins=args.twins,
                     num_cameras=args.cameras, classes=args.classes, version=args.version)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    print(f'{path}: {args.scenes * args.frames} samples')


if __name__ == '__main__':
    main()
