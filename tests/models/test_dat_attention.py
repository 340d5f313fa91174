# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The attention layers of DAT against formulas written down once more, query by query.

Neighbourhood attention is compared with a mask over the whole map, and with the gather of every
window; deformable attention and shifted windows with loops over single numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmdcnv4.models.layers import deformable_attention, local_attention
from mmdcnv4.models.layers.deformable_attention import DeformableAttention, DeformableOptions
from mmdcnv4.models.layers.local_attention import (
    NeighborhoodAttention,
    WindowAttention,
    neighborhood_attention,
    neighborhood_attention_reference,
    tile_groups,
)

K = 7


def randomise(module, scale=0.5):
    """Draws every parameter, so that no branch is quiet."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return module.double()


def window_start(query, length, size):
    """The window inside the map whose centre is nearest to the query."""
    return min(range(length - size + 1), key=lambda start: abs(start + size // 2 - query))


def masked_attention(layer, x):
    """The whole layer with a bias over all pairs of pixels, -inf outside the window."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, max(K - width, 0), 0, max(K - height, 0)))
    rows, columns = x.shape[2:]
    bias = torch.full((layer.heads, rows * columns, rows * columns), -math.inf, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            top, left = window_start(i, rows, K), window_start(j, columns, K)
            for m in range(top, top + K):
                for n in range(left, left + K):
                    bias[:, i * columns + j, m * columns + n] = layer.rpb[:, m - i + K - 1,
                                                                          n - j + K - 1]
    tokens = layer.qkv(x.flatten(2).transpose(1, 2))
    q, k, v = tokens.unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias
    out = (logits.softmax(3) @ v).transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
    return layer.proj(out[:, :height, :width]).permute(0, 3, 1, 2)


@pytest.mark.parametrize('size', [(7, 7), (8, 13), (25, 33), (17, 40), (30, 14)])
@pytest.mark.parametrize('limit', [2**22, 20_000])  # at once, and in pieces computed again
def test_tiles_equal_the_gather_form(size, limit, monkeypatch):
    monkeypatch.setattr(local_attention, 'MAX_LOGITS', limit)
    torch.manual_seed(0)
    inputs = [torch.randn(2, *size, 2, 4, dtype=torch.float64, requires_grad=True)
              for _ in range(3)]
    inputs.append(torch.randn(2, 13, 13, dtype=torch.float64, requires_grad=True))
    out, expected = (form(*inputs, K) for form in (
        neighborhood_attention, neighborhood_attention_reference))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * weight).sum(), inputs))


@pytest.mark.parametrize('size', [(5, 9), (7, 7), (8, 13), (3, 4), (1, 1)])
def test_neighborhood_layer_equals_a_mask(size):
    layer = randomise(NeighborhoodAttention(8, 2))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), masked_attention(layer, x))


def test_neighborhood_gradients():
    layer = randomise(NeighborhoodAttention(2, 1, kernel_size=3))
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, rpb: torch.func.functional_call(layer, {'rpb': rpb}, (x,)), (x, layer.rpb))


@pytest.mark.parametrize('length', range(7, 60))
def test_every_query_is_in_one_tile_and_its_window_in_the_keys(length):
    queries = []
    for group in tile_groups(length, K):
        for tile in range(group.tiles):
            first, start = (place + tile * group.size for place in (group.first, group.start))
            assert start >= 0 and start + group.keys <= length
            for query in range(first, first + group.size):
                window = start + group.windows[query - first]
                assert window == window_start(query, length, K)
                assert start <= window and window + K <= start + group.keys
                queries.append(query)
    assert queries == list(range(length))


def test_index_made_in_inference_serves_a_training_step():
    local_attention._cached_table_index.cache_clear()
    layer = NeighborhoodAttention(8, 2)
    with torch.inference_mode():
        layer(torch.randn(1, 8, 9, 11))
    layer(torch.randn(1, 8, 9, 11)).sum().backward()
    assert layer.rpb.grad.any() and local_attention._cached_table_index.cache_info().hits


def test_neighborhood_refuses_a_map_below_the_window():
    q = torch.zeros(1, 6, 9, 1, 4)
    with pytest.raises(ValueError, match='at least 7 rows and columns, got 6 x 9'):
        neighborhood_attention(q, q, q, torch.zeros(1, 13, 13), K)


def region(place, length, size, shift):
    """Which of the three stripes of the shifted map a pixel is in."""
    return (place >= length - size) + (place >= length - shift)


def windows_by_loops(layer, x):
    """Attention inside shifted windows, pixel by pixel; the map is padded to whole windows."""
    size, shift = layer.window_size, layer.shift
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % size, 0, -height % size))
    rows, columns = x.shape[2:]
    q, k, v = layer.proj_qkv(x.permute(0, 2, 3, 1)).unflatten(3, (3, layer.heads, -1)).unbind(3)
    out = torch.zeros_like(q)
    table = layer.relative_position_bias_table.view(2 * size - 1, 2 * size - 1, -1)
    for i in range(rows):
        for j in range(columns):  # places in the shifted map
            keys, logits = [], []
            own = ((i + shift) % rows, (j + shift) % columns)
            for m in range(i // size * size, i // size * size + size):
                for n in range(j // size * size, j // size * size + size):
                    other = ((m + shift) % rows, (n + shift) % columns)
                    logit = (q[:, own[0], own[1]] * k[:, other[0], other[1]]).sum(2)
                    logit = logit / math.sqrt(q.shape[-1]) + table[i - m + size - 1,
                                                                   j - n + size - 1]
                    is_apart = (region(i, rows, size, shift), region(j, columns, size, shift)) != (
                        region(m, rows, size, shift), region(n, columns, size, shift))
                    is_padding = other[0] >= height or other[1] >= width
                    is_left_out = is_padding and not layer.attend_padding
                    logits.append(logit - 100 * (shift > 0 and is_apart) - 100 * is_left_out)
                    keys.append(v[:, other[0], other[1]])
            weights = torch.stack(logits).softmax(0)
            out[:, own[0], own[1]] = (weights[..., None] * torch.stack(keys)).sum(0)
    return layer.proj_out(out.flatten(3))[:, :height, :width].permute(0, 3, 1, 2)


@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('attend_padding', [True, False])
@pytest.mark.parametrize('size', [(6, 9), (4, 5), (1, 1)])
def test_windows_equal_loops(shifted, size, attend_padding):
    layer = randomise(WindowAttention(4, 2, 3, shifted, attend_padding))
    assert layer.shift == (2 if shifted else 0)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), windows_by_loops(layer, x))


def test_windows_of_the_papers_are_shifted_by_four():
    assert WindowAttention(4, 2, 7, shifted=True).shift == 4


def test_window_gradients():
    layer = randomise(WindowAttention(2, 1, 2, shifted=True))
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, table: torch.func.functional_call(
            layer, {'relative_position_bias_table': table}, (x,)),
        (x, layer.relative_position_bias_table))


def bilinear(image, y, x):
    """Value of (channels, H, W) at pixel coordinates; zero outside."""
    total = 0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * image[:, i, j]
    return torch.zeros_like(image[:, 0, 0]) + total


def place_of_key(layer, index, length, delta):
    """Coordinate of a key in [-1, 1], from section 3 of the description, by case."""
    mode, factor = layer.options.ref_mode, layer.options.offset_range_factor
    span = length if mode == 'v1' else max(length - 1, 1)
    rest = (2 * (index + 0.5) / span - 1 if mode != 'paper' or length == 1
            else 2 * index / span - 1)
    if factor == -1:
        free = rest + delta
        return math.tanh(free) if mode == 'v1' else min(max(free, -1.0), 1.0)
    if factor == 0 and mode == 'v1':
        return rest + delta
    return rest + factor * math.tanh(delta) / span


def place_of_query(layer, index, length):
    if layer.options.ref_mode == 'v1':
        return 2 * (index + 0.5) / length - 1
    return 2 * index / max(length - 1, 1) - 1


def bias_by_hand(layer, head, gaps, pair):
    """Bias of one query and key, whose coordinates are `gaps` = (y, x) apart."""
    if layer.position_bias == 'fixed':
        return layer.rpe_table[head, pair[0], pair[1]]
    if layer.position_bias == 'log_cpb':
        scaled = [math.copysign(math.log2(1 + abs(4 * gap)) / 3, gap) for gap in gaps]
        hidden = layer.rpe_table[0].weight @ torch.tensor(scaled).double() + layer.rpe_table[0].bias
        return (layer.rpe_table[2].weight @ hidden.relu())[head % (layer.heads // layer.groups)]
    if layer.position_bias == 'deformable':
        table = layer.rpe_table[head:head + 1]
        y, x = ((gap / 2 + 1) / 2 * (length - 1) for gap, length in zip(gaps, table.shape[1:]))
        return bilinear(table, y, x)[0]
    return 0.0


def deformable_by_loops(layer, image):
    """One image (C, H, W), from section 3 of the description."""
    (channels, height, width), groups, heads = image.shape, layer.groups, layer.heads
    q = F.conv2d(image[None], layer.proj_q.weight, layer.proj_q.bias)[0]
    deltas = [layer.conv_offset(part[None])[0] for part in q.chunk(groups)]
    rows, columns = deltas[0].shape[1:]
    keys, places = [], []
    for i in range(rows):
        for j in range(columns):
            sampled, where = [], []
            for group, delta in enumerate(deltas):
                y = place_of_key(layer, i, rows, delta[0, i, j].item())
                x = place_of_key(layer, j, columns, delta[1, i, j].item())
                sampled.append(bilinear(image.chunk(groups)[group], (y + 1) / 2 * (height - 1),
                                        (x + 1) / 2 * (width - 1)))
                where.append((y, x))
            keys.append(torch.cat(sampled))
            places.append(where)
    k, v = ([proj.weight[:, :, 0, 0] @ key + proj.bias for key in keys]
            for proj in (layer.proj_k, layer.proj_v))
    out, d = torch.zeros_like(q), channels // heads
    for i in range(height):
        for j in range(width):
            own = (place_of_query(layer, i, height), place_of_query(layer, j, width))
            for head in range(heads):
                part = slice(head * d, head * d + d)
                logits = []
                for n in range(len(keys)):
                    other = places[n][head // (heads // groups)]
                    gaps = (own[0] - other[0], own[1] - other[1])
                    logits.append((q[part, i, j] * k[n][part]).sum() / math.sqrt(d)
                                  + bias_by_hand(layer, head, gaps, (i * width + j, n)))
                weights = torch.stack(logits).softmax(0)
                out[part, i, j] = sum(w * value[part] for w, value in zip(weights, v))
    if layer.position_bias == 'depthwise':
        out = out + F.conv2d(q[None], layer.rpe_table.weight, layer.rpe_table.bias, padding=1,
                             groups=channels)[0]
    return F.conv2d(out[None], layer.proj_out.weight, layer.proj_out.bias)[0]


def make(size=(6, 6), stride=2, kernel_size=3, **options):
    return randomise(DeformableAttention(8, 4, 2, stride, kernel_size, size,
                                         DeformableOptions(**options)))


@pytest.mark.parametrize('factor', [-1.0, 0.0, 2.0])
@pytest.mark.parametrize('mode', ['code', 'paper', 'v1'])
@pytest.mark.parametrize('size', [(5, 7), (2, 6)])  # 2 rows: one row of keys
@torch.no_grad()
def test_deformable_equals_loops(factor, mode, size):
    layer = make(offset_range_factor=factor, ref_mode=mode)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([deformable_by_loops(layer, i) for i in x]))


@pytest.mark.parametrize('bias', ['none', 'fixed', 'depthwise', 'log_cpb', 'deformable'])
@pytest.mark.parametrize('stride, kernel_size', [(2, 3), (1, 3), (2, 2)])
@torch.no_grad()
def test_position_biases_equal_loops(bias, stride, kernel_size):
    layer = make((4, 6), stride, kernel_size, position_bias=bias)
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], deformable_by_loops(layer, x[0]))


@pytest.mark.parametrize('bias', ['none', 'fixed', 'depthwise', 'log_cpb', 'deformable'])
def test_chunks_change_nothing(bias, monkeypatch):
    results = []
    for limit in (2**22, 150 * (32 if bias == 'log_cpb' else 1)):
        monkeypatch.setattr(deformable_attention, 'MAX_LOGITS', limit)
        layer = make((5, 7), position_bias=bias)
        x = torch.randn(2, 8, 5, 7, dtype=torch.float64).requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, out.numel()).double().view_as(out)).sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    assert all(grad.any() for grad in results[0])  # those of the offsets and of the bias, too
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize('bias', ['fixed', 'log_cpb', 'deformable'])
@pytest.mark.parametrize('limit', [2**22, 30])
def test_deformable_gradients(bias, limit, monkeypatch):
    monkeypatch.setattr(deformable_attention, 'MAX_LOGITS', limit)
    layer = randomise(DeformableAttention(4, 2, 1, 2, 3, (3, 4), DeformableOptions(
        offset_range_factor=2.0, ref_mode='v1', position_bias=bias)))
    names = [name for name, _ in layer.named_parameters()
             if name.startswith(('rpe_table', 'conv_offset.3'))]
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    parameters = [layer.get_parameter(name) for name in names]
    # fast: along random directions, where the chunks make every evaluation slow
    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-4, fast_mode=limit == 30)


@torch.no_grad()
def test_without_offsets_the_keys_are_means():
    layer = make(use_offsets=False)
    assert not any(p.requires_grad for p in layer.conv_offset.parameters())
    assert not hasattr(layer, 'rpe_table')
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    means = torch.stack([x[..., i:i + 2, j:j + 2].mean((2, 3))
                         for i in (0, 2) for j in (0, 2, 4)], 2)  # (N, C, Ns)
    k, v = (proj.weight[:, :, 0, 0] @ means + proj.bias[:, None]
            for proj in (layer.proj_k, layer.proj_v))
    q = layer.proj_q(x).flatten(2)
    weights = torch.einsum('nhdq,nhdk->nhqk', *(t.unflatten(1, (4, 2)) for t in (q, k)))
    out = torch.einsum('nhqk,nhdk->nhdq', (weights / 2**0.5).softmax(3), v.unflatten(1, (4, 2)))
    expected = layer.proj_out(out.flatten(1, 2).view_as(x))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match=r'that 2 divides, got \(5, 6\)'):
        layer(torch.zeros(1, 8, 5, 6, dtype=torch.float64))


def test_a_fixed_bias_has_one_size():
    with pytest.raises(ValueError, match=r'size \(6, 6\) of construction, got \(6, 8\)'):
        make(position_bias='fixed')(torch.zeros(1, 8, 6, 8, dtype=torch.float64))


def test_offsets_stay_in_float32_under_autocast():
    layer, seen = make().float(), []
    layer.conv_offset.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert layer(torch.randn(1, 8, 6, 6)).dtype == torch.bfloat16
    assert seen == [torch.float32]
