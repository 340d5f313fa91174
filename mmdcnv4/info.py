# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m mmdcnv4.info`: what is installed, what was compiled, what is missing and why.

Paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from . import registration
from .ops import _extension, get_backend, kernel_check, proven
from .version import __version__

_PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmdet3d', 'mmpretrain', 'numpy')


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _mmcv_ops() -> str:
    try:
        import mmcv.ops  # noqa: F401
    except Exception as error:  # whatever is wrong with it, the report must go on
        return f'not usable ({type(error).__name__}: {error})'
    return 'built'


def _cuda_devices() -> str:
    if torch.version.cuda is None:
        return 'none (torch is a CPU build)'
    if not torch.cuda.is_available():
        return f'none visible (torch was built for CUDA {torch.version.cuda})'
    names = [f'{torch.cuda.get_device_name(i)} '
             f'(sm_{"".join(map(str, torch.cuda.get_device_capability(i)))})'
             for i in range(torch.cuda.device_count())]
    return ', '.join(names)


def _cpu_kernels() -> str:
    cpu: dict[str, Any] = _extension.build_info.get('cpu', {})
    if not cpu:
        return f'missing: {_extension.missing_reason}'
    return (f'built for {", ".join(cpu["built"])} with {cpu["compiler"]}; '
            f'this processor runs {", ".join(cpu["supported"])}; in use: {cpu["active"]}')


def _cuda_kernels() -> str:
    cuda: dict[str, Any] = _extension.build_info.get('cuda', {})
    if cuda:
        return (f'built for {", ".join(cuda["architectures"])} with CUDA {cuda["toolkit"]} '
                f'({cuda["kernels"]})')
    if torch.version.cuda is None:
        return 'missing: torch is a CPU build'
    if not _extension.is_available:
        return f'missing: {_extension.missing_reason}'
    return ('missing: nvcc was not found when the package was built (or MMDCNV4_CUDA=0 was set); '
            'dcnv4 takes the PyTorch path on CUDA tensors')


def _tensor_core_kernels() -> str:
    """Whether they run, and why."""
    choice = proven.choice()
    if choice != 'auto':
        return f'{"on" if choice == "1" else "off"} ({proven.VARIABLE}={choice})'
    known = proven.reasons(_extension.build_info['cuda']['kernels'])
    return '; '.join(f'{"on" if is_right else "off"} for sm_{capability} by {reason}'
                     for capability, (is_right, reason) in sorted(known.items())) or (
        'off: not proven for these kernels; `python -m mmdcnv4.info --check` checks them')


def _backend() -> str:
    try:
        return get_backend()
    except ValueError:
        return f'invalid ({os.environ["MMDCNV4_BACKEND"]!r})'


def _registered() -> list[str]:
    """Type names of this package in mmengine's root registries."""
    try:
        from mmengine import registry
    except Exception:  # absent, or broken, which `skipped` tells
        return []
    roots = (registry.MODELS, registry.HOOKS, registry.OPTIM_WRAPPER_CONSTRUCTORS,
             registry.DATASETS, registry.TRANSFORMS)
    return sorted({name for root in roots for name, member in root.module_dict.items()
                   if member.__module__.split('.')[0] == 'mmdcnv4'})


def collect() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, value) lines; importing nothing that is not installed."""
    software = [('mmdcnv4', __version__), ('Python', sys.version.split()[0]),
                ('platform', platform.platform()), ('torch', torch.__version__)]
    software += [(package, _version(package)) for package in _PACKAGES]
    kernels = [('CPU kernels', _cpu_kernels()), ('CUDA kernels', _cuda_kernels()),
               ('CUDA devices', _cuda_devices()), ('CPU threads', str(torch.get_num_threads())),
               ('backend', _backend())]
    if 'cuda' in _extension.build_info:
        kernels.insert(2, ('tensor cores', _tensor_core_kernels()))
    if _version('mmcv') != 'not installed':
        kernels.append(('mmcv.ops', _mmcv_ops()))
    registered = [('registered', ', '.join(_registered()) or 'nothing')]
    registered += [(f'skipped {module}', reason)
                   for module, reason in registration.skipped.items()]
    registered += [(f'on demand {module}', how)
                   for module, how in registration.on_demand().items()]
    return [('software', software), ('kernels', kernels), ('registration', registered)]


def report() -> str:
    """The report as text."""
    lines = []
    for title, items in collect():
        lines.append(f'{title}:')
        lines += [f'  {name:<16} {value}' for name, value in items]
    return '\n'.join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the report; with --check, checks the CUDA kernels on this machine's GPU instead."""
    parser = argparse.ArgumentParser(prog='python -m mmdcnv4.info',
                                     description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='run every CUDA kernel on this GPU '
                        'against the reference; tensor-core kernels that pass are used afterwards')
    if parser.parse_args(argv).check:
        return kernel_check.check_and_remember()
    sys.stdout.write(report() + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
