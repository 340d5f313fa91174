// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// vec.h — kLanes neighbouring numbers. With GCC and Clang it is a vector register (or a few), by
// means of their vector extensions, so that one kernel source serves SSE, AVX, AVX-512 and NEON;
// with other compilers it is an array, left to the optimiser.
//
// In the namespace of an instruction set: a template compiled for AVX-512 must never be the one
// that the linker keeps for all.
#pragma once

#include "kernel_scope.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

template <typename T, int kLanes>
struct Vec {
#if defined(__GNUC__)
  typedef T Register
      __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
  Register r;

  static MMDCNV4_HD Vec load(const T* from) { return {*reinterpret_cast<const Register*>(from)}; }
  MMDCNV4_HD void store(T* to) const { *reinterpret_cast<Register*>(to) = r; }
  MMDCNV4_HD Vec operator+(Vec other) const { return {r + other.r}; }
  MMDCNV4_HD Vec operator*(Vec other) const { return {r * other.r}; }
  MMDCNV4_HD void add_product(T scale, Vec other) { r += scale * other.r; }
  MMDCNV4_HD void add_product(Vec scale, Vec other) { r += scale.r * other.r; }
#else
  T r[kLanes];

  static MMDCNV4_HD Vec load(const T* from) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.r[i] = from[i];
    return v;
  }
  MMDCNV4_HD void store(T* to) const {
    for (int i = 0; i < kLanes; ++i) to[i] = r[i];
  }
  MMDCNV4_HD Vec operator+(Vec other) const {
    for (int i = 0; i < kLanes; ++i) other.r[i] += r[i];
    return other;
  }
  MMDCNV4_HD Vec operator*(Vec other) const {
    for (int i = 0; i < kLanes; ++i) other.r[i] *= r[i];
    return other;
  }
  MMDCNV4_HD void add_product(T scale, Vec other) {
    for (int i = 0; i < kLanes; ++i) r[i] += scale * other.r[i];
  }
#endif
  // Sum of the lanes, by halves.
  MMDCNV4_HD T sum() const {
    if constexpr (kLanes == 1) {
      return r[0];
    } else {
      T lanes[kLanes];
      store(lanes);
      return (Vec<T, kLanes / 2>::load(lanes) + Vec<T, kLanes / 2>::load(lanes + kLanes / 2)).sum();
    }
  }
};

// The integer as wide as T.
template <int kBytes> struct IntegerOf;
template <> struct IntegerOf<4> { typedef int32_t type; };
template <> struct IntegerOf<8> { typedef int64_t type; };

// Splits eight (x, y) pairs.
template <typename T>
MMDCNV4_HD void split_pairs(const T* pairs, T* x, T* y) {
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename Vec<T, 8>::Register Register;
  typedef typename IntegerOf<sizeof(T)>::type Lanes __attribute__((vector_size(8 * sizeof(T))));
  const Register low = Vec<T, 8>::load(pairs).r, high = Vec<T, 8>::load(pairs + 8).r;
  Vec<T, 8>{__builtin_shuffle(low, high, Lanes{0, 2, 4, 6, 8, 10, 12, 14})}.store(x);
  Vec<T, 8>{__builtin_shuffle(low, high, Lanes{1, 3, 5, 7, 9, 11, 13, 15})}.store(y);
#else
  for (int i = 0; i < 8; ++i) {
    x[i] = pairs[2 * i];
    y[i] = pairs[2 * i + 1];
  }
#endif
}

// The weights of the four corners of one tap after the other, each in all lanes. A load that fills
// a vector with one number costs as much as the load of a whole vector, so where the instruction
// set can pick any lane (AVX2, AVX-512) the weights of kCount taps are loaded together.
#if defined(__GNUC__) && !defined(__clang__)
template <typename T, int kLanes,
          bool kPick = kLanes * sizeof(T) == 64 || (kLanes == 8 && sizeof(T) == 4)>
#else
template <typename T, int kLanes, bool kPick = false>
#endif
struct TapWeights {
  static constexpr int64_t kCount = INT64_MAX;
  const T* at[4];

  MMDCNV4_HD explicit TapWeights(const T* const (&from)[4])
      : at{from[0], from[1], from[2], from[3]} {}
  MMDCNV4_HD T get(int corner) const { return *at[corner]; }
  MMDCNV4_HD void next() {
    for (int c = 0; c < 4; ++c) ++at[c];
  }
};

#if defined(__GNUC__) && !defined(__clang__)
template <typename T, int kLanes>
struct TapWeights<T, kLanes, true> {
  static constexpr int64_t kCount = kLanes;
  typedef typename IntegerOf<sizeof(T)>::type Integer;
  typedef Integer Lane __attribute__((vector_size(kLanes * sizeof(T))));
  Vec<T, kLanes> taps[4];
  Lane lane = {};

  MMDCNV4_HD explicit TapWeights(const T* const (&from)[4])
      : taps{Vec<T, kLanes>::load(from[0]), Vec<T, kLanes>::load(from[1]),
             Vec<T, kLanes>::load(from[2]), Vec<T, kLanes>::load(from[3])} {}
  MMDCNV4_HD Vec<T, kLanes> get(int corner) const {
    return {__builtin_shuffle(taps[corner].r, lane)};
  }
  MMDCNV4_HD void next() { lane += Integer(1); }
};
#endif

// Part of the channels of a row: kVectors * kLanes neighbouring ones, which stay in registers.
template <int kLanes_, int kVectors_>
struct Strip {
  static constexpr int kLanes = kLanes_, kVectors = kVectors_;
};

// Calls visit(channel, Strip) for strips that cover the channels [channel, count), widest first.
template <int kLanes, int kVectors, typename Visit>
MMDCNV4_HD void for_strips(int64_t channel, int64_t count, const Visit& visit) {
  for (; count - channel >= kVectors * kLanes; channel += kVectors * kLanes)
    visit(channel, Strip<kLanes, kVectors>());
  if (channel == count) return;
  if constexpr (kVectors > 1) {
    for_strips<kLanes, kVectors / 2>(channel, count, visit);
  } else if constexpr (kLanes > 1) {
    for_strips<kLanes / 2, 1>(channel, count, visit);
  }
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
