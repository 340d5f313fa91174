# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `mmdcnv4._C`. Everything else about the package is in pyproject.toml.

Environment variables:
    MMDCNV4_CUDA=0/1      never / always compile the CUDA kernels (default: when nvcc is found and
                          torch was built for CUDA; a GPU is never looked for).
    MMDCNV4_LINEINFO=1    line numbers in the CUDA kernels, for profilers.
    MMDCNV4_NATIVE=0      no extension at all: the PyTorch path.
    MMDCNV4_SANITIZE=1    AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).
    TORCH_CUDA_ARCH_LIST, MAX_JOBS: as for every torch extension. Empty means not set.

Without a working C++ compiler the package installs without kernels and says so. Without torch it
does not install, unless MMDCNV4_NATIVE=0 says that this is meant: uv shows no warning of a build.
Under pip's build isolation the torch of the environment that asked for the build is used, not a
fresh download: kernels work only with the torch they were built against. uv's isolated builds do
not say which environment asked; pyproject.toml asks for builds without isolation, which uv reads in
the clone, and everywhere else --no-build-isolation is needed.
"""

import hashlib
import importlib.util
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from unittest import mock

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NEEDS_TORCH: list = []  # why nothing can be built; source archives can
# 'undefined' alone does not look at conversions of NaN and large floats to integers
SANITIZERS = '-fsanitize=address,undefined,float-cast-overflow'


def warn(message: str) -> None:
    """One clear line in pip's output (pip shows it with -v, and always when the build fails)."""
    print(f'\n*** mmdcnv4: {message} ***\n', file=sys.stderr, flush=True)


def torch_problem() -> str:
    """Makes torch importable, also from an isolated build; returns why that failed, or ''."""
    if importlib.util.find_spec('torch') is None:
        sys.path.append(sysconfig.get_paths()['purelib'])
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f'torch cannot be imported while building ({error})'
    return ''


def cpp_standard() -> str:
    """The C++ standard of torch's headers: what its BuildExtension adds to flags without one."""
    from torch.utils.cpp_extension import BuildExtension
    return max(re.findall(r"'c\+\+(\d\d)'", inspect.getsource(BuildExtension.build_extensions)),
               default='17')


def compiler_problem() -> str:
    """Compiles a short program with the flags of the build; returns why that failed, or ''."""
    if os.name == 'nt':
        return ''  # setuptools finds MSVC by itself
    compiler = (os.environ.get('CXX') or 'c++').split()
    if shutil.which(compiler[0]) is None:
        return f'no C++ compiler was found ({compiler[0]})'
    flags = [*cpu_flags(), f'-std=c++{cpp_standard()}']
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text('#include <Python.h>\n#include <vector>\n'
                          '#if __cplusplus > 201703L\n#include <concepts>\n#endif\n'
                          'template <class T> int f() { if constexpr (sizeof(T) > 1) return 1; '
                          'else return 0; }\nint main() { return f<std::vector<int>>(); }\n')
        command = [*compiler, *flags, '-I', sysconfig.get_paths()['include'], '-c',
                   str(source), '-o', str(Path(folder, 'probe.o'))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return (f'the C++ compiler does not work ({" ".join(compiler)} with {" ".join(flags)}): '
                f'{result.stderr[-300:]}')
    return ''


def cuda_wanted() -> bool:
    """Whether to compile csrc/cuda: by toolkit and choice, never by the GPUs of this machine."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME
    sources = list((ROOT / 'csrc' / 'cuda').rglob('*.cu'))
    choice = os.environ.get('MMDCNV4_CUDA') or os.environ.get('FORCE_CUDA')
    if choice == '0' or not sources:
        return False
    possible = CUDA_HOME is not None and torch.version.cuda is not None
    if choice == '1' and not possible:
        raise SystemExit(f'mmdcnv4: MMDCNV4_CUDA=1 needs nvcc and a CUDA build of torch; found '
                         f'CUDA_HOME={CUDA_HOME}, torch {torch.__version__}')
    return possible


def cpu_flags() -> list:
    """Flags of our own C++ files."""
    if os.name == 'nt':
        return ['/O2', '/DMMDCNV4_COMPILER="msvc"']
    # floor and comparisons keep their IEEE meaning; only errno and traps are given up
    flags = ['-O3', '-g0', '-fno-math-errno', '-fno-trapping-math', '-Wall', '-Wextra',
             '-Wno-unused-parameter', '-Wno-unknown-pragmas', '-fvisibility=hidden',
             '-DMMDCNV4_COMPILER="' + platform.python_compiler().split('[')[0].strip() + '"']
    if platform.machine().lower() in ('x86_64', 'amd64'):
        flags += ['-DMMDCNV4_X86=1', '-Wno-psabi']
    if sys.platform == 'linux':
        # at::parallel_for is serial without it. Not a link flag: the threads are those of torch,
        # whose own OpenMP runtime the dynamic linker finds.
        flags.append('-fopenmp')
    if os.environ.get('MMDCNV4_SANITIZE') == '1':
        # Python's own flags may have -fwrapv, under which no signed overflow is reported
        flags += [SANITIZERS, '-fno-wrapv', '-fno-sanitize-recover=all', '-fno-omit-frame-pointer',
                  '-g', '-O1']
    return flags


def toolkit_version(cuda_home: str) -> tuple:
    """(major, minor) of nvcc."""
    text = subprocess.run([str(Path(cuda_home, 'bin', 'nvcc')), '--version'], capture_output=True,
                          text=True, check=True).stdout
    return tuple(int(number) for number in re.search(r'release (\d+)\.(\d+)', text).groups())


def knows_architecture(name: str) -> bool:
    """Whether this torch turns an architecture into flags of nvcc."""
    from torch.utils import cpp_extension
    with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=name):
        try:
            return bool(cpp_extension._get_cuda_arch_flags())
        except ValueError:
            return False


def default_architectures(toolkit: tuple) -> str:
    """All that the toolkit compiles for, torch has a name for and this machine can have, and PTX.

    The PTX is of 8.0: every later GPU can take it, also one between two others, and the
    tensor-core kernels have code from there on. 8.9 takes what is compiled for 8.6: for either,
    nvcc 13.0 makes the same instructions. Orin (8.7) and Thor (11.0) sit beside Arm cores.
    """
    is_arm = platform.machine().lower() in ('aarch64', 'arm64')
    names = ['7.0'] if toolkit < (13, 0) else []
    names += ['7.5', '8.0+PTX', '8.6']
    names += ['8.7'] if is_arm else []
    names += ['9.0'] if toolkit >= (11, 8) else []
    names += ['10.0', '12.0'] if toolkit >= (12, 8) else []
    names += ['11.0'] if toolkit >= (13, 0) and is_arm else []
    return ';'.join(filter(knows_architecture, names))


def kernel_hash(of_all: bool = False) -> str:
    """Names CUDA kernels of DCNv4 by their sources; comments and spaces do not count.

    Those on tensor cores, which run where they have been proven, with all that they include;
    `of_all`: the direct kernels, too. Bindings to torch are no part of them, nor is attention.
    """
    csrc = ROOT / 'csrc'
    found, following = {}, [*(csrc / 'cuda' / 'window').glob('*.cu'), csrc / 'window_plan.cpp']
    if of_all:
        following += [*(csrc / 'cuda').glob('dcnv4_*ward_*.cu'), csrc / 'launch_plan.cpp']
    while following:
        path = following.pop().resolve()
        if path in found or not path.exists():  # the emulator's headers are elsewhere
            continue
        text = path.read_text(encoding='utf-8')
        following += [path.parent / name for name in re.findall(r'#include "(.+)"', text)]
        text = re.sub(r'//[^\n]*|/\*.*?\*/', ' ', text, flags=re.DOTALL)
        found[path] = ' '.join(text.split()).encode()
    digest = hashlib.sha256()
    for path in sorted(found, key=lambda path: path.name):
        digest.update(found[path])
    return digest.hexdigest()[:16]


def write_kernel_hash() -> str:
    """A header with the hash, written anew when it changes; returns its folder."""
    path = ROOT / 'build' / 'generated' / 'mmdcnv4_kernel_hash.h'
    text = f'#define MMDCNV4_KERNEL_HASH "{kernel_hash()}"\n'
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path.parent)


def cuda_flags(cuda_home: str) -> list:
    """Flags of our own CUDA files; sets TORCH_CUDA_ARCH_LIST where the user did not."""
    toolkit = toolkit_version(cuda_home)
    if not os.environ.get('TORCH_CUDA_ARCH_LIST'):
        os.environ['TORCH_CUDA_ARCH_LIST'] = default_architectures(toolkit)
    # no fast math: comparisons at borders keep their IEEE meaning
    flags = ['-O3']
    if os.environ.get('MMDCNV4_LINEINFO') == '1':
        flags.append('-lineinfo')
    if os.name != 'nt':
        flags += ['-Xcompiler', '-fvisibility=hidden']
    return flags + (['--compress-mode=size'] if toolkit >= (12, 8) else [])


def make_extension() -> dict:
    """Keyword arguments for `setup`: the extension, or nothing with a warning."""
    if os.environ.get('MMDCNV4_NATIVE') == '0':
        return {}
    problem = torch_problem()
    if problem:
        pip = 'uv pip' if os.environ.get('UV') else 'pip'  # uv tells its children so
        NEEDS_TORCH.append(
            f'{problem}. If you have it, the build was isolated from your environment; else '
            'install it first. Then type, in a clone:\n'
            f'    {pip} install setuptools wheel ninja\n'
            f'    {pip} install --no-build-isolation --editable .\n'
            'Without kernels, on the slow PyTorch path: MMDCNV4_NATIVE=0 before the command.')
        return {}
    problem = compiler_problem()
    if problem:
        warn(f'{problem}; installing WITHOUT compiled kernels: dcnv4 will take the slow PyTorch '
             'path. Install a compiler, then '
             '`pip install --no-build-isolation --editable .`')
        return {}
    from torch.utils import cpp_extension
    with_cuda = cuda_wanted()
    sources = sorted(str(path.relative_to(ROOT)) for folder in ('csrc', 'csrc/cpu')
                     for path in (ROOT / folder).glob('*.cpp'))
    arguments = {'cxx': cpu_flags()}
    kind, includes = cpp_extension.CppExtension, {}
    if with_cuda:
        kind = cpp_extension.CUDAExtension
        sources += sorted(str(path.relative_to(ROOT))
                          for path in (ROOT / 'csrc/cuda').rglob('*.cu'))
        arguments['cxx'].append('-DMMDCNV4_WITH_CUDA=1')
        arguments['nvcc'] = cuda_flags(cpp_extension.CUDA_HOME)
        includes['include_dirs'] = [write_kernel_hash()]
    links = [SANITIZERS] if os.environ.get('MMDCNV4_SANITIZE') == '1' else []
    extension = kind('mmdcnv4._C', sources, extra_compile_args=arguments, extra_link_args=links,
                     **includes)
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=cpp_extension.BuildExtension))


def link_recipes() -> None:
    """Makes `mmdcnv4/.mim` for a build in the source folder: links to the folders beside it."""
    target = ROOT / 'mmdcnv4' / '.mim'
    target.mkdir(exist_ok=True)
    for name in ('configs', 'tools', 'model-index.yml'):
        if not (target / name).exists():
            (target / name).symlink_to(Path('..', '..', name), (ROOT / name).is_dir())


class BuildWithConfigs(build_py):
    """Adds `mmdcnv4/.mim`, where mim and mmengine look for what `mmdcnv4::...` names."""

    def run(self) -> None:
        """Copies after the modules; an editable installation has links instead."""
        if NEEDS_TORCH:
            raise SystemExit(f'\n*** mmdcnv4: {NEEDS_TORCH[0]} ***\n')
        super().run()
        if getattr(self, 'editable_mode', False):  # setuptools >= 64
            link_recipes()
            return
        target = Path(self.build_lib, 'mmdcnv4', '.mim')
        left_out = shutil.ignore_patterns('__pycache__')
        for folder in ('configs', 'tools'):  # dev/ and benchmarks/ need the sources
            shutil.copytree(ROOT / folder, target / folder, dirs_exist_ok=True, ignore=left_out)
        shutil.copy(ROOT / 'model-index.yml', target)


options = make_extension()
options.setdefault('cmdclass', {})['build_py'] = BuildWithConfigs
if '--inplace' in sys.argv:
    if NEEDS_TORCH:
        raise SystemExit(f'mmdcnv4: {NEEDS_TORCH[0]}')
    link_recipes()
setup(license='Apache-2.0', **options)
