// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernel_includes.h — all that the kernels include. It comes before any instruction set is
// chosen, so that these headers are compiled for every processor of the platform.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../bilinear.h"
#include "../dcnv4_params.h"
#include "kernel_table.h"

#if defined(__clang__)
#define MMDCNV4_VECTORIZE _Pragma("clang loop vectorize(enable)")
#elif defined(__GNUC__)
#define MMDCNV4_VECTORIZE _Pragma("GCC ivdep")
#else
#define MMDCNV4_VECTORIZE
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define MMDCNV4_UNROLL_POINTS _Pragma("GCC unroll 9")
#else
#define MMDCNV4_UNROLL_POINTS
#endif

#if defined(__GNUC__)
#define MMDCNV4_INLINE __attribute__((always_inline))
#define MMDCNV4_NOINLINE __attribute__((noinline))
#define MMDCNV4_PREFETCH(address, is_write) __builtin_prefetch(address, is_write, 3)
#define MMDCNV4_RESTRICT __restrict__
#else
#define MMDCNV4_INLINE
#define MMDCNV4_NOINLINE
#define MMDCNV4_PREFETCH(address, is_write)
#define MMDCNV4_RESTRICT
#endif
