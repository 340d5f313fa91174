// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_op.h — the operator and its gradient as C++ functions that go through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "dcnv4_check.h"

namespace mmdcnv4 {

using Dcnv4Op = at::Tensor(const at::Tensor& value, const at::Tensor& offset_mask,
                           MMDCNV4_SCALARS);
using Dcnv4BackwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad_output,
                                                           const at::Tensor& value,
                                                           const at::Tensor& offset_mask,
                                                           MMDCNV4_SCALARS);

// Looked up once: finding an operator by its name takes longer than calling it.
inline const c10::TypedOperatorHandle<Dcnv4Op>& dcnv4_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mmdcnv4::dcnv4", "").typed<Dcnv4Op>();
  return op;
}

inline const c10::TypedOperatorHandle<Dcnv4BackwardOp>& dcnv4_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mmdcnv4::_dcnv4_backward", "")
                             .typed<Dcnv4BackwardOp>();
  return op;
}

} // namespace mmdcnv4
