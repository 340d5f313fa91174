# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a COCO file must hold so that mmdet reads, trains on and evaluates it.

The rules are those of mmdet 3.3's `CocoDataset` with its children, of `LoadAnnotations`, and of
pycocotools and the LVIS API; a field that they do not read for an entry may be absent from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Optional

from ..errors import InvalidValue
from .layouts import COCO, CocoLayout

_BOX = 'It must be four numbers: [x, y, width, height] in pixels.'
_CROWD = 'It must be 0, or 1 for a group of objects.'


def read_coco(file: str) -> dict[str, Any]:
    """The content of a COCO file.

    Raises:
        InvalidValue: it is no JSON file of a dict with the lists `images` and `categories`.
    """
    try:
        content = json.loads(Path(file).read_bytes())
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise InvalidValue(f'cannot read the annotation file {file}: the file is corrupt '
                           f'({error}).') from error
    for key in ('images', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InvalidValue(f"the annotation file {file} has no list '{key}': COCO files hold "
                               'images, annotations and categories.')
    return content


def _fault(file: str, what: str, index: int, entry: Any, field: str, remedy: str) -> InvalidValue:
    found = repr(entry[field]) if isinstance(entry, dict) and field in entry else 'nothing'
    name = entry.get('id', '?') if isinstance(entry, dict) else '?'
    return InvalidValue(f'the annotation file {file}: {what}[{index}] (id {name}) has {found} as '
                        f'{field}. {remedy}')


def _check_fields(file: str, what: str, entries: Iterable[Any], fields: Sequence[str],
                  remedy: str) -> None:
    for index, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or entry.get(field) is None:
                raise _fault(file, what, index, entry, field, remedy)


def _chosen(content: dict, classes: Optional[Sequence[str]]) -> set:
    """The ids of the categories of these names."""
    return {category['id'] for category in content['categories']
            if classes is None or category['name'] in classes}


def _is_box(box: Any, finite: bool = True) -> bool:
    """Whether it is four numbers; mmdet drops an infinite box of another class without harm."""
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(
        _is_finite(value) if finite else isinstance(value, Real) for value in box)


def _is_finite(value: Any) -> bool:
    """Whether it is a number; JSON files of Python may hold NaN and Infinity."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_images(file: str, images: Sequence[dict], used: Container, layout: CocoLayout) -> None:
    """Sizes of images that are in `used` by their ids must be sizes, those of others be there."""
    for index, image in enumerate(images):
        for field in ('width', 'height') if layout.file_of(image) is not None else ():
            is_size = _is_finite(image.get(field)) and image[field] > 0
            if field not in image or image['id'] in used and not is_size:
                raise _fault(file, 'images', index, image, field,
                             'It must be the size of the image in pixels.')


def _check_unique(file: str, what: str, entries: Sequence[dict]) -> None:
    """mmdet and pycocotools keep one of several entries of the same id."""
    seen: dict[Any, int] = {}
    for index, entry in enumerate(entries):
        if what == 'images' and entry['id'] in seen and entry == entries[seen[entry['id']]]:
            continue  # whichever is kept
        if entry['id'] in seen:
            raise _fault(file, what, index, entry, 'id', 'It must be unique, but '
                         f'{what}[{seen[entry["id"]]}] has it as well; number them anew.')
        seen[entry['id']] = index


def _check_some_are_used(file: str, annotations: Sequence[dict], by_id: dict, chosen: set,
                         layout: CocoLayout) -> None:
    """Refuses a file whose boxes mmdet drops, all of them, to train on background alone."""
    candidates = [annotation for annotation in annotations
                  if annotation['category_id'] in chosen and annotation['image_id'] in by_id
                  and not annotation.get('ignore')]
    if not candidates or any(_is_used(annotation, by_id[annotation['image_id']])
                             for annotation in candidates):
        return
    image = by_id[candidates[0]['image_id']]
    raise InvalidValue(
        f'the annotation file {file}: none of its {len(candidates)} objects would be used, mmdet '
        'drops boxes that are smaller than a pixel or lie outside their image. The first, id '
        f'{candidates[0]["id"]}, is {candidates[0]["bbox"]} ([x, y, width, height] in pixels) in '
        f'the image {image[layout.image]} of width {image["width"]} and height {image["height"]}; '
        'boxes relative to the image, or a wrong size of the images, are the usual causes.')


def _overlaps(annotation: dict, image: dict) -> bool:
    """Whether a box and its image have something in common; mmdet looks at no other box."""
    x, y, width, height = annotation['bbox']
    return (min(x + width, image['width']) > max(x, 0)
            and min(y + height, image['height']) > max(y, 0))


def _is_used(annotation: dict, image: dict) -> bool:
    """Whether mmdet goes on with a box: one that is not empty and overlaps its image."""
    return min(annotation['bbox'][2:]) >= 1 and _overlaps(annotation, image)


def _check_object(file: str, index: int, annotation: dict, image: dict, is_chosen: bool,
                  needs_mask: bool) -> None:
    """The fields that mmdet reads of an object."""
    box = annotation.get('bbox')
    if not _is_box(box, finite=is_chosen):
        raise _fault(file, 'annotations', index, annotation, 'bbox', _BOX)
    if not _overlaps(annotation, image):
        return
    if not isinstance(annotation.get('area'), Real):
        raise _fault(file, 'annotations', index, annotation, 'area',
                     'It must be the area in pixels; width * height of the box will do.')
    if needs_mask and is_chosen and _is_used(annotation, image) and annotation['area'] > 0 \
            and not annotation.get('segmentation'):
        raise _fault(file, 'annotations', index, annotation, 'segmentation',
                     'The model learns masks: every object needs a polygon or a run-length '
                     'mask; for boxes alone take a model without a mask head.')


def _check_lists(file: str, content: dict, layout: CocoLayout, trains: bool) -> list[dict]:
    """Refuses entries without the fields that every reader needs; the images that are read."""
    images, annotations = content['images'], content.get('annotations') or []
    _check_fields(file, 'images', images, ('id', layout.image),
                  'Every image needs its id, its file and its size in pixels.')
    if layout.reads_names:
        _check_fields(file, 'categories', content['categories'], ('id', 'name'),
                      'Every category needs both.')
    else:
        _check_fields(file, 'categories', content['categories'], ('id',), 'Every category has one.')
    _check_fields(file, 'annotations', annotations, ('id', 'image_id', 'category_id'),
                  'Every object needs its own id and those of its image and of its category.')
    _check_images(file, images, {entry['id'] for entry in images} if trains else
                  {annotation['image_id'] for annotation in annotations}, layout)
    for what, entries in (('images', images), ('categories', content['categories']),
                          ('annotations', annotations)):
        _check_unique(file, what, entries)
    return [image for image in images if layout.file_of(image) is not None]


def _check_some_are_left(file: str, content: dict, by_id: dict, chosen: set,
                         classes: Optional[Sequence[str]], layout: CocoLayout) -> None:
    """Refuses a file of which no image is left where those without objects are left out."""
    annotations = content['annotations']
    if not any(annotation['category_id'] in chosen for annotation in annotations):
        known = [category.get('name') for category in content['categories']]
        raise InvalidValue(
            f'the dataset of {file} has no image left: the file holds {len(annotations)} objects, '
            'none of a class of the config. metainfo.classes must be names of its categories '
            f'{known}, got {classes}.')
    if layout.drops_crowds and all(
            annotation.get('iscrowd') for annotation in annotations
            if annotation['category_id'] in chosen and annotation['image_id'] in by_id
            and not annotation.get('ignore')):
        raise InvalidValue(f'the dataset of {file} has no image left: its objects of the classes '
                           'of the config are crowds, all of them; iscrowd must be 0 for an '
                           'object to learn.')


def check_coco_dataset(file: str, classes: Optional[Sequence[str]], needs_mask: bool,
                       trains: bool = False, drops_empty: bool = False,
                       layout: CocoLayout = COCO) -> Optional[str]:
    """Refuses a file on which a `CocoDataset` would fail.

    Args:
        file: the annotation file.
        classes: names of the categories that the dataset takes; None for all.
        needs_mask: whether its pipeline loads masks.
        trains: whether a model learns from it; in a test, objects that cannot be used and sizes of
            images without objects do no harm.
        drops_empty: whether it leaves out images without an object of these classes.
        layout: what the class of the dataset reads.

    Returns:
        The name of the first image.

    Raises:
        InvalidValue: names the file, the entry, the field and a remedy.
    """
    content = read_coco(file)
    annotations = content.get('annotations') or []
    if layout.needs_annotations and not isinstance(content.get('annotations'), list):
        raise InvalidValue(f"the annotation file {file} has no list 'annotations', which the LVIS "
                           'API reads also where there are none; add an empty one.')
    images = _check_lists(file, content, layout, trains)
    if drops_empty and not annotations:
        raise InvalidValue(
            f"the annotation file {file} holds no objects: its list 'annotations' is empty or "
            'missing. To train one needs images with objects; a file of image names alone serves '
            'for the test split.')
    chosen = _chosen(content, classes if layout.reads_names else None)
    by_id = {image['id']: image for image in images}
    for index, annotation in enumerate(annotations):
        image = by_id.get(annotation['image_id'])
        if annotation.get('ignore') or image is None:
            continue
        _check_object(file, index, annotation, image, annotation['category_id'] in chosen,
                      needs_mask)
    if not images:
        raise InvalidValue(f'the annotation file {file} holds no image.')
    if trains:
        _check_some_are_used(file, annotations, by_id, chosen, layout)
    if drops_empty:
        _check_some_are_left(file, content, by_id, chosen, classes, layout)
    return layout.file_of(images[0])


def _metric_kinds(metric: dict) -> set[str]:
    """What a metric computes from the entries of its annotation file, by its dict in the config."""
    kinds = metric.get('metric', 'bbox')
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    return set() if metric.get('format_only') else kinds & {
        'bbox', 'segm', 'proposal', 'proposal_fast'}


def _check_metric_objects(file: str, content: dict, kinds: set[str], chosen: set,
                          fields: Sequence[tuple[str, str]]) -> None:
    """Refuses objects that cannot be evaluated; `fields` are numbers that they need, and why."""
    if not kinds - {'proposal_fast'}:
        return
    known = {image['id'] for image in content['images']}
    for index, annotation in enumerate(content.get('annotations') or []):
        if annotation.get('category_id') not in chosen or annotation.get('image_id') not in known:
            continue
        if {'bbox', 'proposal'} & kinds and not _is_box(annotation.get('bbox')):
            raise _fault(file, 'annotations', index, annotation, 'bbox',
                         f'The metric reads it. {_BOX}')
        for field, remedy in fields:
            if not isinstance(annotation.get(field), Real):
                raise _fault(file, 'annotations', index, annotation, field,
                             f'The metric reads it. {remedy}')
        if 'segm' in kinds and not annotation.get('segmentation'):
            raise _fault(file, 'annotations', index, annotation, 'segmentation',
                         'The metric compares masks; set its metric=["bbox"] for boxes alone.')


def _check_proposals(file: str, content: dict, has_crowds: bool) -> None:
    """What mmdet's own `proposal_fast` reads: of all classes, and, for COCO, without crowds."""
    known = {image['id'] for image in content['images']}
    for index, annotation in enumerate(content.get('annotations') or []):
        if annotation.get('image_id') not in known or has_crowds and annotation.get('ignore'):
            continue
        if has_crowds and not isinstance(annotation.get('iscrowd'), Real):
            raise _fault(file, 'annotations', index, annotation, 'iscrowd',
                         f'The metric reads it. {_CROWD}')
        if not (has_crowds and annotation['iscrowd']) and not _is_box(annotation.get('bbox'),
                                                                      finite=False):
            raise _fault(file, 'annotations', index, annotation, 'bbox',
                         f'The metric reads it. {_BOX}')


def check_coco_metric(file: str, metric: dict, classes: Optional[Sequence[str]]) -> None:
    """Refuses a file that pycocotools cannot evaluate, before the first epoch.

    Args:
        file: the annotation file of the metric.
        metric: its dict in the config.
        classes: names of the categories that are evaluated; None for all.

    Raises:
        InvalidValue: names the file, the entry, the field and a remedy.
    """
    kinds = _metric_kinds(metric)
    if kinds:
        content = read_coco(file)
        _check_fields(file, 'images', content['images'], ('id',), 'Every image has one.')
        _check_fields(file, 'categories', content['categories'],
                      ('id',) if classes is None else ('id', 'name'), 'The metric reads it.')
        if 'proposal_fast' in kinds:
            _check_proposals(file, content, has_crowds=True)
        # for proposals classes count for nothing
        chosen = _chosen(content, None if 'proposal' in kinds else classes)
        _check_metric_objects(file, content, kinds, chosen, (
            ('iscrowd', _CROWD), ('area', 'It must be the area in pixels.')))


def check_lvis_metric(file: str, metric: dict) -> None:
    """Refuses a file that the LVIS API cannot evaluate, before the first epoch.

    Args:
        file: the annotation file of the metric.
        metric: its dict in the config.

    Raises:
        InvalidValue: names the file, the entry, the field and a remedy.
    """
    kinds = _metric_kinds(metric)
    content = read_coco(file) if kinds else {}
    if 'proposal_fast' in kinds:
        _check_proposals(file, content, has_crowds=False)
    if not kinds - {'proposal_fast'}:
        return
    _check_fields(file, 'images', content['images'], (
        'id', 'neg_category_ids', 'not_exhaustive_category_ids'),
        'The LVIS metric reads it: a list of categories, which may be empty.')
    _check_fields(file, 'categories', content['categories'], ('id',), 'Every category has one.')
    for index, category in enumerate(content['categories']):
        if category.get('frequency') not in ('r', 'c', 'f'):
            raise _fault(file, 'categories', index, category, 'frequency', 'The LVIS metric reads '
                         'it: r, c or f, for rare, common or frequent.')
    _check_metric_objects(file, content, kinds, _chosen(content, None),
                          [('area', 'It must be the area in pixels.')])
