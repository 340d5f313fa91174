// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernels_avx512.cpp — the CPU kernels for x86-64 with AVX-512.

#include "kernel_includes.h"

#ifdef MMDCNV4_X86
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#define MMDCNV4_INSTRUCTION_SET avx512
#define MMDCNV4_VECTOR_BYTES 64
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
