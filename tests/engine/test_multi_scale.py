# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of several image sizes, through mmengine's dataset and torch's loader."""

from __future__ import annotations

import pickle

import pytest
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.registry import DATA_SAMPLERS, TRANSFORMS
from torch.utils.data import DataLoader

from mmdcnv4.datasets.multi_scale import AtBatchSize, MultiScaleBatchSampler, SizedIndex


class Resize:
    """Stands for a transform with a scale."""

    def __init__(self, scale=7):
        self.scale = scale

    def __call__(self, results):
        return self.scale


class Numbers(BaseDataset):
    """Numbers in place of images."""

    def load_data_list(self):
        return [dict(number=number) for number in range(203)]


@pytest.fixture
def resize():
    TRANSFORMS.register_module('ResizeForTest', module=Resize)
    yield dict(type='AtBatchSize', transform=dict(type='ResizeForTest'))
    TRANSFORMS.module_dict.pop('ResizeForTest')


def build_sampler(dataset, **options):
    return DATA_SAMPLERS.build(
        dict(type='MultiScaleBatchSampler', sizes=(8, 16, 32), base_size=16, **options),
        default_args=dict(sampler=DefaultSampler(dataset, seed=0), batch_size=4))


@pytest.mark.parametrize('num_workers', [0, 1])
def test_images_of_a_batch_have_its_size(resize, num_workers):
    dataset = Numbers(pipeline=[resize])
    sampler = build_sampler(dataset)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers,
                        collate_fn=list)
    batches = list(loader)
    # 16, 4 and 2 images: 203 of them in batches of 22 / 3 on average
    assert len(batches) == len(loader) == 27
    counts = {(8, 8): 16, (16, 16): 4, (32, 32): 2}
    assert {batch[0] for batch in batches} == set(counts)
    for batch in batches:
        assert set(batch) == {batch[0]} and len(batch) == counts[batch[0]]


def test_sizes_follow_seed_and_epoch():
    dataset = Numbers()

    def sizes(epoch, **options):
        sampler = build_sampler(dataset, **options)
        sampler.sampler.set_epoch(epoch)
        return [batch[0].size for batch in sampler]

    assert sizes(0) == sizes(0)
    assert sizes(0) != sizes(1) and sizes(0) != sizes(0, seed=1)
    assert len(sizes(0)) == len(sizes(1))


def test_every_image_before_one_comes_again():
    sampler = build_sampler(Numbers())
    indices = [int(index) for batch in sampler for index in batch]
    assert len(set(indices[:203])) == min(203, len(indices))


def test_without_the_sampler_the_transform_runs_as_it_is(resize):
    assert Numbers(pipeline=[resize])[3] == 7


def test_index_survives_the_way_to_a_worker():
    index = pickle.loads(pickle.dumps(SizedIndex(5, 160)))
    assert index == 5 and index.size == 160


def test_refusals():
    for options, text in ((dict(batch_size=0), 'batch_size must be'), (dict(sizes=()), 'sizes')):
        with pytest.raises(ValueError, match=text):
            MultiScaleBatchSampler(**dict(dict(sampler=[0], batch_size=4), **options))
    TRANSFORMS.register_module('NoScale', module=type('NoScale', (), {}))
    try:
        with pytest.raises(ValueError, match='must be one with a scale, got NoScale'):
            AtBatchSize(dict(type='NoScale'))
    finally:
        TRANSFORMS.module_dict.pop('NoScale')
