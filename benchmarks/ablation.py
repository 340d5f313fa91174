# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times the layer and its operator step by step from DCNv3 to DCNv4: table 10 of the DCNv4 paper.

    python benchmarks/ablation.py                             # 64 x 56 x 56 x 128, 4 groups
    python benchmarks/ablation.py --shape 1 56 56 128 --device cpu

The paper's steps inside the kernel (channels per thread, shared coefficients, vector loads) are
not separate kernels here; on a GPU the direct and the tensor-core kernels are. A row is the median
of runs; all rows take turns in one process. Offsets are N(0, 0.5) pixels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from mmdcnv4.models.layers.dcnv3 import DCNv3
from mmdcnv4.ops import DCNv4, dcnv4, offset_mask_channels

# by the paper, in ms on an A100, layer and kernel: for orientation
PUBLISHED = {'DCNv3 layer': '3.28', 'DCNv3 operator (softmax)': '1.45', 'DCNv4 layer': '1.28',
             'DCNv4 operator': '0.606', 'DCNv4 layer, float16': '0.873',
             'DCNv4 operator, float16': '0.404'}


def move(layer: nn.Module) -> nn.Module:
    """Lets the layer sample where no pixel is."""
    for name, parameter in layer.named_parameters():
        if name.endswith(('offset.bias', 'offset_mask.bias')):
            nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def candidates(shape: Sequence[int], groups: int, dtype: torch.dtype, device: str
               ) -> dict[str, Callable[[], Tensor]]:
    """Name -> a forward pass."""
    torch.manual_seed(0)
    x = torch.randn(*shape, device=device, dtype=dtype)
    channels = shape[-1]
    packed = torch.randn(*shape[:3], offset_mask_channels(groups, 9), device=device, dtype=dtype)
    packed *= 0.5
    layers = {'DCNv3 layer': DCNv3(channels, group=groups),
              'DCNv4 layer, depthwise predictor': DCNv4(channels, group=groups, dw_kernel_size=3),
              'DCNv4 layer': DCNv4(channels, group=groups),
              'DCNv4 layer without projections': DCNv4(channels, group=groups,
                                                       without_pointwise=True)}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, layer in layers.items():
        placed = move(layer).to(device, dtype)
        calls[name] = lambda placed=placed: placed(x)  # type: ignore[misc]
    for name, softmax in (('DCNv3 operator (softmax)', True), ('DCNv4 operator', False)):
        calls[name] = lambda softmax=softmax: dcnv4(  # type: ignore[misc]
            x, packed, kernel_size=3, padding=1, groups=groups, softmax=softmax)
    suffix = '' if dtype == torch.float32 else f', {str(dtype)[6:]}'
    return {name + suffix: call for name, call in calls.items()}


def measure(calls: dict[str, Callable[[], Tensor]], repeats: int, device: str
            ) -> dict[str, float]:
    """Median of the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if device != 'cpu':
                    torch.cuda.synchronize()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Measures and prints a table; returns seconds by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', type=int, nargs=4, default=[64, 56, 56, 128],
                        metavar=('N', 'H', 'W', 'C'))
    parser.add_argument('--groups', type=int, default=4)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    dtypes = [torch.float32] if args.device == 'cpu' else [torch.float32, torch.float16]
    choose = getattr(torch.ops.mmdcnv4, '_set_cuda_fast', None) if args.device != 'cpu' else None
    times: dict[str, float] = {}
    for dtype in dtypes:
        for fast in (('0', '1') if choose is not None and dtype != torch.float32 else ('0',)):
            if choose is not None:
                choose(fast)
            found = measure(candidates(args.shape, args.groups, dtype, args.device), args.repeats,
                            args.device)
            times.update({name + ', tensor cores' * (fast == '1'): value
                          for name, value in found.items()})
    print(f'{"x".join(map(str, args.shape))}, {args.groups} groups, forward, {args.device}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}\n'
          f'{"":50} {"ms":>9}  published (A100, 64x56x56x128)')
    for name, value in times.items():
        print(f'{name:50} {1000 * value:9.3f}  {PUBLISHED.get(name, "")}'.rstrip())
    return times


if __name__ == '__main__':
    main()
