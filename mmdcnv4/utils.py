# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What mmengine expects of a package whose models `mmengine.hub.get_model` builds."""

from __future__ import annotations

from . import registration


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers all classes of this package whose packages are installed, BEVFormer v2 as well.

    Args:
        init_default_scope: has no effect, since the scope of a recipe is that of its library.
    """
    registration.register_all(on_demand=True)
