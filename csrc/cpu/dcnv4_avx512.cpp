// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_avx512.cpp — the CPU kernels for x86-64 with AVX-512.

#include "kernel_includes.h"

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

#include "dcnv4_kernels.inl"

} // namespace
} // namespace avx512

const KernelTable& avx512_kernels() {
  static const KernelTable table = {"avx512",
                                    {avx512::forward<float>, avx512::backward<float>},
                                    {avx512::forward<double>, avx512::backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
