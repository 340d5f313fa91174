# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Every command of every page: a real shell reads it, and the program that it names can, too.

The shell blocks of a page run in order in one shell, with stand-ins for `python`, `pip`, `make` and
`mim` that write down their arguments. Then each tool parses its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for folder in ('.', 'docs', 'configs', 'configs/*', 'csrc', 'benchmarks')
               for path in ROOT.glob(f'{folder}/*.md') if path.name != 'CHANGELOG.md')
FENCE = re.compile(r'^```(?:shell|bash|console)\n(.*?)^```', re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r'<[a-z][a-z ]*>')
STAND_INS = ('python', 'pip', 'make', 'mim', 'git')
# ending of a config's name: what a page must name that trains with it
DATA = {'coco': 'COCO', 'ade20k': 'ADE20K', 'nus': 'nuScenes', 'in1k': 'ImageNet',
        'drawn-scenes': 'drawn_scenes.py', 'synthetic-rig': 'synthetic_rig.py', 'bccd': 'BCCD',
        'camvid': 'CamVid'}


def commands(page: Path, tmp_path: Path) -> list[list[str]]:
    """What a page has run: lists of words that begin with the name of the program."""
    blocks = FENCE.findall(page.read_text())
    for name in STAND_INS:
        (tmp_path / name).write_text('#!/bin/sh\nfor word in "${0##*/}" "$@"; do\n'
                                     f'    printf \'%s\\037\' "$word" >> {tmp_path}/record\ndone\n'
                                     f"printf '\\036' >> {tmp_path}/record\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'record').touch()
    script = PLACEHOLDER.sub('PLACEHOLDER', '\n'.join(blocks))
    done = subprocess.run(['bash', '-euc', script], cwd=ROOT, capture_output=True, text=True,
                          env={'PATH': f'{tmp_path}:/usr/bin:/bin'}, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / 'record').read_text().split('\036')[:-1]
    return [line.split('\037')[:-1] for line in lines]


class Parsed(Exception):
    """Ends a program behind its command line."""


@cache
def load(script: str) -> Any:
    spec = importlib.util.spec_from_file_location(f'page_{Path(script).stem}', ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments of a program, as its own parser reads them."""
    module = load(script)
    monkeypatch.setattr(sys, 'argv', [script, *words])
    if hasattr(module, 'parse_args'):
        return module.parse_args()
    original = argparse.ArgumentParser.parse_args

    def parse_and_end(*args: Any, **kwargs: Any) -> None:
        raise Parsed(original(*args, **kwargs))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_end)
        module.main()
    return caught.value.args[0]


# of mmengine, which a config need not have; and what takes names of its own
FREE = re.compile(r'randomness\.|.*\.custom_keys\.')


def check_options(config: str, options: dict) -> None:
    """Whether the config has the entries that are overridden, or those that hold them."""
    from mmengine.config import Config
    cfg = Config.fromfile(ROOT / config)._cfg_dict
    for key in options:
        if FREE.match(key):
            continue
        *path, last = key.split('.')
        node: Any = cfg
        for step in path:
            inside = step in node if isinstance(node, dict) else step.isdigit()
            assert inside, f'{config} has no {key}: nothing called {step}'
            node = node[step] if isinstance(node, dict) else node[int(step)]
        assert isinstance(node, dict) or int(last) < len(node), key


@cache
def texts_of_tests() -> str:
    return '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('*.py')
                     if path.parent.name != 'docs')


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('mmdet3d', reason='mmdet3d is not installed')
    for program, *words in commands(page, tmp_path):
        if program == 'make':
            assert re.search(rf'^{words[0]}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        if program != 'python':  # pip and mim act on what is installed, see tests/configs/test_mim
            continue
        if words[:1] == ['-m'] and words[1] == 'torch.distributed.run':
            start = next(index for index, word in enumerate(words) if word.endswith('.py'))
            words = [Path(words[start]).resolve().relative_to(ROOT).as_posix(), *words[start + 1:]]
        if words[0] == '-m':
            assert importlib.util.find_spec(words[1]) is not None, words
            continue
        script, *rest = words
        args = parse(script, rest, monkeypatch)
        stem = script.removesuffix('.py')
        assert Path(stem).name in texts_of_tests() or stem.startswith('benchmarks/'), \
            f'no test runs {script}'
        config = str(getattr(args, 'config', ''))
        if not config.startswith('configs/') or 'PLACEHOLDER' in config:
            continue
        assert (ROOT / config).is_file(), config
        found = [name for ending, name in DATA.items() if ending in Path(config).stem]
        assert found and found[-1] in page.read_text(), f'{page} does not name the data of {config}'
        if isinstance(getattr(args, 'cfg_options', None), dict):
            check_options(config, args.cfg_options)


@pytest.mark.parametrize('block, message', [
    ('python tools/train.py', 'required: config'), ('python tools/test.py a.py b.pth --foo',
                                                   'unrecognized arguments: --foo'),
    ('python tools/no_such.py', 'No such file'), ('bash tools/dist_train.sh x', 'usage'),
    ('python tools/train.py configs/none/x_coco.py', 'configs/none/x_coco.py'),
    ('python tools/train.py configs/quick_start/upernet_flash-intern-image-mini_1xb4-2k_drawn-'
     'scenes-160x160.py --cfg-options modle.backbone.depths=1', 'nothing called modle')])
def test_faults_are_found(block: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / 'page.md'
    page.write_text(f'COCO, drawn_scenes.py\n```shell\n{block}\n```\n')
    with pytest.raises((AssertionError, SystemExit, OSError)) as caught:
        test_commands(page, tmp_path, monkeypatch)
    assert message in str(caught.value) + capsys.readouterr().err
