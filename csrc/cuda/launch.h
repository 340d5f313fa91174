// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// launch.h — the entries of the kernels, on plain pointers. Each type of value is compiled in files
// of its own, so that builds run in parallel. No torch headers.
#pragma once

#include "../window_plan.h"
#include "offset_numbers.cuh"

namespace mmdcnv4 {
namespace cuda {

template <typename T>
void launch_dcnv4_forward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                          const T* value,                      // [N, H, W, G, D]
                          const OffsetNumbers<T>& offset_mask, // [N, Ho, Wo, P]
                          T* output);                          // [N, Ho, Wo, G, D], written whole

// The same by the tensor-core kernel, for plans that are made for it; T: half types, float32.
// Returns false, and does nothing, where the extension has no such code for the current device.
template <typename T>
bool launch_dcnv4_window_forward(const Dcnv4Params& p, const WindowPlan& plan, Stream stream,
                                 const T* value, const OffsetNumbers<T>& offset_mask, T* output);

template <typename T>
void launch_dcnv4_backward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                           const T* grad_output,                  // [N, Ho, Wo, G, D]
                           const T* value,                        // [N, H, W, G, D]
                           const OffsetNumbers<T>& offset_mask,   // [N, Ho, Wo, P]
                           const FloatSum<wide_t<T>>& grad_value, // [N, H, W, G, D], added to
                           const OffsetGradients<T>& grad_offset_mask); // [N, Ho, Wo, P], written

// The same, bitwise repeatable; for plans of vector width 1.
template <typename T>
void launch_dcnv4_backward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                           const T* grad_output, const T* value,
                           const OffsetNumbers<T>& offset_mask,
                           const FixedSum<wide_t<T>>& grad_value, // [N, H, W, G, D], added to
                           const OffsetGradients<T>& grad_offset_mask);

// Memory that launch_dcnv4_window_backward() works with.
struct WindowScratch {
  uint32_t* counts;  // 1 + window_lists(), zeros
  uint32_t* entries; // window_lists() * window_list_room(), aligned to 16 bytes, of any content
};

// The same by the tensor-core kernels, as launch_dcnv4_window_forward().
template <typename T>
bool launch_dcnv4_window_backward(const Dcnv4Params& p, const WindowBackwardPlan& plan,
                                  Stream stream, const T* grad_output, const T* value,
                                  const OffsetNumbers<T>& offset_mask,
                                  const WindowScratch& scratch,
                                  T* grad_value, // [N, H, W, G, D], written whole
                                  const OffsetGradients<T>& grad_offset_mask);

} // namespace cuda
} // namespace mmdcnv4
