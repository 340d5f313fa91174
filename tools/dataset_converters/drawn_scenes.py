# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the drawn-scenes dataset: see `mmdcnv4/datasets/drawn_scenes.py`.

python tools/dataset_converters/drawn_scenes.py data/drawn_scenes --num-train 800 --num-val 100
"""

import argparse

from mmdcnv4.datasets.drawn_scenes import SceneConfig, write_drawn_scenes


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Draw scenes of simple shapes and write them in COCO and ADE20K layout.')
    parser.add_argument('root', help='folder to create, usually data/drawn_scenes')
    parser.add_argument('--num-train', type=int, default=800, help='training images')
    parser.add_argument('--num-val', type=int, default=100, help='images of the held-out split')
    parser.add_argument('--size', type=int, default=160, help='side of the images in pixels')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other scenes')
    return parser.parse_args()


def main() -> None:
    """Draws, writes and says where."""
    args = parse_args()
    try:
        root = write_drawn_scenes(args.root, args.num_train, args.num_val, args.seed,
                                  SceneConfig(size=args.size))
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{args.num_train} + {args.num_val} images are in {root}/coco and {root}/ade')


if __name__ == '__main__':
    main()
