// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_backward.cuh — all gradients of DCNv4 on tensor cores, for 3x3 kernels of stride 1:
// four kernels, one after the other.
//
//     dcnv4_window_grad_offset  offsets and masks; notes the taps it leaves over
//     dcnv4_window_clear        where there are any: clears a tensor in float32
//     dcnv4_window_grad_rest    likewise: their gradients, those of value into that tensor
//     dcnv4_window_grad_value   value, that tensor added
//
// Limits      as dcnv4_window_forward.cuh
#pragma once

#include "dcnv4_window_grad_offset.cuh"
#include "dcnv4_window_grad_rest.cuh"
#include "dcnv4_window_grad_value.cuh"

namespace mmdcnv4 {
namespace cuda {

template <typename T>
void launch_window_grad_rest(const Dcnv4Params& p, const WindowBackwardPlan& plan, Stream stream,
                             const T* grad_output, const T* value,
                             const OffsetNumbers<T>& offset_mask, const WindowScratch& scratch,
                             const OffsetGradients<T>& grad_offset_mask) {
  WindowArguments arguments = make_window_arguments(p, plan.offset_mask);
  arguments.call.team_log2 = log2_of(int32_t(p.group_channels / kChunkNumbers));
  const uint64_t count = uint64_t(p.batch) * uint64_t(p.height * p.width) *
                         uint64_t(p.channels()) * sizeof(float) / 16;
  constexpr uint64_t kCleared = kMaxThreads * kClearedPerThread;
  const uint64_t* rest_count = scratch.rest_count;
  launch(&dcnv4_window_clear_kernel<uint4>, int64_t((count + kCleared - 1) / kCleared),
         kMaxThreads, 0, stream, rest_count, count, reinterpret_cast<uint4*>(scratch.sum));
  launch(&dcnv4_window_grad_rest_kernel<T>, plan.rest_blocks, kMaxThreads, 0, stream, arguments,
         plan.offset_mask.reach, grad_output, value, offset_mask,
         static_cast<const uint64_t*>(scratch.rest), rest_count, scratch.sum, grad_offset_mask);
}

template <typename T>
bool launch_dcnv4_window_backward(const Dcnv4Params& p, const WindowBackwardPlan& plan,
                                  Stream stream, const T* grad_output, const T* value,
                                  const OffsetNumbers<T>& offset_mask,
                                  const WindowScratch& scratch, T* grad_value,
                                  const OffsetGradients<T>& grad_offset_mask) {
  bool is_launched = false;
  with_window(p.group_channels, plan.value.reach, [&](auto depth, auto reach) {
    constexpr int kDepth = decltype(depth)::value, kReach = decltype(reach)::value;
    auto* offset_kernel = &dcnv4_window_grad_offset_kernel<T, kDepth, kReach>;
    auto* value_kernel = &dcnv4_window_grad_value_kernel<T, kDepth, kReach>;
    if (!prepare_tensor_core_kernel(offset_kernel) || !prepare_tensor_core_kernel(value_kernel))
      return;
    const auto begin = [&](const auto* tensor, int64_t image, int64_t pixels, int64_t channels) {
      return tensor + image * pixels * channels;
    };
    const int64_t in_pixels = p.height * p.width, out_pixels = p.queries();
    for_each_launch(p, plan.offset_mask, [&](int64_t image, int64_t blocks) {
      launch(offset_kernel, blocks, plan.offset_mask.threads, plan.offset_mask.shared_bytes, stream,
             make_window_arguments(p, plan.offset_mask),
             begin(grad_output, image, out_pixels, p.channels()),
             begin(value, image, in_pixels, p.channels()),
             offset_mask.from(image * out_pixels * p.offset_mask_channels),
             grad_offset_mask.from(image * out_pixels * p.offset_mask_channels),
             uint64_t(image) * uint64_t(out_pixels * p.groups), scratch.rest,
             scratch.rest_count);
    });
    launch_window_grad_rest(p, plan, stream, grad_output, value, offset_mask, scratch,
                            grad_offset_mask);
    for_each_launch(p, plan.value, [&](int64_t image, int64_t blocks) {
      launch(value_kernel, blocks, plan.value.threads, plan.value.shared_bytes, stream,
             make_window_arguments(p, plan.value),
             begin(grad_output, image, out_pixels, p.channels()),
             offset_mask.from(image * out_pixels * p.offset_mask_channels),
             static_cast<const uint64_t*>(scratch.rest_count),
             static_cast<const float*>(scratch.sum) + image * in_pixels * p.channels(),
             grad_value + image * in_pixels * p.channels());
    });
    is_launched = true;
  });
  return is_launched;
}

} // namespace cuda
} // namespace mmdcnv4
