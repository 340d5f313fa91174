# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Where the tensor-core kernels are trusted: `MMDCNV4_FAST=auto`, `0` or `1`.

With `auto`, the default, they run on GPUs for which these very kernels have been proven: by the
project, on a GPU of the same compute capability (`PROVEN`), or by this machine's own check
(`python -m mmdcnv4.info --check`), whose verdict is kept in the user's cache for the driver, the
build and the capability that it was made with. A verdict against them wins over the table.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

VARIABLE = 'MMDCNV4_FAST'
CHOICES = ('auto', '0', '1')


class Proof(NamedTuple):
    """Kernels, by the hash of their sources, that passed every test on a GPU."""

    kernels: str
    capability: int  # 90: sm_90
    result: str  # where the run is written down, below benchmarks/results/


# filled from committed results on a GPU alone; where sources have changed since, the result says
# why it holds for them
PROVEN = (Proof('56b7a7b3a83b6a0d', 90, 'nvidia-h200-20261127-float32.md'),)


def choice() -> str:
    """What the environment variable says; empty means not set.

    Raises:
        ValueError: if it is anything but `auto`, `0` or `1`.
    """
    text = os.environ.get(VARIABLE) or 'auto'
    if text not in CHOICES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(CHOICES)}, got {text!r}')
    return text


def cache_file() -> Path:
    """Where verdicts of this user are kept."""
    root = os.environ.get('XDG_CACHE_HOME') or str(Path('~/.cache').expanduser())
    return Path(root, 'mmdcnv4', 'kernels.json')


def driver() -> str:
    """Version of the NVIDIA driver, without starting CUDA; empty if there is none."""
    try:
        return Path('/sys/module/nvidia/version').read_text().strip()
    except OSError:
        pass
    try:
        first = Path('/proc/driver/nvidia/version').read_text().splitlines()[0]
        return ' '.join(first.split()[1:9])
    except (OSError, IndexError):
        return ''


def conditions(kernels: str) -> dict[str, str]:
    """What a verdict depends on."""
    return dict(kernels=kernels, driver=driver(), torch=torch.__version__)


def read_verdicts(path: Optional[Path] = None) -> list[dict[str, Any]]:
    """Verdicts in the user's cache; none where the file is missing or not readable."""
    try:
        verdicts = json.loads((path or cache_file()).read_text())
    except (OSError, ValueError):
        return []
    return [verdict for verdict in verdicts if isinstance(verdict, dict)] \
        if isinstance(verdicts, list) else []


def write_verdict(kernels: str, capability: int, device: str, is_right: bool,
                  path: Optional[Path] = None) -> Path:
    """Keeps the verdict of a check, in place of an older one for the same conditions."""
    path = path or cache_file()
    new = dict(conditions(kernels), capability=capability, device=device, is_right=is_right,
               date=time.strftime('%Y-%m-%d'))
    key = (*conditions(kernels), 'capability')
    others = [old for old in read_verdicts(path) if any(old.get(k) != new[k] for k in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f'{path.name}.{os.getpid()}')
    fresh.write_text(json.dumps([*others, new], indent=1) + '\n')
    fresh.replace(path)
    return path


def reasons(kernels: str) -> dict[int, tuple[bool, str]]:
    """For each compute capability that is known: whether it is proven, and by what."""
    known = {proof.capability: (True, f'benchmarks/results/{proof.result}')
             for proof in PROVEN if proof.kernels == kernels}
    now = conditions(kernels)
    for verdict in read_verdicts():
        if all(verdict.get(key) == value for key, value in now.items()):
            by = f'the check of this machine on {verdict.get("date")}'
            known[int(verdict.get('capability', 0))] = (verdict.get('is_right') is True, by)
    return known


def apply(kernels: str) -> None:
    """Tells the extension the choice and the proven capabilities."""
    torch.ops.mmdcnv4._set_cuda_proven(
        [capability for capability, (is_right, _) in reasons(kernels).items() if is_right])
    torch.ops.mmdcnv4._set_cuda_fast(choice())
