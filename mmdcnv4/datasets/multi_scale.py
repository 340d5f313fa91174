# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of several image sizes, small images in large batches, so that each costs the same.

Source:   "MobileViT", Mehta and Rastegari, ICLR 2022, arXiv:2110.02178, section 3.3; the recipe of
          Dynamic Mobile-Former has sizes from 160 to 320.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from mmengine.registry import DATA_SAMPLERS, TRANSFORMS
from torch.utils.data import Sampler


class SizedIndex(int):
    """Index of an image that also says the size of its batch, in pixels.

    mmengine's datasets hand the index to the pipeline as `sample_idx`.
    """

    size: int

    def __new__(cls, index: int, size: int) -> SizedIndex:
        """An integer with one more attribute."""
        result = super().__new__(cls, index)
        result.size = size
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return SizedIndex, (int(self), self.size)  # into the processes that load images


@DATA_SAMPLERS.register_module()
class MultiScaleBatchSampler(Sampler):
    """Gives every batch a random size of its images, the same on all devices.

    A `batch_sampler` of a data loader; :class:`AtBatchSize` in the pipeline brings the images to
    the size.

    Args:
        sampler: of indices.
        batch_size: images in a batch of `base_size`; one of size s has
            `batch_size * (base_size / s)**2`, rounded down, at least 2.
        sizes: in pixels.
        base_size: in pixels.
        seed: of the sequence of sizes, a new one in every epoch of the sampler.

    Every epoch has the same number of batches, since schedules count on it: as many as hold the
    images on average. An epoch that draws many large batches starts again with its first images.
    """

    def __init__(self, sampler: Sampler, batch_size: int,
                 sizes: Sequence[int] = (160, 192, 224, 256, 320), base_size: int = 224,
                 seed: int = 0) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError('MultiScaleBatchSampler: sizes must be integers > 0, '
                             f'got {tuple(sizes)}')
        for name, value in dict(batch_size=batch_size, base_size=base_size).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'MultiScaleBatchSampler: {name} must be an integer > 0, '
                                 f'got {value!r}')
        self.sampler, self.batch_size = sampler, batch_size
        self.sizes, self.base_size = tuple(sizes), base_size
        self.seed = seed

    def images(self, size: int) -> int:
        """Images in a batch of `size`."""
        return max(int(self.batch_size * (self.base_size / size)**2), 2)

    def __len__(self) -> int:
        """Batches of an epoch."""
        mean = sum(map(self.images, self.sizes)) / len(self.sizes)
        return max(int(len(self.sampler) / mean), 1)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[SizedIndex]]:
        generator = np.random.default_rng((self.seed, getattr(self.sampler, 'epoch', 0)))
        indices = cycle(self.sampler)
        for size in generator.choice(self.sizes, len(self)).tolist():
            yield [SizedIndex(index, size) for index in islice(indices, self.images(size))]


@TRANSFORMS.register_module()
class AtBatchSize:
    """Runs a transform with its `scale` set to the image size of the batch.

    Without :class:`MultiScaleBatchSampler` the transform runs as it is.

    Args:
        transform: a transform with an attribute `scale`, such as mmpretrain's RandomResizedCrop.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, transform: dict) -> None:
        self.transform = TRANSFORMS.build(transform)
        if not hasattr(self.transform, 'scale'):
            raise ValueError('AtBatchSize: transform must be one with a scale, '
                             f'got {type(self.transform).__name__}')

    def __call__(self, results: dict[str, Any]) -> Any:
        """Transforms the results of the pipeline so far."""
        size = getattr(results.get('sample_idx'), 'size', None)
        if size is not None:
            self.transform.scale = (size, size)
        return self.transform(results)
