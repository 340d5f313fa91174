// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_avx2.cpp — the CPU kernels for x86-64 with AVX2.

#include "kernel_includes.h"

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

#include "dcnv4_kernels.inl"

} // namespace
} // namespace avx2

const KernelTable& avx2_kernels() {
  static const KernelTable table = {"avx2",
                                    {avx2::forward<float>, avx2::backward<float>},
                                    {avx2::forward<double>, avx2::backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
