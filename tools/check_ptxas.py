# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels and checks what came out: registers, stack, spills, vector loads.

Needs nvcc, no GPU. Instructions are counted where cuobjdump is found (beside nvcc, on the path, or
in an installed triton); without it the vector loads are looked for in the PTX.

Example:
    python tools/check_ptxas.py --arch 80 90 100
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
# bytes per number, wider type first in the name of the kernel
TYPES = {'d': ('float64', 8), 'f': ('float32', 4), 'Half': ('float16', 2),
         'BFloat16': ('bfloat16', 2)}
# 65536 registers and 256 threads per block: this many blocks have to fit on a multiprocessor
REGISTERS = {4: 64, 3: 80, 2: 128}


@dataclass
class Kernel:
    """One compiled kernel of one architecture."""

    arch: str
    direction: str
    dtype: str
    offset_dtype: str
    vec: int
    variant: bool
    registers: int = 0
    stack: int = 0
    spills: int = 0
    instructions: Optional[int] = None
    widest_load: Optional[int] = None
    widest_reduction: Optional[int] = None

    @property
    def label(self) -> str:
        """For tables and messages."""
        special = {'forward': 'K=9', 'backward': 'softmax'}[self.direction] if self.variant else ''
        return (f'sm_{self.arch} {self.direction} {self.dtype} {self.offset_dtype} '
                f'vec {self.vec} {special}').strip()

    @property
    def vector_bytes(self) -> int:
        """What one load of `value` should move."""
        return self.vec * next(size for name, size in TYPES.values() if name == self.dtype)

    def problems(self) -> list[str]:
        """What breaks a rule, in words."""
        blocks = 2 if self.dtype == 'float64' else 4 if self.variant else 3
        ceiling = REGISTERS[min(blocks, 3) if self.direction == 'backward' else blocks]
        found = []
        if self.registers > ceiling:
            found.append(f'{self.registers} registers, at most {ceiling}')
        if self.stack or self.spills:
            found.append(f'{self.stack} bytes of stack, {self.spills} bytes spilled')
        if self.widest_load is not None and self.widest_load < self.vector_bytes:
            found.append(f'loads of {self.widest_load} bytes, expected {self.vector_bytes}')
        expected = 4 * min(self.vec, 4) if int(self.arch) >= 90 else 4
        if self.direction == 'backward' and self.dtype != 'float64' and \
                self.widest_reduction != expected:
            found.append(f'reductions of {self.widest_reduction} bytes, expected {expected}')
        return [f'{self.label}: {text}' for text in found]


def parse_name(arch: str, mangled: str) -> Optional[Kernel]:
    """Template arguments from the mangled name of a kernel."""
    match = re.search(r'dcnv4_(forward|backward)_kernelI(.*)Li(\d+)ELb([01])E', mangled)
    if match is None:
        return None
    types = re.findall(r'NS0_\d+(Half|BFloat16)E|S\d?_|([df])', match[2])
    names = [TYPES[long or short][0] for long, short in types if long or short]
    names = names if len(names) == 2 else names * 2  # the second repeats the first
    return Kernel(arch, match[1], names[0], names[1], int(match[3]), match[4] == '1')


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


def add_sass(kernels: dict[str, Kernel], sass: str) -> None:
    """Counts instructions and finds the widest load from global memory, in disassembled code."""
    for part in sass.split('Function : ')[1:]:
        name, _, code = part.partition('\n')
        lines = re.findall(r'^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);', code, re.MULTILINE)
        kernel = kernels[name.strip()]
        kernel.instructions = sum('NOP' not in line for line in lines)
        widths = re.findall(r'\bLDG\.E(?:\.\w+)*', ' '.join(lines))
        kernel.widest_load = max(int((re.findall(r'\.(\d+)\b', load) or ['32'])[0]) // 8
                                 if not re.search(r'\.[US]16', load) else 2 for load in widths)
        counts = re.findall(r'\bRED[G.]\S*?\.F32(?:x(\d))?\.', ' '.join(lines))
        kernel.widest_reduction = max((4 * int(count or 1) for count in counts), default=None)


def add_ptx(kernels: dict[str, Kernel], ptx: str) -> None:
    """Finds the widest load from global memory in PTX."""
    for part in ptx.split('.entry ')[1:]:
        kernel = kernels[re.match(r'\S+?(?=\()', part)[0]]
        loads = re.findall(r'ld\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)', part)
        kernel.widest_load = max(int(count or 1) * int(bits) // 8 for count, bits in loads)
        counts = re.findall(r'red\.global\.add(?:\.v(\d))?\.f32', part)
        kernel.widest_reduction = max((4 * int(count or 1) for count in counts), default=None)


def compile_kernels(arch: str, source: Path, folder: Path) -> list[Kernel]:
    """Compiles one .cu file and returns its kernels."""
    flags = ['-std=c++17', '-O3', f'-arch=sm_{arch}']
    cubin = folder / f'{source.stem}-{arch}.cubin'
    log = run('nvcc', *flags, '-cubin', '-Xptxas', '-v', '-o', str(cubin), str(source))
    kernels = read_ptxas(arch, log)
    disassembler = find_tool('cuobjdump')
    if disassembler is not None and find_tool('nvdisasm') is not None:
        add_sass(kernels, run(disassembler, '--dump-sass', str(cubin)))
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
        reduction = kernel.widest_reduction or '-'
        print(f'{kernel.label:58} {kernel.registers:9} {kernel.stack:6} {kernel.spills:7} '
              f'{kernel.widest_load:5} {reduction:>9} {count:>13}')


def main() -> int:
    """Returns the number of broken rules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', nargs='+', default=['80', '90', '100'], help='without sm_')
    parser.add_argument('--quiet', action='store_true', help='print problems only')
    args = parser.parse_args()
    if shutil.which('nvcc') is None:
        raise SystemExit('check_ptxas: nvcc is not installed')
    sources = sorted((ROOT / 'csrc' / 'cuda').glob('dcnv4_*ward_*.cu'))
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            for source in sources:
                kernels += compile_kernels(arch, source, Path(folder))
    if not args.quiet:
        print_table(kernels)
    problems = [text for kernel in kernels for text in kernel.problems()]
    print(f'{len(kernels)} kernels, {len(kernels) // len(args.arch)} per architecture; '
          f'{len(problems)} problems')
    print('\n'.join(problems))
    return len(problems)


if __name__ == '__main__':
    sys.exit(min(main(), 100))
