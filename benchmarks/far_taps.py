# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How often the tensor-core kernels run the parts that only far taps need.

The kernels decide tap by tap (csrc/cuda/window/window_taps.cuh), and a warp does for 32 rows what
any of them needs. What a count of instructions wants follows from offsets drawn as the benchmark
draws them and from the kernels' rules: counted here on one image, its edges included.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_peers import make_problem, offset_scale_of
from torch import Tensor
from window_groups import Group

BLOCK = 4  # side of the pixels that share a window, kWindowBlock
WARP = 32
DISTRIBUTIONS = ('D0', 'D1', 'D2', 'D3', 'D4')  # see make_problem
TAPS = 9
# forward: a unit is multiplied if this many times its far ones of two taps are no more than its
# rows, is_worth_a_product
ROWS_PER_FAR = {16: 8, 32: 4, 64: 3}
JUDGED_TAPS = [1, 5]
FORWARD_TILE = (8, 16)  # height and width, for calls that fill the device
SAMPLED_ROWS = 20_000  # as many groups are looked at as make about this many rows
REACH = 2  # pixels, how far from its own a tap is near, kReach
STENCIL_PIXELS = 240  # in and around a tile of 16x8: they give the stencils their banks


class FarRates(NamedTuple):
    """Averages per row (an output pixel and a group), so that they serve any number of rows.

    Each is a count of one row's share: of units of 32 rows, of turns of a loop.
    """

    gathered: float  # forward: units that are gathered without a product
    cell_taps: float  # of these, taps times passes that read cells of the tile
    pixel_taps: float  # and that read the image
    layered: float  # units with a product and far taps
    layers: float  # of these, one far tap a row
    rounds: float  # four rows of a layer, or two
    copied_rounds: float  # that have corners elsewhere than among the tile's cells
    cell_copies: float  # accesses of these to cells
    elsewhere: float  # taps whose corners are read in the image
    left_units: float  # gradient of offsets: units with taps that are left over
    collects: float  # turns of the loop that collects these
    takes: float  # turns of the loop in which teams take them
    list_turns: float  # gradient of value: turns over the lists of blocks, 32 taps each
    list_eights: float  # products of 8 taps
    listed: float  # entries of the lists
    has_full: bool  # whether a list is full, which no other rate knows of
    window_conflicts: float  # wavefronts of an access to the corners of 32 rows in their windows
    stencil_conflicts: float  # the same in the stencils of 32 neighbouring pixels


class Taps(NamedTuple):
    """(K, H, W, G) each: from a pixel at rest to the sample of a tap, and where the pixel is."""

    move_x: Tensor
    move_y: Tensor
    pixel_x: Tensor
    pixel_y: Tensor


def has_windows(offsets: str) -> bool:
    """Whether the tensor-core kernels take calls with such offsets: up to an offset_scale of 1."""
    return offset_scale_of(offsets) <= 1


def in_units(rows: Tensor, group: Group) -> Tensor:
    """(K, H, W, G) -> (K, units, 32): two groups of 4x4 pixels, or two such blocks of one that
    fills the slice."""
    count, height, width, groups = rows.shape
    blocks, groups_of_unit = 2 // group.of_unit, group.of_unit
    rows = F.pad(rows, (0, -groups % groups_of_unit, 0, -width % (blocks * BLOCK),
                        0, -height % BLOCK))
    rows = rows.reshape(count, rows.shape[1] // BLOCK, BLOCK, -1, blocks, BLOCK,
                        rows.shape[3] // groups_of_unit, groups_of_unit)
    # unit: line, pair of blocks, pair of groups; row: block or group, y, x
    return rows.permute(0, 1, 3, 6, 4, 7, 2, 5).reshape(count, -1, WARP)


def conflicts(banks: Tensor, is_active: Tensor) -> float:
    """Wavefronts per access of a warp: (…, 32) banks, every lane another word; idle ones free."""
    lanes = banks.reshape(-1, WARP).long() + WARP * torch.arange(banks.numel() // WARP)[:, None]
    active = is_active.reshape(-1)
    counts = torch.bincount(lanes.reshape(-1)[active], minlength=banks.numel())
    most = counts.reshape(-1, WARP).amax(1)
    return most.sum().item() / max(1, (most > 0).sum().item())


def corner_banks(upper_left: Tensor, right: int, below: int) -> Tensor:
    """(…) -> (4, …): the four corners of samples, in words."""
    return torch.stack([upper_left, upper_left + right, upper_left + below,
                        upper_left + right + below])


def are_inside(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Which samples have a corner in the image."""
    return (x > -1) & (x < width) & (y > -1) & (y < height)


def are_cells(taps: Taps, tile: tuple[int, int]) -> Tensor:
    """Which samples have all their corners, clamped into the image, among the cells of the tile."""
    _, height, width, _ = taps.move_x.shape

    def among(move: Tensor, pixel: Tensor, side: int, tile_side: int) -> Tensor:
        cell = (pixel + move).floor().clamp(0, side - 1) - pixel // tile_side * tile_side + REACH
        return (cell >= 0) & (cell < tile_side + 2 * REACH - 1)

    return (among(taps.move_y, taps.pixel_y, height, tile[0])
            & among(taps.move_x, taps.pixel_x, width, tile[1]))


def gathers_of(is_cell: Tensor, is_pixel: Tensor, team: int) -> tuple[int, ...]:
    """Of (9, units, 32): units, taps times passes that read cells, that read the image; taps."""
    per_pass = [int(taken.unflatten(-1, (team, -1)).any(-1).sum())
                for taken in (is_cell, is_pixel)]
    return (is_cell.shape[1], *per_pass, int(is_pixel.sum()))


def layers_of(far: Tensor, is_cell: Tensor, is_pixel: Tensor, group: Group) -> tuple[int, ...]:
    """Of (9, units, 32) far taps, most of which are one of the two: how they are multiplied.

    Returns:
        Units with far taps, layers, rounds, those that are copied, accesses of these to cells; taps
        that are read in the image.
    """
    layer = far.flip(0).cumsum(0).flip(0)  # a row's last tap is in the first
    per_unit = layer[0].amax(1)
    rounds = copied = copies = 0
    for number in range(1, TAPS + 1):
        now = far & (layer == number)
        state = ((now & is_cell).any(0) + 2 * (now & is_pixel).any(0).long())
        order = (state == 0).long().argsort(dim=1, stable=True)  # rows with a tap first
        state = state.gather(1, order).unflatten(1, (-1, group.round_rows))
        is_copied = (state == 2).any(-1)
        rounds += int((state > 0).any(-1).sum())
        copied += int(is_copied.sum())
        # 32 lanes take as many chunks of 16 bytes: four cells of so many rows
        per_copy = (state[is_copied] == 1).unflatten(-1, (-1, 8 // group.team))
        copies += int(per_copy.any(-1).sum())
    return (int((per_unit > 0).sum()), int(per_unit.sum()), rounds, copied, copies,
            int((far & is_pixel).sum()))


def forward_counts(taps: Taps, is_near: Tensor, group: Group,
                   tile: tuple[int, int]) -> tuple[int, ...]:
    """What the rates of the forward kernel are of, in their order."""
    _, height, width, _ = is_near.shape
    inside = are_inside(taps.pixel_x + taps.move_x, taps.pixel_y + taps.move_y, height, width)
    is_cell = are_cells(taps, tile)
    far, is_cell, is_pixel = (in_units(mask.to(torch.uint8), group).bool() for mask in (
        ~is_near, inside & is_cell, inside & ~is_cell))
    existing = in_units(torch.ones_like(is_near[:1], dtype=torch.uint8), group)[0].sum(1)
    is_gathered = ROWS_PER_FAR[group.depth] * far[JUDGED_TAPS].sum((0, 2)) > existing
    *gathers, gathered_pixels = gathers_of(is_cell[:, is_gathered], is_pixel[:, is_gathered],
                                            group.team)
    *layers, far_pixels = layers_of(*(mask[:, ~is_gathered] for mask in (far, is_cell, is_pixel)),
                                    group)
    return (*gathers, *layers, gathered_pixels + far_pixels)


def lists_of(x: Tensor, y: Tensor, is_listed: Tensor) -> Tensor:
    """How many taps are listed for each block of 4x4 input pixels and group.

    Args:
        x, y: (K, H, W, G), where taps sample the image.
        is_listed: which of them are to be listed, if they sample it at all.
    """
    _, height, width, groups = x.shape
    blocks_h, blocks_w = -(-height // BLOCK), -(-width // BLOCK)
    inside = is_listed & are_inside(x, y, height, width)
    group = torch.arange(groups).expand_as(x)[inside]
    left, top = (t[inside].floor().long() for t in (x, y))
    ends = [((at.clamp(min=0) // BLOCK), (at + 1).clamp(max=side - 1) // BLOCK)
            for at, side in ((left, width), (top, height))]
    (first_x, last_x), (first_y, last_y) = ends
    counts = torch.zeros(blocks_h * blocks_w * groups, dtype=torch.long)
    for block_x, is_x in ((first_x, True), (last_x, first_x != last_x)):
        for block_y, is_y in ((first_y, True), (last_y, first_y != last_y)):
            chosen = torch.ones_like(group, dtype=torch.bool) & is_x & is_y
            index = ((block_y * blocks_w + block_x) * groups + group)[chosen]
            counts += torch.bincount(index, minlength=len(counts))
    return counts


def taps_of(numbers: Tensor, scale: float) -> Taps:
    """Of a 3x3 kernel with padding 1; `numbers`: (H, W, G, 27) of offset_mask."""
    tap = torch.arange(TAPS)[:, None, None, None]  # column by column
    offset = numbers[..., :2 * TAPS].permute(3, 0, 1, 2)
    pixel_y, pixel_x = torch.meshgrid(*map(torch.arange, numbers.shape[:2]), indexing='ij')
    return Taps((tap // 3 - 1 + offset[::2]) * scale, (tap % 3 - 1 + offset[1::2]) * scale,
                pixel_x[None, :, :, None], pixel_y[None, :, :, None])


def draw_taps(height: int, width: int, offsets: str, seed: int = 0) -> Taps:
    """Those of a map of this size, offsets drawn as the benchmark draws them."""
    groups = max(2, SAMPLED_ROWS // (height * width) // 2 * 2)
    problem = make_problem((1, height, width, groups), 1, torch.float32, offsets, 'cpu', seed)
    return taps_of(problem.offset_mask[0, ..., :27 * groups].unflatten(-1, (groups, 27)),
                   problem.offset_scale)


@functools.cache
def far_rates(height: int, width: int, group: Group, offsets: str,
              tile: tuple[int, int] = FORWARD_TILE, seed: int = 0) -> FarRates:
    """Rates on a map of this size.

    Args:
        height, width: of the map.
        group: channels of a group.
        offsets: a distribution, see `make_problem`.
        tile: height and width of the forward kernel's.
        seed: of the offsets.
    """
    return rates_of(draw_taps(height, width, offsets, seed), group, tile)


def rates_of(taps: Taps, group: Group, tile: tuple[int, int] = FORWARD_TILE) -> FarRates:
    """Rates of known taps."""
    move_x, move_y, pixel_x, pixel_y = taps
    _, height, width, _ = move_x.shape
    rows = move_x[0].numel()

    # in the window of the pixel's block
    side = BLOCK + 2 * REACH
    column, line = ((move + at % BLOCK + REACH).floor() for move, at in ((move_x, pixel_x),
                                                                         (move_y, pixel_y)))
    is_near = (column >= 0) & (column < side - 1) & (line >= 0) & (line < side - 1)
    forward = forward_counts(taps, is_near, group, tile)
    cell = in_units((line * side + column) * is_near, group)  # not near: nobody asks
    cells = corner_banks(cell.long(), 1, side)
    window = conflicts(torch.arange(WARP) ^ (cells & 6) << 2,
                       in_units(is_near.to(torch.uint8), group).bool().expand_as(cells))

    # backward: within reach of its own pixel, and not on the edge
    is_edge = (move_x == -1 - pixel_x) | (move_y == -1 - pixel_y)
    is_near = (torch.minimum(move_x, move_y) >= -REACH) & (torch.maximum(move_x, move_y) < REACH)
    is_left = ~is_near & ~is_edge
    left = in_units(is_left.sum(0, True), group)[0]
    taken = left.sum(1)
    lists = lists_of(pixel_x + move_x, pixel_y + move_y, is_left)
    eights = lists // WARP * (WARP // 8) + -(-(lists % WARP) // 8)
    pitch = (STENCIL_PIXELS + 7) // 16 * 16 + 8
    below = (2 * REACH + 1) * pitch | 1
    count = height * width // WARP * WARP
    place = (move_y.floor() * below + move_x.floor() * pitch).long().flatten(1, 2)[:, :count]
    place = place.transpose(1, 2) + torch.arange(count)
    near = is_near.flatten(1, 2)[:, :count].transpose(1, 2)
    stencils = corner_banks(place, pitch, below)
    return FarRates(*(number / rows for number in (
        *forward, (taken > 0).sum().item(), left.amax(1).sum().item(),
        (-(-taken // (WARP // group.team))).sum().item(), (-(-lists // WARP)).sum().item(),
        eights.sum().item(), lists.sum().item())),
        has_full=bool((lists > BLOCK * BLOCK * group.depth).any()), window_conflicts=window,
        stencil_conflicts=conflicts(stencils % WARP, near.expand_as(stencils)))


@functools.cache
def existing_corners(height: int, width: int, offsets: str) -> float:
    """Share of the corners of all samples that are pixels of the image."""
    move_x, move_y, pixel_x, pixel_y = draw_taps(height, width, offsets)
    x, y = pixel_x + move_x, pixel_y + move_y
    across, down = (sum(((at.floor() + step >= 0) & (at.floor() + step < side)).float()
                        for step in (0, 1)) for at, side in ((x, width), (y, height)))
    return (across * down * are_inside(x, y, height, width)).mean().item() / 4


@functools.cache
def pixels_per_row(height: int, width: int, offsets: str, tile_h: int, tile_w: int) -> float:
    """Input pixels of a group that a tile of output pixels reads, per output pixel.

    A block that keeps what it has read in its L1 cache fetches as many.
    """
    move_x, move_y, pixel_x, pixel_y = draw_taps(height, width, offsets)
    x, y, groups = pixel_x + move_x, pixel_y + move_y, move_x.shape[-1]
    tile = torch.arange(height)[:, None] // tile_h * width + torch.arange(width) // tile_w
    tile = tile[None, :, :, None] * groups + torch.arange(groups)
    read = [tile.expand_as(x) * (height * width)
            + (y.floor() + down).clamp(0, height - 1).long() * width
            + (x.floor() + right).clamp(0, width - 1).long()
            for down in (0, 1) for right in (0, 1)]
    return len(torch.stack(read).unique()) / (height * width * groups)
