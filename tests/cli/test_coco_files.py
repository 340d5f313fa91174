# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""COCO files that mmdet would fail on after a while, or train on to no end: one line each."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmdcnv4.checks.coco import check_coco_dataset
from mmdcnv4.errors import InvalidValue


def content():
    return dict(
        images=[dict(id=number, file_name=f'{number}.jpg', width=20, height=10)
                for number in (1, 2)],
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
        annotations=[dict(id=number, image_id=1 + number % 2, category_id=1, area=9.0,
                          bbox=[1, 2, 3, 3], iscrowd=0) for number in range(4)])


def check(tmp_path, changed):
    file = tmp_path / 'annotations.json'
    file.write_text(json.dumps(changed))
    return check_coco_dataset(str(file), ['cat'], False, True, True)


def test_the_good_file(tmp_path):
    assert check(tmp_path, content()) == '1.jpg'


@pytest.mark.parametrize('bbox', [
    [math.nan] * 4, [1, 2, math.inf, 3], [1, 2, 3], ['1', 2, 3, 3], 'box', None, [1, 2, 3, True]])
def test_boxes(tmp_path, bbox):
    changed = content()
    changed['annotations'][2]['bbox'] = bbox
    with pytest.raises(InvalidValue, match=r'annotations\[2\] \(id 2\) has .* as bbox. It must be '
                       'four numbers'):
        check(tmp_path, changed)


@pytest.mark.parametrize('what', ['images', 'annotations', 'categories'])
def test_duplicate_ids(tmp_path, what):
    changed = content()
    changed[what][1]['id'] = changed[what][0]['id']
    with pytest.raises(InvalidValue, match=rf'{what}\[1\] .*as id. It must be unique, but {what}'
                       r'\[0\] has it'):
        check(tmp_path, changed)


@pytest.mark.parametrize('width', [0, -3, 'wide', math.nan])
def test_sizes_of_images(tmp_path, width):
    changed = content()
    changed['images'][1]['width'] = width
    with pytest.raises(InvalidValue, match=r'images\[1\] .*width. It must be the size'):
        check(tmp_path, changed)


@pytest.mark.parametrize('change', [
    dict(bbox=[0.1, 0.2, 0.3, 0.3]), dict(bbox=[50, 2, 3, 3]), dict(bbox=[1, 2, 3, 0])], ids=str)
def test_boxes_that_are_all_dropped(tmp_path, change):
    changed = content()
    for annotation in changed['annotations']:
        annotation.update(change)
    with pytest.raises(InvalidValue, match='none of its 4 objects would be used.*width 20 and'):
        check(tmp_path, changed)
    changed['annotations'][3]['bbox'] = [1, 2, 3, 3]  # one is enough
    assert check(tmp_path, changed) == '1.jpg'


def test_no_annotations(tmp_path):
    changed = content()
    del changed['annotations']
    with pytest.raises(InvalidValue, match="holds no objects: its list 'annotations'"):
        check(tmp_path, changed)
