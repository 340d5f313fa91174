// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_kernels.h — the CPU kernels as plain functions on pointers, one table per instruction
// set. No torch headers: the kernels can be built and tested alone.
#pragma once

#include "../dcnv4_params.h"

namespace mmdcnv4 {
namespace cpu {

// Output rows [begin, end) of the N * Ho rows of the call.
template <typename T>
using ForwardFunction = void (*)(const Dcnv4Params& p,
                                 const T* value,       // [N, H, W, G, D]
                                 const T* offset_mask, // [N, Ho, Wo, P]
                                 T* output,            // [N, Ho, Wo, G, D]
                                 int64_t begin, int64_t end);

// Groups [group_begin, group_end) of one image: this slice of both gradients, written whole.
template <typename T>
using BackwardFunction = void (*)(const Dcnv4Params& p,
                                  const T* grad_output, // [N, Ho, Wo, G, D]
                                  const T* value,       // [N, H, W, G, D]
                                  const T* offset_mask, // [N, Ho, Wo, P]
                                  T* grad_value,        // [N, H, W, G, D]
                                  T* grad_offset_mask,  // [N, Ho, Wo, P]
                                  int64_t image, int64_t group_begin, int64_t group_end);

template <typename T>
struct Kernels {
  ForwardFunction<T> forward;
  BackwardFunction<T> backward;
};

struct KernelTable {
  const char* instruction_set;
  Kernels<float> f32;
  Kernels<double> f64;
};

const KernelTable& generic_kernels();
const char* active_instruction_set(); // of all kernels; `_set_cpu_instruction_set` changes it
#ifdef MMDCNV4_X86
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

} // namespace cpu
} // namespace mmdcnv4
