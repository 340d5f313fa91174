# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a machine does to a training: a full disk, a killed worker, a killed or stopped process.

python dev/reliability/machine.py [--work-dir DIR]

Prints for each what the training says, how long it took, and what is left in the work directory.
The disk is full by the limit of the size of a file (RLIMIT_FSIZE), which needs no rights.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Optional

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

from kill import Training  # noqa: E402

from helpers.tiny_run import write_config  # noqa: E402
from mmdcnv4.cli.checkpoints import damage  # noqa: E402


def last_lines(log: Path) -> str:
    """What a process said at its end."""
    lines = [line for line in log.read_text().splitlines() if re.match(
        r'(hint|error|\w*Error|SystemExit)\b', line)]
    return '\n    '.join(line[:400] for line in lines[-2:]) or log.read_text()[-300:]


def wait_for(log: Path, text: str, seconds: float = 120) -> None:
    """Waits until a log holds a text."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.is_file() and re.search(text, log.read_text()):
            return
        time.sleep(0.05)
    raise TimeoutError(f'{log} has no {text}: {log.read_text()[-1000:]}')


def report(name: str, code: Optional[int], seconds: float, work_dir: Path, log: Path) -> bool:
    """Prints a result; whether it is right: it ended, and every checkpoint is whole."""
    files = {file.name: damage(file) for file in sorted(work_dir.glob('*.pth'))}
    left = [path.name for path in work_dir.glob('.*.partial')]
    is_right = code not in (None, 0) and not any(files.values())
    print(f'{name}: {"right" if is_right else "WRONG"}; exit {code} after {seconds:.1f} s; whole '
          f'checkpoints {list(files)}, unfinished {left}\n    {last_lines(log)}', flush=True)
    return is_right


def full_disk(folder: Path) -> bool:
    """The second checkpoint does not fit; with one to keep, the first has to stay."""
    config = write_config(folder / 'disk.py', keep=1, length=2, extra=2**19)
    work_dir = folder / 'disk'
    assert Training(config, work_dir).wait() == 0
    size = (work_dir / 'epoch_2.pth').stat().st_size
    (work_dir / 'epoch_2.pth').rename(work_dir / 'epoch_1.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    config = write_config(folder / 'disk.py', keep=1, length=4, extra=2**19)
    begin = time.monotonic()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    process = Training(config, work_dir, '--resume')
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    code = process.wait()
    return report('full disk', code, time.monotonic() - begin, work_dir, work_dir.with_suffix(
        '.log')) and [file.name for file in work_dir.glob('*.pth')] == ['epoch_1.pth']


def killed_worker(folder: Path) -> bool:
    """One of two workers of the data loader is killed."""
    config = write_config(folder / 'worker.py', workers=2, length=50, seconds=0.2)
    work_dir = folder / 'worker'
    process = Training(config, work_dir)
    log = work_dir.with_suffix('.log')
    wait_for(log, r'Epoch\(train\) +\[2\]')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    workers = [int(child) for child in children]
    begin = time.monotonic()
    os.kill(workers[-1], signal.SIGKILL)
    return report('killed worker of the data loader', process.wait(120), time.monotonic() - begin,
                  work_dir, log)


def peer(folder: Path, name: str, blow: int, timeout: int) -> bool:
    """The second of two processes is killed or stopped; the first has to end in words."""
    config = write_config(folder / f'{name}.py', length=200, seconds=0.1)
    with open(config, 'a') as stream:
        stream.write(f"env_cfg = dict(dist_cfg=dict(backend='gloo', timeout={timeout}))\n")
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    processes = []
    for rank in (0, 1):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        processes.append(Training(config, folder / f'{name}-{rank}', '--launcher', 'pytorch'))
    work_dir = folder / f'{name}-0'
    log = work_dir.with_suffix('.log')
    wait_for(log, r'Epoch\(train\) +\[2\]')
    begin = time.monotonic()
    os.killpg(processes[1].pid, blow)
    code = processes[0].wait(timeout + 60)
    seconds = time.monotonic() - begin
    processes[1].kill()
    return report(f'{name} process of two (timeout {timeout} s)', code, seconds, work_dir, log)


def main() -> int:
    """Runs all of it."""
    arguments = argparse.ArgumentParser(description='Faults of the machine.')
    arguments.add_argument('--work-dir', type=Path, default=Path('work_dirs/machine'))
    folder = arguments.parse_args().work_dir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    results = [full_disk(folder), killed_worker(folder),
               peer(folder, 'killed', signal.SIGKILL, 300),
               peer(folder, 'stopped', signal.SIGSTOP, 20)]
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
