# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Images per second of backbones of one size class, on the same input in one process.

python tools/analysis_tools/throughput.py --size 224 --batch 1 8 [--models NAME ...] [--amp]
    [--compile [MODE]]

The speed columns of tables 4 to 7 of the DCNv4 paper: FlashInternImage, InternImage, ConvNeXt and
Swin. Swin is that of mmdet; ConvNeXt is `ConvNeXtDCNv4` with its own depthwise convolutions, which
gives the values of mmpretrain's (a test compares them). All return their four maps; classifiers
differ from that by one linear layer. Untrained weights; offsets of DCNv4 and DCNv3 are random,
with a standard deviation of half a pixel, since at rest they would all hit the same pixels.

The models take turns, and a row is the median of its rounds. On a busy machine say so.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmdcnv4  # noqa: F401  registers the classes
from mmdcnv4.cli import preflight
from mmdcnv4.cli.explain import explain
from mmdcnv4.models.layers.dcnv3 import DCNv3
from mmdcnv4.ops import DCNv4

_SWIN = dict(type='mmdet.SwinTransformer')
BACKBONES: dict[str, dict[str, Any]] = {
    'FlashInternImage-T': dict(type='FlashInternImage', arch='t'),
    'InternImage-T': dict(type='InternImage', arch='t'),
    'Swin-T': dict(_SWIN, depths=(2, 2, 6, 2)),
    'ConvNeXt-T': dict(type='ConvNeXtDCNv4', arch='t', core_op='DWConv'),
    'ConvNeXt-T + DCNv4': dict(type='ConvNeXtDCNv4', arch='t'),
    'FlashInternImage-S': dict(type='FlashInternImage', arch='s'),
    'InternImage-S': dict(type='InternImage', arch='s'),
    'Swin-S': dict(_SWIN, depths=(2, 2, 18, 2)),
    'ConvNeXt-S': dict(type='ConvNeXtDCNv4', arch='s', core_op='DWConv'),
    'FlashInternImage-B': dict(type='FlashInternImage', arch='b'),
    'InternImage-B': dict(type='InternImage', arch='b'),
    'Swin-B': dict(_SWIN, embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'ConvNeXt-B': dict(type='ConvNeXtDCNv4', arch='b', core_op='DWConv'),
    'ConvNeXt-B + DCNv4': dict(type='ConvNeXtDCNv4', arch='b'),
    'ViT-B': dict(type='ViTDCNv4', arch='b', layer_with_dcn=()),
    'ViT-B + DCNv4': dict(type='ViTDCNv4', arch='b'),
}
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune')
DEFAULT = ('FlashInternImage-T', 'InternImage-T', 'Swin-T', 'ConvNeXt-T')


class Row(NamedTuple):
    """Result of one model at one batch size; seconds of a forward pass."""

    name: str
    batch: int
    parameters: int
    median: float
    low: float
    high: float

    @property
    def images_per_second(self) -> float:
        """Of the median."""
        return self.batch / self.median


def build(name: str, device: torch.device) -> nn.Module:
    """The model in evaluation mode, with moving samples."""
    torch.manual_seed(0)
    cfg = BACKBONES[name]
    if cfg['type'].startswith('mmdet.'):
        import mmdet.models  # noqa: F401  registers
    with DefaultScope.overwrite_default_scope('mmengine'):
        model = MODELS.build(cfg)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DCNv4):
                bias = module.offset_mask.bias
                groups, points = module.geometry.groups, module.geometry.points
                rows = bias[:3 * groups * points].view(groups, 3 * points)
                rows[:, :2 * points].normal_(std=0.5)
                rows[:, 2 * points:] = 1 / points
            elif isinstance(module, DCNv3):
                module.offset.bias.normal_(std=0.5)
    model.to(device)
    model.eval()  # mmdet's returns nothing
    return model


def make_run(model: nn.Module, images: torch.Tensor, amp: bool) -> Callable[[], None]:
    """One forward pass, up to the end of the work on the device."""
    device = images.device
    dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast(device.type, dtype) if amp else contextlib.nullcontext():
            model(images)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    return run


def measure(names: Sequence[str], batch: int, args: argparse.Namespace) -> list[Row]:
    """A row per model."""
    device = torch.device(args.device)
    images = torch.randn(batch, 3, args.size, args.size,
                         generator=torch.Generator().manual_seed(0)).to(device)
    models = {name: build(name, device) for name in names}
    if args.compile:
        for model in models.values():
            model.compile(mode=args.compile, dynamic=False)
    runs = {name: make_run(model, images, args.amp) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.warm_up + args.repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn >= args.warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return [Row(name, batch, sum(p.numel() for p in models[name].parameters()),
                statistics.median(times), min(times), max(times))
            for name, times in seconds.items()]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', choices=BACKBONES, default=list(DEFAULT),
                        metavar='NAME', help=f'any of {", ".join(BACKBONES)}')
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--amp', action='store_true',
                        help='autocast to float16 on a GPU, to bfloat16 on a CPU')
    parser.add_argument('--compile', nargs='?', const='default', choices=COMPILE_MODES,
                        metavar='MODE',
                        help='through torch.compile; `reduce-overhead` also records a CUDA graph')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--warm-up', type=int, default=3)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--debug', action='store_true', help='full tracebacks')
    args = parser.parse_args(argv)
    if min(args.size, args.repeats, *args.batch) < 1 or args.warm_up < 0:
        parser.error('sizes and counts must be positive')
    return args


def main(argv: Optional[Sequence[str]] = None) -> list[Row]:
    """Measures and prints a table; returns its rows."""
    args = parse_args(argv)
    rows = []
    with explain(debug=args.debug):
        preflight.check_device(args.device)
        compiled = f'compiled ({args.compile}), ' if args.compile else ''
        print(f'{args.size} x {args.size}, {"autocast" if args.amp else "float32"}, {compiled}'
              f'{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n'
              f'{"backbone":20} {"M par.":>7} {"batch":>5} {"images/s":>9} {"ms":>9} '
              f'{"fastest":>9} {"slowest":>9}')
        for batch in args.batch:
            for row in measure(args.models, batch, args):
                rows.append(row)
                times = ' '.join(f'{1000 * value:9.2f}'
                                 for value in (row.median, row.low, row.high))
                print(f'{row.name:20} {row.parameters / 1e6:7.1f} {row.batch:5} '
                      f'{row.images_per_second:9.2f} {times}', flush=True)
    return rows


if __name__ == '__main__':
    main()
