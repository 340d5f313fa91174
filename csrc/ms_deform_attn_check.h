// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_check.h — every check of the tensors and sizes of multi-scale deformable
// attention, shared by all devices. The same rules in Python: mmdcnv4/ops/multi_scale.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ms_deform_attn_params.h"

namespace mmdcnv4 {

// Owns the arrays that `params` points to.
struct MsDeformAttnCall {
  std::vector<int32_t> heights, widths, starts;
  MsDeformAttnParams params;
};

// Throws ValueError or TypeError (as Python sees them) naming the argument, the rule and the value.
MsDeformAttnCall check_ms_deform_attn(const at::Tensor& value, const at::Tensor& locations,
                                      const at::Tensor& weights, at::IntArrayRef sizes);

// Additionally checks grad_output [B, Q, M * D] against the parameters.
void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                       const MsDeformAttnParams& p);

} // namespace mmdcnv4
