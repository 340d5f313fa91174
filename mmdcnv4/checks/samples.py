# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Names the files of the one sample on which a pipeline fails, and checks its label map.

Only that sample is looked at. Where its files are readable the error passes unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmengine.dataset import Compose
from torch import nn

from ..errors import InvalidValue, MissingFile, UserError
from .config import is_known, is_local, reads_local_disk

_FILES = ('img_path', 'seg_map_path', 'lidar_path')


class LabelRange(NamedTuple):
    """The labels of a segmentor: 0 ... `num_classes` - 1 and `ignore_index`.

    Attributes:
        num_classes, ignore_index: of its heads.
        must_label_all: whether a loss fails on pixels of `ignore_index`.
        size, divisor: to which the data preprocessor pads label maps, with `ignore_index`; None
            and 1 where it does not.
    """

    num_classes: int
    ignore_index: int
    must_label_all: bool = False
    size: Optional[tuple[int, int]] = None
    divisor: int = 1

    def is_padded(self, height: int, width: int) -> bool:
        """Whether the data preprocessor pads a map of this size."""
        return bool(height % self.divisor or width % self.divisor) or self.size is not None and (
            height < self.size[0] or width < self.size[1])


def label_range(model: nn.Module) -> Optional[LabelRange]:
    """The labels that every head of the model takes whose loss fails on others.

    These are heads with a cross entropy over all classes; other losses do without. The one of
    mmsegmentation fails on ignored pixels, too, where it has weights of classes and its value is
    the mean.
    """
    ranges, must_label_all = [], False
    module: Any
    loss: Any
    for module in model.modules():
        losses = getattr(module, 'loss_decode', None)
        for loss in list(losses) if isinstance(losses, nn.ModuleList) else [losses]:
            is_of_host = type(loss).__name__ == 'CrossEntropyLoss' and not (
                loss.use_sigmoid or loss.use_mask)
            if is_of_host or type(loss).__name__ == 'WeightedCrossEntropy':
                ranges.append((module.num_classes, module.ignore_index))
            must_label_all |= (is_of_host and loss.class_weight is not None
                               and loss.reduction == 'mean')
    if not ranges:
        return None
    labels = LabelRange(*min(ranges), must_label_all)
    preprocessor: Any = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, 'seg_pad_val', None) != labels.ignore_index:
        return labels
    return labels._replace(size=preprocessor.size, divisor=preprocessor.size_divisor or 1)


def sample_files(data: Any) -> Iterator[str]:
    """The local files of a sample, at any depth of its dict."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in _FILES and isinstance(value, str) and is_local(value):
                yield value
            elif isinstance(value, dict):
                yield from sample_files(value)


def check_image(file: str) -> None:
    """Refuses an image or label map that is absent or that OpenCV cannot read.

    Raises:
        UserError: names the file.
    """
    import cv2  # only here: after a failure
    if not os.path.isfile(file):
        raise MissingFile(f'the file {file} does not exist.')
    content = np.fromfile(file, np.uint8)  # imread, from a file, would accept half a JPEG
    if content.size and cv2.imdecode(content, cv2.IMREAD_UNCHANGED) is not None:
        return
    kind = None
    try:
        from PIL import Image
        with Image.open(file) as image:
            image.load()
            kind = image.format
    except (ImportError, OSError, ValueError, SyntaxError):  # what PIL says of other files
        pass
    if kind is None:
        raise InvalidValue(f'cannot read the image {file}: the file is empty or corrupt.')
    raise InvalidValue(f'cannot read the image {file}: it is a {kind} file, which OpenCV does not '
                       'read; convert it to PNG or JPEG, or let the pipeline use another decoder '
                       "with LoadImageFromFile's imdecode_backend='pillow'.")


class CheckedPipeline(Compose):
    """A pipeline that says which file it fails on.

    Args:
        pipeline: does the work; its transforms are shared.
        labels: that a label map may hold; None to look at none.
    """

    def __init__(self, pipeline: Compose, labels: Optional[LabelRange] = None) -> None:
        self.transforms: list = pipeline.transforms  # shared, as hooks may change one of them
        self.labels = labels

    def __call__(self, data: dict) -> Optional[dict]:
        """Applies the transforms.

        Raises:
            UserError: a file of the sample is absent, unreadable, or holds labels that the model
                does not know.
        """
        files = list(sample_files(data))  # transforms may change the dict
        try:
            result = super().__call__(data)
        except UserError:
            raise
        except Exception as error:
            for file in files if self._reads_files() else ():
                if not file.lower().endswith(('.bin', '.npy')):
                    self._blame(file, error)
            if files and hasattr(error, 'add_note'):  # Python >= 3.11
                error.add_note(f'while the pipeline worked on {files[0]}')
            raise
        if self.labels is not None and result is not None:
            self._check_labels(result, files)
        return result

    def _reads_files(self) -> bool:
        """Whether what loads the samples is known to read the paths in them from the disk."""
        return all(reads_local_disk(vars(transform)) and is_known(type(transform))
                   for transform in self.transforms
                   if type(transform).__name__.startswith('Load'))

    @staticmethod
    def _blame(file: str, error: Exception) -> None:
        try:
            check_image(file)
        except UserError as fault:
            raise fault from error

    def _check_labels(self, result: dict, files: list[str]) -> None:
        field = getattr(result.get('data_samples'), 'gt_sem_seg', None)
        if field is None or self.labels is None:
            return
        labels = torch.as_tensor(field.data)
        name = next((file for file in files[1:]), files[0] if files else '?')
        if labels.dim() != 3 or labels.shape[0] != 1:
            raise InvalidValue(
                f'the label map {name} must have one channel that holds the number of the class, '
                f'got the shape {tuple(labels.shape)}; write coloured maps anew with one number '
                'per pixel.')
        count, ignored = self.labels[:2]
        wrong = labels[((labels < 0) | (labels >= count)) & (labels != ignored)]
        if wrong.numel():
            raise InvalidValue(
                f'the label map {name} holds the value {int(wrong[0])}, allowed are 0 ... '
                f'{count - 1} and {ignored} (ignored), after reduce_zero_label and label_map of '
                'the dataset; set num_classes of every head and metainfo.classes alike, or mend '
                'the map.')
        if self.labels.must_label_all and (bool((labels == ignored).any())
                                           or self.labels.is_padded(*labels.shape[1:])):
            raise InvalidValue(
                f'the label map {name} has ignored pixels ({ignored}), of its own or by padding, '
                'on which the CrossEntropyLoss of mmsegmentation fails with class_weight; take '
                "loss_decode=dict(_delete_=True, type='WeightedCrossEntropy', class_weight=...).")


def check_samples_of(dataset: Any, labels: Optional[LabelRange] = None) -> None:
    """Makes a dataset, or those that it wraps, name the files on which their pipelines fail."""
    for inner in getattr(dataset, 'datasets', ()):
        check_samples_of(inner, labels)
    if hasattr(dataset, 'dataset'):
        check_samples_of(dataset.dataset, labels)
    pipeline = getattr(dataset, 'pipeline', None)
    if type(pipeline) is Compose:  # a class of the user's may do more
        dataset.pipeline = CheckedPipeline(pipeline, labels)
