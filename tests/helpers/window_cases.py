# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Calls that the emulated tensor-core kernels are tried with, forward and backward."""

from __future__ import annotations

import torch

from helpers.cuda_cases import BF16, DTYPES, F16, F32, NORMS

TYPES = {name: DTYPES[name] for name in ('f16', 'bf16', 'f16-f32', 'bf16-f32', 'f32')}
# every D of every type
KERNELS = [(depth, dtypes) for dtypes in TYPES for depth in (16, 32, 64)
           if dtypes != 'f32' or depth < 64]
# Largest relative error of a product in float32, whose factors are two numbers of TF32 each: of 24
# bits one of A and two of B are cut off, 2^-23 and 3 * 2^-23, and the product of the small ones is
# left out, 2^-21: together 2^-20. Tensor cores cut off their sums, 2^-23: 24 of them are a product
# with 64 cells, 12 one with 32 channels.
WEIGHT_SPLIT = 2.0**-20 + 24 * 2.0**-23
DOT_SPLIT = 2.0**-20 + 12 * 2.0**-23
# ... of a weight: float16 and TF32 have 11 bits, two bfloat16 have 16. Half types are multiplied
# exactly with each other.
FORWARD_WEIGHTS = {F16: 2.0**-11, BF16: 2.0**-16, F32: WEIGHT_SPLIT}
BACKWARD_WEIGHTS = {F16: 2.0**-11, BF16: 2.0**-11, F32: WEIGHT_SPLIT}
DOTS = {F16: 0.0, BF16: 0.0, F32: DOT_SPLIT}
# In norm, of float32: each of 24 sums loses 2^-24 on average, always towards zero, of a result that
# is half complete on average: 0.7e-6. The roundings that direct kernels have as well are as many. A
# low part that is missing would be 1e-4.
WINDOW_NORMS = {**NORMS, F32: (1.2e-6, 1.2e-6, 1.2e-6)}
# the largest numbers, infinite when rounded to TF32; NaN that is infinite when it is cut off, and
# NaN that is zero when it is rounded
HARD_TO_SPLIT = torch.tensor([0x7f7fffff, -0x00800001, 0x7f800001, 0x7fffffff, -1],
                             dtype=torch.int32).view(F32)
GEOMETRIES = {
    '3x3': dict(kernel_size=3, padding=1),
    '3x3-ring': dict(kernel_size=3, padding=(1, 2), offset_scale=0.5, remove_center=True),
}
# N, H, W, G, D: ragged tiles and slices, primes, one pixel, one line, every D, 80 groups
SIZES = [(3, 5, 7, 3, 16), (2, 13, 1, 5, 16), (3, 1, 1, 3, 32), (1, 11, 19, 3, 32),
         (2, 9, 11, 1, 64), (1, 6, 17, 3, 64), (2, 3, 2, 80, 16), (5, 2, 3, 1, 16)]
