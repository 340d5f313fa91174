// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// device.cuh — the few words of the device that the kernels use: qualifiers, shared memory, packed
// conversions, reductions. Compiled by anything but nvcc they come from tests/cuda/emulator, which
// runs the same kernels thread by thread on the CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MMDCNV4_DEVICE __device__ __forceinline__
#define MMDCNV4_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace mmdcnv4 {
namespace cuda {

// Two 16-bit numbers in one word, the first in the low half.
MMDCNV4_DEVICE float2 half_pair_to_float2(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
MMDCNV4_DEVICE uint32_t float2_to_half_pair(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
MMDCNV4_DEVICE uint32_t float2_to_bfloat16_pair(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Adds to global memory and does not wait for the result. The kernels never read what they add to:
// without a "memory" clobber the compiler may move loads of other tensors across.
MMDCNV4_DEVICE void reduce_add(float* to, float a) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(a));
}
MMDCNV4_DEVICE void reduce_add(float* to, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b));
#else
  reduce_add(to, a);
  reduce_add(to + 1, b);
#endif
}
MMDCNV4_DEVICE void reduce_add(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d));
#else
  reduce_add(to, a, b);
  reduce_add(to + 2, c, d);
#endif
}
// visit(std::integral_constant<int, n>): float32 numbers that one reduction adds.
template <typename Visit>
MMDCNV4_DEVICE void with_reduction_width(const Visit& visit) {
#if __CUDA_ARCH__ >= 900
  visit(std::integral_constant<int, 4>());
#else
  visit(std::integral_constant<int, 1>());
#endif
}
MMDCNV4_DEVICE void reduce_add(double* to, double a) { atomicAdd(to, a); }
MMDCNV4_DEVICE void reduce_add(uint64_t* to, uint64_t a) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to), "l"(a));
}

// Adds to global memory; returns what was there before.
MMDCNV4_DEVICE uint32_t fetch_add(uint32_t* to, uint32_t number) { return atomicAdd(to, number); }

MMDCNV4_DEVICE int64_t round_to_integer(double number) { return __double2ll_rn(number); }

using Stream = cudaStream_t;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int32_t threads, int32_t shared_bytes,
            Stream stream, Arguments... arguments) {
  kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(arguments...);
}

} // namespace cuda
} // namespace mmdcnv4

#else
#include "emulator.h"
#endif
