// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// library.cpp — every schema of the namespace mmdcnv4. What computes them registers itself: kernels
// in csrc/cpu and csrc/cuda, gradient and autocast in dcnv4_autograd.cpp.

#include <torch/library.h>

#include <string>

#include "dcnv4_check.h"
#include "window_plan.h"

namespace {

// The plan of a call on a GPU of common limits, whatever device the tensors are on.
std::string launch_plan(const at::Tensor& value, const at::Tensor& offset_mask, MMDCNV4_SCALARS,
                        bool backward, int64_t multiprocessors) {
  const auto p = mmdcnv4::check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  const int32_t bytes = int32_t(value.element_size());
  return to_json(mmdcnv4::make_launch_plan(
      p, {bytes, bytes == 8 ? 8 : 4, mmdcnv4::kMaxVectorBytes, backward},
      {int32_t(multiprocessors), 48 * 1024, 48 * 1024, INT32_MAX}));
}

// The same of the tensor-core kernels, with `shared_bytes` for a block that opts in to them: how
// the forward kernel and the gradient of offset_mask are cut, and how the gradient of value is.
std::string window_plans(const at::Tensor& value, const at::Tensor& offset_mask, MMDCNV4_SCALARS,
                         int64_t multiprocessors, int64_t shared_bytes) {
  const auto p = mmdcnv4::check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  const auto plan = mmdcnv4::make_window_backward_plan(
      p, {int32_t(value.element_size()), 4, mmdcnv4::kMaxVectorBytes, true},
      int32_t(offset_mask.element_size()),
      {int32_t(multiprocessors), 48 * 1024, int32_t(shared_bytes), INT32_MAX});
  return "{\"offset_mask\": " + to_json(plan.offset_mask) + ", \"value\": " + to_json(plan.value) +
         ", \"rest_blocks\": " + std::to_string(plan.rest_blocks) + "}";
}

} // namespace

TORCH_LIBRARY(mmdcnv4, m) {
  m.def(
      "dcnv4(Tensor value, Tensor offset_mask, int[2] kernel_size, int groups, int[2] stride, "
      "int[2] padding, int[2] dilation, float offset_scale, bool remove_center, bool softmax) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_dcnv4_backward(Tensor grad_output, Tensor value, Tensor offset_mask, int[2] kernel_size, "
      "int groups, int[2] stride, int[2] padding, int[2] dilation, float offset_scale, "
      "bool remove_center, bool softmax) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});

  // Multi-scale deformable attention (arXiv:2010.04159); `sizes` is height and width per level.
  m.def(
      "ms_deform_attn(Tensor value, Tensor locations, Tensor weights, int[] sizes) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor locations, "
      "Tensor weights, int[] sizes) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});

  // What was compiled, as JSON; read by mmdcnv4/ops/_extension.py.
  m.def("_cpu_info() -> str");
  // Chooses the CPU kernels: "auto", "generic", "avx2" or "avx512". For tests and benchmarks.
  m.def("_set_cpu_instruction_set(str name) -> ()");
  // How the CUDA kernels would cut a call into blocks, as JSON; needs no GPU. For tests
  // and benchmarks/predict.py.
  m.def(
      "_dcnv4_launch_plan(Tensor value, Tensor offset_mask, int[2] kernel_size, int groups, "
      "int[2] stride, int[2] padding, int[2] dilation, float offset_scale, bool remove_center, "
      "bool softmax, bool backward, int multiprocessors) -> str");
  m.def(
      "_dcnv4_window_plans(Tensor value, Tensor offset_mask, int[2] kernel_size, int groups, "
      "int[2] stride, int[2] padding, int[2] dilation, float offset_scale, bool remove_center, "
      "bool softmax, int multiprocessors, int shared_bytes) -> str");
#ifdef MMDCNV4_WITH_CUDA
  m.def("_cuda_info() -> str");
  // Turns the tensor-core kernels on ("1") or off ("0"), or on where they are proven ("auto"), as
  // MMDCNV4_FAST does; and the compute capabilities for which they are. See ops/proven.py.
  m.def("_set_cuda_fast(str choice) -> ()");
  m.def("_set_cuda_proven(int[] capabilities) -> ()");
#endif
}

TORCH_LIBRARY_IMPL(mmdcnv4, CompositeExplicitAutograd, m) {
  m.impl("_dcnv4_launch_plan", launch_plan);
  m.impl("_dcnv4_window_plans", window_plans);
}
