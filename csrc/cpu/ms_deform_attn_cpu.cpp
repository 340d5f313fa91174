// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_cpu.cpp — multi-scale deformable attention on the CPU: check, allocate, split over
// threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../ms_deform_attn_check.h"
#include "kernel_table.h"

namespace mmdcnv4 {
namespace cpu {
namespace {

MsDeformAttnCall check_call(const at::Tensor& value, const at::Tensor& locations,
                            const at::Tensor& weights, at::IntArrayRef sizes) {
  const auto dtype = value.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "ms_deform_attn: value must be float32 or float64 on the CPU, got ", dtype);
  return check_ms_deform_attn(value, locations, weights, sizes);
}

template <typename T>
void run_forward(const MsDeformAttnParams& p, const at::Tensor& value, const at::Tensor& locations,
                 const at::Tensor& weights, at::Tensor& output) {
  const auto run = kernels<T>().ms_deform_attn_forward;
  const T *maps = value.const_data_ptr<T>(), *where = locations.const_data_ptr<T>();
  const T* factors = weights.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  // below about 20 microseconds of work a second thread does not pay
  const int64_t cost = p.heads * p.samples() * (p.head_channels + 8) * 4;
  at::parallel_for(0, p.batch * p.queries, std::max<int64_t>(1, 300000 / cost),
                   [&](int64_t begin, int64_t end) {
                     run(p, maps, where, factors, to, begin, end);
                   });
}

template <typename T>
void run_backward(const MsDeformAttnParams& p, const at::Tensor& grad_output,
                  const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
                  at::Tensor& grad_value, at::Tensor& grad_locations, at::Tensor& grad_weights) {
  const auto run = kernels<T>().ms_deform_attn_backward;
  const T *grad = grad_output.const_data_ptr<T>(), *maps = value.const_data_ptr<T>();
  const T *where = locations.const_data_ptr<T>(), *factors = weights.const_data_ptr<T>();
  T *to = grad_value.mutable_data_ptr<T>(), *to_where = grad_locations.mutable_data_ptr<T>();
  T* to_factors = grad_weights.mutable_data_ptr<T>();
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      run(p, grad, maps, where, factors, to, to_where, to_factors, task / p.heads, task % p.heads);
  });
}

at::Tensor forward(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
                   at::IntArrayRef sizes) {
  const MsDeformAttnCall call = check_call(value, locations, weights, sizes);
  const MsDeformAttnParams& p = call.params;
  at::Tensor output = at::empty({p.batch, p.queries, p.heads * p.head_channels}, value.options());
  if (output.numel() == 0) return output;
  const at::Tensor maps = value.contiguous(), where = locations.contiguous();
  const at::Tensor factors = weights.contiguous();
  if (value.scalar_type() == at::kDouble) {
    run_forward<double>(p, maps, where, factors, output);
  } else {
    run_forward<float>(p, maps, where, factors, output);
  }
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& locations,
    const at::Tensor& weights, at::IntArrayRef sizes) {
  const MsDeformAttnCall call = check_call(value, locations, weights, sizes);
  const MsDeformAttnParams& p = call.params;
  check_grad_output(grad_output, value, p);
  at::Tensor grad_value = at::empty(value.sizes(), value.options());
  at::Tensor grad_locations = at::empty(locations.sizes(), value.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), value.options());
  if (p.batch > 0) {
    const at::Tensor grad = grad_output.contiguous(), maps = value.contiguous();
    const at::Tensor where = locations.contiguous(), factors = weights.contiguous();
    if (value.scalar_type() == at::kDouble) {
      run_backward<double>(p, grad, maps, where, factors, grad_value, grad_locations,
                           grad_weights);
    } else {
      run_backward<float>(p, grad, maps, where, factors, grad_value, grad_locations, grad_weights);
    }
  }
  return {grad_value, grad_locations, grad_weights};
}

} // namespace
} // namespace cpu
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CPU, m) {
  m.impl("ms_deform_attn", mmdcnv4::cpu::forward);
  m.impl("_ms_deform_attn_backward", mmdcnv4::cpu::backward);
}
