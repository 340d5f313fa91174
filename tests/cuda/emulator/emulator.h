// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// emulator.h — what csrc/cuda/device.cuh is to nvcc, for an ordinary C++ compiler: the words of
// CUDA that the kernels use, so that the very same kernels run on the CPU, thread by thread, under
// the sanitizers. A thread of the GPU is a fibre here; __syncwarp() and shuffles switch to the next
// one and return once all threads of the warp have arrived. It aborts with a message where a GPU
// would hang or have no defined result: threads of a warp at different operations, or gone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __grid_constant__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define MMDCNV4_DEVICE inline
#define MMDCNV4_SHARED_MEMORY(name) unsigned char* const name = emulator::shared_memory()

struct Index3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

extern Index3 thread_index, block_index, block_size, grid_size;

// Order in which the threads of a block take turns; what is right in one order only is a race. With
// the first three all warps go on to their next meeting before any goes further; with the others a
// warp goes as far as it can alone, to its end or to where it waits for the block.
enum class Order { kForward, kBackward, kShuffled, kWarps, kWarpsBackward };
constexpr int kOrders = 5;

// Copies in the background land when they are asked for, or when they are waited for: a GPU may do
// either. By number: the order, and kOrders more where they land at once.
struct Schedule {
  Order order;
  bool copies_land_at_once;
};

void set_schedule(int number);
bool copies_land_at_once();

// Whether a reduction adds up to four float32, as on sm_90 and newer, or one, as before.
void set_vector_reductions(bool on);
bool has_vector_reductions();
// Reductions of all threads, and sectors of 32 bytes that they meet: those that the threads of a
// warp execute at a time (each its first, its second, ...) meet a sector once.
struct Reductions {
  int64_t numbers, sectors;
};
void note_reduction(const void* to, int numbers);
Reductions take_reductions();
unsigned char* shared_memory();
void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

// All threads of the warp meet here. When the last has come, `operation` is called, once, with what
// the 32 lanes brought; it may be null.
using Operation = void (*)(void* const* lanes);
void meet(Operation operation, uint32_t mask, void* brought);
void meet_block(); // all threads of the block, likewise
int lane();
void align_steps(int warp); // its threads have met: see enter_step() of warp_words.h

} // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::meet(nullptr, mask, nullptr); }
inline void __syncthreads() { emulator::meet_block(); }

namespace emulator {

template <typename T>
struct Shuffled {
  T number, received;
  int source;
};

template <typename T>
T shuffle(uint32_t mask, T number, int source) {
  Shuffled<T> own{number, number, source};
  meet(
      [](void* const* lanes) {
        const auto at = [&](int lane) { return static_cast<Shuffled<T>*>(lanes[lane]); };
        for (int lane = 0; lane < 32; ++lane)
          at(lane)->received = at(at(lane)->source & 31)->number;
      },
      mask, &own);
  return own.received;
}

} // namespace emulator

template <typename T>
T __shfl_xor_sync(uint32_t mask, T number, int lanes) {
  return emulator::shuffle(mask, number, emulator::lane() ^ lanes);
}
template <typename T>
T __shfl_sync(uint32_t mask, T number, int source) {
  return emulator::shuffle(mask, number, source);
}
inline int __any_sync(uint32_t mask, int condition) {
  uint32_t any = condition != 0;
  for (int step = 16; step > 0; step >>= 1) any |= __shfl_xor_sync(mask, any, step);
  return int(any);
}

inline uint32_t __ballot_sync(uint32_t mask, int condition) {
  uint32_t bits = uint32_t(condition != 0) << emulator::lane();
  for (int step = 16; step > 0; step >>= 1) bits |= __shfl_xor_sync(mask, bits, step);
  return bits;
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t number) {
  for (int step = 16; step > 0; step >>= 1) number += __shfl_xor_sync(mask, number, step);
  return number;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(uint32_t(bits)); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(int(bits)); }
inline uint32_t __float_as_uint(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}
// a + b, rounded down.
inline float __fadd_rd(float a, float b) {
  const double sum = double(a) + double(b);
  const float nearest = float(sum);
  return double(nearest) > sum ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __uint_as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

namespace mmdcnv4 {
namespace cuda {

using std::exp;

inline float half_to_float(uint32_t bits) {
  const uint16_t low = uint16_t(bits);
  _Float16 half;
  std::memcpy(&half, &low, sizeof(half));
  return float(half);
}
inline uint32_t float_to_half(float number) {
  const _Float16 half = _Float16(number);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
// Rounds to nearest, ties to even.
inline uint32_t float_to_bfloat16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  if (number != number) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline float2 half_pair_to_float2(uint32_t word) {
  return {half_to_float(word), half_to_float(word >> 16)};
}
inline uint32_t float2_to_half_pair(float first, float second) {
  return float_to_half(first) | float_to_half(second) << 16;
}
inline uint32_t float2_to_bfloat16_pair(float first, float second) {
  return float_to_bfloat16(first) | float_to_bfloat16(second) << 16;
}

// As on sm_90 and newer, or as before.
template <typename Visit>
inline void with_reduction_width(const Visit& visit) {
  if (emulator::has_vector_reductions()) {
    visit(std::integral_constant<int, 4>());
  } else {
    visit(std::integral_constant<int, 1>());
  }
}
// The vector forms want the alignment that the device wants.
template <typename T>
inline void reduce_add(T* to, T a) {
  emulator::note_reduction(to, 1);
  *to += a;
}
inline void reduce_add(float* to, float a, float b) {
  emulator::note_reduction(to, 2);
  float2& pair = *reinterpret_cast<float2*>(to);
  pair.x += a;
  pair.y += b;
}
inline void reduce_add(float* to, float a, float b, float c, float d) {
  emulator::note_reduction(to, 4);
  struct alignas(16) Four {
    float x, y, z, w;
  };
  Four& four = *reinterpret_cast<Four*>(to);
  four.x += a;
  four.y += b;
  four.z += c;
  four.w += d;
}

inline uint32_t fetch_add(uint32_t* to, uint32_t number) {
  const uint32_t before = *to;
  *to += number;
  return before;
}

inline int64_t round_to_integer(double number) { return std::llrint(number); }

using Stream = int;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int32_t threads, int32_t shared_bytes,
            Stream, Arguments... arguments) {
  emulator::run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

} // namespace cuda
} // namespace mmdcnv4
