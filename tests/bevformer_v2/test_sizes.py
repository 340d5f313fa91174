# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Mean sizes of an info file, as a function and as the tool that prints the entry of the config."""

from __future__ import annotations

import mmengine
import pytest

from helpers.tool_runner import load_tool
from mmdcnv4.bevformer_v2.data.sizes import mean_sizes
from mmdcnv4.bevformer_v2.models.perspective_head import PerspectiveHead


def boxes(*rows):
    return dict(data_list=[dict(token='a', instances=[
        dict(bbox_label_3d=label, bbox_3d=[0, 0, 0, *size, 0]) for label, size in rows])],
        metainfo=dict(categories={'tram': 0, 'light rail': 1, 'ship': 2}))


ROWS = [(0, (30, 2.4, 3.5)), (0, (20, 2.6, 3.7)), (1, (9, 2, 3)), (-1, (1, 1, 1))]


def test_means_are_width_length_height():
    sizes = mean_sizes(boxes(*ROWS))
    assert set(sizes) == {'tram', 'light rail'}  # of classes without a box there is no mean
    assert sizes['tram'] == pytest.approx((2.5, 25, 3.6))
    assert mean_sizes(boxes(*ROWS), ['a', 'b'])['b'] == pytest.approx((2, 9, 3))


@pytest.mark.parametrize('infos, classes, message', [
    (boxes((3, (1, 1, 1))), None, 'got 3 in sample a'), (dict(data_list=[]), None, 'categories'),
    (boxes((1, (1, 1, 1))), ['a'], 'got 1 in sample a')])
def test_labels_without_a_name(infos, classes, message):
    with pytest.raises(ValueError, match=message):
        mean_sizes(infos, classes)


def test_tool_prints_what_the_head_takes(tmp_path, capsys):
    mmengine.dump(boxes(*ROWS), tmp_path / 'infos.pkl')
    tool = load_tool('analysis_tools/box_sizes')
    tool.main([str(tmp_path / 'infos.pkl')])
    printed: dict = {}
    exec(capsys.readouterr().out, printed)
    head = PerspectiveHead(2, 8, num_convs=1, classes=['light rail', 'tram'],
                           **printed['model']['perspective_head'])
    assert head.canonical_sizes.flatten().tolist() == pytest.approx([2, 9, 3, 2.5, 25, 3.6])
    with pytest.raises(SystemExit, match=r'error: the info file .*none.pkl does not exist'):
        tool.main([str(tmp_path / 'none.pkl')])
