# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Everything that a few minutes on a GPU can tell about the CUDA kernels, in one command.

    make first-contact OUT=folder          all steps, in at most 590 s
    make test-gpu                          build, smoke, tests and sanitizers
    python dev/gpu/contact.py --steps smoke bench --out folder

Steps: environment, build, smoke (every family of kernels against the reference), bench (two shapes
alongside peers), profile (ncu: instructions, stalls, bytes), tests, attention_smoke,
attention_tests, attention_bench (the same for multi-scale deformable attention), sanitizers. Each
runs in processes of its own, so that an illegal access in one leaves the others their evidence;
each has a limit; a step for which no time is left is reported as not run. What a step prints goes
to OUT as it comes, one log per step, and `summary.txt` is rewritten after each. An extension that
is already in the folder (built elsewhere for this Python, torch and architecture) is used if it has
CUDA kernels; otherwise it is built. Needs a CUDA build of torch, numpy and pytest; no OpenMMLab
package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / 'benchmarks' / 'gpu.py'
SHAPES = ('64x56x56x128', '1x100x160x256')
HAS_KERNELS = ('from mmdcnv4.ops import _extension as e; '
               'assert "cuda" in e.build_info, e.missing_reason; print(e.build_info["cuda"])')
ENVIRONMENT = ('import os, sys, torch; print("Python", sys.version.split()[0], "torch", '
               'torch.__version__, os.cpu_count(), "CPUs"); '
               'torch.cuda.is_available() or sys.exit("torch sees no GPU"); '
               'p = torch.cuda.get_device_properties(0); print(p)')
# parts of the tests, each in a process: pytest arguments, MMDCNV4_FAST
TESTS = {'direct': (['tests/cuda/test_dcnv4_gpu.py'], '0'),
         'tensor cores': (['tests/cuda/test_fast_gpu.py'], None),
         'tensor cores by the switch': (['tests/cuda/test_dcnv4_gpu.py', '-k',
                                         'not elements and not large and not f64'], '1'),
         'in PyTorch': (['tests/cuda/test_gpu_behaviour.py'], None)}
KERNELS = 'regex:dcnv4|forward_kernel|backward_kernel'  # ours and the released ones


class Command(NamedTuple):
    """A process of a step."""

    name: str
    arguments: Sequence[str]
    limit: float  # seconds
    environment: dict[str, str] = {}


class Contact:
    """Runs the steps and keeps the summary.

    Args:
        out: folder for logs and results.
        budget: seconds for everything.
        python: interpreter of all processes.
    """

    def __init__(self, out: Path, budget: float, python: str):
        self.out, self.budget, self.python = out, budget, python
        self.started = time.monotonic()
        self.summary: list[str] = []
        self.environment = {**os.environ, 'PYTHONUNBUFFERED': '1',
                            'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1', 'OMP_NUM_THREADS': '4'}
        for name in ('MMDCNV4_FAST', 'MMDCNV4_BACKEND'):
            self.environment.pop(name, None)
        path = self.environment.get('PYTHONPATH')
        self.environment['PYTHONPATH'] = str(ROOT) + (os.pathsep + path if path else '')
        # ninja next to the interpreter halves the time of a build
        self.environment['PATH'] = os.pathsep.join(
            (str(Path(python).parent), self.environment.get('PATH', ''), '/usr/local/cuda/bin'))
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def tell(self, line: str) -> None:
        """Adds a line to the summary, on the screen and in the file."""
        self.summary.append(line)
        print(line, flush=True)
        (self.out / 'summary.txt').write_text('\n'.join(self.summary) + '\n')

    def run(self, *commands: Command) -> bool:
        """Runs commands at the same time; True if all of them succeeded."""
        running = []
        for command in commands:
            limit = min(command.limit, self.left - 5)
            if limit < 5:
                self.tell(f'not run  {command.name}: no time left')
                continue
            log = self.out / (command.name.replace(' ', '-') + '.log')
            with log.open('w') as file:
                process = subprocess.Popen(list(command.arguments), cwd=ROOT, stdout=file,
                                           stderr=subprocess.STDOUT, start_new_session=True,
                                           env={**self.environment, **command.environment})
            running.append((command, process, log, time.monotonic(), limit))
        results = [self.wait(*one) for one in running]
        return len(results) == len(commands) and all(results)

    def wait(self, command: Command, process: subprocess.Popen, log: Path, started: float,
             limit: float) -> bool:
        """Waits for one process; the last line of its log goes into the summary."""
        try:
            code = process.wait(max(1, started + limit - time.monotonic()))
            verdict = 'ok      ' if code == 0 else 'FAILED  '
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code, verdict = -9, f'FAILED (stopped after {limit:.0f} s) '
        lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
        last = lines[-1].strip()[:150] if lines else ''
        self.tell(f'{verdict} {command.name} ({time.monotonic() - started:.0f} s): {last}')
        return code == 0

    def module(self, *arguments: str) -> list[str]:
        """A command of this Python."""
        return [self.python, *arguments]

    # the steps

    def step_environment(self) -> bool:
        """Python, torch, device, driver, clocks."""
        smi = ['nvidia-smi'] if shutil.which('nvidia-smi') else ['echo', 'no nvidia-smi']
        self.run(Command('nvidia-smi', smi, 20))
        return self.run(Command('environment', self.module('-c', ENVIRONMENT), 60))

    def step_build(self) -> bool:
        """Uses the extension in this folder, or builds one."""
        if self.run(Command('extension that is here', self.module('-c', HAS_KERNELS), 60)):
            return True
        script = ['bash', str(ROOT / 'dev' / 'gpu' / 'build.sh'), self.python]
        return (self.run(Command('build', script, 300))
                and self.run(Command('extension', self.module('-c', HAS_KERNELS), 60)))

    def step_smoke(self) -> bool:
        """Every family of kernels against the reference."""
        return self.run(Command('smoke', self.module('-m', 'mmdcnv4.info', '--check'), 120))

    def step_bench(self) -> bool:
        """Two shapes; the released package apart, since it may take its process with it."""
        def bench(name: str, dtype: str, seconds: int, *peers: str) -> bool:
            arguments = [str(BENCHMARK), '--shapes', *SHAPES, '--dtypes', dtype, '--offsets', 'D1',
                         'D0', 'D2', 'D3', '--group-channels', '32', '16', '--budget', str(seconds),
                         '--output', str(self.out / name), '--peers', *peers]
            return self.run(Command(name, self.module(*arguments), seconds + 40))

        results = [bench('bench', 'float16', 50, 'ours', 'ours fast', 'depthwise 7x7 nhwc'),
                   bench('bench-released', 'float16', 50, 'ours', 'ours fast', 'official'),
                   bench('bench-float32', 'float32', 25, 'ours', 'ours fast')]
        return all(results)

    def step_profile(self) -> bool:
        """Counters of one launch of each kernel, and of each instruction."""
        ncu = shutil.which('ncu', path=self.environment['PATH'])
        if ncu is None:
            self.tell('not run  profile: ncu is not installed')
            return True
        report = str(self.out / 'profile.ncu-rep')
        done = self.run(Command('profile', [
            ncu, '--clock-control', 'none', '--profile-from-start', 'off', '--kernel-name', KERNELS,
            '--set', 'full', '-f', '-o', report.removesuffix('.ncu-rep'), self.python,
            str(ROOT / 'dev' / 'gpu' / 'profiled_calls.py')], 120))
        for page in ('raw', 'source') if done else ():
            self.run(Command(f'profile {page}', [ncu, '--import', report, '--page', page, '--csv'],
                             40))
        return done and self.run(Command('profile table', self.module(
            str(ROOT / 'dev' / 'gpu' / 'profiled_calls.py'), '--table',
            str(self.out / 'profile-raw.log')), 20))

    def step_tests(self) -> bool:
        """The tests on a GPU, their parts at the same time."""
        return self.run(*(Command(f'tests {name}', self.module(
            '-m', 'pytest', '-q', '--tb=short', '--maxfail=20', '-p', 'no:cacheprovider',
            *arguments), 170, {} if fast is None else {'MMDCNV4_FAST': fast})
            for name, (arguments, fast) in TESTS.items()))

    def step_attention_smoke(self) -> bool:
        """Multi-scale deformable attention in every type against its form in PyTorch."""
        return self.run(Command('attention smoke',
                                self.module('-m', 'mmdcnv4.ops.attention_check'), 60))

    def step_attention_tests(self) -> bool:
        """Its tests on a GPU."""
        return self.run(Command('attention tests', self.module(
            '-m', 'pytest', '-q', '--tb=short', '--maxfail=20', '-p', 'no:cacheprovider',
            'tests/cuda/test_ms_deform_attn_gpu.py'), 120))

    def step_attention_bench(self) -> bool:
        """Its time in DINO and BEVFormer; mmcv's kernel beside it where a library of it is here."""
        library = BENCHMARK.with_name('libmmcv_attention.so')
        peer = ['--mmcv-library', str(library)] if library.exists() else []
        return self.run(Command('attention bench', self.module(
            str(BENCHMARK.with_name('gpu_attention.py')), '--output',
            str(self.out / 'attention.json'), *peer), 90))

    def step_sanitizers(self) -> bool:
        """Small calls of all kernels under memcheck, then racecheck; only our kernels."""
        sanitizer = shutil.which('compute-sanitizer', path=self.environment['PATH'])
        if sanitizer is None:
            self.tell('not run  sanitizers: compute-sanitizer is not installed')
            return True
        results = [self.run(Command(tool, [
            sanitizer, '--tool', tool, '--kernel-name', 'kns=dcnv4', '--report-api-errors', 'no',
            '--print-limit', '20', '--error-exitcode', '9', *self.module(
                '-m', 'mmdcnv4.ops.kernel_check')], 110,
            # every allocation is one of its own, so that its end is seen
            {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'})) for tool in ('memcheck', 'racecheck')]
        return all(results)


STEPS: dict[str, Callable[[Contact], bool]] = {
    name: getattr(Contact, f'step_{name}')
    for name in ('environment', 'build', 'smoke', 'bench', 'profile', 'tests',
                  'attention_smoke', 'attention_tests', 'attention_bench', 'sanitizers')}
# without these nothing else can run
NEEDED = ('environment', 'build')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the steps in order; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT / '.build' / 'contact')
    parser.add_argument('--budget', type=float, default=590, metavar='SECONDS')
    parser.add_argument('--python', default=sys.executable)
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=list(STEPS))
    args = parser.parse_args(argv)
    contact = Contact(args.out.resolve(), args.budget, args.python)
    is_good = True
    for name in STEPS:
        if name not in args.steps and name not in NEEDED:
            continue
        print(f'== {name}', flush=True)
        is_good &= (done := STEPS[name](contact))
        if name in NEEDED and not done:
            contact.tell(f'not run  everything else: {name} failed')
            break
    contact.tell(f'{"all is well" if is_good else "something failed"}, '
                 f'{time.monotonic() - contact.started:.0f} s')
    return 0 if is_good else 1


if __name__ == '__main__':
    sys.exit(main())
