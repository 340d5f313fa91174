# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels and checks what came out: registers, stack, spills, vector loads.

Needs nvcc, no GPU. Instructions are counted where cuobjdump is found (beside nvcc, on the path, or
in an installed triton); without it the vector loads are looked for in the PTX.

Example:
    python dev/cuda/check_ptxas.py --arch 80 90 100
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
# types of `value` as they are in the names of kernels, and bytes per number
TYPES = {'d': ('float64', 8), 'f': ('float32', 4), 'Half': ('float16', 2),
         'BFloat16': ('bfloat16', 2)}
# kernels on tensor cores: how many numbers of `value` or its gradient a load from global memory
# should move beside the copies in the background
WINDOW_VECTORS = {'window_forward': 8, 'window_grad_offset': 2, 'window_grad_value': 2}
ATTENTION = {f'attention_{name}' for name in ('forward', 'backward', 'rank', 'place')}
DIRECTIONS = {'forward', 'backward', 'window_grad_rest', 'window_clear', *WINDOW_VECTORS}
# direct kernels that most calls take, by their variant
PLAIN = {'forward': 'K=9', 'backward': '', 'attention_forward': '', 'attention_backward': ''}
# 65536 registers and 256 threads per block: this many blocks have to fit on a multiprocessor
REGISTERS = {4: 64, 3: 80, 2: 128}
# kernels that add to the gradient of value in float32
ADDING = ('backward', 'window_grad_rest', 'attention_backward')
# in machine code and in PTX: copies in the background, matrices from shared memory, their product
TENSOR_CORE_WORDS = {'copy': r'\bLDGSTS\b|cp\.async\.cg', 'load': r'\bLDSM\b|ldmatrix\.sync',
                     'multiply': r'\bHMMA\b|mma\.sync'}


INTRODUCTION = """# What the compiler makes of the kernels

Written by `dev/cuda/check_ptxas.py --write`, with nvcc {nvcc}, for {archs}. One line per kind of
kernel and dtype of `value`: the largest number among its kernels. Instructions are those in the
code, and those that a warp executes for 256 outputs of a 3x3 kernel where offsets have the dtype of
`value`: with the widest loads and groups of 32 channels, without softmax; on tensor cores a block
of 16x8 pixels without far taps. For attention, outputs with 4 levels of 4 points, in heads of 32
channels; backward as if every sample lay in another cell than the one before. For comparison, by
nvcc 13.0: the released DCNv4 kernels in float16 with groups of 32 channels execute about 1670
forward, with 56 registers and 40 bytes of stack, and about 21600 backward; the attention of mmcv
2.1 in float32 about 12500 forward and 36600 backward, with 39 and 48 registers.

"""


@dataclass
class Kernel:
    """One compiled kernel of one architecture."""

    arch: str
    direction: str  # 'forward', 'backward', 'window_forward', 'window_grad_offset', ...
    dtype: str
    vec: int
    variant: str = ''
    registers: int = 0
    stack: int = 0
    spills: int = 0
    instructions: Optional[int] = None
    executed: Optional[float] = None  # per 256 outputs
    widest_load: Optional[int] = None
    widest_reduction: Optional[int] = None
    tensor_core_words: Optional[set[str]] = None

    @property
    def label(self) -> str:
        """For tables and messages."""
        shape = self.variant if self.is_window else f'vec {self.vec} {self.variant}'
        return (f'sm_{self.arch} {self.direction} {self.dtype} {shape}').strip()

    @property
    def is_window(self) -> bool:
        """Whether it uses tensor cores."""
        return self.direction in WINDOW_VECTORS

    @property
    def vector_bytes(self) -> int:
        """What one load of `value` should move."""
        return self.vec * next(size for name, size in TYPES.values() if name == self.dtype)

    def problems(self) -> list[str]:
        """What breaks a rule, in words."""
        blocks = 4 if self.variant == 'K=9' or self.direction == 'attention_forward' else 3
        is_large = self.is_window or self.direction == 'attention_backward'  # 128 threads
        ceiling = REGISTERS[2 if self.dtype == 'float64' or is_large else blocks]
        if (self.direction == 'window_grad_value' and 'reach 4' in self.variant
                or self.direction != 'window_grad_value' and self.variant.startswith('D=64')):
            ceiling = 168  # one block, or blocks of 128 threads
        found = []
        if self.registers > ceiling:
            found.append(f'{self.registers} registers, at most {ceiling}')
        if self.stack or self.spills:
            found.append(f'{self.stack} bytes of stack, {self.spills} bytes spilled')
        if self.widest_load is not None and self.widest_load < self.vector_bytes:
            found.append(f'loads of {self.widest_load} bytes, expected {self.vector_bytes}')
        expected = 4 * min(self.vec, 4) if int(self.arch) >= 90 else 4
        if self.direction in ADDING and self.dtype != 'float64' and \
                self.widest_reduction != expected:
            found.append(f'reductions of {self.widest_reduction} bytes, expected {expected}')
        has_body = int(self.arch) >= 80  # of kernels on tensor cores
        if self.is_window and has_body and self.tensor_core_words != set(TENSOR_CORE_WORDS):
            found.append(f'tensor cores: found only {sorted(self.tensor_core_words or [])}')
        return [f'{self.label}: {text}' for text in found]


def parse_name(arch: str, mangled: str) -> Optional[Kernel]:
    """Template arguments from the mangled name of a kernel."""
    match = re.search(r'(?:dcnv4_|(?=attention_))(\w+?)_kernelI'
                      r'(?:NS0_\d+(Half|BFloat16)E|([df])|5uint4)'
                      r'((?:L[ib]\d+E)*)(?:NS0_8(Float|Fixed)Sum\w+?EE)?EEv', mangled)
    if match is None or match[1] not in DIRECTIONS | ATTENTION:
        return None
    if match[1] == 'window_clear':
        return Kernel(arch, match[1], 'float32', 1)  # reads nothing but a flag
    dtype = TYPES[match[2] or match[3]][0]
    if match[1] == 'window_grad_rest':
        return Kernel(arch, match[1], dtype, 8)
    if match[1] in ATTENTION:
        numbers = re.findall(r'\d+', match[4])
        return Kernel(arch, match[1], dtype, int(numbers[0]) if numbers else 1,
                      'fixed point' if match[5] == 'Fixed' else '')
    first, second = map(int, re.findall(r'\d+', match[4]))
    if match[1] in WINDOW_VECTORS:
        return Kernel(arch, match[1], dtype, WINDOW_VECTORS[match[1]], f'D={first} reach {second}')
    variant = {'forward': 'K=9', 'backward': 'softmax'}[match[1]] if second else ''
    if match[5] == 'Fixed':
        variant = f'{variant} fixed point'.strip()
    return Kernel(arch, match[1], dtype, first, variant)


def find_tool(name: str) -> Optional[str]:
    """A program beside nvcc, on the path, or in an installed triton."""
    nvcc = shutil.which('nvcc')
    spec = importlib.util.find_spec('triton')
    places = [Path(nvcc).resolve().parent / name] if nvcc else []
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / 'backends' / 'nvidia' / 'bin' / name)
    found = next((str(place) for place in places if place.is_file()), None)
    return found or shutil.which(name)


def run(*command: str) -> str:
    """Output and errors of a command, which must succeed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f'check_ptxas: {" ".join(command)} failed\n{result.stderr[-3000:]}')
    return result.stdout + result.stderr


def read_ptxas(arch: str, log: str) -> dict[str, Kernel]:
    """Kernels of a log of `nvcc -Xptxas -v`, by their mangled names."""
    kernels = {}
    pattern = (r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
               r'stores, (\d+) bytes spill loads.*?Used (\d+) registers')
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        kernel = parse_name(arch, name)
        if kernel is None:
            raise SystemExit(f'check_ptxas: unknown kernel {name}')
        kernel.stack, kernel.spills = int(stack), int(stores) + int(loads)
        kernel.registers = int(registers)
        kernels[name] = kernel
    return kernels


def words_in(code: str) -> set[str]:
    """Names of TENSOR_CORE_WORDS that occur."""
    return {name for name, pattern in TENSOR_CORE_WORDS.items() if re.search(pattern, code)}


def functions(sass: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Names of the kernels in disassembled code, with addresses and instructions."""
    for part in sass.split('Function : ')[1:]:
        name, _, code = part.partition('\n')
        found = re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);', code, re.MULTILINE)
        yield name.strip(), [(int(at, 16), line) for at, line in found if 'NOP' not in line]


def add_sass(kernels: dict[str, Kernel], sass: str) -> None:
    """Counts instructions and finds the widest load from global memory, in disassembled code."""
    for name, code in functions(sass):
        lines = [line for _, line in code]
        kernel = kernels[name]
        kernel.instructions = len(lines)
        widths = re.findall(r'\bLDG\.E(?:\.\w+)*', ' '.join(lines))
        kernel.widest_load = max((int((re.findall(r'\.(\d+)\b', load) or ['32'])[0]) // 8
                                  if not re.search(r'\.[US]16', load) else 2 for load in widths),
                                 default=None)
        kernel.tensor_core_words = words_in(' '.join(lines))
        counts = re.findall(r'\bRED[G.]\S*?\.F32(?:x(\d))?\.', ' '.join(lines))
        kernel.widest_reduction = max((4 * int(count or 1) for count in counts), default=None)


def add_ptx(kernels: dict[str, Kernel], ptx: str) -> None:
    """Finds the widest load from global memory in PTX."""
    for part in ptx.split('.entry ')[1:]:
        kernel = kernels[re.match(r'\S+?(?=\()', part)[0]]
        loads = re.findall(r'ld\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)', part)
        kernel.widest_load = max((int(count or 1) * int(bits) // 8 for count, bits in loads),
                                 default=None)
        kernel.tensor_core_words = words_in(part)
        counts = re.findall(r'red\.global\.add(?:\.v(\d))?\.f32', part)
        kernel.widest_reduction = max((4 * int(count or 1) for count in counts), default=None)


def loop_bodies(lines: list[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    """Loops in machine code, inner ones first: first and last instruction, and the text."""
    starts = {address: i for i, (address, _) in enumerate(lines)}
    for i, (_, line) in enumerate(lines):
        target = re.search(r'\bBRA\b.*?\b0x([0-9a-f]+)', line)
        begin = starts.get(int(target[1], 16), i) if target else i
        if begin < i:  # else not the end of a loop
            yield begin, i, ' '.join(text for _, text in lines[begin:i + 1])


def direct_turns(body: str, kernel: Kernel) -> float:
    """How often a loop of a direct kernel runs: 9 taps, 32 channels."""
    team = 32 // kernel.vec
    if kernel.direction == 'backward' and 'RED' in body:
        return 9 if 'SHFL' in body and 'STG' not in body else 1  # taps; taps by nines, channels
    if 'SHFL' in body:
        return math.log2(team)
    if 'LDG.E.128' in body:  # forward, channels
        return 1
    if 'F2I' in body:  # coefficients
        return -(-9 // team)
    return -(-27 // team) if 'STG' in body and 'LDS' in body else 0  # results; borders, padding


def attention_turns(body: str, kernel: Kernel) -> float:
    """How often a loop of a kernel of attention runs: 4 levels, 4 points, 32 channels."""
    team, count = 32 // kernel.vec, {'attention_forward': 16}.get(kernel.direction, 32)
    has_math = 'F2I' in body
    if kernel.direction == 'attention_forward':
        if 'LDG.E.128' in body:  # two samples a turn; the loops around it once
            return 1 if has_math or 'STG' in body or 'SHFL' in body else count / 2
        return -(-count // team) if has_math else math.log2(team) if 'SHFL' in body else 0
    if 'RED' in body:  # samples; around them once, with the last additions
        return count if body.count('RED') <= (kernel.vec if 'F32x4' in body else 4 * kernel.vec) \
            else 1
    return math.log2(team) if 'SHFL' in body else -(-count // team)


def window_turns(body: str, kernel: Kernel) -> float:
    """How often a loop of a kernel on tensor cores runs: 16x8 pixels, 64 channels."""
    depth, reach = map(int, re.findall(r'\d+', kernel.variant))
    cells = (16 + 2 * reach) * (8 + 2 * reach)  # of 8 chunks, copied by all threads
    # the gradient of value takes group after group, all of its warps together; the others take
    # units of 32 rows
    is_value = kernel.direction == 'window_grad_value'
    warps = 4 if depth == 64 and not is_value else 8
    if 'HMMA' in body and 'STG' in body:
        return window_units(kernel)
    if is_value and 'STS' not in body or 'LDG.E.128' in body:  # far taps; sums again
        return 0
    if is_value and 'F2I' in body:  # output pixels, a thread each
        return -(-cells // (32 * warps))
    rows = 32 if depth == 64 or is_value else 16  # of offset_mask, at a time
    if 'LDGSTS' in body and 'SHFL' in body:
        return rows * 8 / 32 / body.count('LDGSTS')
    if 'STG' in body and 'LDS' in body:  # gradients of offset_mask
        return rows / 4
    if 'LDGSTS' in body:  # cells; the forward kernel copies them in its first turn
        turns = window_units(kernel) if kernel.direction == 'window_forward' else 1
        return cells * 8 / (32 * warps) / body.count('LDGSTS') / turns
    return 1


def window_units(kernel: Kernel) -> int:
    """How many units of work a warp does in turn."""
    depth = int(re.findall(r'\d+', kernel.variant)[0])
    if kernel.direction == 'window_grad_value':
        return 64 // depth
    return {16: 2, 32: 1, 64: 1}[depth]


def executed_instructions(lines: list[tuple[int, str]], kernel: Kernel) -> float:
    """Instructions per 256 outputs that a warp executes, see INTRODUCTION.

    From machine code: straight through, both sides of branches included, with loops weighed.
    """
    last = max(i for i, (_, line) in enumerate(lines) if 'EXIT' in line)  # then: detours
    weights = [1.0] * (last + 1)
    for begin, end, body in loop_bodies(lines[:last]):
        turns = (attention_turns if kernel.direction in ATTENTION else
                 window_turns if kernel.is_window else direct_turns)
        factor = turns(body, kernel)
        for i in range(begin, end + 1):
            weights[i] *= factor
    if not kernel.is_window:
        samples = 16 / 32 if kernel.direction == 'attention_backward' else 1  # of an output
        return sum(weights) * 256 * samples / (32 * kernel.vec)
    depth = int(re.findall(r'\d+', kernel.variant)[0])
    rows = 16 if kernel.direction == 'window_grad_value' else 32
    return sum(weights) * 256 / (rows * depth * window_units(kernel))


def add_executed(kernels: dict[str, Kernel], sass: str) -> None:
    """Counts what warps execute of the kernels that INTRODUCTION names, in disassembled code."""
    for name, lines in functions(sass):
        kernel = kernels[name]
        is_widest = kernel.vector_bytes == 16 and kernel.dtype != 'float64'
        is_plain = is_widest and kernel.variant == PLAIN.get(kernel.direction)
        if kernel.is_window or is_plain:
            kernel.executed = executed_instructions(lines, kernel)


def compile_kernels(arch: str, source: Path, folder: Path, count: bool) -> list[Kernel]:
    """Compiles one .cu file and returns its kernels; `count`: with what they execute."""
    flags = ['-std=c++17', '-O3', f'-arch=sm_{arch}']
    cubin = folder / f'{source.stem}-{arch}.cubin'
    log = run('nvcc', *flags, '-cubin', '-Xptxas', '-v', '-o', str(cubin), str(source))
    kernels = read_ptxas(arch, log)
    disassembler = find_tool('cuobjdump')
    if disassembler is not None and find_tool('nvdisasm') is not None:
        add_sass(kernels, run(disassembler, '--dump-sass', str(cubin)))
        if count:  # code for one dtype of offsets: a sum over both would say nothing
            run('nvcc', *flags, '-DMMDCNV4_OFFSETS_AS_VALUE', '-cubin', '-o', str(cubin),
                str(source))
            add_executed(kernels, run(disassembler, '--dump-sass', str(cubin)))
    else:
        ptx = cubin.with_suffix('.ptx')
        run('nvcc', *flags, '-ptx', '-o', str(ptx), str(source))
        add_ptx(kernels, ptx.read_text())
    return list(kernels.values())


def print_table(kernels: list[Kernel]) -> None:
    """One line per kernel."""
    print(f'{"kernel":58} {"registers":>9} {"stack":>6} {"spills":>7} {"load":>5} '
          f'{"reduction":>9} {"instructions":>13}')
    for kernel in kernels:
        count = '-' if kernel.instructions is None else kernel.instructions
        load, reduction = kernel.widest_load or '-', kernel.widest_reduction or '-'
        print(f'{kernel.label:58} {kernel.registers:9} {kernel.stack:6} {kernel.spills:7} '
              f'{load:>5} {reduction:>9} {count:>13}')


def summary(kernels: list[Kernel]) -> str:
    """A Markdown table: one line per kind of kernel and dtype, the largest number of each."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    kinds: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        shape = kernel.variant if kernel.is_window else 'all widths'
        kinds.setdefault((kernel.direction, shape, kernel.dtype), []).append(kernel)

    def cells(group: list[Kernel], name: str, spec: str = '') -> str:
        numbers = []
        for arch in archs:
            known = [getattr(kernel, name) for kernel in group if kernel.arch == arch]
            known = [number for number in known if number is not None]
            numbers.append(format(max(known), spec) if known else '-')
        return ' / '.join(numbers)

    lines = [f'| kernel | shape | dtype | kernels | registers, {" / ".join(archs)} | stack '
             '| spills | instructions | executed per 256 outputs |',
             '| --- | --- | --- | --- | --- | --- | --- | --- | --- |']
    for (direction, shape, dtype), group in sorted(kinds.items()):
        lines.append(f'| {direction} | {shape} | {dtype} | {len(group) // len(archs)} '
                     f'| {cells(group, "registers")} | {max(k.stack for k in group)} '
                     f'| {max(k.spills for k in group)} | {cells(group, "instructions")} '
                     f'| {cells(group, "executed", ".0f")} |')
    nvcc = re.search(r'release ([\d.]+)', run('nvcc', '--version'))
    return INTRODUCTION.format(nvcc=nvcc[1] if nvcc else '?', archs=', '.join(
        f'sm_{arch}' for arch in archs)) + '\n'.join(lines) + '\n'


def main() -> int:
    """Returns the number of broken rules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', nargs='+', default=['80', '90', '100'], help='without sm_')
    parser.add_argument('--quiet', action='store_true', help='print problems only')
    parser.add_argument('--write', type=Path, help='write a summary to this Markdown file')
    args = parser.parse_args()
    if shutil.which('nvcc') is None:
        raise SystemExit('check_ptxas: nvcc is not installed')
    sources = sorted(path for path in (ROOT / 'csrc' / 'cuda').rglob('*.cu')
                     if not path.name.endswith('_cuda.cu'))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda pair: compile_kernels(*pair, Path(folder), args.write is not None),
                         itertools.product(args.arch, sources))
        kernels = [kernel for file in files for kernel in file]
    if not args.quiet:
        print_table(kernels)
    if args.write is not None:
        args.write.write_text(summary(kernels))
    problems = [text for kernel in kernels for text in kernel.problems()]
    print(f'{len(kernels)} kernels, {len(kernels) // len(args.arch)} per architecture; '
          f'{len(problems)} problems')
    print('\n'.join(problems))
    return len(problems)


if __name__ == '__main__':
    sys.exit(min(main(), 100))
