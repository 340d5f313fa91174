# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Attention inside windows: neighbourhoods around every pixel, and fixed or shifted windows.

Source:   "Neighborhood Attention Transformer", Hassani et al., CVPR 2023, arXiv:2204.07143,
          section 3; "Swin Transformer", Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2; as
          "DAT++", Xia et al., arXiv:2309.01430, uses them.
Differs:  neighbourhood attention is computed by tiles of queries with the attention of PyTorch, so
          that no other library is needed; windows are padded, for any size of the map.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import recompute

TILE = 8
# Logits that may exist at a time; with more of them the map is processed in pieces, whose
# intermediate results are computed again in the backward pass.
MAX_LOGITS = 2**22


class TileGroup(NamedTuple):
    """Neighbouring tiles along an axis that see their keys in the same way.

    Tile t holds the queries `first + t * size ... + size` and sees the keys `start + t * size ...
    + keys`.
    """

    first: int
    tiles: int
    size: int
    start: int
    keys: int
    windows: tuple[int, ...]  # first key of each query, from `start`


def tile_groups(length: int, kernel_size: int, tile: int = TILE) -> list[TileGroup]:
    """Cuts an axis of at least `kernel_size` queries into tiles; the last one may be smaller.

    The window of query i begins at `clamp(i - kernel_size // 2, 0, length - kernel_size)`: at a
    border it is shifted inside, not cropped.
    """
    if length <= tile + kernel_size - 1:  # the keys of one tile are the whole axis
        tile = length
    groups: list[TileGroup] = []
    for first in range(0, length, tile):
        size = min(tile, length - first)
        keys = min(size + kernel_size - 1, length)
        start = min(max(first - kernel_size // 2, 0), length - keys)
        windows = tuple(min(max(query - kernel_size // 2, 0), length - kernel_size) - start
                        for query in range(first, first + size))
        last = groups[-1] if groups else None
        if last is not None and (last.size, last.first - last.start, last.windows) == (
                size, first - start, windows):
            groups[-1] = last._replace(tiles=last.tiles + 1)
        else:
            groups.append(TileGroup(first, 1, size, start, keys, windows))
    return groups


def _axis_index(group: TileGroup, kernel_size: int) -> Tensor:
    """Row of the bias table for each (query, key) of a tile, (size, keys); -1 outside the window.

    Key n of the image has row `n - i + kernel_size - 1` for query i.
    """
    keys = torch.arange(group.keys)
    windows = torch.tensor(group.windows)[:, None]
    queries = torch.arange(group.size)[:, None] + group.first - group.start
    index = keys - queries + kernel_size - 1
    return index.where((keys >= windows) & (keys < windows + kernel_size), -1)


def _table_index(rows: TileGroup, columns: TileGroup, kernel_size: int,
                 device: torch.device) -> Tensor:
    """Entry of the flattened bias table, one past its end outside the window.

    Returns:
        (queries * keys) of a tile, flattened from (rows, columns) of both.
    """
    width = 2 * kernel_size - 1
    y = _axis_index(rows, kernel_size)[:, None, :, None]
    x = _axis_index(columns, kernel_size)[None, :, None, :]
    index = (y * width + x).where((y >= 0) & (x >= 0), width * width)
    return index.flatten().to(device=device, dtype=torch.int32)


@lru_cache(maxsize=256)
def _cached_table_index(rows: TileGroup, columns: TileGroup, kernel_size: int,
                        device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be used in a training step later
        return _table_index(rows, columns, kernel_size, device)


def _tile_bias(rpb: Tensor, rows: TileGroup, columns: TileGroup, kernel_size: int) -> Tensor:
    """Bias inside the windows and -inf outside, (heads, queries, keys) of a tile."""
    place = (rows._replace(tiles=1), columns._replace(tiles=1), kernel_size, rpb.device)
    is_plain = type(rpb.detach()) is Tensor and not torch.compiler.is_compiling()
    index = (_cached_table_index if is_plain else _table_index)(*place)
    table = F.pad(rpb.flatten(1), (0, 1), value=float('-inf'))
    return table.index_select(1, index).view(
        rpb.shape[0], rows.size * columns.size, rows.keys * columns.keys)


def _cut_queries(x: Tensor, rows: TileGroup, columns: TileGroup) -> Tensor:
    """(N, H, W, heads, d) -> (N * tiles, heads, queries, d)."""
    x = x[:, rows.first:rows.first + rows.tiles * rows.size,
          columns.first:columns.first + columns.tiles * columns.size]
    x = x.unflatten(1, (rows.tiles, rows.size)).unflatten(3, (columns.tiles, columns.size))
    # (N, tiles, rows, tiles, columns, heads, d) -> (N, tiles, tiles, heads, rows, columns, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def _cut_keys(x: Tensor, rows: TileGroup, columns: TileGroup) -> Tensor:
    """(N, H, W, heads, d) -> (N * tiles, heads, keys, d); tiles share keys."""
    x = x[:, rows.start:rows.start + (rows.tiles - 1) * rows.size + rows.keys,
          columns.start:columns.start + (columns.tiles - 1) * columns.size + columns.keys]
    x = x.unfold(1, rows.keys, rows.size).unfold(2, columns.keys, columns.size)
    # (N, tiles, tiles, heads, d, rows, columns) -> (N, tiles, tiles, heads, rows, columns, d)
    return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(0, 2)


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, rows: TileGroup,
                  columns: TileGroup, kernel_size: int) -> Tensor:
    """Attention of the queries of some tiles, (N, rows, columns, heads, d)."""
    bias = _tile_bias(rpb, rows, columns, kernel_size)
    out = F.scaled_dot_product_attention(
        _cut_queries(q, rows, columns), _cut_keys(k, rows, columns),
        _cut_keys(v, rows, columns), attn_mask=bias.to(q.dtype))
    out = out.unflatten(2, (rows.size, columns.size))
    out = out.unflatten(0, (q.shape[0], rows.tiles, columns.tiles))
    # (N, tiles, tiles, heads, rows, columns, d) -> (N, tiles, rows, tiles, columns, heads, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _split(group: TileGroup, tiles: int) -> list[TileGroup]:
    """The same tiles in pieces of at most `tiles`."""
    return [group._replace(first=group.first + done * group.size,
                           start=group.start + done * group.size,
                           tiles=min(tiles, group.tiles - done))
            for done in range(0, group.tiles, tiles)]


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor,
                           kernel_size: int) -> Tensor:
    """Attention of every pixel to the `kernel_size`^2 pixels of a window around it.

    At the borders the window is shifted inside. Queries are cut into tiles; each tile attends to
    the keys that its windows cover, with -inf where a key is outside the window of a query.

    Args:
        q, k, v: shape (N, H, W, heads, d), H and W at least `kernel_size`.
        rpb: bias by displacement, shape (heads, 2 * kernel_size - 1, 2 * kernel_size - 1).
        kernel_size: odd.

    Returns:
        Shape (N, H, W, heads, d).

    Raises:
        ValueError: the map is smaller than the window.
    """
    batch, height, width, heads = map(int, q.shape[:4])  # int: tracers have tensors there
    if min(height, width) < kernel_size:
        raise ValueError(f'neighborhood_attention: q must have at least {kernel_size} rows and '
                         f'columns, got {height} x {width}')
    column_groups = tile_groups(width, kernel_size)
    pieces: list[list[tuple[TileGroup, TileGroup]]] = []
    logits = 0
    for rows in tile_groups(height, kernel_size):
        per_row = batch * heads * rows.size * rows.keys * sum(
            group.tiles * group.size * group.keys for group in column_groups)
        logits += per_row * rows.tiles
        pieces += [[(piece, columns) for columns in column_groups]
                   for piece in _split(rows, max(MAX_LOGITS // max(per_row, 1), 1))]
    outs = []
    for row in pieces:
        parts = []
        for group, columns in row:
            args = (q, k, v, rpb, group, columns, kernel_size)
            parts.append(recompute(_attend_tiles, *args, preserve_rng_state=False)
                         if logits > MAX_LOGITS else _attend_tiles(*args))
        outs.append(torch.cat(parts, 2))
    return torch.cat(outs, 1)


def neighborhood_attention_reference(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor,
                                     kernel_size: int) -> Tensor:
    """The same by gathering the window of every query: plain, and kernel_size^2 times the memory.

    Arguments and result are those of :func:`neighborhood_attention`.
    """
    places, index = [], []
    for length in q.shape[1:3]:
        query = torch.arange(length, device=q.device)[:, None]
        start = (query - kernel_size // 2).clamp(0, length - kernel_size)
        places.append(start + torch.arange(kernel_size, device=q.device))  # (length, K)
        index.append(places[-1] - query + kernel_size - 1)
    rows, columns = places
    keys, values = (x[:, rows][:, :, :, columns] for x in (k, v))  # (N, H, K, W, K, heads, d)
    logits = torch.einsum('nijhd,niajbhd->nijhab', q * q.shape[-1]**-0.5, keys)
    bias = rpb[:, index[0][:, :, None, None], index[1]]  # (heads, H, K, W, K)
    logits = logits + bias.permute(1, 3, 0, 2, 4)
    weights = logits.flatten(4).softmax(4).view_as(logits)
    return torch.einsum('nijhab,niajbhd->nijhd', weights, values)


class NeighborhoodAttention(nn.Module):
    """Multi-head neighbourhood attention with a relative position bias.

    Maps smaller than the window are padded with zeros at the right and at the bottom; padded
    pixels are attended to, as in the released models.

    Args:
        channels: width C.
        heads: divides C.
        kernel_size: odd width of the window.
    """

    def __init__(self, channels: int, heads: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.heads, self.kernel_size = heads, kernel_size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rpb = nn.Parameter(torch.empty(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the bias table."""
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        height, width = x.shape[2:]
        x = pad_at_least(x, self.kernel_size).permute(0, 2, 3, 1)  # (N, H, W, C)
        qkv = self.qkv(x).unflatten(3, (3, self.heads, -1))
        q, k, v = qkv.unbind(3)  # (N, H, W, heads, d)
        out = neighborhood_attention(q, k, v, self.rpb, self.kernel_size)
        out = out[:, :height, :width].flatten(3)
        return self.proj(out).permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Attention inside windows of a fixed grid, which may be shifted.

    Args:
        channels: width C.
        heads: divides C.
        window_size: side w of the windows.
        shifted: move the grid by ceil(w / 2) pixels down and right; the map wraps around, and
            pixels that are not neighbours do not attend to each other.
        attend_padding: whether the zeros that fill windows up at the right and at the bottom are
            attended to, as in the released models. Their share depends on the size of the map, and
            with it what a trained network predicts.
    """

    def __init__(self, channels: int, heads: int, window_size: int, shifted: bool,
                 attend_padding: bool = True) -> None:
        super().__init__()
        self.heads, self.window_size, self.attend_padding = heads, window_size, attend_padding
        self.shift = -(-window_size // 2) if shifted else 0
        self.proj_qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1)**2, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the bias table."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)

    def _bias(self) -> Tensor:
        """(heads, w * w, w * w), by the displacement of query and key."""
        size = self.window_size
        places = torch.arange(size, device=self.relative_position_bias_table.device)
        row, column = (axis.flatten() for axis in torch.meshgrid(places, places, indexing='ij'))
        index = (row[:, None] - row + size - 1) * (2 * size - 1) + (
            column[:, None] - column + size - 1)
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """-100 between the pixels of a window that the shift has brought together, else 0.

        Returns:
            (windows, 1, w * w, w * w).
        """
        regions = []
        for length in (height, width):
            place = torch.arange(length, device=device)
            regions.append((place >= length - self.window_size).long()
                           + (place >= length - self.shift).long())
        region = regions[0][:, None] * 3 + regions[1]
        region = self._cut(region[None, :, :, None])[..., 0].squeeze(0)  # (windows, w * w)
        return -100.0 * (region[:, None, :, None] != region[:, None, None, :]).float()

    def _padding_mask(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """-100 for the keys that fill (N, C, H, W) up to `rows` and `columns`, else 0.

        Returns:
            (windows, 1, 1, w * w).
        """
        mask = torch.full((rows, columns), -100.0, device=x.device)
        mask[:x.shape[2], :x.shape[3]] = 0
        mask = mask.roll((-self.shift, -self.shift), (0, 1))
        return self._cut(mask[None, :, :, None])[0].unsqueeze(1).transpose(2, 3)

    def _cut(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, windows, w * w, C)."""
        size = self.window_size
        x = x.unflatten(1, (-1, size)).unflatten(3, (-1, size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        height, width = x.shape[2:]
        size = self.window_size
        rows, columns = height + -height % size, width + -width % size
        bias = self._bias()
        if not self.attend_padding and (rows, columns) != (height, width):
            bias = bias + self._padding_mask(x, rows, columns)
        x = F.pad(x, (0, columns - width, 0, rows - height)).permute(0, 2, 3, 1)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            bias = bias + self._mask(rows, columns, x.device)
        qkv = self.proj_qkv(self._cut(x)).unflatten(3, (3, self.heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (N, windows, heads, w * w, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out = out.transpose(2, 3).flatten(3)  # (N, windows, w * w, C)
        out = out.unflatten(2, (size, size)).unflatten(1, (rows // size, -1))
        out = self.proj_out(out.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out[:, :height, :width].permute(0, 3, 1, 2)


def pad_at_least(x: Tensor, size: int) -> Tensor:
    """Pads (N, C, H, W) with zeros at the right and at the bottom up to `size` rows and columns."""
    height, width = x.shape[2:]
    if height >= size and width >= size:
        return x
    return F.pad(x, (0, max(size - width, 0), 0, max(size - height, 0)))
