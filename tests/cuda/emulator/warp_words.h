// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// warp_words.h — what csrc/cuda/window/tensor_core.cuh is to nvcc, for an ordinary C++ compiler: shared
// memory with its banks, copies in the background, matrix fragments. Layouts follow the PTX ISA
// (sections on ldmatrix, mma.m16n8k16 and cp.async).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "../../../csrc/cuda/vector_io.cuh"
#include "emulator.h"
#include "races.h"

namespace emulator {

// Accesses to shared memory are checked for races, and counted by phase. From one meeting of a warp
// to the next, its threads enter the same steps in the same order, though some may leave out the
// last of them; the n-th accesses of its threads within a step are one instruction of the warp.
void set_counting(bool on);
void enter_step(int phase);
void note_access(const void* address, int bytes, Access access);
// {"clear": {"instructions": 16, "wavefronts": 64}, ...}: sums over all warps since the last call.
std::string take_counts(const char* const* phases, int count);

// A copy lands when the thread that asked for it waits for it, or at once: see Schedule.
void copy_later(void* to, const void* from, int bytes, bool exists);
void commit_copies();
void wait_copies(int pending);

// Reads and writes of a warp that are one instruction: ldmatrix and mma.
struct Matrices {
  const void* row; // of matrix lane / 8, row lane % 8: 16 bytes
  uint32_t received[4];
};
void load_matrices(void* const* lanes);
void load_matrices_transposed(void* const* lanes);

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
  float (*widen)(uint32_t bits);
};
void multiply_add(void* const* lanes);
void multiply_add_tf32(void* const* lanes); // `widen` is not used
void multiply_add_tf32_cut(void* const* lanes);
float round_to_tf32(float number);

} // namespace emulator

namespace mmdcnv4 {
namespace cuda {

inline void enter_step(SharedPhase phase) { emulator::enter_step(int(phase)); }

template <typename T>
inline T read_shared(const unsigned char* from) {
  emulator::note_access(from, sizeof(T), emulator::Access::kRead);
  return *reinterpret_cast<const T*>(from);
}
template <typename T>
inline void write_shared(unsigned char* to, const T& data) {
  emulator::note_access(to, sizeof(T), emulator::Access::kWrite);
  *reinterpret_cast<T*>(to) = data;
}

inline void copy_async(unsigned char* to_shared, const void* from, bool exists) {
  emulator::note_access(to_shared, 16, emulator::Access::kCopyBegins);
  emulator::copy_later(to_shared, from, 16, exists);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  emulator::wait_copies(kPending);
}

inline void load_matrices(const unsigned char* row, uint32_t (&to)[4]) {
  emulator::note_access(row, 16, emulator::Access::kRead);
  emulator::Matrices own{row, {}};
  emulator::meet(&emulator::load_matrices, 0xffffffffu, &own);
  std::memcpy(to, own.received, sizeof(to));
}
inline void load_matrices_transposed(const unsigned char* row, uint32_t (&to)[4]) {
  emulator::note_access(row, 16, emulator::Access::kRead);
  emulator::Matrices own{row, {}};
  emulator::meet(&emulator::load_matrices_transposed, 0xffffffffu, &own);
  std::memcpy(to, own.received, sizeof(to));
}

template <typename T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::Product own{d, a, b0, b1, [](uint32_t bits) { return widen_pair(bits, T()).x; }};
  emulator::meet(&emulator::multiply_add, 0xffffffffu, &own);
}

inline uint32_t round_to_tf32(float number) {
  return __float_as_uint(emulator::round_to_tf32(number));
}
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], float b0, float b1) {
  emulator::Product own{d, a, __float_as_uint(b0), __float_as_uint(b1), nullptr};
  emulator::meet(&emulator::multiply_add_tf32, 0xffffffffu, &own);
}
inline void multiply_add_tf32_cut(float (&d)[4], const uint32_t (&a)[4], float b0, float b1) {
  emulator::Product own{d, a, __float_as_uint(b0), __float_as_uint(b1), nullptr};
  emulator::meet(&emulator::multiply_add_tf32_cut, 0xffffffffu, &own);
}

inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t bits) {
  return uint32_t((uint64_t(high) << 32 | low) >> (bits & 31));
}

template <typename T>
T forget(T number) {
  return number;
}

template <typename... Parameters>
bool prepare_tensor_core_kernel(void (*)(Parameters...)) {
  return true;
}

} // namespace cuda
} // namespace mmdcnv4
