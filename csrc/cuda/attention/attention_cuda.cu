// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_cuda.cu — multi-scale deformable attention on a GPU: check, guard, allocate, sort,
// launch. Nothing here waits for the device or reads from it, so that calls can be captured in a
// graph.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../../ms_deform_attn_check.h"
#include "../binding.h"
#include "attention_launch.h"

namespace mmdcnv4 {
namespace cuda {
namespace {

template <typename T>
OffsetNumbers<T> numbers_of(const at::Tensor& tensor) {
  return {static_cast<const unsigned char*>(tensor.const_data_ptr()),
          tensor.scalar_type() == at::kFloat};
}
template <typename T>
OffsetGradients<T> gradients_in(const at::Tensor& tensor) {
  return {static_cast<unsigned char*>(tensor.mutable_data_ptr()),
          tensor.scalar_type() == at::kFloat};
}

// Tensors that hold 32-bit words.
uint32_t* words_of(const at::Tensor& tensor) {
  return static_cast<uint32_t*>(tensor.mutable_data_ptr());
}

at::Tensor attention_forward(const at::Tensor& value, const at::Tensor& locations,
                             const at::Tensor& weights, at::IntArrayRef sizes) {
  const MsDeformAttnCall call = check_ms_deform_attn(value, locations, weights, sizes);
  const MsDeformAttnParams& p = call.params;
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor output = at::empty({p.batch, p.queries, p.channels()}, value.options());
  if (output.numel() == 0) return output;
  const at::Tensor maps = value.contiguous(), where = locations.contiguous();
  const at::Tensor factors = weights.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  with_type(dtype_of(value), dtype_of(value), [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionPlan plan = make_forward_plan(
        p, {int32_t(sizeof(T)), common_alignment({&maps, &output})}, current_device_limits());
    launch_attention_forward(p, plan, stream, static_cast<const T*>(maps.const_data_ptr()),
                             numbers_of<T>(where), numbers_of<T>(factors),
                             static_cast<T*>(output.mutable_data_ptr()));
  });
  check_launches("ms_deform_attn");
  return output;
}

// The images of `p`. Additions to grad_value come in an order that varies.
template <typename T>
void run_sorted(const MsDeformAttnParams& p, const AttentionPlan& plan, cudaStream_t stream,
                const at::TensorOptions& words, const AttentionBackward<T>& call,
                const FloatSum<wide_t<T>>& grad_value) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  const at::Tensor counts = at::zeros({p.batch * p.heads * p.pixels}, words);
  const at::Tensor ranks = at::empty({samples}, words), order = at::empty({samples}, words);
  launch_attention_rank(p, plan, stream, call.locations, words_of(counts), words_of(ranks));
  const at::Tensor ends = counts.cumsum(0, at::kInt);
  launch_attention_place(p, plan, stream, call, words_of(ends), words_of(ranks), words_of(order));
  launch_attention_backward(p, plan, stream, call, words_of(order),
                            words_of(ends) + ends.numel() - 1, grad_value);
}

// The same, bitwise repeatable: a stable sort, and sums in fixed point.
template <typename T>
void run_sorted(const MsDeformAttnParams& p, const AttentionPlan& plan, cudaStream_t stream,
                const at::TensorOptions& words, const AttentionBackward<T>& call,
                const FixedSum<wide_t<T>>& grad_value) {
  const at::Tensor cells = at::empty({p.batch * p.queries * p.heads * p.samples()}, words);
  launch_attention_cells(p, plan, stream, call.locations, words_of(cells));
  const at::Tensor order =
      std::get<1>(cells.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false)).to(at::kInt);
  const uint32_t* const all = nullptr;
  launch_attention_backward(p, plan, stream, call, words_of(order), all, grad_value);
}

template <typename T, typename Sum>
void run_all(const MsDeformAttnParams& p, const AttentionPlan& plan, cudaStream_t stream,
             const at::TensorOptions& words, const AttentionBackward<T>& call,
             const Sum& grad_value) {
  for_each_launch(p, plan, [&](int64_t image, int64_t images) {
    MsDeformAttnParams part = p;
    part.batch = images;
    run_sorted(part, plan, stream, words, call.from(p, image),
               grad_value.from(image * p.pixels * p.channels()));
  });
}

template <typename T>
at::Tensor fast_backward(const MsDeformAttnParams& p, const at::Tensor& value, int32_t alignment,
                         cudaStream_t stream, const AttentionBackward<T>& call) {
  const at::Tensor sum = at::zeros(value.sizes(), value.options().dtype(sum_type(value)));
  const AttentionPlan plan = make_backward_plan(p, {int32_t(sizeof(T)), alignment},
                                                current_device_limits());
  run_all(p, plan, stream, value.options().dtype(at::kInt), call,
          FloatSum<wide_t<T>>{static_cast<wide_t<T>*>(sum.mutable_data_ptr())});
  return sum.to(value.scalar_type());
}

// As finely as the largest of grad_output and of the weights allow.
template <typename T>
at::Tensor deterministic_backward(const MsDeformAttnParams& p, const at::Tensor& value,
                                  const at::Tensor& grad_output, const at::Tensor& weights,
                                  cudaStream_t stream, const AttentionBackward<T>& call) {
  const at::Tensor exponent = exponent_above(grad_output).add(exponent_above(weights));
  const at::Tensor bits = exponent.clamp_max(1024).neg().add(fixed_sum_bits(p));
  const at::Tensor scale = bits.clamp(-1020, 1020).exp2();
  const at::Tensor sum = at::zeros(value.sizes(), value.options().dtype(at::kLong));
  const at::Tensor not_finite = at::zeros(value.sizes(), value.options().dtype(sum_type(value)));
  const AttentionPlan plan = make_backward_plan(p, {int32_t(sizeof(T)), int32_t(sizeof(T))},
                                                current_device_limits());
  run_all(p, plan, stream, value.options().dtype(at::kInt), call,
          FixedSum<wide_t<T>>{static_cast<uint64_t*>(sum.mutable_data_ptr()),
                              static_cast<wide_t<T>*>(not_finite.mutable_data_ptr()),
                              static_cast<const double*>(scale.const_data_ptr())});
  return sum.to(at::kDouble).div_(scale).add_(not_finite).to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& locations,
    const at::Tensor& weights, at::IntArrayRef sizes) {
  const MsDeformAttnCall checked = check_ms_deform_attn(value, locations, weights, sizes);
  const MsDeformAttnParams& p = checked.params;
  check_grad_output(grad_output, value, p);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  if (grad_output.numel() == 0)
    return {at::zeros(value.sizes(), value.options()), grad_locations, grad_weights};
  const at::Tensor maps = value.contiguous(), grad = grad_output.contiguous();
  const at::Tensor where = locations.contiguous(), factors = weights.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  at::Tensor grad_value;
  with_type(dtype_of(value), dtype_of(value), [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionBackward<T> call{static_cast<const T*>(grad.const_data_ptr()),
                                    static_cast<const T*>(maps.const_data_ptr()),
                                    numbers_of<T>(where),
                                    numbers_of<T>(factors),
                                    gradients_in<T>(grad_locations),
                                    gradients_in<T>(grad_weights)};
    grad_value = at::globalContext().deterministicAlgorithms()
                     ? deterministic_backward<T>(p, maps, grad, factors, stream, call)
                     : fast_backward<T>(p, maps, common_alignment({&maps, &grad}), stream, call);
  });
  check_launches("ms_deform_attn");
  return {grad_value, grad_locations, grad_weights};
}

} // namespace
} // namespace cuda
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CUDA, m) {
  m.impl("ms_deform_attn", mmdcnv4::cuda::attention_forward);
  m.impl("_ms_deform_attn_backward", mmdcnv4::cuda::attention_backward);
}
