# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A few drawn scenes for the tests of the tools."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='the tools are tested with mmdet, which is not installed')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 6 held-out scenes of 64 x 64 pixels."""
    from mmdcnv4.datasets.drawn_scenes import SceneConfig, write_drawn_scenes
    return write_drawn_scenes(tmp_path_factory.mktemp('drawn') / 'scenes', 16, 6,
                              config=SceneConfig(size=64))
