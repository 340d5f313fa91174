# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The U-Net of latent diffusion with DCNv4: its size, its schedule, its loss and its sampler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdcnv4.models.diffusion import (
    ClassConditionalDiffusion,
    latent_diffusion_unet,
    noise_schedule,
)
from mmdcnv4.models.layers.dcnv4_conv import DCNv4Conv2d

TINY = dict(sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, norm_num_groups=4,
            attention_head_dim=4, block_out_channels=(16, 32), cross_attention_dim=8,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))


@pytest.fixture(autouse=True)
def _needs_diffusers():
    pytest.importorskip('diffusers')


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize('options, count, layers', [
    (dict(replace=()), 859_520_964, 0), (dict(), 565_581_716, 44),
    (dict(dw_kernel_size=3), 566_080_916, 44),
    (dict(replace=('res', 'updown')), None, 50)])
def test_counts(options, count, layers):
    with torch.device('meta'):
        unet, report = latent_diffusion_unet(**options)
    replaced = [module for module in unet.modules() if isinstance(module, DCNv4Conv2d)]
    assert len(replaced) == layers
    assert count is None or parameters(unet) == count
    if report is not None:
        assert (report.total, report.new_total) == (859_520_964, parameters(unet))
        assert not report.skipped


@pytest.mark.parametrize('kind', ['DDPMScheduler', 'DPMSolverMultistepScheduler',
                                  'DDIMScheduler'])
def test_schedule(kind):
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2
    torch.testing.assert_close(noise_schedule(kind).betas, expected)


class Guess(nn.Module):
    """In place of the U-Net: keeps what it is given, and predicts a number times the input."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, timesteps, encoder_hidden_states):
        self.calls.append((x, timesteps, encoder_hidden_states))
        return type('Output', (), dict(sample=x * encoder_hidden_states.mean((1, 2))
                                       [:, None, None, None]))


def test_loss_adds_the_noise_of_the_step_and_hides_classes():
    torch.manual_seed(0)
    model = ClassConditionalDiffusion(Guess(), 3, 4, label_drop=0.25)
    images, labels = torch.randn(400, 1, 2, 2), torch.full((400,), 2)
    torch.manual_seed(1)
    loss = model.loss(images, labels)
    torch.manual_seed(1)
    noise, steps = torch.randn_like(images), torch.randint(1000, (400,))
    ((x, timesteps, context),) = model.unet.calls
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2).cumprod(0)[steps]
    noisy = kept.sqrt()[:, None, None, None] * images + (
        1 - kept).sqrt()[:, None, None, None] * noise
    assert torch.equal(timesteps, steps)
    torch.testing.assert_close(x, noisy, rtol=1e-4, atol=1e-5)
    hidden = (context[:, 0] == model.tokens.weight[3]).all(1)
    assert 0.15 < hidden.float().mean() < 0.35
    assert (context[~hidden, 0] == model.tokens.weight[2]).all()
    predicted = x * context.mean((1, 2))[:, None, None, None]
    torch.testing.assert_close(loss, (predicted - noise).square().mean())


def test_sampler_inverts_a_known_noise():
    """Where the noise of a point mass is predicted, the sampler finds the point."""
    point = torch.tensor([0.7, -0.4]).view(2, 1, 1, 1)
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2).cumprod(0)

    class Exact(nn.Module):
        def forward(self, x, timesteps, encoder_hidden_states):
            a = kept[timesteps][:, None, None, None]
            where = point.repeat(2, 1, 1, 1)
            return type('Output', (), dict(sample=(x - a.sqrt() * where) / (1 - a).sqrt()))

    model = ClassConditionalDiffusion(Exact(), 3, 4)
    for solver in ('DPMSolverMultistepScheduler', 'DDIMScheduler'):
        out = model.sample(torch.tensor([0, 1]), (1, 3, 3), steps=10, solver=solver,
                           generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(out, point.expand(2, 1, 3, 3), rtol=0, atol=0.05)


def test_guidance():
    model = ClassConditionalDiffusion(Guess(), 2, 4)
    nn.init.constant_(model.tokens.weight, 0.0)
    model.tokens.weight.data[2] = 1.0  # without a class the input is noise, with one it is not
    labels = torch.tensor([0, 1])
    plain = model.sample(labels, (1, 2, 2), steps=3, guidance=0.0,
                         generator=torch.Generator().manual_seed(0))
    guided = model.sample(labels, (1, 2, 2), steps=3, guidance=1.0,
                          generator=torch.Generator().manual_seed(0))
    assert guided.abs().mean() > plain.abs().mean()


def test_a_training_step_reaches_every_layer():
    torch.manual_seed(0)
    unet, report = latent_diffusion_unet(group_channels=16, **TINY)
    assert len(report.replaced) == 16
    model = ClassConditionalDiffusion(unet, 3, 8)
    model.loss(torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])).backward()
    for module in unet.modules():
        if isinstance(module, DCNv4Conv2d):
            assert module.offset_mask.weight.grad.any() and module.output_proj.weight.grad.any()
    with pytest.raises(ValueError, match='replace must be some of'):
        latent_diffusion_unet(('attn',))
