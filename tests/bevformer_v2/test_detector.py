# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The whole detector: flip, mask, history, missing frames, batches, gradients, bf16."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdcnv4.bevformer_v2.models.detector import Geometry, without_training
from mmdcnv4.bevformer_v2.models.grid_mask import GridMask

TODAY = dict(frames=(0,))


def preprocess(model, batch, training=True):
    data = model.data_preprocessor(batch, training)
    return data['inputs'], data['data_samples']


def losses_of(model, batch):
    return model.loss(*preprocess(model, batch))


def total(losses):
    return sum(value for name, value in losses.items() if 'loss' in name)


def frozen_norms(model):
    """Training mode without the two things that depend on the batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return model


def remove_objects(batch):
    for sample in batch['data_samples']:
        sample.gt_instances_3d = sample.gt_instances_3d[:0]
        sample.gt_mono = sample.gt_mono[:0]
    return batch


@pytest.mark.parametrize('with_objects', [True, False])
@pytest.mark.parametrize('frames', [(0,), (-1, 0)])
def test_every_parameter_gets_a_gradient(make_model, make_batch, frames, with_objects):
    """With and without objects, neighbours, and a missing neighbour (sample 0)."""
    model = make_model(frames=frames).train()
    batch = make_batch(frames=frames)
    losses = losses_of(model, batch if with_objects else remove_objects(batch))
    assert all(value.isfinite() for value in losses.values())
    assert {'loss_cls', 'd0.loss_bbox', 'mono_loss_conf3d'} <= set(losses)
    total(losses).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_all_frames_missing(make_model, make_batch):
    model = make_model().train()
    total(losses_of(model, make_batch((0, 3)))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bfloat16(make_model, make_batch):
    model = make_model().train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = losses_of(model, make_batch())
    assert all(value.isfinite() for value in losses.values())
    total(losses).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()
    reference = losses_of(model, make_batch())
    expected = float(total(reference).detach())
    assert float(total(losses).detach()) == pytest.approx(expected, rel=0.1)


def test_a_batch_is_the_mean_of_its_samples(make_model, make_batch):
    model = frozen_norms(make_model())
    losses = losses_of(model, make_batch((0, 4)))
    single = [losses_of(model, make_batch((index,))) for index in (0, 4)]
    counts = [len(make_batch((index,))['data_samples'][0].gt_instances_3d) for index in (0, 4)]
    for name in ('loss_cls', 'loss_bbox', 'd0.loss_cls', 'd0.loss_bbox'):
        expected = sum(n * part[name] for n, part in zip(counts, single)) / sum(counts)
        torch.testing.assert_close(losses[name], expected, atol=1e-4, rtol=1e-4)


def test_predictions_do_not_depend_on_the_batch(make_model, make_batch):
    model = make_model().eval()
    both = model.test_step(make_batch((0, 4)))
    for index, sample in zip((0, 4), both):
        alone = model.test_step(make_batch((index,)))[0].pred_instances_3d
        assert sample.pred_instances_3d.bboxes_3d.tensor.shape == (300, 9)
        torch.testing.assert_close(sample.pred_instances_3d.scores_3d, alone.scores_3d,
                                   atol=1e-4, rtol=1e-4)
        # equal scores may change places
        order = [pred.bboxes_3d.tensor[:, 0].sort().values
                 for pred in (sample.pred_instances_3d, alone)]
        torch.testing.assert_close(*order, atol=2e-3, rtol=1e-3)


class Pooled(nn.Module):
    """A backbone of four levels in which no cell knows its neighbours."""

    def forward(self, x):
        x = x[:, torch.arange(64) % 3]
        return [nn.functional.avg_pool2d(x, stride) for stride in (8, 16, 32, 64)]


def test_predictions_do_not_depend_on_the_sizes_of_the_neighbours(make_model, make_dataset, tiny):
    from mmengine.dataset import pseudo_collate
    model = make_model(**TODAY, data_preprocessor=dict(pad_size_divisor=64)).eval()
    model.img_backbone, model.img_neck = Pooled(), nn.Identity()
    pipe = list(tiny.test_dataloader.dataset.pipeline)
    samples = []
    for index, height in ((0, 64), (4, 96)):
        pipe[1] = dict(pipe[1], crop=(0, 0, 320, 160), heights=(height,))
        samples.append(make_dataset(pipeline=pipe, test_mode=True, frames=(0,))[index])
    found = [model(*preprocess(model, pseudo_collate(list(chosen)), False), mode='tensor')
             for chosen in (samples, samples[:1], samples[1:])]
    for both, *alone in zip(*found):
        torch.testing.assert_close(both, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


class Pointwise(nn.Module):
    """A backbone without neighbours: mirrored images give mirrored maps."""

    def forward(self, x):
        return [x[..., ::stride, ::stride] if stride == 1 else nn.functional.avg_pool2d(x, stride)
                for stride in (8, 16)]


def test_flip_leaves_features_in_place(make_model):
    """Widths that the stride does not divide before padding included: padding is mirrored too."""
    model = make_model(**TODAY)
    model.img_backbone, model.img_neck = Pointwise(), nn.Identity()
    images = torch.randn(2, 3, 3, 64, 96)
    images[..., 81:] = 0
    plain = model.extract_feat(images, torch.tensor([False, False]))
    mixed = model.extract_feat(images, torch.tensor([False, True]))
    for one, other in zip(plain, mixed):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_flip_reaches_the_network(make_model):
    model = make_model(**TODAY).eval()
    images = torch.randn(2, 3, 3, 32, 64)
    with torch.no_grad():
        mixed = model.extract_feat(images, torch.tensor([False, True]))
        plain = model.extract_feat(images, torch.tensor([False, False]))
        mirrored = model.extract_feat(images.flip(-1), torch.tensor([False, False]))
    torch.testing.assert_close(mixed[0][0], plain[0][0])
    torch.testing.assert_close(mixed[0][1], mirrored[0][1].flip(-1))
    assert not torch.allclose(mixed[0][1], plain[0][1])


def test_grid_mask():
    mask = GridMask(prob=1.0).train()
    images = torch.ones(2, 3, 60, 100)
    kept = []
    for _ in range(300):
        out = mask(images)
        assert torch.equal(out[0, 0], out[1, 2])  # all images alike
        kept.append(float(out.mean()))
    # squares of half the period are blank, a quarter of the area
    assert np.mean(kept) == pytest.approx(0.75, abs=0.06)
    rows, columns = (out[0, 0] == 1).all(1), (out[0, 0] == 1).all(0)
    assert torch.equal(out[0, 0] == 1, rows[:, None] | columns[None])
    assert mask.eval()(images) is images
    assert GridMask(prob=0.0).train()(images) is images


def test_history_restores_every_mode():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2)))
    model.train()
    model[1][1].eval()
    with pytest.raises(RuntimeError), without_training(model):
        assert not model[0].training and not torch.is_grad_enabled()
        raise RuntimeError
    assert [m.training for m in model.modules()] == [True, True, True, True, False]
    assert torch.is_grad_enabled()


def test_history_changes_no_buffer_and_has_no_gradient(make_model, make_batch):
    model = make_model(temporal_fusion=dict(num_blocks=1)).train()
    inputs, samples = preprocess(model, make_batch((1,)))
    images = inputs['imgs'].unflatten(1, (2, 6)).requires_grad_()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    geometry = Geometry.of(samples, images.device)
    history = model._history(images, geometry, model._look(geometry, images.shape[-2:]))
    assert list(history) == [0] and not history[0].requires_grad
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(module.training for module in model.modules())


def test_missing_frames_repeat_the_nearer_one(make_model, make_batch):
    model = make_model(frames=(-2, -1, 0, 1), temporal_fusion=dict(num_blocks=1)).eval()
    seen = []
    model.temporal_fusion.forward = lambda frames: seen.extend(frames) or frames[2]
    _, samples = preprocess(model, make_batch((1, 2), frames=(-2, -1, 0, 1)))
    geometry = Geometry.of(samples, torch.device('cpu'))
    assert geometry.frame_valid.tolist() == [[False, True, True, True], [True, True, True, False]]
    bev = torch.full((2, 4, 1), 0.0, requires_grad=True)
    history = {frame: torch.full((2, 4, 1), value)
               for frame, value in ((0, -2.0), (1, -1.0), (3, 1.0))}
    model._fuse(bev, history, geometry)
    assert [[x[b, 0].item() for x in seen] for b in range(2)] == [[-1, -1, 0, 1], [-2, -1, 0, 0]]
    assert [x.requires_grad for x in seen] == [False, False, True, False]


def test_bda_warps_all_frames_in_training_only(make_model, make_batch):
    model = make_model()
    seen = []
    model.temporal_fusion.forward = lambda frames: seen.extend(frames) or frames[1]
    _, samples = preprocess(model, make_batch((1,)))
    samples[0].set_metainfo(dict(bda_mat=np.diag([-1.0, 1, 1]).astype(np.float32)))
    geometry = Geometry.of(samples, torch.device('cpu'))
    bev = torch.arange(32.0 * 32).view(1, -1, 1)
    mirrored = bev.view(1, 32, 32, 1).flip(2).flatten(1, 2)
    model.train()._fuse(bev, {0: bev + 1}, geometry)
    model.eval()._fuse(bev, {0: bev + 1}, geometry)
    for got, expected in zip(seen, (mirrored + 1, mirrored, bev + 1, bev)):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_the_past_matters(make_model, make_batch):
    model = make_model().eval()
    batch = make_batch((1,))
    before = model.test_step(batch)[0].pred_instances_3d.scores_3d
    batch['inputs']['img'][0][:6] = 255 - batch['inputs']['img'][0][:6]
    after = model.test_step(batch)[0].pred_instances_3d.scores_3d
    assert not torch.equal(before, after)


@torch.no_grad()
def predictions(model, batches):
    found = [model.test_step(copy.deepcopy(batch))[0].pred_instances_3d for batch in batches]
    return [(item.bboxes_3d.tensor, item.scores_3d, item.labels_3d) for item in found]


def test_cached_maps_give_the_same_numbers_to_the_last_bit(make_model, make_batch):
    frames = (-2, -1, 0)
    batches = [make_batch((index,), frames=frames) for index in range(6)]  # scene by scene
    found, calls = [], []
    for cache_maps in (False, True):
        model = make_model(frames=frames, cache_maps=cache_maps).eval()
        count = []
        model.img_backbone.register_forward_hook(lambda *_, count=count: count.append(1))
        found.append(predictions(model, batches))
        calls.append(len(count))
    assert calls == [12, 6]  # 1 + 2 + 3 frames of two scenes; each frame once
    for plain, cached in zip(*found):
        assert all(torch.equal(*pair) for pair in zip(plain, cached))


def test_the_cache_forgets_when_weights_may_change(make_model, make_batch):
    model = make_model(cache_maps=True).eval()
    batch = make_batch((1,))
    before = predictions(model, [batch])[0][1]
    state = {name: value + 0.01 if 'img_backbone' in name and 'weight' in name else value
             for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    after = predictions(model, [batch])[0][1]
    assert not torch.equal(before, after)
    assert torch.equal(after, predictions(model.train().eval(), [batch])[0][1])
    assert len(model.map_cache._entries) == 2
    losses_of(model.train(), batch)
    assert not model.map_cache._entries
    model.eval()(*preprocess(model, batch, False), mode='tensor')  # with gradients
    assert not model.map_cache._entries


def test_the_cache_keeps_what_the_frames_span(make_model, make_batch):
    model = make_model(frames=(-2, 0), cache_maps=True).eval()
    predictions(model, [make_batch((index,), frames=(-2, 0)) for index in range(5)])
    assert len(model.map_cache._entries) == 3
    predictions(model, [make_batch((0, 1), frames=(-2, 0))])
    assert len(model.map_cache._entries) == 3  # a batch takes and leaves nothing


def test_all_augmentations_for_some_steps(make_model, make_dataset, tiny):
    from mmengine.dataset import pseudo_collate
    pipe = list(tiny.train_dataloader.dataset.pipeline)
    pipe[4] = dict(pipe[4], heights=(80, 96, 112), img_flip_prob=0.5)
    pipe[2:2] = [dict(type='BEVAugment')]
    pipe[6:6] = [tiny.photometric, dict(type='ClipToUint8')]
    dataset = make_dataset(pipeline=pipe)
    model = make_model()
    model.grid_mask = GridMask()
    model.train()
    wrapper = build_optim_wrapper(model, tiny.optim_wrapper)
    for step in range(3):
        batch = pseudo_collate([dataset[step], dataset[step + 3]])
        logs = model.train_step(batch, wrapper)
        assert all(torch.isfinite(value).all() for value in logs.values())


def test_raw_outputs(make_model, make_batch):
    model = make_model().eval()
    inputs, samples = preprocess(model, make_batch((0, 1)), training=False)
    logits, codes = model(inputs, samples, mode='tensor')
    assert logits.shape == (2, 2, 60, 10) and codes.shape == (2, 2, 60, 10)


def test_frames_of_model_and_data_set_must_agree(make_model, make_batch):
    model = make_model()
    with pytest.raises(ValueError, match=r'frames \(-1, 0\) of the model.*of frames \(0, 1\)'):
        losses_of(model, make_batch(frames=(0, 1)))


def test_classes_of_model_and_data_set_must_agree(make_model, make_batch, tiny):
    names = list(tiny.train_dataloader.dataset.metainfo.classes)
    names[0], names[1] = names[1], names[0]
    batch = make_batch(metainfo=dict(classes=names, version='v1.0-mini'))
    with pytest.raises(ValueError, match="perspective_head.classes must be .*'bicycle', 'barrier'"):
        losses_of(make_model(), batch)
    losses_of(make_model(perspective_head=dict(classes=names)), batch)


@pytest.mark.parametrize('changes, message', [
    (dict(frames=(0, -1)), 'frames must be ascending'), (dict(frames=(-1,)), 'contain 0'),
    (dict(temporal_fusion=None), 'temporal_fusion must be given exactly'),
    (dict(bev_encoder=dict(bev_size=(16, 8))),
     r"bev_size must be the same .*'bev_encoder': \(16, 8\), 'temporal_fusion'"),
    (dict(bev_head=dict(embed_dims=32)), 'embed_dims must be the same in .*got .*32'),
    (dict(bev_head=dict(pc_range=[-50., -50., -5., 50., 50., 3.])),
     "pc_range must be the same in bev_encoder and bev_head, got .*-50.0")])
def test_refuses(make_model, changes, message):
    with pytest.raises(ValueError, match=f'^BEVFormerV2: .*{message}'):
        make_model(**changes)


def test_boxes_may_have_another_height_than_the_pillars(make_model):
    low, high = make_model().bev_head.pc_range[:3], make_model().bev_head.pc_range[3:]
    make_model(bev_head=dict(pc_range=[*low[:2], -9., *high[:2], 9.]))
