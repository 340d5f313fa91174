# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""`torch.export` of backbone and neck, and of a whole model of one frame, against eager."""

from __future__ import annotations

import pytest
import torch

from mmdcnv4.bevformer_v2.export import ImagePart, SingleFrame


@torch.no_grad()
def test_image_part(make_model):
    """Exported with six images, any number of them gives what eager gives."""
    part = ImagePart(make_model()).eval()
    batch = torch.export.Dim('batch', min=2, max=48)
    program = torch.export.export(part, (torch.rand(6, 3, 96, 256),),
                                  dynamic_shapes=({0: batch},))
    for count in (2, 6):
        images = torch.randn(count, 3, 96, 256)
        found, expected = program.module()(images), part(images)
        assert len(found) == 5
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_single_frame(make_model, make_batch):
    """Also with matrices it was not exported with, and cameras that see other numbers of cells."""
    model = make_model(frames=(0,)).eval()
    batch = model.data_preprocessor(make_batch((0,), frames=(0,)), False)
    images, samples = batch['inputs']['imgs'], batch['data_samples']
    lidar2img = torch.from_numpy(samples[0].lidar2img).float()
    whole = SingleFrame(model).eval()
    program = torch.export.export(whole, (images, lidar2img)).module()
    logits, codes = program(images, lidar2img)
    expected = model(batch['inputs'], samples, mode='tensor')  # of all layers
    torch.testing.assert_close(logits, expected[0][-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codes, expected[1][-1], atol=1e-5, rtol=1e-5)
    zoomed = lidar2img.clone()
    zoomed[:, :, :2] *= 0.5  # all lies nearer to the first pixel
    found, expected = program(images.flip(1), zoomed), whole(images.flip(1), zoomed)
    for a, b, first in zip(found, expected, (logits, codes)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(a, first, atol=1e-3)


def test_several_frames_are_refused(make_model):
    with pytest.raises(ValueError, match=r'model.frames must be \(0,\), got \(-1, 0\)'):
        SingleFrame(make_model())
