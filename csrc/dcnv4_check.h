// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_check.h — every check of a call's tensors and integers, shared by all devices. The same
// rules in Python: mmdcnv4/ops/contract.py.
#pragma once

#include <ATen/core/Tensor.h>

#include "dcnv4_params.h"

namespace mmdcnv4 {

// The scalars of the schema, in its order.
#define MMDCNV4_SCALARS                                                                         \
  at::IntArrayRef kernel_size, int64_t groups, at::IntArrayRef stride, at::IntArrayRef padding, \
      at::IntArrayRef dilation, double offset_scale, bool remove_center, bool softmax
#define MMDCNV4_SCALAR_NAMES \
  kernel_size, groups, stride, padding, dilation, offset_scale, remove_center, softmax

// A list of a schema's int[2] may have any length where the caller built it by hand.
void check_is_pair(at::IntArrayRef pair, const char* name);

// Throws ValueError or TypeError (as Python sees them) naming the argument, the rule and the value.
Dcnv4Params check_dcnv4(const at::Tensor& value, const at::Tensor& offset_mask, MMDCNV4_SCALARS);

// Additionally checks grad_output [N, Ho, Wo, C] against the parameters.
void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                       const Dcnv4Params& p);

} // namespace mmdcnv4
