// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_cpu.cpp — the CPU side of the operator: check, allocate, split over threads.
//
// float16 and bfloat16 are widened to float32 in one pass and the result is rounded once: each
// pixel is read about 4K times, so widening inside the gather would cost more than the copy.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "../dcnv4_check.h"
#include "kernel_table.h"

namespace mmdcnv4 {
namespace cpu {
namespace {

// The type in which a call is computed: double for double, float for everything else.
at::ScalarType compute_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Dense and of the type of the computation: often the tensor itself, without asking the dispatcher.
at::Tensor prepare(const at::Tensor& tensor, at::ScalarType type) {
  if (tensor.scalar_type() == type && tensor.is_contiguous()) return tensor;
  return tensor.to(type).contiguous();
}

at::Tensor round_to(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

template <typename T>
void run_forward(const Dcnv4Params& p, const at::Tensor& value, const at::Tensor& offset_mask,
                 at::Tensor& output) {
  // below about 20 microseconds of work a second thread does not pay
  const int64_t row_cost = p.out_width * p.channels() * p.points() * 4;
  const int64_t grain = std::max<int64_t>(1, 300000 / std::max<int64_t>(1, row_cost));
  const auto run = kernels<T>().dcnv4_forward;
  const T *from = value.const_data_ptr<T>(), *om = offset_mask.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  at::parallel_for(0, p.batch * p.out_height, grain, [&](int64_t begin, int64_t end) {
    run(p, from, om, to, begin, end);
  });
}

template <typename T>
void run_backward(const Dcnv4Params& p, const at::Tensor& grad_output, const at::Tensor& value,
                  const at::Tensor& offset_mask, at::Tensor& grad_value,
                  at::Tensor& grad_offset_mask) {
  // adjacent groups share cache lines and coefficient vectors: as few parts of an image as give
  // every thread the same work
  const int64_t threads = std::max(1, at::get_num_threads());
  const int64_t parts = std::min(p.groups, threads / std::gcd(threads, p.batch));
  const int64_t block = (p.groups + parts - 1) / parts;
  const int64_t blocks = (p.groups + block - 1) / block;
  const auto run = kernels<T>().dcnv4_backward;
  const T* grad = grad_output.const_data_ptr<T>();
  const T *from = value.const_data_ptr<T>(), *om = offset_mask.const_data_ptr<T>();
  T *to = grad_value.mutable_data_ptr<T>(), *to_om = grad_offset_mask.mutable_data_ptr<T>();
  at::parallel_for(0, p.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * block;
      run(p, grad, from, om, to, to_om, task / blocks, first, std::min(first + block, p.groups));
    }
  });
}

at::Tensor dcnv4_forward_cpu(const at::Tensor& value, const at::Tensor& offset_mask,
                             MMDCNV4_SCALARS) {
  const Dcnv4Params p = check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  const auto type = compute_type(value);
  at::Tensor output = at::empty({p.batch, p.out_height, p.out_width, p.channels()},
                                value.options().dtype(type));
  if (output.numel() == 0) return round_to(output, value.scalar_type());
  const at::Tensor wide_value = prepare(value, type);
  const at::Tensor wide_offset_mask = prepare(offset_mask, type);
  if (type == at::kDouble) {
    run_forward<double>(p, wide_value, wide_offset_mask, output);
  } else {
    run_forward<float>(p, wide_value, wide_offset_mask, output);
  }
  return round_to(output, value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cpu(const at::Tensor& grad_output,
                                                      const at::Tensor& value,
                                                      const at::Tensor& offset_mask,
                                                      MMDCNV4_SCALARS) {
  const Dcnv4Params p = check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  check_grad_output(grad_output, value, p);
  const auto type = compute_type(value);
  at::Tensor grad_value = at::empty(value.sizes(), value.options().dtype(type));
  at::Tensor grad_offset_mask = at::empty(offset_mask.sizes(), value.options().dtype(type));
  if (p.batch > 0) {
    const at::Tensor grad = prepare(grad_output, type);
    const at::Tensor wide_value = prepare(value, type);
    const at::Tensor wide_offset_mask = prepare(offset_mask, type);
    if (type == at::kDouble) {
      run_backward<double>(p, grad, wide_value, wide_offset_mask, grad_value, grad_offset_mask);
    } else {
      run_backward<float>(p, grad, wide_value, wide_offset_mask, grad_value, grad_offset_mask);
    }
  }
  return {round_to(grad_value, value.scalar_type()),
          round_to(grad_offset_mask, offset_mask.scalar_type())};
}

} // namespace

} // namespace cpu
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CPU, m) {
  m.impl("dcnv4", mmdcnv4::cpu::dcnv4_forward_cpu);
  m.impl("_dcnv4_backward", mmdcnv4::cpu::dcnv4_backward_cpu);
}
