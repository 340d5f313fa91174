# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How the classes of mmdet 3.3 that are a `CocoDataset` read their annotation files."""

from __future__ import annotations

import os
import sys
from collections.abc import Container
from typing import Any, NamedTuple, Optional


class CocoLayout(NamedTuple):
    """What a class reads of a COCO file, where they differ.

    Attributes:
        image: the field of an image that names its file.
        keeps_last: of that name, the last folder and the file alone are used.
        left_out: names of files, after that, whose images the class leaves out.
        reads_names: the class takes the categories whose names it knows; else all.
        needs_annotations: the list of the objects must be there, if empty.
        drops_empty: `filter_cfg` with `filter_empty_gt` leaves out images without an object.
        drops_crowds: and those with nothing but crowds.
    """

    image: str = 'file_name'
    keeps_last: bool = False
    left_out: Container[str] = ()
    reads_names: bool = True
    needs_annotations: bool = False
    drops_empty: bool = True
    drops_crowds: bool = False

    def file_of(self, image: dict[str, Any]) -> Optional[str]:
        """The file of an image, below the folder of the images; None where it is left out."""
        name = str(image[self.image])
        if self.keeps_last:
            folder, file = os.path.split(name)
            name = os.path.join(os.path.split(folder)[-1], file)
        return None if name in self.left_out else name


COCO = CocoLayout()
_LAYOUTS = {  # class whose `load_data_list` is in use
    'CocoDataset': COCO,
    'Objects365V1Dataset': COCO,  # sorts the categories
    'Objects365V2Dataset': CocoLayout(keeps_last=True),
    'LVISV05Dataset': CocoLayout(reads_names=False, needs_annotations=True),
    'LVISV1Dataset': CocoLayout('coco_url', reads_names=False, needs_annotations=True)}


def layout_of(kind: Optional[type]) -> Optional[CocoLayout]:
    """The layout that a class reads; None for other formats and for a reader of the user's own.

    Args:
        kind: the class of a dataset.
    """
    bases = {base.__name__: base for base in getattr(kind, '__mro__', ())
             if base.__module__.split('.')[0] == 'mmdet'}

    def keeps(name: str, method: str) -> bool:
        return name in bases and getattr(kind, method) is getattr(bases[name], method)

    name = next((name for name in _LAYOUTS if keeps(name, 'load_data_list')), None)
    if name is None or not keeps('CocoDataset', 'parse_data_info'):
        return None
    layout = _LAYOUTS[name]
    if layout.keeps_last:
        module = sys.modules[bases[name].__module__]
        layout = layout._replace(left_out=set(getattr(module, 'objv2_ignore_list', ())))
    drops_crowds = keeps('CityscapesDataset', 'filter_data')
    return layout._replace(drops_crowds=drops_crowds,
                           drops_empty=drops_crowds or keeps('CocoDataset', 'filter_data'))
