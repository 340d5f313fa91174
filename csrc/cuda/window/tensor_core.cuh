// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// tensor_core.cuh — the words of the device that only tensor-core kernels use (sm_80 and newer):
// accesses to shared memory, copies in the background, matrix fragments. As with device.cuh, any
// compiler but nvcc takes them from tests/cuda/emulator, which also counts bank conflicts.
//
// Fragments (PTX ISA, mma.m16n8k16), with lane = 4 g + t:
//     A 16x16   a0: row g,     columns 2t 2t+1    a2: row g,     columns 2t+8 2t+9
//               a1: row g + 8, columns 2t 2t+1    a3: row g + 8, columns 2t+8 2t+9
//     B 16x8    b0: rows 2t 2t+1, column g        b1: rows 2t+8 2t+9, column g
//     D 16x8    d0 d1: row g, columns 2t 2t+1     d2 d3: row g + 8, columns 2t 2t+1
// With TF32 (mma.m16n8k8) the product has 8 columns of A, and a register holds one number:
//     A 16x8    a0: row g, column t     a1: row g + 8, column t     a2 a3: the same, column t + 4
//     B 8x8     b0: row t, column g     b1: row t + 4, column g
#pragma once

#include "../vector_io.cuh"

namespace mmdcnv4 {
namespace cuda {

// What a kernel is doing with shared memory; the emulator counts wavefronts by it.
enum class SharedPhase {
  kCopy, kNumbers, kClear, kScatter, kWeights, kPixels, kCollect, kTaps, kFar, kFinish
};

} // namespace cuda
} // namespace mmdcnv4

// Kernels have no body where this is 0: see prepare_tensor_core_kernel().
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define MMDCNV4_HAS_TENSOR_CORES 0
#else
#define MMDCNV4_HAS_TENSOR_CORES 1
#endif

#if defined(__CUDACC__)

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace mmdcnv4 {
namespace cuda {

MMDCNV4_DEVICE void enter_step(SharedPhase) {}

template <typename T>
MMDCNV4_DEVICE T read_shared(const unsigned char* from) {
  return *reinterpret_cast<const T*>(from);
}
template <typename T>
MMDCNV4_DEVICE void write_shared(unsigned char* to, const T& data) {
  *reinterpret_cast<T*>(to) = data;
}

// Global to shared memory, 16 bytes, zeros where there is nothing to copy; done after a wait.
MMDCNV4_DEVICE void copy_async(unsigned char* to_shared, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(to_shared))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
MMDCNV4_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread's copies but the last kPending.
template <int kPending>
MMDCNV4_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers, each transposed: lane 8 m + r brings the address of row r
// of matrix m, 16 bytes. As rows of B, matrices 0 and 1 give b0 and b1.
MMDCNV4_DEVICE void load_matrices_transposed(const unsigned char* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same, not transposed: as columns of B, matrices 0 and 1 give b0 and b1.
MMDCNV4_DEVICE void load_matrices(const unsigned char* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// D += A B, numbers of type T, sums in float32.
MMDCNV4_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MMDCNV4_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 BFloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// TF32 has the range of float32 and 11 significant bits: float16 and bfloat16 fit in exactly.
MMDCNV4_DEVICE uint32_t round_to_tf32(float number) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(number));
  return rounded;
}
MMDCNV4_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(__float_as_uint(b0)),
                 "r"(__float_as_uint(b1)));
}
// The same with factors of more bits: the device takes those of TF32 and no notice of the others.
MMDCNV4_DEVICE void multiply_add_tf32_cut(float (&d)[4], const uint32_t (&a)[4], float b0,
                                          float b1) {
  multiply_add_tf32(d, a, b0, b1);
}

// Bits `bits` ... `bits` + 31 of high:low.
MMDCNV4_DEVICE uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t bits) {
  return __funnelshift_r(low, high, bits);
}

// Hides from the compiler where a number came from, so that it computes anew what depends on it.
MMDCNV4_DEVICE uint32_t forget(uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}
template <typename T>
MMDCNV4_DEVICE T* forget(T* to_global) {
  uint64_t address = __cvta_generic_to_global(to_global); // the compiler is to know which memory
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("dcnv4: CUDA error: ") + cudaGetErrorString(error));
}

// Whether there is code of `kernel` for the current device that uses tensor cores: an extension may
// have been built for older ones. Asked once per kernel and device; then the kernel is also allowed
// all shared memory that there is, whatever a call needs: another thread may be about to launch it.
template <typename... Parameters>
bool prepare_tensor_core_kernel(void (*kernel)(Parameters...)) {
  constexpr int kOldest = 80; // MMDCNV4_HAS_TENSOR_CORES
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> answers;
  int device = 0, most_shared_bytes = 0;
  check_cuda(cudaGetDevice(&device));
  const std::pair<const void*, int> question(reinterpret_cast<const void*>(kernel), device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError(); // clears it: there is no code at all
  } else {
    check_cuda(error);
  }
  const bool is_there = error == cudaSuccess && attributes.ptxVersion >= kOldest;
  if (is_there) {
    check_cuda(cudaDeviceGetAttribute(&most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                      device));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most_shared_bytes));
  }
  answers.emplace(question, is_there);
  return is_there;
}

} // namespace cuda
} // namespace mmdcnv4

#else
#include "warp_words.h"
#endif
