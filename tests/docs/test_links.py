# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Relative links and quoted commands in the documentation point to things that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_HIDDEN = {'.venv', '.build', 'build', 'work_dirs', 'data', '.git', '.pytest_cache'}
PAGES = sorted(path for path in ROOT.rglob('*.md')
               if not _HIDDEN & set(path.relative_to(ROOT).parts))

LINK = re.compile(r'\]\(([^)\s]+)\)')
# a path below one of our folders, as it stands in a command or in back quotes
FILE = re.compile(r'(?<![\w/.:-])((?:tools|configs|mmdcnv4|csrc|tests|dev|benchmarks|requirements)'
                  r'/[\w./-]*\w)')
TARGET = re.compile(r'^\s*(?:\$ )?make ([a-z-]+)', re.MULTILINE)
FENCE = re.compile(r'```(?:shell|bash|console)\n(.*?)```', re.DOTALL)


def page_id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        target = link.split('#')[0]
        if target and '://' not in target:
            assert (page.parent / target).exists(), f'{page_id(page)}: {link}'


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_quoted_commands_name_existing_files(page):
    for block in FENCE.findall(page.read_text()):
        for name in FILE.findall(block):
            assert (ROOT / name).exists(), f'{page_id(page)}: {name}'


def test_quoted_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    quoted = {target for page in PAGES for block in FENCE.findall(page.read_text())
              for target in TARGET.findall(block)}
    assert {'demo', 'test'} <= quoted, 'the README shows both commands'
    for target in quoted:
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def test_readme_names_every_top_level_folder():
    readme = (ROOT / 'README.md').read_text()
    for folder in ('csrc', 'mmdcnv4', 'configs', 'tools', 'dev', 'benchmarks', 'tests'):
        assert f'`{folder}/`' in readme
