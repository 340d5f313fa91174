# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels and checks what came out: registers, stack, spills, vector loads.

Needs nvcc, no GPU. Instructions are counted where cuobjdump is found (beside nvcc, on the path, or
in an installed triton); without it the vector loads are looked for in the PTX.

Example:
    python dev/cuda/check_ptxas.py --arch 80 90 100 --write csrc/cuda/compiled.md
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))
from machine_code import functions, parts_of
from window_groups import CHUNK_BYTES, Group

ROOT = Path(__file__).resolve().parents[2]
# types of `value` as they are in the names of kernels, and bytes per number
TYPES = {'d': ('float64', 8), 'f': ('float32', 4), 'Half': ('float16', 2),
         'BFloat16': ('bfloat16', 2)}
# kernels on tensor cores: how many bytes a load from global memory should move beside the copies in
# the background, and whether words of float32 are read from shared memory one by one
WINDOW_LOADS = {'window_forward': CHUNK_BYTES, 'window_grad_offset': CHUNK_BYTES,
                'window_grad_value': 4}
FLOAT_WORDS = ('window_forward', 'window_grad_value')
ATTENTION = {f'attention_{name}' for name in ('forward', 'backward', 'rank', 'place')}
DIRECTIONS = {'forward', 'backward', 'window_grad_rest', 'window_clear', *WINDOW_LOADS}
DEPTHS = (16, 32, 64)  # channels of a group, for which kernels are counted
# run by each backward call on tensor cores, and leave at once as a rule
RARE = ('window_grad_rest', 'window_clear')
# direct kernels that most calls take, by their variant
PLAIN = {'forward': 'K=9', 'backward': '', 'attention_forward': '', 'attention_backward': ''}
MOST_ADDED = 4  # channels per thread of the direct gradients, kMostAdded
# 65536 registers and 256 threads per block: this many blocks have to fit on a multiprocessor
REGISTERS = {4: 64, 3: 80, 2: 128}
# kernels that add to the gradient of value in float32
ADDING = ('backward', 'window_grad_rest', 'attention_backward')
# in machine code and in PTX: copies in the background, matrices from shared memory, their product
TENSOR_CORE_WORDS = {'copy': r'\bLDGSTS\b|cp\.async\.cg', 'load': r'\bLDSM\b|ldmatrix\.sync',
                     'multiply': r'\bHMMA\b|mma\.sync'}


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
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # of the shapes: see parts_of
    widest_load: Optional[int] = None
    widest_reduction: Optional[int] = None
    tensor_core_words: Optional[set[str]] = None

    @property
    def label(self) -> str:
        """For tables and messages."""
        shape = self.variant if self.is_window else f'vec {self.vec} {self.variant}'
        return (f'sm_{self.arch} {self.direction} {self.dtype} {shape}').strip()

    @property
    def shape(self) -> str:
        """How its call is told from others in tables."""
        return self.variant if self.is_window else 'all widths'

    @property
    def depth(self) -> int:
        """Channels of a group, where the kernel is made for one number of them."""
        return int(re.findall(r'\d+', self.variant)[0]) if self.is_window else 32

    @property
    def is_window(self) -> bool:
        """Whether it uses tensor cores."""
        return self.direction in WINDOW_LOADS

    @property
    def size(self) -> int:
        """Bytes of a number of `value`."""
        return next(size for name, size in TYPES.values() if name == self.dtype)

    @property
    def vector_bytes(self) -> int:
        """What one load of `value` should move."""
        return self.vec * self.size

    @property
    def expected_words(self) -> set[str]:
        """Names of TENSOR_CORE_WORDS that should occur."""
        has_matrices = self.dtype != 'float32' or self.direction not in FLOAT_WORDS
        return {name for name in TENSOR_CORE_WORDS if name != 'load' or has_matrices}

    def problems(self) -> list[str]:
        """What breaks a rule, in words."""
        is_attention = self.direction == 'attention_forward' and \
            (self.dtype != 'bfloat16' or self.arch not in ('86', '87', '89'))
        blocks = 4 if self.variant == 'K=9' or is_attention else 3
        is_large = self.is_window or self.direction == 'attention_backward'  # 128 threads
        ceiling = REGISTERS[2 if self.dtype == 'float64' or is_large else blocks]
        fills_slice = self.is_window and Group(self.depth, self.size).of_slice == 1
        if fills_slice and self.direction != 'window_grad_value':
            ceiling = 168  # blocks of 128 threads
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
        if self.is_window and has_body and self.tensor_core_words != self.expected_words:
            found.append(f'tensor cores: found {sorted(self.tensor_core_words or [])}, expected '
                         f'{sorted(self.expected_words)}')
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
    dtype, size = TYPES[match[2] or match[3]]
    if match[1] == 'window_grad_rest':
        return Kernel(arch, match[1], dtype, CHUNK_BYTES // size)
    if match[1] in ATTENTION:
        numbers = re.findall(r'\d+', match[4])
        return Kernel(arch, match[1], dtype, int(numbers[0]) if numbers else 1,
                      'fixed point' if match[5] == 'Fixed' else '')
    first, *others = map(int, re.findall(r'\d+', match[4]))
    if match[1] in WINDOW_LOADS:
        return Kernel(arch, match[1], dtype, WINDOW_LOADS[match[1]] // size, f'D={first}')
    (second,) = others
    variant = {'forward': 'K=9', 'backward': 'softmax'}[match[1]] if second else ''
    if match[5] == 'Fixed':
        variant = f'{variant} fixed point'.strip()
    return Kernel(arch, match[1], dtype, first, variant)


def kernel_hash(root: Path = ROOT, of_all: bool = True) -> str:
    """What setup.py computes of the sources in a folder; the program itself would build."""
    tree = ast.parse((ROOT / 'setup.py').read_text())
    function = next(node for node in tree.body
                    if isinstance(node, ast.FunctionDef) and node.name == 'kernel_hash')
    names = {'hashlib': hashlib, 're': re, 'ROOT': root}
    exec(compile(ast.Module([function], []), 'setup.py', 'exec'), names)
    return names['kernel_hash'](of_all)


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


def add_parts(kernels: dict[str, Kernel], sass: str) -> None:
    """Counts what warps execute of the kernels that INTRODUCTION names, in disassembled code."""
    for name, code in functions(sass):
        kernel = kernels[name]
        is_gradient = kernel.direction == 'backward'
        is_widest = kernel.dtype != 'float64' and (
            kernel.vec == MOST_ADDED if is_gradient else kernel.vector_bytes == 16)
        if kernel.is_window or kernel.direction in RARE:
            group = Group(kernel.depth, kernel.size)
            kernel.parts = {kernel.shape: parts_of(code, kernel.direction, group)}
        elif is_widest and kernel.variant == PLAIN.get(kernel.direction):
            depths = (32,) if kernel.direction in ATTENTION else DEPTHS
            # teams of the gradients are those of four bytes per channel
            size = 16 // MOST_ADDED if is_gradient else kernel.size
            kernel.parts = {f'D={depth}': parts_of(code, kernel.direction, Group(depth, size))
                            for depth in depths}


class Compiler:
    """Compiles .cu files for an architecture.

    Args:
        folder: what was compiled is kept there and taken again where no source is newer.
        is_counted: also with one type of offsets: a sum over two would say nothing.
    """

    def __init__(self, folder: Path, is_counted: bool) -> None:
        self.folder, self.is_counted = folder, is_counted
        self.changed = max(path.stat().st_mtime for path in (ROOT / 'csrc').rglob('*')
                           if path.suffix in ('.cu', '.cuh', '.h'))
        self.disassembler = find_tool('cuobjdump') if find_tool('nvdisasm') is not None else None

    def make(self, path: Path, source: Path, *flags: str) -> Path:
        """Runs nvcc for `path`, unless that is new; what it prints goes to `path`.log."""
        if not path.exists() or path.stat().st_mtime < self.changed:
            log = run('nvcc', *flags, '-o', f'{path}.new', str(source))
            path.with_name(f'{path.name}.log').write_text(log)
            path.with_name(f'{path.name}.new').replace(path)
        return path

    def __call__(self, arch: str, source: Path) -> list[Kernel]:
        """The kernels of one .cu file."""
        flags = ('-std=c++17', '-O3', f'-arch=sm_{arch}')
        stem = self.folder / f'{source.stem}-{arch}'
        cubin = self.make(Path(f'{stem}.cubin'), source, *flags, '-cubin', '-Xptxas', '-v')
        kernels = read_ptxas(arch, cubin.with_name(f'{cubin.name}.log').read_text())
        if self.disassembler is not None:
            add_sass(kernels, run(self.disassembler, '--dump-sass', str(cubin)))
            if self.is_counted:
                if not source.stem.startswith('attention'):
                    cubin = self.make(Path(f'{stem}-counted.cubin'), source, *flags, '-cubin',
                                      '-DMMDCNV4_OFFSETS_AS_VALUE')
                add_parts(kernels, run(self.disassembler, '--dump-sass', str(cubin)))
        else:
            add_ptx(kernels, self.make(Path(f'{stem}.ptx'), source, *flags, '-ptx').read_text())
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


def main() -> int:
    """Returns the number of broken rules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', nargs='+', default=['80', '90', '100'], help='without sm_')
    parser.add_argument('--quiet', action='store_true', help='print problems only')
    parser.add_argument('--write', type=Path, help='write tables to this Markdown file')
    parser.add_argument('--objects', type=Path, metavar='FOLDER',
                        help='keep what was compiled, and take what is there and not too old')
    args = parser.parse_args()
    if shutil.which('nvcc') is None:
        raise SystemExit('check_ptxas: nvcc is not installed')
    sources = sorted(path for path in (ROOT / 'csrc' / 'cuda').rglob('*.cu')
                     if not path.name.endswith('_cuda.cu'))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiler = Compiler(args.objects or Path(folder), args.write is not None)
        compiler.folder.mkdir(parents=True, exist_ok=True)
        if args.write is not None and compiler.disassembler is None:
            raise SystemExit('check_ptxas: --write counts in machine code: needs cuobjdump and '
                             'nvdisasm, beside nvcc or of triton')
        files = pool.map(lambda pair: compiler(*pair), itertools.product(args.arch, sources))
        kernels = [kernel for file in files for kernel in file]
    if not args.quiet:
        print_table(kernels)
    if args.write is not None:
        from compiled_tables import tables  # needs torch
        nvcc = re.search(r'release ([\d.]+)', run('nvcc', '--version'))
        args.write.write_text(tables(kernels, nvcc[1] if nvcc else '?', kernel_hash()))
    problems = [text for kernel in kernels for text in kernel.problems()]
    print(f'{len(kernels)} kernels, {len(kernels) // len(args.arch)} per architecture; '
          f'{len(problems)} problems')
    print('\n'.join(problems))
    return len(problems)


if __name__ == '__main__':
    sys.exit(min(main(), 100))
