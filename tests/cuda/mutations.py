# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Puts faults into copies of the kernels, one at a time, and shows which tests see them.

python tests/cuda/mutations.py [--only PATTERN] [--jobs N]

The faults are in mutants_*.py, each with the tests that should see it and the sources to compile
with it; dev/reliability/inject.py does the same with Python. Only these sources are compiled, the
others are linked as they are: for the CUDA kernels to the emulator, for the CPU kernels to an
extension that has the kernels of any processor alone. Templates are weak symbols, of which the
linker takes the first: faulty objects come first. Before the faults, the same sources are compiled
without any, and all of the tests must be green.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

import mutants_cpu  # noqa: E402
import mutants_direct  # noqa: E402
import mutants_float  # noqa: E402
import mutants_forward  # noqa: E402
import mutants_window  # noqa: E402

from helpers.emulator_build import FLAGS, EmulatorBuild  # noqa: E402
from helpers.faults import Fault  # noqa: E402

FOLDER = ROOT / '.build' / 'mutants'
CXX = os.environ.get('CXX') or 'g++'
FAULTS = [*mutants_window.FAULTS, *mutants_forward.FAULTS, *mutants_float.FAULTS,
          *mutants_direct.FAULTS, *mutants_cpu.FAULTS]
SECONDS = 300  # for the tests of one fault; a barrier that is missing may make them hang
# half of the time of -O1, and the sanitizers see as much
QUICK = ['-O0' if flag == '-O1' else flag for flag in FLAGS if not flag.startswith('-W')] + ['-w']
NATIVE = ['-std=c++20', '-O0', '-fPIC', '-w', '-fvisibility=hidden', '-fno-math-errno',
          '-fno-trapping-math', '-fopenmp', '-DMMDCNV4_COMPILER="mutant"',
          '-DTORCH_EXTENSION_NAME=_C']
# compiled once, for all sources that know torch
TORCH_HEADERS = ('torch/library.h', 'torch/csrc/autograd/custom_function.h', 'ATen/Parallel.h',
                 'ATen/core/Tensor.h', 'torch/csrc/autograd/python_variable.h')
LEFT_OUT = 'mutations.py has left out this kernel'

_objects: dict[Path, Path] = {}  # of the emulator, without faults


class Result(NamedTuple):
    """What came of a fault."""

    fault: Fault
    red: str  # the test that saw it, or ''
    message: str
    seconds: float

    @property
    def verdict(self) -> str:
        if self.fault.equivalent:
            return 'NOT EQUIVALENT' if self.red else 'equivalent'
        return 'caught' if self.red else 'SURVIVED'


def is_native(fault: Fault) -> bool:
    return fault.units[0].startswith('csrc/cpu')


def run(*command: str) -> None:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-3000:]}')


class Compiler:
    """Builds programs with faulty sources from a copy of the checkout's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ('csrc', 'tests/cuda/emulator'):
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(ROOT / name, folder / name)
        self.dispatch = (folder / 'csrc/cuda/dispatch.h').read_text()

    def emulator(self, fault: Fault) -> Path:
        """The emulator with the fault's units from the copy."""
        self.keep(widths_of(fault.tests))
        objects = []
        for number, unit in enumerate(fault.units):
            objects.append(str(self.folder / f'{number}.o'))
            run(CXX, *QUICK, '-I', str(self.folder / 'tests/cuda/emulator'), '-x', 'c++', '-c',
                str(self.folder / unit), '-o', objects[-1])
        others = [str(compiled) for unit, compiled in _objects.items()
                  if unit.relative_to(ROOT).as_posix() not in fault.units]
        program = self.folder / 'emulator'
        run(CXX, *QUICK, *objects, *others, '-o', str(program))
        return program

    def keep(self, widths: Sequence[int]) -> None:
        """Of the tensor-core kernels only those that the tests call: each is a second or so."""
        text = self.dispatch
        for number in {16, 32, 64} - set(widths):
            text, count = re.subn(rf'(if \(depth == {number}\)) return .*;',
                                  rf'\1 throw std::logic_error("{LEFT_OUT}");', text)
            assert count == 1, f'dispatch.h has {count} cases for depth == {number}'
        (self.folder / 'csrc/cuda/dispatch.h').write_text(text)

    def native(self, fault: Fault) -> Path:
        """A folder with the package and an extension with the fault's units from the copy."""
        objects = []
        for number, unit in enumerate(fault.units):
            objects.append(str(self.folder / f'{number}.o'))
            run(CXX, *native_flags(unit), '-c', str(self.folder / unit), '-o', objects[-1])
        others = [str(native_object(unit)) for unit in native_units() if unit not in fault.units]
        package = self.folder / 'native' / 'mmdcnv4'
        package.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / 'mmdcnv4').iterdir():
            if path.suffix != '.so' and path.name != '__pycache__':
                (package / path.name).unlink(missing_ok=True)
                (package / path.name).symlink_to(path)
        library = package / f'_C{sysconfig.get_config_var("EXT_SUFFIX")}'
        library.unlink(missing_ok=True)
        run(CXX, '-shared', *objects, *others, '-o', str(library),
            *(f'-L{path}' for path in cpp_extension.library_paths()),
            '-lc10', '-ltorch', '-ltorch_cpu', '-ltorch_python')
        return package.parent


def widths_of(tests: Sequence[str]) -> tuple[int, ...]:
    wide = ('test_bank_conflicts', 'test_shifted_maps', 'test_far_taps_are_listed',
            'test_nothing_left_over')
    widths = {int(found) for test in tests for found in re.findall(r'[\[x-](32|64)(?=[]-])', test)}
    return (16, *sorted(widths | {32 for test in tests for name in wide if name in test}))


def native_units() -> Iterator[str]:
    """All but the kernels of certain processors."""
    for path in sorted([*(ROOT / 'csrc').glob('*.cpp'), *(ROOT / 'csrc/cpu').glob('*.cpp')]):
        if path.name not in ('kernels_avx2.cpp', 'kernels_avx512.cpp'):
            yield path.relative_to(ROOT).as_posix()


def native_object(unit: str) -> Path:
    return FOLDER / 'native' / f'{Path(unit).name}.o'


def native_flags(unit: str) -> list[str]:
    includes = [f'-I{path}' for path in (*cpp_extension.include_paths(),
                                         sysconfig.get_paths()['include'])]
    if 'kernels_' in unit or '_plan' in unit:
        return [*NATIVE, *includes]
    return [*NATIVE, '-include', str(FOLDER / 'native' / 'torch.h'), *includes]


def build_native() -> None:
    """The objects of the extension without a fault."""
    folder = FOLDER / 'native'
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / 'torch.h'
    header.write_text(''.join(f'#include <{name}>\n' for name in TORCH_HEADERS))
    newest = max(path.stat().st_mtime for path in (ROOT / 'csrc').rglob('*') if path.is_file())
    units = [unit for unit in native_units() if not native_object(unit).exists()
             or native_object(unit).stat().st_mtime < newest]
    if units:
        flags = native_flags('kernels_')
        run(CXX, *flags, '-x', 'c++-header', str(header), '-o', str(header) + '.gch')
    for unit in units:
        run(CXX, *native_flags(unit), '-c', str(ROOT / unit), '-o', str(native_object(unit)))


class FirstFailure:
    """A pytest plugin that writes down what runs, and what fails first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, test: str, message: str) -> None:
        self.path.write_text(json.dumps([test, message]))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(nodeid, 'the tests crashed or did not end')

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash: Any = getattr(report.longrepr, 'reprcrash', None)
            text = ' '.join(getattr(crash, 'message', '').split())
            # what the emulator or a sanitizer says, behind their warnings
            found = re.search(r'emulator: .*|runtime error: .*|ERROR: AddressSanitizer: .*', text)
            self.note(report.nodeid, (found[0] if found else text)[:300])


def first_red(fault: Fault, made: Path, notes: Path) -> tuple[str, str]:
    """The first of the fault's tests that fails, and what it says; or nothing. The tests run in a
    fork of this process, which has loaded torch already."""
    notes.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            output = os.open(notes.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(ROOT)
            if is_native(fault):
                sys.path.insert(0, str(made))
            else:
                os.environ['MMDCNV4_EMULATOR'] = str(made)
            code = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *fault.tests],
                               plugins=[FirstFailure(notes)])
            if is_native(fault) and not sys.modules['mmdcnv4._C'].__file__.startswith(str(made)):
                code = 98
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(int(code))
    end = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return '', ''
    test, message = json.loads(notes.read_text()) if notes.exists() else ('', '')
    # 1: a test has failed; below 0: killed by a signal
    if code > 1 or not test or LEFT_OUT in message:
        log = notes.with_suffix('.log').read_text()
        raise RuntimeError(f'{fault.name}: pytest ended with {code}: {message} {log[-3000:]}')
    return test, message


_compiler: Optional[Compiler] = None


def try_fault(fault: Fault) -> Result:
    """In a folder of this process."""
    global _compiler
    started = time.monotonic()
    folder = FOLDER / f'run-{os.getppid()}' / str(os.getpid())
    if _compiler is None:
        _compiler = Compiler(folder)
    before = fault.put_into(folder) if fault.right else None
    try:
        made = _compiler.native(fault) if is_native(fault) else _compiler.emulator(fault)
    finally:
        if before is not None:
            (folder / fault.file).write_text(before)
    test, message = first_red(fault, made, folder / 'notes')
    return Result(fault, test, message, time.monotonic() - started)


def without_faults(faults: Sequence[Fault]) -> Iterator[Fault]:
    """All tests and sources of the faults, but no fault."""
    for native in (False, True):
        chosen = [fault for fault in faults if is_native(fault) == native]
        if chosen:
            yield Fault('no fault', chosen[0].file, '', '',
                        tuple(dict.fromkeys(test for fault in chosen for test in fault.tests)),
                        tuple(dict.fromkeys(unit for fault in chosen for unit in fault.units)))


def prepare(faults: Sequence[Fault]) -> None:
    """Compiles all that has no fault."""
    if not all(map(is_native, faults)):
        build = EmulatorBuild()
        build.start(all_objects=True)
        build.finish()
        build.stop()
        _objects.update(build.objects)
    if any(map(is_native, faults)):
        build_native()


def main() -> int:
    """Tries the faults; 0 if each is seen, or makes no difference as it should."""
    arguments = argparse.ArgumentParser(description='Faults in the kernels, and who sees them.')
    arguments.add_argument('--only', default='', metavar='PATTERN',
                           help='regular expression: names or files of faults')
    arguments.add_argument('--jobs', type=int, default=1)
    args = arguments.parse_args()
    faults = [fault for fault in FAULTS if re.search(args.only, f'{fault.name} {fault.file}')]
    if not faults:
        arguments.error(f'--only: no fault matches {args.only!r}')
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    prepare(faults)
    results = []
    with multiprocessing.get_context('fork').Pool(args.jobs) as pool:
        for result in pool.imap_unordered(try_fault, without_faults(faults)):
            print(f'no fault, {len(result.fault.tests)} tests, {result.seconds:.1f} s: '
                  + (f'RED: {result.red}: {result.message}' if result.red else 'green'), flush=True)
            if result.red:
                return 1
        for result in pool.imap_unordered(try_fault, faults):
            results.append(result)
            by = f' by {result.red.rpartition("/")[2]}: {result.message[:90]}' if result.red else ''
            print(f'{result.fault.name}: {result.verdict}{by} ({result.seconds:.1f} s)', flush=True)
    for verdict in ('caught', 'equivalent', 'SURVIVED', 'NOT EQUIVALENT'):
        count = sum(result.verdict == verdict for result in results)
        print(f'{verdict}: {count} of {len(results)}')
    return int(any(result.verdict.isupper() for result in results))


if __name__ == '__main__':
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(FOLDER / f'run-{os.getpid()}', ignore_errors=True)
