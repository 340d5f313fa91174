# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Mean sizes of the classes of an info file, from which the perspective head starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np

from ...errors import InvalidValue


def mean_sizes(infos: dict, info_classes: Optional[Sequence[str]] = None
               ) -> dict[str, tuple[float, float, float]]:
    """Mean width, length, height in metres of each class that has a box.

    Args:
        infos: an info file of version 1.1: `data_list` with `instances`, and `metainfo`.
        info_classes: names of the labels in their order; by default those of
            `metainfo.categories`.

    Raises:
        ValueError: the labels have no names, or one is none of them.
    """
    categories = (infos.get('metainfo') or {}).get('categories') or {}
    names = dict(enumerate(info_classes)) if info_classes is not None else {
        label: name for name, label in categories.items()}
    if not names:
        raise InvalidValue('mean_sizes: infos must have metainfo.categories, got none; give '
                           'info_classes, the names of the labels in their order')
    found: dict[str, list[Sequence[float]]] = {}
    for info in infos['data_list']:
        for item in info.get('instances') or ():
            label = item['bbox_label_3d']
            if label >= 0:
                if label not in names:
                    raise InvalidValue(f'mean_sizes: labels must be those of {names}, got {label} '
                                       f'in sample {info.get("token")}')
                found.setdefault(names[label], []).append(item['bbox_3d'][3:6])  # l, w, h
    means = {name: np.mean(boxes, 0).tolist() for name, boxes in sorted(found.items())}
    return {name: (width, length, height) for name, (length, width, height) in means.items()}
