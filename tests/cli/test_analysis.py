# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the counter of mmengine says of PyTorch's attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmdcnv4.cli.analysis import flop_analyzer


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_counts_both_products():
    q, k, v = (torch.zeros(2, 3, *size) for size in ((5, 4), (7, 4), (7, 6)))
    assert flop_analyzer(Attention(), (q, k, v)).total() == 2 * 3 * (5 * 7 * 4 + 5 * 7 * 6)
