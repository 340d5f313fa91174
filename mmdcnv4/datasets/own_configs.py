# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configs of the mini models for a folder of the user, with sizes derived from its data.

Every function returns the entries that differ from a config of this package, as a config of one's
own would hold them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from mmengine.config import Config

from .own_folder import CocoFolder, SemanticFolder

COLORS = ((230, 70, 60), (70, 130, 240), (60, 180, 90), (240, 180, 40), (170, 90, 220),
          (60, 200, 200), (240, 120, 190), (140, 100, 60), (150, 150, 150), (190, 210, 60))
SMALL_OBJECT = 20.0  # pixels: median size of the smallest class of objects after resizing
SIDES = (160, 416)  # allowed longer sides of an image that a detector sees
CROP = (224, 320)  # largest height and width that a segmentor is trained on


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """RGB colours of the classes; they repeat after ten."""
    return [COLORS[index % len(COLORS)] for index in range(num_classes)]


def _multiple_of_32(size: float) -> int:
    return max(32, 32 * round(size / 32))


def detector_side(folder: CocoFolder) -> int:
    """The longer side of the images that a detector sees, in pixels, a multiple of 32.

    Large enough for the small objects, as far as two CPU cores can train at that size.
    """
    most = max(SIDES[0], min(SIDES[1], max(folder.image_size)))
    return _multiple_of_32(np.clip(SMALL_OBJECT / folder.small_size, SIDES[0], most))


def _resized(pipeline: list[dict], side: int) -> list[dict]:
    steps = copy.deepcopy(pipeline)
    for step in steps:
        if step['type'] == 'Resize':
            step['scale'] = (side, side)  # keep_ratio: the longer side becomes `side`
    return steps


def _detector_data(folder: CocoFolder, base: Config, side: int) -> dict[str, Any]:
    """The loaders and evaluators; without a test split, that of validation serves both."""
    root = folder.root.resolve().as_posix() + '/'
    metainfo = dict(_delete_=True, classes=folder.classes, palette=palette(len(folder.classes)))
    entries: dict[str, Any] = {}
    for loader in ('train', 'val', 'test'):
        split = folder.splits.get(loader, folder.splits['val'])
        dataset = base[f'{loader}_dataloader'].dataset
        entries[f'{loader}_dataloader'] = dict(dataset=dict(
            data_root=root, ann_file=split.annotations, data_prefix=dict(img=split.images + '/'),
            metainfo=metainfo, pipeline=_resized(dataset.pipeline, side)))
        if loader != 'train':
            entries[f'{loader}_evaluator'] = dict(ann_file=root + split.annotations)
    return entries


def _epochs(folder: CocoFolder, base: Config, iterations: int) -> dict[str, Any]:
    """About `iterations` steps, in 6 to 60 epochs with six validations."""
    per_epoch = -(-folder.num_images // base.train_dataloader.batch_size)
    count = 6 * int(np.clip(round(iterations / per_epoch / 6), 1, 10))
    schedulers = copy.deepcopy(base.param_scheduler)
    warm_up, decay = schedulers
    warm_up['end'] = min(warm_up['end'], count * per_epoch // 4)
    decay.update(end=count, T_max=count)
    return dict(train_cfg=dict(max_epochs=count, val_interval=count // 6),
                param_scheduler=schedulers,
                default_hooks=dict(checkpoint=dict(interval=count // 6)))


def detector_entries(folder: CocoFolder, base: Config, iterations: int = 1900) -> dict[str, Any]:
    """What a mini detector needs for this folder.

    Args:
        folder: the dataset.
        base: the Mask R-CNN of the quick start where `folder.has_masks`, else the RetinaNet for
            BCCD.
        iterations: about how many training steps.

    Returns:
        Entries to merge into `base`.
    """
    side = detector_side(folder)
    small = folder.small_size * side
    num_classes = len(folder.classes)
    most = max(20, int(1.5 * folder.max_objects))
    elongated = np.mean(np.abs(np.log(folder.aspect_ratios)) > np.log(1.5)) > 0.1
    ratios = [0.5, 1.0, 2.0] if elongated else [1.0]
    # the smallest anchors have the size of the small objects
    if folder.has_masks:
        finest = base.model.rpn_head.anchor_generator.strides[0]
        model = dict(
            rpn_head=dict(anchor_generator=dict(scales=[max(2, round(small / finest))],
                                                ratios=ratios)),
            roi_head=dict(bbox_head=dict(num_classes=num_classes),
                          mask_head=dict(num_classes=num_classes)),
            test_cfg=dict(rpn=dict(max_per_img=max(50, 2 * most)), rcnn=dict(max_per_img=most)))
    else:
        finest = base.model.bbox_head.anchor_generator.strides[0]
        model = dict(
            bbox_head=dict(num_classes=num_classes, anchor_generator=dict(
                octave_base_scale=max(1, round(small / finest)))),
            test_cfg=dict(max_per_img=most))
    return dict(model=model, **_detector_data(folder, base, side),
                **_epochs(folder, base, iterations))


# ------------------------------------------------------------------------------ segmentation


def class_weights(frequencies: np.ndarray) -> list[float]:
    """Weights of the classes in the loss: the square root of median frequency over frequency.

    Args:
        frequencies: shape (classes,); a class that does not occur has 0 and gets the weight 1.
    """
    known = frequencies > 0
    weights = np.ones(len(frequencies))
    weights[known] = np.sqrt(np.median(frequencies[known]) / frequencies[known])
    return [round(float(weight), 2) for weight in np.clip(weights, 0.2, 5.0)]


def _segmentor_pipeline(folder: SemanticFolder, base: Config, size: tuple[int, int],
                        crop: tuple[int, int]) -> list[dict]:
    steps = copy.deepcopy(base.train_pipeline)
    for step in steps:
        if step['type'] == 'RandomResize':
            step['scale'] = size
        if step['type'] == 'RandomCrop':
            step.update(crop_size=crop, ignore_index=folder.ignore_index)
    return steps


def segmentor_entries(folder: SemanticFolder, base: Config, iterations: int = 3000
                      ) -> dict[str, Any]:
    """What the mini UperNet needs for this folder.

    Args:
        folder: the dataset.
        base: the UperNet for CamVid.
        iterations: training steps.

    Returns:
        Entries to merge into `base`.
    """
    width, height = folder.image_size
    crop = (min(CROP[0], _multiple_of_32(0.8 * height)), min(CROP[1], _multiple_of_32(0.8 * width)))
    train_pipeline = _segmentor_pipeline(folder, base, folder.image_size, crop)
    root = folder.root.resolve().as_posix() + '/'
    loss = dict(class_weight=class_weights(folder.frequencies))
    head = dict(num_classes=len(folder.classes), ignore_index=folder.ignore_index,
                loss_decode=loss)
    entries: dict[str, Any] = dict(
        crop_size=crop, ignore_index=folder.ignore_index, train_pipeline=train_pipeline,
        model=dict(data_preprocessor=dict(size=crop, seg_pad_val=folder.ignore_index),
                   decode_head=head, auxiliary_head=head))
    for loader in ('train', 'val', 'test'):
        split = folder.splits.get(loader, folder.splits['val'])
        dataset = dict(
            data_root=root, img_suffix=folder.suffixes[0], seg_map_suffix=folder.suffixes[1],
            ignore_index=folder.ignore_index,
            data_prefix=dict(img_path=split.images, seg_map_path=split.annotations),
            metainfo=dict(_delete_=True, classes=folder.classes,
                          palette=palette(len(folder.classes))))
        if loader == 'train':
            dataset['pipeline'] = train_pipeline
        else:
            entries[f'{loader}_evaluator'] = dict(ignore_index=folder.ignore_index)
        entries[f'{loader}_dataloader'] = dict(dataset=dataset)
    warm_up, decay = copy.deepcopy(base.param_scheduler)
    warm_up['end'] = min(warm_up['end'], max(1, iterations // 10))
    decay['end'] = iterations
    interval = -(-iterations // 6)
    return dict(
        **entries, param_scheduler=[warm_up, decay],
        train_cfg=dict(max_iters=iterations, val_interval=interval),
        default_hooks=dict(checkpoint=dict(interval=interval)))
