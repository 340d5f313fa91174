# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Counts parameters and multiply-adds of the model of a config, with mmengine's counter.

python tools/analysis_tools/get_flops.py CONFIG --shape 800 1280 [--part backbone]

A call of the operator counts 5 K per output element: four for the interpolation of each of the K
samples, one for its mask. A call of PyTorch's attention counts both products, including those that
a mask hides: the tiles of neighbourhood attention compute four times the products of the windows.
Norms and other elementwise layers, of which the counter knows some, are given apart: tables of
papers leave them out.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from mmengine.config import Config

import mmdcnv4  # noqa: F401  registers the classes
from mmdcnv4.cli import arguments, config
from mmdcnv4.cli.analysis import PARTS, ModelPart, flop_analyzer
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError
from mmdcnv4.ops import _extension

PRODUCTS = ('conv', 'linear', 'matmul', 'addmm', 'mm', 'bmm', 'einsum', 'dcnv4',
            'scaled_dot_product_attention')


class Cost(NamedTuple):
    """What a model costs per image."""

    parameters: int
    multiply_adds: dict[str, int]  # operator -> count
    others: dict[str, int]  # operator -> count, for elementwise layers

    @property
    def total(self) -> int:
        """Multiply-adds of all products."""
        return sum(self.multiply_adds.values())


def count(cfg: Config, height: int, width: int, part: str = 'model') -> Cost:
    """Traces one image through the model on the CPU.

    Args:
        cfg: config.
        height, width: of the image.
        part: of :class:`mmdcnv4.cli.analysis.ModelPart`.

    Raises:
        UserError: the operator is not compiled, so that it cannot be told in a trace, or the model
            fails on such an image.
    """
    if not _extension.is_available:
        raise UserError('the compiled operator is needed: '
                        'pip install --no-build-isolation --no-deps -e .')
    model = ModelPart(cfg, part).eval()
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer, about shapes that it fixes
        analyzer = flop_analyzer(model, (torch.zeros(1, 3, height, width),))
        try:
            found = analyzer.by_operator()
        except (IndexError, RuntimeError, ValueError) as error:
            raise UserError(f'the {part} fails on an image of {height} x {width} '
                            f'({type(error).__name__}: {error}); heads need maps of some size: '
                            'take a larger --shape, or --part backbone.') from error
    traced = getattr(model.model, part) if part == 'backbone' else model.model
    parameters = sum(parameter.numel() for parameter in traced.parameters())
    return Cost(parameters, {name: int(n) for name, n in found.items() if name in PRODUCTS},
                {name: int(n) for name, n in found.items() if name not in PRODUCTS})


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Count parameters and multiply-adds.')
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('--shape', type=int, nargs='+', default=[224, 224],
                        help='height and width, or one number for both')
    parser.add_argument('--part', choices=PARTS, default='model')
    arguments.add_config_arguments(parser)
    args = parser.parse_args(argv)
    if len(args.shape) > 2 or min(args.shape) < 1:
        parser.error(f'--shape must be one or two positive numbers, got {args.shape}')
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Prints a table."""
    args = parse_args(argv)
    height, width = args.shape[0], args.shape[-1]
    with explain(debug=args.debug):
        cost = count(config.read_config(args.config, args.cfg_options), height, width, args.part)
    print(f'{args.part} at {height} x {width}: {cost.parameters:,} parameters, '
          f'{cost.total / 1e9:.2f} G multiply-adds')
    for title, counts in (('', cost.multiply_adds), ('not in the sum: ', cost.others)):
        for name, number in sorted(counts.items(), key=lambda item: -item[1]):
            if number:
                print(f'  {title}{name:22s}{number / 1e9:10.3f} G')


if __name__ == '__main__':
    main()
