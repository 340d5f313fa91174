# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What mmengine's FLOP counter needs to know of the operator, and of PyTorch's attention."""

from __future__ import annotations

import math

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape


def dcnv4_multiply_adds(inputs: list, outputs: list) -> int:
    """Multiply-adds of one traced call of the operator: 5 K per output element.

    Each of the K samples takes four for the interpolation and one for the mask.

    Args:
        inputs, outputs: values of the traced graph, in the order of the operator's schema.
    """
    kernel = [value.toIValue() for value in inputs[2].node().inputs()]
    points = math.prod(kernel) - int(inputs[8].toIValue())
    return 5 * points * math.prod(get_shape(outputs[0]))


def attention_multiply_adds(inputs: list, outputs: list) -> int:
    """Multiply-adds of one traced call of PyTorch's attention: both products, masked or not.

    Args:
        inputs, outputs: values of the traced graph: queries (..., L, E), keys (..., S, E) and
            values (..., S, V).
    """
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# `FlopAnalyzer` and `get_model_complexity_info` of mmengine start from this table
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update({
    'mmdcnv4::dcnv4': dcnv4_multiply_adds,
    'aten::scaled_dot_product_attention': attention_multiply_adds})
