# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Feature maps of key frames, kept while a scene is tested in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Optional

import numpy as np
from torch import Tensor


def frame_key(sample: Any, frame: int, images: Tensor) -> Optional[Hashable]:
    """What the images of a frame are known by, None if the sample does not say.

    Args:
        sample: with the metainfo of `PackBEVInputs`.
        frame: index of the frame.
        images: shape (1, V, 3, H, W).
    """
    meta = sample.metainfo
    token = (meta.get('frame_tokens') or {}).get(frame)
    if not token:
        return None
    transform = np.asarray(meta.get('image_transform', np.eye(3))).tobytes()
    return (token, tuple(meta.get('cameras', ())), transform, bool(meta['img_flip']),
            tuple(images.shape), images.dtype, images.device)


class MapCache:
    """The last `capacity` entries, by the time of their last use.

    Args:
        capacity: entries; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[Hashable, list[Tensor]] = OrderedDict()

    def clear(self) -> None:
        """Forgets everything: the weights may have changed."""
        self._entries.clear()

    def get(self, key: Optional[Hashable], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The entry, computed if it is not there."""
        if not self.capacity or key is None:
            return compute()
        maps = self._entries.pop(key, None)
        if maps is None:
            maps = compute()
        self._entries[key] = maps
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
        return maps
