// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// msda_avx2.cpp — multi-scale deformable attention for x86-64 with AVX2.

#include "kernel_includes.h"
#include "msda_kernels.h"

#ifdef MMDCNV4_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace mmdcnv4 {
namespace cpu {
namespace avx2 {
namespace {

constexpr int kVectorBytes = 32;
#include "vec.h"

#include "msda_kernels.inl"

} // namespace
} // namespace avx2

const MsdaTable& avx2_msda() {
  static const MsdaTable table = {"avx2",
                                  {avx2::msda_forward<float>, avx2::msda_backward<float>},
                                  {avx2::msda_forward<double>, avx2::msda_backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
