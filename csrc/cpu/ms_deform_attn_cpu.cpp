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
#include <vector>

#include "kernel_table.h"

namespace mmdcnv4 {
namespace cpu {
namespace {

constexpr int64_t kMaxSide = int64_t(1) << 30; // pixel coordinates are 32-bit

// Levels and sizes of a call; owns the arrays that `params` points to.
struct Call {
  std::vector<int32_t> heights, widths, starts;
  MsDeformAttnParams params;
};

void check_tensor(const at::Tensor& tensor, const at::Tensor& value, at::IntArrayRef shape,
                  const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == value.scalar_type(), "ms_deform_attn: ", name,
                   " must have the dtype of value (", value.scalar_type(), "), got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == value.device(), "ms_deform_attn: ", name,
                    " must be on the device of value (", value.device(), "), got ",
                    tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "ms_deform_attn: ", name, " must have shape ", shape,
                    ", got ", tensor.sizes());
}

void check_levels(at::IntArrayRef sizes, Call& call) {
  TORCH_CHECK_VALUE(!sizes.empty() && sizes.size() % 2 == 0,
                    "ms_deform_attn: sizes must be height and width of each level, got ", sizes);
  int64_t pixels = 0;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    TORCH_CHECK_VALUE(sizes[i] > 0 && sizes[i + 1] > 0,
                      "ms_deform_attn: sizes must be positive, got ", sizes);
    TORCH_CHECK_VALUE(sizes[i] <= kMaxSide && sizes[i + 1] <= kMaxSide,
                      "ms_deform_attn: sizes must have sides <= ", kMaxSide, ", got ", sizes);
    call.heights.push_back(int32_t(sizes[i]));
    call.widths.push_back(int32_t(sizes[i + 1]));
    call.starts.push_back(int32_t(pixels));
    pixels += sizes[i] * sizes[i + 1];
    TORCH_CHECK_VALUE(pixels <= INT32_MAX, "ms_deform_attn: sizes must have at most ", INT32_MAX,
                      " pixels together, got ", sizes);
  }
  call.params.pixels = pixels;
}

Call check_call(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
                at::IntArrayRef sizes) {
  Call call;
  check_levels(sizes, call);
  const auto dtype = value.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "ms_deform_attn: value must be float32 or float64, got ", dtype);
  MsDeformAttnParams& p = call.params;
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(1) == p.pixels && value.size(2) > 0 &&
                        value.size(3) > 0,
                    "ms_deform_attn: value must have shape (B, ", p.pixels,
                    ", heads, channels), the pixels of sizes, got ", value.sizes());
  TORCH_CHECK_VALUE(locations.dim() == 6 && locations.size(4) > 0,
                    "ms_deform_attn: locations must have shape (B, Q, heads, levels, points, 2), "
                    "got ", locations.sizes());
  p.batch = value.size(0);
  p.heads = value.size(2);
  p.head_channels = value.size(3);
  p.queries = locations.size(1);
  p.levels = int64_t(call.heights.size());
  p.points = locations.size(4);
  check_tensor(locations, value, {p.batch, p.queries, p.heads, p.levels, p.points, 2},
               "locations");
  check_tensor(weights, value, {p.batch, p.queries, p.heads, p.levels, p.points}, "weights");
  p.heights = call.heights.data();
  p.widths = call.widths.data();
  p.starts = call.starts.data();
  return call;
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
  const Call call = check_call(value, locations, weights, sizes);
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
  const Call call = check_call(value, locations, weights, sizes);
  const MsDeformAttnParams& p = call.params;
  check_tensor(grad_output, value, {p.batch, p.queries, p.heads * p.head_channels}, "grad_output");
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
