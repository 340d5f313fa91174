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
#include <atomic>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../dcnv4_check.h"
#include "dcnv4_kernels.h"

namespace mmdcnv4 {
namespace cpu {
namespace {

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables{&generic_kernels()};
#ifdef MMDCNV4_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) tables.push_back(&avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512_kernels());
#endif
  return tables;
}

std::atomic<const KernelTable*>& active_table() {
  static std::atomic<const KernelTable*> table{supported_tables().back()};
  return table;
}

void set_instruction_set(std::string name) {
  const auto tables = supported_tables();
  if (name == "auto") name = tables.back()->instruction_set;
  std::string known;
  for (const KernelTable* table : tables) {
    if (name == table->instruction_set) {
      active_table() = table;
      return;
    }
    known += std::string(" ") + table->instruction_set;
  }
  TORCH_CHECK_VALUE(false, "dcnv4: the instruction set must be one of auto", known, ", got ", name);
}

std::string info() {
  std::string built = "\"generic\"", supported;
#ifdef MMDCNV4_X86
  built += ", \"avx2\", \"avx512\"";
#endif
  for (const KernelTable* table : supported_tables())
    supported += std::string(supported.empty() ? "\"" : ", \"") + table->instruction_set + "\"";
  return "{\"built\": [" + built + "], \"supported\": [" + supported + "], \"active\": \"" +
         active_table().load()->instruction_set + "\", \"compiler\": \"" MMDCNV4_COMPILER "\"}";
}

template <typename T>
const Kernels<T>& kernels() {
  const KernelTable& table = *active_table().load();
  if constexpr (std::is_same_v<T, double>) {
    return table.f64;
  } else {
    return table.f32;
  }
}

// The type in which a call is computed: double for double, float for everything else.
at::ScalarType compute_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename T>
void run_forward(const Dcnv4Params& p, const at::Tensor& value, const at::Tensor& offset_mask,
                 at::Tensor& output) {
  // below about 20 microseconds of work a second thread does not pay
  const int64_t row_cost = p.out_width * p.channels() * p.points() * 4;
  const int64_t grain = std::max<int64_t>(1, 300000 / std::max<int64_t>(1, row_cost));
  const auto run = kernels<T>().forward;
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
  // adjacent groups share cache lines and coefficient vectors: as many as leave work for everyone
  const int64_t per_thread = p.batch * p.groups / std::max(1, at::get_num_threads());
  const int64_t block = std::clamp<int64_t>(per_thread, 1, 4);
  const int64_t blocks = (p.groups + block - 1) / block;
  const auto run = kernels<T>().backward;
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
  if (output.numel() == 0) return output.to(value.scalar_type());
  const at::Tensor wide_value = value.to(type).contiguous();
  const at::Tensor wide_offset_mask = offset_mask.to(type).contiguous();
  if (type == at::kDouble) {
    run_forward<double>(p, wide_value, wide_offset_mask, output);
  } else {
    run_forward<float>(p, wide_value, wide_offset_mask, output);
  }
  return output.to(value.scalar_type());
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
    const at::Tensor grad = grad_output.to(type).contiguous();
    const at::Tensor wide_value = value.to(type).contiguous();
    const at::Tensor wide_offset_mask = offset_mask.to(type).contiguous();
    if (type == at::kDouble) {
      run_backward<double>(p, grad, wide_value, wide_offset_mask, grad_value, grad_offset_mask);
    } else {
      run_backward<float>(p, grad, wide_value, wide_offset_mask, grad_value, grad_offset_mask);
    }
  }
  return {grad_value.to(value.scalar_type()), grad_offset_mask.to(offset_mask.scalar_type())};
}

} // namespace

const char* active_instruction_set() { return active_table().load()->instruction_set; }

} // namespace cpu
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CPU, m) {
  m.impl("dcnv4", mmdcnv4::cpu::dcnv4_forward_cpu);
  m.impl("_dcnv4_backward", mmdcnv4::cpu::dcnv4_backward_cpu);
}

TORCH_LIBRARY_IMPL(mmdcnv4, CompositeExplicitAutograd, m) {
  m.impl("_cpu_info", mmdcnv4::cpu::info);
  m.impl("_set_cpu_instruction_set", mmdcnv4::cpu::set_instruction_set);
}
