// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_kernels.h — DCNv4 on the CPU as plain functions on pointers. No torch headers: the kernels
// can be built and tested alone.
#pragma once

#include "../dcnv4_params.h"

namespace mmdcnv4 {
namespace cpu {

// Lines of outputs [begin, end) of the N * Ho of the call.
template <typename T>
using Dcnv4Forward = void (*)(const Dcnv4Params& p,
                              const T* value,       // [N, H, W, G, D]
                              const T* offset_mask, // [N, Ho, Wo, P]
                              T* output,            // [N, Ho, Wo, G, D]
                              int64_t begin, int64_t end);

// Groups [group_begin, group_end) of one image: this slice of both gradients, written whole.
template <typename T>
using Dcnv4Backward = void (*)(const Dcnv4Params& p,
                               const T* grad_output, // [N, Ho, Wo, G, D]
                               const T* value,       // [N, H, W, G, D]
                               const T* offset_mask, // [N, Ho, Wo, P]
                               T* grad_value,        // [N, H, W, G, D]
                               T* grad_offset_mask,  // [N, Ho, Wo, P]
                               int64_t image, int64_t group_begin, int64_t group_end);

} // namespace cpu
} // namespace mmdcnv4
