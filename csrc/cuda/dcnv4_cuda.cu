// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_cuda.cu — the CUDA side of the operator: check, guard, allocate, choose the kernel, launch.
// Nothing here waits for the device or reads from it, so that calls can be captured in a graph.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mmdcnv4_kernel_hash.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "../dcnv4_check.h"
#include "binding.h"
#include "launch.h"

namespace mmdcnv4 {
namespace cuda {
namespace {

LaunchPlan plan_for(const Dcnv4Params& p, const at::Tensor& value, int32_t alignment,
                    bool backward) {
  const int32_t element_bytes = int32_t(value.element_size());
  return make_launch_plan(p, {element_bytes, std::max(element_bytes, 4), alignment, backward},
                          current_device_limits());
}

// Which devices take the tensor-core kernels for calls that these are made for: all ("1"), none
// ("0"), or those of a compute capability that was proven ("auto").
class FastChoice {
public:
  void set(const std::string& choice) {
    TORCH_CHECK(choice == "auto" || choice == "0" || choice == "1",
                "dcnv4: the tensor-core kernels can be \"auto\", \"0\" or \"1\", got \"", choice,
                "\"");
    choice_ = choice == "auto" ? kAuto : choice == "1" ? kOn : kOff;
  }
  void set_proven(at::IntArrayRef capabilities) {
    for (auto& proven : proven_) proven = false;
    for (const int64_t capability : capabilities)
      if (capability >= 0 && capability < int64_t(proven_.size())) proven_[capability] = true;
  }
  // Of the current device. The first time that a call would have been theirs it says so.
  bool is_on(bool is_theirs) {
    if (choice_ != kAuto) return choice_ == kOn && is_theirs;
    if (!is_theirs) return false;
    const size_t capability = size_t(10 * device_number(cudaDevAttrComputeCapabilityMajor) +
                                     device_number(cudaDevAttrComputeCapabilityMinor));
    if (capability < proven_.size() && proven_[capability]) return true;
    TORCH_WARN_ONCE("mmdcnv4: dcnv4 runs its direct CUDA kernels; faster ones on tensor cores have "
                    "not been proven for sm_", capability, " with this build. `python -m "
                    "mmdcnv4.info --check` checks them in seconds and turns them on.");
    return false;
  }

private:
  enum Choice { kAuto, kOff, kOn };
  std::atomic<Choice> choice_{kAuto};
  std::array<std::atomic<bool>, 256> proven_{}; // by compute capability: 90 for sm_90
};

FastChoice& fast_choice() {
  static FastChoice choice;
  return choice;
}

void set_fast(std::string choice) { fast_choice().set(choice); }
void set_proven(at::IntArrayRef capabilities) { fast_choice().set_proven(capabilities); }

// offset_mask or its gradient, where value has type T.
template <typename T>
OffsetNumbers<T> numbers_of(const at::Tensor& offset_mask) {
  return {static_cast<const unsigned char*>(offset_mask.const_data_ptr()),
          offset_mask.scalar_type() == at::kFloat};
}
template <typename T>
OffsetGradients<T> gradients_in(const at::Tensor& grad_offset_mask) {
  return {static_cast<unsigned char*>(grad_offset_mask.mutable_data_ptr()),
          grad_offset_mask.scalar_type() == at::kFloat};
}

// Returns whether it did.
template <typename T>
bool try_window_forward(const Dcnv4Params& p, int32_t alignment, cudaStream_t stream,
                        const T* value, const OffsetNumbers<T>& offset_mask, T* output) {
  if constexpr (sizeof(T) <= 4) {
    const WindowPlan plan =
        make_window_plan(p, {int32_t(sizeof(T)), 4, alignment, false}, current_device_limits());
    return fast_choice().is_on(plan.is_made_for) &&
           launch_dcnv4_window_forward(p, plan, stream, value, offset_mask, output);
  } else {
    return false;
  }
}

at::Tensor dcnv4_forward_cuda(const at::Tensor& value, const at::Tensor& offset_mask,
                              MMDCNV4_SCALARS) {
  const Dcnv4Params p = check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor output =
      at::empty({p.batch, p.out_height, p.out_width, p.channels()}, value.options());
  if (output.numel() == 0) return output;
  const at::Tensor from = value.contiguous(), packed = offset_mask.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  with_type(dtype_of(value), dtype_of(offset_mask), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* value_data = static_cast<const T*>(from.const_data_ptr());
    const OffsetNumbers<T> numbers = numbers_of<T>(packed);
    auto* output_data = static_cast<T*>(output.mutable_data_ptr());
    const int32_t alignment = common_alignment({&from, &packed, &output});
    if (try_window_forward(p, alignment, stream, value_data, numbers, output_data)) return;
    const LaunchPlan plan = plan_for(p, from, common_alignment({&from, &output}), false);
    launch_dcnv4_forward(p, plan, stream, value_data, numbers, output_data);
  });
  check_launches("dcnv4");
  return output;
}

// Returns grad_value, or an undefined tensor where it did nothing. Memory to work with comes from
// the allocator of the current stream, which gives it away again in the order of the stream.
template <typename T>
at::Tensor try_window_backward(const Dcnv4Params& p, const at::Tensor& grad_output,
                               const at::Tensor& value, const at::Tensor& offset_mask,
                               const at::Tensor& grad_offset_mask, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    const int32_t alignment =
        common_alignment({&grad_output, &value, &offset_mask, &grad_offset_mask});
    const WindowBackwardPlan plan =
        make_window_backward_plan(p, {int32_t(sizeof(T)), 4, alignment, true},
                                  int32_t(offset_mask.element_size()), current_device_limits());
    if (!fast_choice().is_on(plan.value.is_made_for)) return {};
    at::Tensor grad_value = at::empty(value.sizes(), value.options());
    const auto words = value.options().dtype(at::kInt);
    const at::Tensor counts = at::zeros({1 + window_lists(p)}, words);
    const at::Tensor entries = at::empty({window_lists(p), window_list_room(p)}, words);
    const WindowScratch scratch{static_cast<uint32_t*>(counts.mutable_data_ptr()),
                                static_cast<uint32_t*>(entries.mutable_data_ptr())};
    if (launch_dcnv4_window_backward(p, plan, stream,
                                     static_cast<const T*>(grad_output.const_data_ptr()),
                                     static_cast<const T*>(value.const_data_ptr()),
                                     numbers_of<T>(offset_mask), scratch,
                                     static_cast<T*>(grad_value.mutable_data_ptr()),
                                     gradients_in<T>(grad_offset_mask)))
      return grad_value;
  }
  return {};
}

// grad_value is summed in float32 (float64 for float64) and rounded once: sums of halves would lose
// small terms.
template <typename T>
at::Tensor direct_backward(const Dcnv4Params& p, const at::Tensor& grad_output,
                           const at::Tensor& value, const at::Tensor& offset_mask,
                           const at::Tensor& grad_offset_mask, cudaStream_t stream) {
  const at::Tensor grad_value = at::zeros(value.sizes(), value.options().dtype(sum_type(value)));
  const LaunchPlan plan =
      plan_for(p, value, common_alignment({&value, &grad_output, &grad_value}), true);
  launch_dcnv4_backward(p, plan, stream, static_cast<const T*>(grad_output.const_data_ptr()),
                        static_cast<const T*>(value.const_data_ptr()), numbers_of<T>(offset_mask),
                        FloatSum<wide_t<T>>{static_cast<wide_t<T>*>(grad_value.mutable_data_ptr())},
                        gradients_in<T>(grad_offset_mask));
  return grad_value.to(value.scalar_type());
}

// Bitwise repeatable: grad_value is summed in 64-bit fixed point, as finely as the largest of
// grad_output and of the masks allow.
template <typename T>
at::Tensor deterministic_backward(const Dcnv4Params& p, const at::Tensor& grad_output,
                                  const at::Tensor& value, const at::Tensor& offset_mask,
                                  const at::Tensor& grad_offset_mask, cudaStream_t stream) {
  const int64_t points = p.points();
  at::Tensor exponent = exponent_above(grad_output);
  if (!p.softmax)
    exponent = exponent.add(exponent_above(offset_mask.narrow(3, 0, p.groups * 3 * points)
                                               .unflatten(3, {p.groups, 3 * points})
                                               .narrow(4, 2 * points, points)));
  const at::Tensor bits = exponent.clamp_max(1024).neg().add(fixed_sum_bits(p));
  const at::Tensor scale = bits.clamp(-1020, 1020).exp2();
  const at::Tensor sum = at::zeros(value.sizes(), value.options().dtype(at::kLong));
  const at::Tensor not_finite = at::zeros(value.sizes(), value.options().dtype(sum_type(value)));
  const FixedSum<wide_t<T>> grad_value{static_cast<uint64_t*>(sum.mutable_data_ptr()),
                                       static_cast<wide_t<T>*>(not_finite.mutable_data_ptr()),
                                       static_cast<const double*>(scale.const_data_ptr())};
  launch_dcnv4_backward(p, plan_for(p, value, int32_t(sizeof(T)), true), stream,
                        static_cast<const T*>(grad_output.const_data_ptr()),
                        static_cast<const T*>(value.const_data_ptr()), numbers_of<T>(offset_mask),
                        grad_value, gradients_in<T>(grad_offset_mask));
  return sum.to(at::kDouble).div_(scale).add_(not_finite).to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cuda(const at::Tensor& grad_output,
                                                       const at::Tensor& value,
                                                       const at::Tensor& offset_mask,
                                                       MMDCNV4_SCALARS) {
  const Dcnv4Params p = check_dcnv4(value, offset_mask, MMDCNV4_SCALAR_NAMES);
  check_grad_output(grad_output, value, p);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor grad_offset_mask = at::empty(offset_mask.sizes(), offset_mask.options());
  if (grad_output.numel() == 0)
    return {at::zeros(value.sizes(), value.options()), grad_offset_mask};
  const at::Tensor from = value.contiguous(), packed = offset_mask.contiguous();
  const at::Tensor grad = grad_output.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  at::Tensor grad_value;
  with_type(dtype_of(value), dtype_of(offset_mask), [&](auto type) {
    using T = typename decltype(type)::type;
    if (at::globalContext().deterministicAlgorithms()) {
      grad_value = deterministic_backward<T>(p, grad, from, packed, grad_offset_mask, stream);
      return;
    }
    grad_value = try_window_backward<T>(p, grad, from, packed, grad_offset_mask, stream);
    if (!grad_value.defined())
      grad_value = direct_backward<T>(p, grad, from, packed, grad_offset_mask, stream);
  });
  check_launches("dcnv4");
  return {grad_value, grad_offset_mask};
}

// What was compiled: {"architectures": ["sm_90"], "toolkit": "13.0", "kernels": "0123456789abcd"},
// the last a hash of their sources.
std::string info() {
  std::string names;
  for (const std::string& name : architectures())
    names += (names.empty() ? "\"" : ", \"") + name + "\"";
  return "{\"architectures\": [" + names + "], \"toolkit\": \"" +
         std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) +
         "\", \"kernels\": \"" MMDCNV4_KERNEL_HASH "\"}";
}

} // namespace
} // namespace cuda
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CUDA, m) {
  m.impl("dcnv4", mmdcnv4::cuda::dcnv4_forward_cuda);
  m.impl("_dcnv4_backward", mmdcnv4::cuda::dcnv4_backward_cuda);
}

TORCH_LIBRARY_IMPL(mmdcnv4, CompositeExplicitAutograd, m) {
  m.impl("_cuda_info", mmdcnv4::cuda::info);
  m.impl("_set_cuda_fast", mmdcnv4::cuda::set_fast);
  m.impl("_set_cuda_proven", mmdcnv4::cuda::set_proven);
}
