// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_backward.cuh — all gradients of DCNv4 by tensor-core kernels, for 3x3 kernels of
// stride 1: four of them, one after the other.
//
//     dcnv4_window_grad_offset  offsets and masks; lists the taps that are far (far_lists.cuh)
//     dcnv4_window_clear        where a list is full: clears memory for its sums
//     dcnv4_window_grad_rest    likewise: adds them up there
//     dcnv4_window_grad_value   value: what is near, what is listed, or those sums
//
// Limits      as dcnv4_window_forward.cuh
#pragma once

#include "dcnv4_window_grad_offset.cuh"
#include "dcnv4_window_grad_rest.cuh"
#include "dcnv4_window_grad_value.cuh"

namespace mmdcnv4 {
namespace cuda {

// Nothing to do as a rule: few blocks, that all see it at once.
template <typename T>
void launch_window_grad_rest(const Dcnv4Params& p, const WindowBackwardPlan& plan, Stream stream,
                             const T* grad_output, const OffsetNumbers<T>& offset_mask,
                             const FarLists& lists) {
  WindowArguments arguments = make_window_arguments(p, plan.offset_mask);
  arguments.call.team_log2 = log2_of(int32_t(p.group_channels / kChunkNumbers<T>));
  launch(&dcnv4_window_clear_kernel<uint4>, plan.rest_blocks, kMaxThreads, 0, stream,
         uint64_t(window_lists(p)), lists);
  launch(&dcnv4_window_grad_rest_kernel<T>, plan.rest_blocks, kMaxThreads, 0, stream, arguments,
         kReach, uint64_t(p.batch) * uint64_t(p.queries()) * uint64_t(p.groups),
         grad_output, offset_mask, lists);
}

template <typename T>
bool launch_dcnv4_window_backward(const Dcnv4Params& p, const WindowBackwardPlan& plan,
                                  Stream stream, const T* grad_output, const T* value,
                                  const OffsetNumbers<T>& offset_mask,
                                  const WindowScratch& scratch, T* grad_value,
                                  const OffsetGradients<T>& grad_offset_mask) {
  bool is_launched = false;
  const FarLists lists = make_far_lists(p, scratch.counts, scratch.entries);
  with_depth<T>(p.group_channels, [&](auto depth) {
    constexpr int kDepth = decltype(depth)::value;
    auto* offset_kernel = &dcnv4_window_grad_offset_kernel<T, kDepth>;
    auto* value_kernel = &dcnv4_window_grad_value_kernel<T, kDepth>;
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
             lists.from(image));
    });
    launch_window_grad_rest(p, plan, stream, grad_output, offset_mask, lists);
    for_each_launch(p, plan.value, [&](int64_t image, int64_t blocks) {
      launch(value_kernel, blocks, plan.value.threads, plan.value.shared_bytes, stream,
             make_window_arguments(p, plan.value),
             begin(grad_output, image, out_pixels, p.channels()),
             offset_mask.from(image * out_pixels * p.offset_mask_channels),
             lists.from(image), Divisor(uint32_t(p.out_width)),
             grad_value + image * in_pixels * p.channels());
    });
    is_launched = true;
  });
  return is_launched;
}

} // namespace cuda
} // namespace mmdcnv4
