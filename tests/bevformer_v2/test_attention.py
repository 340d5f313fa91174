# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Both attentions against literal, dense forms; encoder, temporal alignment and fusion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmdcnv4.bevformer_v2 import geometry
from mmdcnv4.bevformer_v2.models.attention import (
    BEVSelfAttention,
    PillarDeformableAttention,
    SpatialCrossAttention,
    VisibleCells,
    deformable_attention,
    ring_offsets,
)
from mmdcnv4.bevformer_v2.models.bev_encoder import BEVFormerV2Encoder, TemporalFusion
from mmdcnv4.datasets import synthetic_rig

RANGE = (-16.0, -16.0, -3.0, 16.0, 16.0, 3.0)
SIZES = [(6, 9), (3, 5)]


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def bilinear(image, x, y):
    """Value of a map (H, W, D) at a place in widths and heights; zero outside."""
    height, width, _ = image.shape
    x, y = x * width - 0.5, y * height - 0.5
    out = torch.zeros(image.shape[-1])
    for j in (int(np.floor(y)), int(np.floor(y)) + 1):
        for i in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < width and 0 <= j < height:
                out += image[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return out


def test_deformable_attention_against_loops():
    heads, depth, points = 2, 3, 2
    value = torch.randn(2, 54 + 15, heads, depth)
    locations = torch.rand(2, 4, heads, 2, points, 2) * 1.4 - 0.2
    weights = torch.rand(2, 4, heads, 2, points)
    out = deformable_attention(value, SIZES, locations, weights)
    for b, q, h in np.ndindex(2, 4, heads):
        expected = torch.zeros(depth)
        for level, (height, width) in enumerate(SIZES):
            start = (0, 54)[level]
            image = value[b, start:start + height * width, h].view(height, width, depth)
            for p in range(points):
                x, y = locations[b, q, h, level, p].tolist()
                expected += weights[b, q, h, level, p] * bilinear(image, x, y)
        torch.testing.assert_close(out[b, q, h * depth:(h + 1) * depth], expected,
                                   atol=1e-5, rtol=1e-5)


def test_ring_offsets():
    offsets = ring_offsets(4, 2, 3).view(4, 2, 3, 2)
    torch.testing.assert_close(offsets[1, 0, 2], torch.tensor([0.0, 3.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[2, 1, 1], torch.tensor([-2.0, 0.0]), atol=1e-6, rtol=0)


def test_bev_self_attention_is_the_mean_of_two_branches():
    bev_size, cells = (5, 4), 20
    attention = randomize(BEVSelfAttention(16, num_heads=2, num_points=3))
    query, pos = torch.randn(2, cells, 16), torch.randn(1, cells, 16)
    reference = geometry.cell_centers((0, 0, 0, 1, 1, 1), bev_size)
    out = attention(query, pos, reference, bev_size)

    both = torch.cat([query, query + pos], -1)
    offsets = attention.sampling_offsets(both).view(2, cells, 2, 2, 3, 2)
    weights = attention.attention_weights(both).view(2, cells, 2, 2, 3).softmax(-1)
    value = attention.value_proj(query).view(2, cells, 2, 8)
    branches = []
    for branch in range(2):
        locations = reference[None, :, None, None] + offsets[:, :, :, branch] / torch.tensor(
            [4.0, 5.0])
        branches.append(deformable_attention(value, [bev_size], locations[:, :, :, None],
                                             weights[:, :, :, branch, None]))
    expected = query + attention.output_proj((branches[0] + branches[1]) / 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_pillar_points_take_turns():
    """Point p of a head and level belongs to height p % Z of the pillar."""
    attention = PillarDeformableAttention(8, num_heads=1, num_levels=1, num_points=4)
    torch.nn.init.zeros_(attention.sampling_offsets.bias)
    with torch.no_grad():
        attention.attention_weights.bias.copy_(torch.tensor([0.0, 50, 0, 0]))  # point 1
    tokens = torch.randn(1, 54, 8)
    reference = torch.rand(1, 3, 2, 2)
    out = attention(torch.zeros(1, 3, 8), tokens, reference, SIZES[:1])
    image = attention.value_proj(tokens)[0].view(6, 9, 8)
    expected = torch.stack([bilinear(image, *reference[0, q, 1].tolist()) for q in range(3)])
    torch.testing.assert_close(out[0], expected, atol=1e-4, rtol=1e-4)


def rig_matrices(batch, width=90, height=60):
    """lidar2img (B, V, 4, 4) of the synthetic cameras; each sample is turned its own way."""
    cam2img = np.eye(4)
    cam2img[:3, :3] = [[60, 0, width / 2], [0, 60, height / 2], [0, 0, 1]]
    views = [[cam2img @ np.linalg.inv(synthetic_rig.camera2ego(degrees + 17 * sample))
              @ synthetic_rig.LIDAR2EGO for degrees in (0, -60, 60)] for sample in range(batch)]
    return torch.tensor(np.array(views)).float()


def test_spatial_cross_attention_against_a_dense_loop():
    torch.manual_seed(0)
    batch, views, cells, channels = 2, 3, 36, 16
    points = geometry.pillar_points(RANGE, (6, 6), 2)
    uv, is_visible = geometry.project_points(points, rig_matrices(batch), (60, 90))
    hit = is_visible.any(-1)
    assert not torch.equal(hit[0], hit[1]) and (hit.sum(1) == 0).any() and (hit.sum(1) > 1).any()
    attention = randomize(SpatialCrossAttention(channels, 2, num_levels=2, num_points=4))
    query = torch.randn(batch, cells, channels)
    tokens = torch.randn(batch * views, 54 + 15, channels)
    out = attention(query, tokens, VisibleCells.of([(uv, is_visible)])[0], SIZES)

    slots = torch.zeros(batch, cells, channels)
    for b in range(batch):
        for v in range(views):
            dense = attention.deform(query[b:b + 1], tokens[None, b * views + v], uv[b, v][None],
                                     SIZES)[0]
            slots[b] += dense * hit[b, v, :, None]
    slots = slots / hit.sum(1).clamp(min=1)[..., None]
    torch.testing.assert_close(out, query + attention.output_proj(slots), atol=1e-5, rtol=1e-5)
    unseen = hit.sum(1) == 0
    torch.testing.assert_close(out[unseen] - query[unseen],
                               attention.output_proj.bias.expand(int(unseen.sum()), -1))


def test_no_cell_is_visible():
    uv, is_visible = torch.rand(1, 2, 5, 2, 2), torch.zeros(1, 2, 5, 2, dtype=torch.bool)
    attention = randomize(SpatialCrossAttention(8, 2, num_levels=2, num_points=2))
    query = torch.randn(1, 5, 8)
    out = attention(query, torch.randn(2, 69, 8), VisibleCells.of([(uv, is_visible)])[0], SIZES)
    torch.testing.assert_close(out, query + attention.output_proj.bias)


def tiny_encoder(**changes):
    options = dict(pc_range=RANGE, bev_size=(7, 6), embed_dims=16, num_layers=2, num_heads=2,
                   num_cams=3, num_levels=2, num_pillar_points=2, num_points=4,
                   feedforward_channels=24, dropout=0.0)
    return BEVFormerV2Encoder(**{**options, **changes})


def test_encoder_does_not_care_for_the_order_of_cameras():
    encoder = randomize(tiny_encoder())
    features = [torch.randn(2, 3, 16, *size) for size in SIZES]
    matrices = rig_matrices(2)
    out = encoder(features, matrices, (60, 90))
    assert out.shape == (2, 42, 16)
    order = [2, 0, 1]
    with torch.no_grad():
        encoder.cam_embed.copy_(encoder.cam_embed[order].clone())
    torch.testing.assert_close(
        encoder([x[:, order] for x in features], matrices[:, order], (60, 90)), out,
        atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_the_sizes_of_its_neighbours():
    """Its own maps in a larger, padded batch, whatever the maps hold in the padding."""
    encoder = randomize(tiny_encoder())
    own, padded, strides = (64, 96), (96, 128), (16, 32)
    matrices = rig_matrices(2, own[1], own[0])
    alone = [torch.randn(1, 3, 16, own[0] // stride, own[1] // stride) for stride in strides]
    expected = encoder(alone, matrices[:1], own)
    mixed = []
    for maps, stride in zip(alone, strides):
        both = 9 * torch.randn(2, 3, 16, padded[0] // stride, padded[1] // stride)
        both[0, :, :, :maps.shape[-2], :maps.shape[-1]] = maps[0]
        mixed.append(both)
    out = encoder(mixed, matrices, padded, (own, padded))
    torch.testing.assert_close(out[:1], expected, atol=1e-5, rtol=1e-5)
    assert (encoder(mixed, matrices, padded)[:1] - expected).abs().max() > 0.1  # padding counts


def test_checkpointing_changes_nothing():
    features = [torch.randn(1, 3, 16, *size) for size in SIZES]
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        encoder = tiny_encoder(with_cp=with_cp).train()
        encoder(features, rig_matrices(1), (60, 90)).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('changes, message', [
    (dict(pc_range=(0, 0, 0, 0, 1, 1)), 'pc_range'), (dict(num_points=3), 'num_points'),
    (dict(embed_dims=15), 'embed_dims')])
def test_encoder_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoder(**changes)


def test_encoder_says_what_it_was_built_for():
    with pytest.raises(ValueError, match='2 levels of 3 cameras, got 1 of 3'):
        tiny_encoder()([torch.randn(1, 3, 16, 6, 9)], rig_matrices(1), (60, 90))


def test_two_frames_of_a_standing_scene_agree():
    """Oracle maps whose pixels say where their ray meets the ground: BEV features of another
    frame, read with the ego motion in lidar2img, are those of the current one."""
    height, width, focal = 120, 180, 100.0
    cam2img = np.eye(4)
    cam2img[:3, :3] = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    now = synthetic_rig.ego2global(0, 0.5)
    found = []
    for time in (0.5, 0.0):
        then = synthetic_rig.ego2global(0, time)
        motion = geometry.current2frame(synthetic_rig.LIDAR2EGO, now, then)
        cam2ego = synthetic_rig.camera2ego(0)
        lidar2img = cam2img @ np.linalg.inv(cam2ego) @ synthetic_rig.LIDAR2EGO @ motion
        # every pixel's place on the ground (z = 0), in metres of the current ego frame
        v, u = np.mgrid[0:height, 0:width] + 0.5
        rays = np.stack([(u - width / 2) / focal, (v - height / 2) / focal, np.ones_like(u)], -1)
        camera2now = np.linalg.inv(now) @ then @ cam2ego
        rays = rays @ camera2now[:3, :3].T
        reach = -camera2now[2, 3] / np.minimum(rays[..., 2], -1e-3)
        ground = camera2now[:3, 3] + reach[..., None] * rays
        oracle = torch.tensor(ground[..., :2]).permute(2, 0, 1)[None].float()
        x, y = np.meshgrid(np.arange(-2, 2.1), np.arange(5.0, 9.0))
        points = np.stack([x.ravel(), y.ravel(), np.full(x.size, -1.8)], -1)  # on the ground
        uv, is_visible = geometry.project_points(
            torch.tensor(points)[:, None].float(), torch.tensor(lidar2img)[None, None],
            (height, width))
        grid = 2 * uv[0, 0, :, 0][None, :, None] - 1
        sampled = F.grid_sample(oracle, grid, align_corners=False)[0, :, :, 0].T
        found.append((sampled, is_visible.flatten()))
    both = found[0][1] & found[1][1]
    assert both.sum() > 8
    # pixels are 2 cm to 20 cm wide on the ground; without ego motion the error is 2 m
    assert (found[0][0] - found[1][0])[both].abs().max() < 0.05


@pytest.mark.parametrize('inter, parameters', [(None, 14_293_760), (512, 14_293_760)])
def test_fusion_of_two_frames(inter, parameters):
    with torch.device('meta'):
        fusion = TemporalFusion(2, (4, 5), inter_channels=inter)
    assert sum(p.numel() for p in fusion.parameters()) == parameters


def test_fusion_keeps_rows_and_columns():
    """Away from a changed cell, further than the convolutions reach, nothing changes."""
    fusion = randomize(TemporalFusion(3, (9, 14), embed_dims=8, inter_channels=12, num_blocks=1))
    frames = [torch.randn(2, 126, 8) for _ in range(3)]
    before = fusion(frames)
    frames[0] = frames[0].clone()
    frames[0][1, 4 * 14 + 3] += 1
    changed = (fusion(frames) - before).abs().amax(-1).view(2, 9, 14) > 1e-6
    rows, columns = torch.nonzero(changed[1], as_tuple=True)
    assert not changed[0].any() and changed[1, 4, 3]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 1, 5)
