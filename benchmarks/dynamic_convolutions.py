# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times Dynamic Mobile-Former beside the same network with static convolutions.

python benchmarks/dynamic_convolutions.py --arch s --batch 8 --size 224

The twin has `nn.Conv2d` of the same widths and groups in place of every dynamic convolution, and no
kernel attention. Both run in one process, in turn; the medians are printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

from mmdcnv4.models.backbones import DynamicMobileFormer
from mmdcnv4.models.layers.dynamic_conv import DynamicConv2d


class StaticConv2d(nn.Conv2d):
    """A convolution that is called like a dynamic one."""

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Convolves `x`, whatever the token."""
        return super().forward(x)


def static_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with the static kernels alone."""
    twin = copy.deepcopy(model)
    convs = [(name, module) for name, module in twin.named_modules()
             if isinstance(module, DynamicConv2d)]
    for name, conv in convs:
        out, per_group, size, _ = conv.static_weight.shape
        plain = StaticConv2d(per_group * conv.groups, out, size, padding=size // 2,
                             groups=conv.groups, bias=False)
        plain.weight = conv.static_weight
        twin.set_submodule(name, plain)
    return twin


def seconds(model: nn.Module, images: Tensor, with_backward: bool) -> float:
    """Wall time of one pass."""
    begin = time.perf_counter()
    with torch.set_grad_enabled(with_backward):
        outs = model(images)
        if with_backward:
            sum(out.square().mean() for out in outs).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Checks that the two agree at the start, and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='s', choices=('xxs', 'xs', 's'))
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    dynamic = DynamicMobileFormer(args.arch).to(args.device)
    static = static_twin(dynamic)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    with torch.no_grad():  # the dynamic kernels begin at zero
        for out, expected in zip(dynamic.eval()(images), static.eval()(images)):
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    print(f'{args.arch}, {args.batch} x {args.size} x {args.size}, {args.device}, torch '
          f'{torch.__version__}, {torch.get_num_threads()} threads, median of {args.repeats}')
    for name, with_backward in (('forward', False), ('forward + backward', True)):
        dynamic.train(with_backward)
        static.train(with_backward)
        times: dict[str, list[float]] = dict(dynamic=[], static=[])
        for repeat in range(args.repeats + 1):
            for kind, model in (('dynamic', dynamic), ('static', static)):
                value = seconds(model, images, with_backward)
                if repeat > 0:  # the first one warms up
                    times[kind].append(value)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        print(f'{name}: dynamic {medians["dynamic"]:.3f} s, static {medians["static"]:.3f} s, '
              f'ratio {medians["dynamic"] / medians["static"]:.2f}')


if __name__ == '__main__':
    main()
