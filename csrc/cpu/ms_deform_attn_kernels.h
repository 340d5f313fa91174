// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_kernels.h — multi-scale deformable attention on the CPU as plain functions on
// pointers. No torch headers.
#pragma once

#include <cstdint>

namespace mmdcnv4 {
namespace cpu {

// Sizes of one call. A level l is a map of heights[l] x widths[l] pixels from pixel starts[l] on.
struct MsDeformAttnParams {
  int64_t batch;    // B
  int64_t pixels;   // S, of all levels together
  int64_t queries;  // Q
  int64_t heads;    // M
  int64_t head_channels; // D
  int64_t levels;   // L
  int64_t points;   // K, of one head and level
  const int32_t *heights, *widths, *starts;

  int64_t samples() const { return levels * points; } // of one query and head
};

// Queries [begin, end) of the B * Q queries of the call.
template <typename T>
using MsDeformAttnForward = void (*)(const MsDeformAttnParams& p,
                             const T* value,     // [B, S, M, D]
                             const T* locations, // [B, Q, M, L, K, 2]
                             const T* weights,   // [B, Q, M, L, K]
                             T* output,          // [B, Q, M, D]
                             int64_t begin, int64_t end);

// One head of one sample of the batch: its slice of all three gradients, written whole.
template <typename T>
using MsDeformAttnBackward = void (*)(const MsDeformAttnParams& p,
                              const T* grad_output, // [B, Q, M, D]
                              const T* value, const T* locations, const T* weights,
                              T* grad_value, T* grad_locations, T* grad_weights,
                              int64_t sample, int64_t head);

} // namespace cpu
} // namespace mmdcnv4
