// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_autograd.cpp — the operator's gradient and its autocast policy, for every device. A call
// that needs no gradient goes straight on to the kernel.

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "dcnv4_op.h"

namespace mmdcnv4 {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The scalars of the schema as one object, to pass through torch::autograd::Function.
struct Scalars {
  std::array<int64_t, 2> kernel_size, stride, padding, dilation;
  int64_t groups;
  double offset_scale;
  bool remove_center, softmax;

  // Nested in a tuple, so that compiled autograd takes them for constants.
  at::IValue pack() const {
    return c10::ivalue::Tuple::create(std::vector<at::IValue>{
        kernel_size[0], kernel_size[1], stride[0], stride[1], padding[0], padding[1], dilation[0],
        dilation[1], groups, offset_scale, remove_center, softmax});
  }

  static Scalars unpack(const at::IValue& packed) {
    const auto items = packed.toTupleRef().elements().asArrayRef();
    const auto pair = [&](size_t i) {
      return std::array<int64_t, 2>{items[i].toInt(), items[i + 1].toInt()};
    };
    return {pair(0),          pair(2),            pair(4),           pair(6),
            items[8].toInt(), items[9].toDouble(), items[10].toBool(), items[11].toBool()};
  }
};

// A pair of the schema; the check of a wrong number is the kernel's.
std::array<int64_t, 2> to_pair(at::IntArrayRef pair, const char* name) {
  check_is_pair(pair, name);
  return {pair[0], pair[1]};
}

Scalars make_scalars(MMDCNV4_SCALARS) {
  return {to_pair(kernel_size, "kernel_size"), to_pair(stride, "stride"),
          to_pair(padding, "padding"),         to_pair(dilation, "dilation"),
          groups,                              offset_scale,
          remove_center,                       softmax};
}

bool needs_graph(std::initializer_list<const at::Tensor*> tensors) {
  bool requires_grad = false;
  for (const at::Tensor* tensor : tensors) {
    requires_grad |= tensor->requires_grad();
    // a derivative of zero, without a word, would be worse than an error
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor->_fw_grad(/*level=*/0).defined(),
                                "dcnv4: the compiled kernels have no forward-mode derivative; use "
                                "backend='pytorch'");
  }
  return requires_grad && at::GradMode::is_enabled();
}

} // namespace

// Not in the unnamed namespace: `grad_fn` and anomaly detection show these two names.
struct Dcnv4Function : torch::autograd::Function<Dcnv4Function> {
  static constexpr bool is_traceable = true; // by compiled autograd

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& value,
                            const at::Tensor& offset_mask, const Scalars& s) {
    ctx->save_for_backward({value, offset_mask});
    ctx->saved_data["scalars"] = s.pack();
    const at::AutoDispatchBelowADInplaceOrView below;
    return dcnv4_op().call(value, offset_mask, s.kernel_size, s.groups, s.stride, s.padding,
                           s.dilation, s.offset_scale, s.remove_center, s.softmax);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Scalars s = Scalars::unpack(ctx->saved_data["scalars"]);
    auto [grad_value, grad_offset_mask] = dcnv4_backward_op().call(
        grads[0], saved[0], saved[1], s.kernel_size, s.groups, s.stride, s.padding, s.dilation,
        s.offset_scale, s.remove_center, s.softmax);
    return {grad_value, grad_offset_mask, at::Tensor()};
  }
};

// The gradient, where it must be differentiable itself: an error, once it is differentiated.
struct Dcnv4BackwardFunction : torch::autograd::Function<Dcnv4BackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output,
                               const at::Tensor& value, const at::Tensor& offset_mask,
                               const Scalars& s) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_value, grad_offset_mask] = dcnv4_backward_op().call(
        grad_output, value, offset_mask, s.kernel_size, s.groups, s.stride, s.padding, s.dilation,
        s.offset_scale, s.remove_center, s.softmax);
    return {grad_value, grad_offset_mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "dcnv4: the compiled kernels have no double backward; use "
                                       "backend='pytorch', whose gradients are differentiable");
  }
};

namespace {

at::Tensor dcnv4_autograd(const at::Tensor& value, const at::Tensor& offset_mask,
                          MMDCNV4_SCALARS) {
  if (needs_graph({&value, &offset_mask}))
    return Dcnv4Function::apply(value, offset_mask, make_scalars(MMDCNV4_SCALAR_NAMES));
  const at::AutoDispatchBelowADInplaceOrView below;
  return dcnv4_op().call(value, offset_mask, MMDCNV4_SCALAR_NAMES);
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_autograd(const at::Tensor& grad_output,
                                                           const at::Tensor& value,
                                                           const at::Tensor& offset_mask,
                                                           MMDCNV4_SCALARS) {
  if (needs_graph({&grad_output, &value, &offset_mask})) {
    const variable_list grads = Dcnv4BackwardFunction::apply(grad_output, value, offset_mask,
                                                             make_scalars(MMDCNV4_SCALAR_NAMES));
    return {grads[0], grads[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return dcnv4_backward_op().call(grad_output, value, offset_mask, MMDCNV4_SCALAR_NAMES);
}

// `value` goes to the autocast dtype; float64 stays. `offset_mask` keeps float32, which holds
// sub-pixel positions that a half type cannot, or follows `value`. For the PyTorch path the same
// is said in mmdcnv4/ops/functional.py.
template <c10::DispatchKey kKey>
at::Tensor dcnv4_autocast(const at::Tensor& value, const at::Tensor& offset_mask,
                          MMDCNV4_SCALARS) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(kKey);
  const auto type = value.scalar_type() == at::kDouble
                        ? at::kDouble
                        : at::autocast::get_autocast_dtype(value.device().type());
  const bool is_wide =
      offset_mask.scalar_type() == at::kFloat || offset_mask.scalar_type() == at::kDouble;
  return dcnv4_op().call(value.to(type), is_wide ? offset_mask : offset_mask.to(type),
                         MMDCNV4_SCALAR_NAMES);
}

} // namespace
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, Autograd, m) {
  m.impl("dcnv4", mmdcnv4::dcnv4_autograd);
  m.impl("_dcnv4_backward", mmdcnv4::dcnv4_backward_autograd);
}

TORCH_LIBRARY_IMPL(mmdcnv4, AutocastCPU, m) {
  m.impl("dcnv4", mmdcnv4::dcnv4_autocast<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(mmdcnv4, AutocastCUDA, m) {
  m.impl("dcnv4", mmdcnv4::dcnv4_autocast<c10::DispatchKey::AutocastCUDA>);
}
