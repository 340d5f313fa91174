# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A whole backbone as one graph: what docs/host_time.md builds on."""

from __future__ import annotations

import torch

from mmdcnv4.models.backbones import FlashInternImage


def gradients(backbone, x):
    x = x.clone().requires_grad_()
    backbone.zero_grad()
    maps = backbone(x)
    sum(level.square().mean() for level in maps).backward()
    return [*maps, x.grad, *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)]


def test_backbone_compiles_in_one_piece():
    """`nn.Module.compile` as documented, forward and backward; state-dict names stay.

    With the depthwise convolutions of S, B and L; test_backbones_api.py compiles without them.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone = FlashInternImage(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8),
                                dw_kernel_size=3, drop_path_rate=0.0)
    for name, parameter in backbone.named_parameters():
        if 'offset_mask.' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    x, names = torch.randn(2, 3, 64, 96), list(backbone.state_dict())
    expected = gradients(backbone, x)
    backbone.compile(fullgraph=True, dynamic=False, backend='aot_eager')
    for actual, wanted in zip(gradients(backbone, x), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert list(backbone.state_dict()) == names
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    torch._dynamo.reset()
