# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ways to run the tools from a test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Optional

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / 'tools'
TINY = Path(__file__).parents[1] / 'tools' / 'tiny_configs'


def data_options(root: Path, **entries: object) -> list[str]:
    """`--cfg-options` that point the tiny detection config at `root` and set more entries."""
    options = [f'{loader}_dataloader.dataset.data_root={root}/coco/'
               for loader in ('train', 'val', 'test')]
    options += [f'{name}_evaluator.ann_file={root}/coco/annotations/instances_val.json'
                for name in ('val', 'test')]
    return ['--cfg-options', *options, *(f'{key}={value}' for key, value in entries.items())]


def load_tool(name: str) -> ModuleType:
    """A program of `tools/` as a module, e.g. 'demo/image_demo'."""
    spec = importlib.util.spec_from_file_location(f'tool_{Path(name).stem}', TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """One thread per process, this Python and this package first, no GPU."""
    # `make test` runs the environment's Python without activating it, the shell tools say `python`.
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'
    return {**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1',
            'PYTHONWARNINGS': 'ignore',
            'PYTHONPATH': f'{REPOSITORY}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}


def start_tool(*command: str, cwd: Optional[Path] = None) -> subprocess.Popen:
    """Starts `python tools/<...>`, output in a pipe."""
    return subprocess.Popen([sys.executable, str(TOOLS / command[0]), *map(str, command[1:])],
                            cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run_command(*command: str) -> str:
    """Runs a command to its end; its output. Fails with the output where the command fails."""
    done = subprocess.run(list(map(str, command)), env=environment(), text=True, timeout=900,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
