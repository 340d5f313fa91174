# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How tests talk to the emulator of the CUDA kernels: see emulator/main.cpp."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.cuda_cases import BF16, F16, F32, F64
from mmdcnv4.ops.contract import make_geometry


class WindowRun(NamedTuple):
    """What the emulator says about the tensor-core backward kernels."""

    offset_mask_plan: dict[str, int]
    value_plan: dict[str, int]
    accesses: dict[str, dict[str, int]]  # to shared memory, by phase
    listed: int  # far taps, in the lists of all blocks that they meet
    has_full: int  # whether a list was full


class Emulator(NamedTuple):
    """The program, and the schedule of calls that name none."""

    program: Path
    schedule: str

    def __call__(self, mode, calls, *options):
        """What the program prints for lines of calls."""
        result = subprocess.run([self.program, mode, *options], input=calls, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def code(self, schedule):
        return SCHEDULES[schedule or self.schedule]


CODE = {F64: 0, F32: 1, F16: 2, BF16: 3}
# of the threads of a block: meeting by meeting, and warp by warp
ORDERS = ('forward', 'backward', 'shuffled', 'warps', 'warps-backward')
# copies in the background land when they are waited for, or at once; the direct kernels have none
SCHEDULES = {order + when: number for number, (when, order) in enumerate(
    (when, order) for when in ('', '-at-once') for order in ORDERS)}
# as different as any three: for tests that compare the results of several; other tests take turns
# through all of them
THREE = ('forward', 'shuffled', 'warps-backward-at-once')
# multiprocessors, shared bytes without and with opting in, blocks per launch
GPU = (132, 48 * 1024, 227 * 1024, 2**31 - 1)
ONE_PROCESSOR = (1, *GPU[1:])  # blocks as large as they get


def to_bytes(tensor):
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype in (F16, BF16) else tensor).numpy().tobytes()


def from_bytes(data, dtype, shape):
    count = int(np.prod(shape)) * dtype.itemsize
    tensor = torch.frombuffer(bytearray(data[:count]), dtype=dtype).reshape(shape)
    return tensor, data[count:]


def sizes_text(value, groups, geometry):
    rules = make_geometry(groups=groups, **geometry)
    pairs = (rules.kernel_size, rules.stride, rules.padding, rules.dilation)
    numbers = [*value.shape[:3], groups, value.shape[3] // groups, *(n for p in pairs for n in p),
               rules.offset_scale, int(rules.remove_center), int(rules.softmax)]
    return ' '.join(map(str, numbers))


def call_emulator(emulator, mode, path, tensors, *, groups, schedule=None, device=GPU,
                  count=False, **geometry):
    """Bytes that the call has appended to its file, and what it has printed."""
    value, packed = tensors[:2]
    data = b''.join(map(to_bytes, tensors))
    path.write_bytes(data)
    call = (f'{path} {emulator.code(schedule)} 16 {CODE[value.dtype]} {CODE[packed.dtype]} '
            f'{" ".join(map(str, device))} {sizes_text(value, groups, geometry)}\n')
    printed = emulator(mode, call, *['count'] * count)
    return path.read_bytes()[len(data):], json.loads(printed)


def emulate_window(emulator, path, inputs, **options):
    """Output of the tensor-core forward kernel; its plan; its accesses to shared memory."""
    value, packed = inputs
    rest, printed = call_emulator(emulator, 'window', path, inputs, **options)
    output, rest = from_bytes(rest, value.dtype, (*packed.shape[:3], value.shape[3]))
    assert not rest
    return output, *printed


def emulate_window_backward(emulator, path, inputs, grad_output, **options):
    """Gradients by the tensor-core kernels; what they have printed, see WindowRun."""
    value, packed = inputs
    rest, printed = call_emulator(emulator, 'window_backward', path, (*inputs, grad_output),
                                  **options)
    grad_value, rest = from_bytes(rest, value.dtype, value.shape)
    grad_packed, rest = from_bytes(rest, packed.dtype, packed.shape)
    assert not rest
    return (grad_value, grad_packed), WindowRun(*printed)
