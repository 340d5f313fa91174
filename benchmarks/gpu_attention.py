# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times multi-scale deformable attention on a GPU, forward and backward, beside its peers.

    python benchmarks/gpu_attention.py [--output FILE.json]

Device time is the median of replays of a CUDA graph of several calls on different inputs, all
candidates on the same ones. `floor` is the bytes that have to be moved (every tensor once) by the
bandwidth of a copy in the same run; `error` is the largest difference from the form in PyTorch in
float32, relative to the largest number.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from gpu_timing import REFUSALS, capture, copy_bandwidth, device_state, elapsed, refusal
from torch import Tensor

from mmdcnv4.ops import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
)

DEVICE = 'cuda'
PYRAMID = [(100, 160), (50, 80), (25, 40), (13, 20)]
# name: sizes, batch, queries (None: a query per pixel), points; 8 heads of 32 channels
SHAPES: dict[str, tuple[list[tuple[int, int]], int, Optional[int], int]] = {
    'encoder of DINO, 4 levels': (PYRAMID, 1, None, 4),
    'encoder of DINO, 4 levels, batch 4': (PYRAMID, 4, None, 4),
    'decoder of DINO': (PYRAMID, 1, 900, 4),
    'cameras of BEVFormer': ([(80, 200), (40, 100), (20, 50), (10, 25)], 6, 2500, 8),
}
DTYPES = {'float16': torch.float16, 'float32': torch.float32, 'bfloat16': torch.bfloat16}
HEADS, CHANNELS = 8, 32


class Problem(NamedTuple):
    """Inputs of a call."""

    value: Tensor
    locations: Tensor  # float32
    weights: Tensor
    sizes: list[tuple[int, int]]
    grad_output: Tensor

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Forward, backward: every tensor read or written once."""
        value, rest, out = (sum(t.numel() * t.element_size() for t in part) for part in (
            (self.value,), (self.locations, self.weights), (self.grad_output,)))
        return value + rest + out, 2 * value + 2 * rest + out


def make_problem(name: str, dtype: torch.dtype, seed: int) -> Problem:
    """Points around a reference, N(0, 2) pixels of their level away; softmax weights."""
    sizes, batch, queries, points = SHAPES[name]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options: dict[str, Any] = dict(generator=generator, device=DEVICE)
    pixels = sum(height * width for height, width in sizes)
    if queries is None:  # the centre of each pixel
        reference = torch.cat([torch.stack(torch.meshgrid(
            (torch.arange(w, device=DEVICE) + 0.5) / w, (torch.arange(h, device=DEVICE) + 0.5) / h,
            indexing='xy'), -1).flatten(0, 1) for h, w in sizes]).expand(batch, -1, -1)
    else:
        reference = torch.rand(batch, queries, 2, **options)
    layout = (*reference.shape[:2], HEADS, len(sizes), points)
    scale = torch.tensor([[w, h] for h, w in sizes], device=DEVICE)[:, None]
    offsets = torch.randn(*layout, 2, **options) * 2 / scale
    logits = torch.randn(*layout[:3], len(sizes) * points, **options)
    return Problem(torch.randn(batch, pixels, HEADS, CHANNELS, **options).to(dtype),
                   reference[:, :, None, None, None] + offsets,
                   logits.softmax(-1).view(layout).to(dtype), sizes,
                   torch.randn(*layout[:2], HEADS * CHANNELS, **options).to(dtype))


def ours(p: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    """The kernels of this package."""
    return lambda t: multi_scale_deformable_attention(t[0], p.sizes, *t[1:], backend='native')


def in_pytorch(p: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    """Sampled by grid_sample."""
    return lambda t: multi_scale_deformable_attention_reference(
        t[0], p.sizes, t[1].to(t[0].dtype), t[2])


def _shapes(p: Problem) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(p.sizes, device=DEVICE)
    areas = shapes.prod(1)
    return shapes, areas.cumsum(0) - areas


class Mmcv(torch.autograd.Function):
    """mmcv's kernel from a library of its own, see --mmcv-library."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """value, shapes, starts, locations, weights, images at a time."""
        ctx.save_for_backward(*arguments[:5])
        ctx.step = arguments[5]
        return torch.ops.mmcv_attention.forward(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """As mmcv does: gradients are added to zeros."""
        value, _, _, locations, weights = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        torch.ops.mmcv_attention.backward(*ctx.saved_tensors, grad.contiguous(), *grads, ctx.step)
        return grads[0], None, None, grads[1], grads[2], None


def mmcv(p: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    """mmcv's kernel; locations of the type of value."""
    function: Any = Mmcv if hasattr(torch.ops.mmcv_attention, 'forward') else (
        importlib.import_module(
            'mmcv.ops.multi_scale_deform_attn').MultiScaleDeformableAttnFunction)
    shapes, starts = _shapes(p)
    return lambda t: function.apply(t[0], shapes, starts, t[1].to(t[0].dtype), t[2], len(t[0]))


def released(p: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    """The released FlashDeformAttn; float16 alone, locations and logits in one tensor.

    It takes the softmax itself; the logarithm of the weights has them for its result.
    """
    function = importlib.import_module('DCNv4.functions').FlashDeformAttnFunction
    shapes, starts = _shapes(p)
    points = p.locations.shape[4]

    def run(t: Sequence[Tensor]) -> Tensor:
        packed = torch.cat([t[1].flatten(3).to(t[0].dtype), t[2].flatten(3).log()], -1)
        return function.apply(t[0], shapes, starts, packed, 64, points)
    return run


PEERS = {'ours': ours, 'mmcv': mmcv, 'released FlashDeformAttn': released, 'PyTorch': in_pytorch}


def milliseconds(runs: list[Callable[[], Any]]) -> float:
    """Median of the time of a call in a graph."""
    once = statistics.median(elapsed(runs[0], 4)[1:])
    count = max(1, min(len(runs) * 4, int(8 / once)))
    graph = capture(runs, count)
    graph.replay()
    return statistics.median(elapsed(graph.replay, max(5, min(30, int(60 / once / count))))) / count


def measure(make: Callable[[Problem], Callable[[Sequence[Tensor]], Tensor]],
            problems: list[Problem], exact: Tensor) -> dict[str, Any]:
    """Milliseconds forward and backward, and the error; or what it raised."""
    def forward(call: Callable[[Sequence[Tensor]], Tensor], p: Problem) -> None:
        with torch.no_grad():
            call(p[:3])

    def both(call: Callable[[Sequence[Tensor]], Tensor], p: Problem,
             leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(leaves), leaves, p.grad_output)

    try:
        calls = [make(p) for p in problems]
        error = (calls[0](problems[0][:3]).float() - exact).abs().max() / exact.abs().max()
        leaves = [[t.clone().requires_grad_() for t in p[:3]] for p in problems]
        time = milliseconds([lambda c=c, p=p: forward(c, p) for c, p in zip(calls, problems)])
        total = milliseconds([lambda c=c, p=p, t=t: both(c, p, t)
                              for c, p, t in zip(calls, problems, leaves)])
    except (*REFUSALS, ImportError) as reason:
        torch.cuda.synchronize()
        return refusal(reason)  # type: ignore[arg-type]
    return dict(forward_ms=time, backward_ms=total - time, error=error.item())


def main(argv: Optional[Sequence[str]] = None) -> list[dict[str, Any]]:
    """Measures and prints; what is measured is written after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, help='JSON')
    parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=list(SHAPES))
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['float16', 'float32'])
    parser.add_argument('--peers', nargs='+', choices=PEERS, default=list(PEERS))
    parser.add_argument('--mmcv-library', type=Path, help='mmcv_attention::forward and backward, '
                        'built from the sources in mmcv/ops/csrc, where there is no mmcv')
    args = parser.parse_args(argv)
    if args.mmcv_library is not None:
        torch.ops.load_library(args.mmcv_library)
    bandwidth = copy_bandwidth(DEVICE)
    head = dict(device=torch.cuda.get_device_name(), torch=torch.__version__,
                python=platform.python_version(), state=device_state(), bandwidth=bandwidth)
    print(head, flush=True)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            problems = [make_problem(shape, DTYPES[dtype], seed) for seed in range(4)]
            p = problems[0]
            exact = multi_scale_deformable_attention_reference(
                p.value.float(), p.sizes, p.locations, p.weights.float())
            floors = [1e3 * number / bandwidth for number in p.bytes_moved]
            for peer in args.peers:
                result = measure(PEERS[peer], problems, exact)
                rows.append(dict(shape=shape, dtype=dtype, peer=peer, floor_ms=floors, **result))
                times = result.get('error') if isinstance(result.get('error'), str) else (
                    f'forward {result["forward_ms"]:8.3f} ms  backward {result["backward_ms"]:8.3f}'
                    f' ms  error {result["error"]:.1e}')
                print(f'{shape:36} {dtype:9} {peer:26} {times}   floors {floors[0]:.3f} '
                      f'{floors[1]:.3f}', flush=True)
                if args.output is not None:
                    args.output.write_text(json.dumps(dict(head, rows=rows), indent=1))
    return rows


if __name__ == '__main__':
    main()
