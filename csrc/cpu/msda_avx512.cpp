// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// msda_avx512.cpp — multi-scale deformable attention for x86-64 with AVX-512.

#include "kernel_includes.h"
#include "msda_kernels.h"

#ifdef MMDCNV4_X86
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

namespace mmdcnv4 {
namespace cpu {
namespace avx512 {
namespace {

constexpr int kVectorBytes = 64;
#include "vec.h"

#include "msda_kernels.inl"

} // namespace
} // namespace avx512

const MsdaTable& avx512_msda() {
  static const MsdaTable table = {"avx512",
                                  {avx512::msda_forward<float>, avx512::msda_backward<float>},
                                  {avx512::msda_forward<double>, avx512::msda_backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
