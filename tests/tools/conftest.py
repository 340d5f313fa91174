# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A few drawn scenes for the tests of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.parity import World

pytest.importorskip('mmdet', reason='the tools are tested with mmdet, which is not installed')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 6 held-out scenes of 64 x 64 pixels."""
    from mmdcnv4.datasets.drawn_scenes import SceneConfig, write_drawn_scenes
    return write_drawn_scenes(tmp_path_factory.mktemp('drawn') / 'scenes', 16, 6,
                              config=SceneConfig(size=64))


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds at the start of each run: asking compilers, laying out configs."""
    from mmengine.config import Config
    from mmengine.runner import runner as runner_module
    monkeypatch.setattr(runner_module, 'collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', property(repr))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two pictures and a config around them."""
    from helpers.parity import World
    return World(tmp_path / 'data')
