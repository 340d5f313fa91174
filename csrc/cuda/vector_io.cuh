// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// vector_io.cuh — a few neighbouring numbers of a tensor, moved by one instruction and widened to
// the type in which the kernels compute. The launch plan makes sure that the addresses are aligned.
#pragma once

#include <cstring>

#include "../launch_plan.h"
#include "device.cuh"

namespace mmdcnv4 {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which the kernels compute with tensors of type T.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

// Machine words of kBytes bytes.
template <int kBytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<2> {
  using type = uint16_t;
};

MMDCNV4_DEVICE float2 widen_pair(uint32_t word, Half) { return half_pair_to_float2(word); }
MMDCNV4_DEVICE float2 widen_pair(uint32_t word, BFloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
MMDCNV4_DEVICE uint32_t narrow_pair(float first, float second, Half) {
  return float2_to_half_pair(first, second);
}
MMDCNV4_DEVICE uint32_t narrow_pair(float first, float second, BFloat16) {
  return float2_to_bfloat16_pair(first, second);
}

template <typename T, int kVec>
struct VectorIo {
  using Raw = typename Words<kVec * int(sizeof(T))>::type;
  static_assert(sizeof(Raw) == kVec * sizeof(T), "a vector is one machine word");

  static MMDCNV4_DEVICE Raw load(const void* from) { return *static_cast<const Raw*>(from); }

  static MMDCNV4_DEVICE void widen(const Raw& raw, wide_t<T> (&to)[kVec]) {
    if constexpr (sizeof(T) >= 4) {
      memcpy(to, &raw, sizeof(raw));
    } else if constexpr (kVec == 1) {
      to[0] = widen_pair(raw, T()).x;
    } else {
      uint32_t words[kVec / 2];
      memcpy(words, &raw, sizeof(raw));
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        const float2 pair = widen_pair(words[i], T());
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  }

  static MMDCNV4_DEVICE wide_t<T> first(const Raw& raw) {
    wide_t<T> to[kVec];
    widen(raw, to);
    return to[0];
  }

  static MMDCNV4_DEVICE void store(const wide_t<T> (&from)[kVec], T* to) {
    Raw raw;
    if constexpr (sizeof(T) >= 4) {
      memcpy(&raw, from, sizeof(raw));
    } else if constexpr (kVec == 1) {
      raw = uint16_t(narrow_pair(from[0], 0.0f, T()));
    } else {
      uint32_t words[kVec / 2];
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i)
        words[i] = narrow_pair(from[2 * i], from[2 * i + 1], T());
      memcpy(&raw, words, sizeof(raw));
    }
    *reinterpret_cast<Raw*>(to) = raw;
  }
};

template <typename T>
MMDCNV4_DEVICE wide_t<T> load_one(const T* from) {
  return VectorIo<T, 1>::first(VectorIo<T, 1>::load(from));
}

template <typename T>
MMDCNV4_DEVICE void store_one(wide_t<T> number, T* to) {
  const wide_t<T> from[1] = {number};
  VectorIo<T, 1>::store(from, to);
}

// Adds kVec neighbouring numbers, in as few reductions as the device can.
template <int kVec, typename T>
MMDCNV4_DEVICE void reduce_add_vector(T* to, const T (&from)[kVec]) {
  if constexpr (sizeof(T) == 4 && kVec % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4)
      reduce_add(to + i, from[i], from[i + 1], from[i + 2], from[i + 3]);
  } else if constexpr (sizeof(T) == 4 && kVec == 2) {
    reduce_add(to, from[0], from[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) reduce_add(to + i, from[i]);
  }
}

// Channels of a row that a thread adds to, of those from `begin` on that its team takes at a time.
// Reductions take as long as there are sectors, 32 bytes of memory, that those of a warp meet,
// however full. So neighbouring threads add neighbouring numbers: where the device adds vectors,
// each thread its own; before sm_90, where it adds one number at a time, one each of the first
// channels, then one each of the next. `vec` divides the channels.
struct AddedChannels {
  int32_t first, pitch;

  static MMDCNV4_DEVICE AddedChannels of(int32_t begin, int32_t end, int32_t lane, int32_t team,
                                         int32_t vec) {
    const int32_t threads = (end - begin) / vec; // that have channels
    return {begin + lane, threads < team ? threads : team};
  }
};
template <int kVec, typename Width>
constexpr bool kAddsOneByOne = kVec > 1 && Width::value == 1;

// Where gradients of value are added up, by any thread: in floating point, in an order that varies.
template <typename T>
struct FloatSum {
  T* numbers;

  FloatSum from(int64_t at) const { return {numbers + at}; } // for the host
  template <int kVec>
  MMDCNV4_DEVICE void add(int64_t at, const T (&from)[kVec]) const {
    reduce_add_vector<kVec>(numbers + at, from);
  }
};

// The same in fixed point, where the order does not matter; what is not finite is added apart, in
// floating point, where it does not either.
template <typename T>
struct FixedSum {
  uint64_t* numbers; // two's complement
  T* not_finite;
  const double* scale; // on the device: numbers are sums times this; small enough for no overflow

  FixedSum from(int64_t at) const { return {numbers + at, not_finite + at, scale}; }
  template <int kVec>
  MMDCNV4_DEVICE void add(int64_t at, const T (&from)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (from[i] - from[i] == T(0)) {
        reduce_add(numbers + at + i, uint64_t(round_to_integer(double(from[i]) * *scale)));
      } else {
        reduce_add(not_finite + at + i, from[i]);
      }
    }
  }
};

} // namespace cuda
} // namespace mmdcnv4
