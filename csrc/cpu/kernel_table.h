// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernel_table.h — the CPU kernels of both operators, one table per instruction set. No torch
// headers.
#pragma once

#include <type_traits>

#include "dcnv4_kernels.h"
#include "ms_deform_attn_kernels.h"

namespace mmdcnv4 {
namespace cpu {

template <typename T>
struct Kernels {
  Dcnv4Forward<T> dcnv4_forward;
  Dcnv4Backward<T> dcnv4_backward;
  MsDeformAttnForward<T> ms_deform_attn_forward;
  MsDeformAttnBackward<T> ms_deform_attn_backward;
};

struct KernelTable {
  const char* instruction_set;
  Kernels<float> f32;
  Kernels<double> f64;
};

const KernelTable& generic_kernels();
#ifdef MMDCNV4_X86
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

const KernelTable& active_kernels(); // the best of this processor, or what was set

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return active_kernels().f64;
  } else {
    return active_kernels().f32;
  }
}

} // namespace cpu
} // namespace mmdcnv4
