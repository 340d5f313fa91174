# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Calls that the emulated tensor-core kernels are tried with, forward and backward."""

from __future__ import annotations

from helpers.cuda_cases import BF16, DTYPES, F16, F32

TYPES = {name: DTYPES[name] for name in ('f16', 'bf16', 'f16-f32', 'bf16-f32', 'f32')}
# every D of every type, and whether there are kernels for windows of 12x12 cells
KERNELS = [(depth, dtypes) for dtypes in TYPES for depth in (16, 32, 64)
           if dtypes != 'f32' or depth < 64]
# Largest relative error of a weight: float16 and TF32 have 11 bits, two bfloat16 have 16. In
# float32 both factors are two numbers of TF32: what is left of them is cut to 11 bits, and its
# product left out.
FORWARD_WEIGHTS = {F16: 2.0**-11, BF16: 2.0**-16, F32: 2.0**-20}
BACKWARD_WEIGHTS = {F16: 2.0**-11, BF16: 2.0**-11, F32: 2.0**-20}
GEOMETRIES = {
    '3x3': dict(kernel_size=3, padding=1),
    '3x3-wide': dict(kernel_size=3, padding=1, offset_scale=2.0),
    '3x3-ring': dict(kernel_size=3, padding=(1, 2), offset_scale=0.5, remove_center=True),
    '3x3-ring-wide': dict(kernel_size=3, padding=0, offset_scale=-1.5, remove_center=True),
}
# N, H, W, G, D: ragged tiles and slices, primes, one pixel, one line, every D, 80 groups
SIZES = [(3, 5, 7, 3, 16), (2, 13, 1, 5, 16), (3, 1, 1, 3, 32), (1, 11, 19, 3, 32),
         (2, 9, 11, 1, 64), (1, 6, 17, 3, 64), (2, 3, 2, 80, 16), (5, 2, 3, 1, 16)]
