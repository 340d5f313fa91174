# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Measures latency, throughput and memory of the model of a config.

python tools/analysis_tools/benchmark.py CONFIG --shape 800 1280 --batch 1 [--amp] [--compile]

With `--training-data` a run is the training loss of the first batch of the config's own training
data, forward and backward, instead of random images.

Every row is the median of single runs, with the 10th and the 90th percentile beside it. On a GPU
the clock is that of the device's events. Memory is what the run needed at its peak: tensors that
were allocated on a GPU, the resident set of the process on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

import mmdcnv4  # noqa: F401  registers the classes
from mmdcnv4.checks.config import check_datasets, default_scope
from mmdcnv4.cli import preflight
from mmdcnv4.cli.analysis import PARTS, ModelPart, build_model
from mmdcnv4.cli.arguments import add_config_arguments
from mmdcnv4.cli.config import read_config
from mmdcnv4.cli.explain import explain


class Timing(NamedTuple):
    """Seconds per run, and the peak of the memory."""

    low: float
    median: float
    high: float
    peak_bytes: int


def tensors(result: object) -> list[Tensor]:
    """All tensors inside nested tuples, lists and dicts."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in tensors(item)]
    return []


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of tensors on a GPU, of the process on a CPU (Linux; else 0)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def measure(function: Callable[[], object], device: torch.device, repeats: int,
            warm_up: int) -> Timing:
    """Times `function` run by run."""
    for _ in range(warm_up):
        function()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        if device.type == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
    seconds.sort()
    last = len(seconds) - 1
    return Timing(seconds[round(0.1 * last)], statistics.median(seconds),
                  seconds[round(0.9 * last)], peak_memory(device))


def autocast(device: torch.device,
             dtype: Optional[torch.dtype]) -> contextlib.AbstractContextManager:
    """Autocast to `dtype`, or nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def make_run(model: nn.Module, images: Tensor, train: bool,
             amp_dtype: Optional[torch.dtype]) -> Callable[[], object]:
    """One forward pass, or one forward and backward pass."""
    def forward() -> object:
        with autocast(images.device, amp_dtype):
            return model(images)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        outputs = [t for t in tensors(forward()) if t.requires_grad]
        sum(t.float().square().mean() for t in outputs).backward()

    return forward_backward if train else torch.inference_mode()(forward)


def make_loss_run(model: Any, cfg: Config, device: torch.device, amp_dtype: Optional[torch.dtype]
                  ) -> tuple[Callable[[], object], tuple[int, ...]]:
    """One forward and backward pass of the loss on the first batch of the training data.

    Returns:
        The run, and the shape of the images (N, 3, H, W), N of all cameras and frames.
    """
    scope = default_scope(cfg)
    with DefaultScope.overwrite_default_scope(scope):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        data = model.data_preprocessor(next(iter(loader)), True)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with DefaultScope.overwrite_default_scope(scope), autocast(device, amp_dtype):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()

    inputs = data['inputs']
    images = inputs['imgs'] if isinstance(inputs, dict) else inputs  # of mmdet3d; several cameras
    return run, tuple(images.flatten(0, -4).shape)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Measure latency, throughput and memory.')
    parser.add_argument('config', help='config of mmdet, mmseg or mmpretrain; with '
                        '--training-data of mmdet3d too')
    parser.add_argument('--shape', type=int, nargs='+', default=[224, 224],
                        help='height and width, or one number for both')
    parser.add_argument('--batch', type=int, default=1, help='images per run')
    parser.add_argument('--part', choices=PARTS, default='model')
    parser.add_argument('--train', action='store_true', help='forward and backward')
    parser.add_argument('--training-data', action='store_true',
                        help='the training loss of a batch of the training data of the config; '
                             '--shape, --batch and --part do not apply')
    parser.add_argument('--amp', nargs='?', choices=['auto', 'float16', 'bfloat16'], const='auto',
                        help='autocast; auto, the default: to float16 on a GPU, bfloat16 on a CPU')
    parser.add_argument('--compile', action='store_true', help='through torch.compile')
    parser.add_argument('--channels-last', action='store_true', help='images in NHWC memory')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--warm-up', type=int, default=5)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    if len(args.shape) > 2 or min(args.batch, args.repeats, *args.shape) < 1 or args.warm_up < 0:
        parser.error('--shape takes one or two numbers; sizes and counts must be positive')
    if args.training_data and args.compile:
        parser.error('--training-data cannot be combined with --compile')
    return args


def run_benchmark(cfg: Config, args: argparse.Namespace) -> Timing:
    """Builds, measures and prints one row."""
    device = torch.device(args.device)
    built = build_model(cfg) if args.training_data else ModelPart(cfg, args.part)
    model: nn.Module = revert_sync_batchnorm(built).to(device)
    train = args.train or args.training_data
    model.train(train)
    amp_dtype = None
    if args.amp == 'auto':
        amp_dtype = torch.float16 if device.type == 'cuda' else torch.bfloat16
    elif args.amp is not None:
        amp_dtype = getattr(torch, args.amp)
    if args.training_data:
        run, shape = make_loss_run(model, cfg, device, amp_dtype)
    else:
        images = torch.randn(args.batch, 3, args.shape[0], args.shape[-1], device=device)
        if args.channels_last:
            images = images.to(memory_format=torch.channels_last)
        shape = tuple(images.shape)
        run = make_run(torch.compile(model) if args.compile else model, images, train, amp_dtype)
    timing = measure(run, device, args.repeats, args.warm_up)
    kind = ['training loss' if args.training_data else args.part,
            'forward+backward' if train else 'forward',
            str(amp_dtype or torch.float32).replace('torch.', '')]
    kind += ['compiled'] if args.compile else []
    print(f'{Path(args.config).stem}: {", ".join(kind)}; {device.type}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}\n'
          f'{shape[0]} x {shape[2]} x {shape[3]}: {1000 * timing.median:.1f} ms '
          f'({1000 * timing.low:.1f} to {1000 * timing.high:.1f}), '
          f'{shape[0] / timing.median:.2f} images/s, '
          f'peak {timing.peak_bytes / 2**20:.0f} MiB')
    return timing


def main(argv: Optional[Sequence[str]] = None) -> Timing:
    """Measures; returns the row for programs that build on this one."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        preflight.check_device(args.device)
        cfg = read_config(args.config, args.cfg_options)
        if args.training_data:
            check_datasets(cfg, ('train',))
    with explain(cfg, args.debug):
        return run_benchmark(cfg, args)


if __name__ == '__main__':
    main()
