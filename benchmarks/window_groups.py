# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How the kernels on tensor cores cut the channels of a pixel (csrc/cuda/window/dense_window.cuh).

A block has a slice of them, 128 bytes: of float32 half as many as of float16. What a group is to
its block, to a warp and to the lanes of a row follows from its bytes alone.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK_BYTES = 16  # that a lane takes at a time
SLICE_BYTES = 128


class Group(NamedTuple):
    """A group of channels.

    Attributes:
        depth: how many, 16, 32 or, if they have 2 bytes, 64.
        size: bytes of each, and of the numbers of offset_mask.
    """

    depth: int
    size: int = 2

    @property
    def team(self) -> int:
        """Lanes that have a row together."""
        return self.depth * self.size // CHUNK_BYTES

    @property
    def of_slice(self) -> int:
        """Groups of a slice."""
        return SLICE_BYTES // (self.depth * self.size)

    @property
    def of_unit(self) -> int:
        """Groups of a unit, whose numbers lie side by side in offset_mask."""
        return min(2, self.of_slice)

    @property
    def round_rows(self) -> int:
        """Far taps that the forward kernel multiplies at a time, FarLayer::kRows."""
        return 2 if self.size == 4 else 4

    def number_copies(self, beside: int) -> int:
        """Copies by 32 lanes that bring the numbers of 32 rows, of so many groups per pixel."""
        lanes = 16 if beside * self.size > 4 else 8  # that copy those of a pixel, chunk by chunk
        return lanes // beside
