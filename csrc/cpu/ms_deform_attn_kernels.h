// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_kernels.h — multi-scale deformable attention on the CPU as plain functions on
// pointers. No torch headers.
#pragma once

#include "../ms_deform_attn_params.h"

namespace mmdcnv4 {
namespace cpu {

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
