// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernels_avx2.cpp — the CPU kernels for x86-64 with AVX2.

#include "kernel_includes.h"

#ifdef MMDCNV4_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MMDCNV4_INSTRUCTION_SET avx2
#define MMDCNV4_VECTOR_BYTES 32
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif // MMDCNV4_X86
