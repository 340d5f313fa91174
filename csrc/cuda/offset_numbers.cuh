// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// offset_numbers.cuh — offset_mask and its gradient: values of T, the type of value, or of float32
// where T is a half type. Kernels learn which of the two at run time: a branch per tap or row costs
// little, and half as many kernels are compiled.
#pragma once

#include <type_traits>

#include "../bilinear.h"
#include "vector_io.cuh"

namespace mmdcnv4 {
namespace cuda {

// What offset_mask says about one tap.
template <typename T>
struct TapNumbers {
  T dx, dy, mask;
};

// Byte: unsigned char, const for numbers that are only read.
template <typename T, typename Byte>
struct NumbersOf {
  using Wide = wide_t<T>;
  Byte* data;
  bool are_float; // float32 with a half type; means nothing where T is another

  MMDCNV4_HD bool are_wider() const {
// dev/cuda/check_ptxas.py counts the instructions of that path
#if defined(MMDCNV4_OFFSETS_AS_VALUE)
    return false;
#else
    return sizeof(T) == 2 && are_float;
#endif
  }
  MMDCNV4_HD int32_t number_bytes() const {
    return are_wider() ? int32_t(sizeof(float)) : int32_t(sizeof(T));
  }
  // Those from number `at` on.
  MMDCNV4_HD NumbersOf from(int64_t at) const { return {data + at * number_bytes(), are_float}; }

  MMDCNV4_DEVICE Wide load(int32_t at) const {
    return are_wider() ? Wide(as<float>()[at]) : load_one(as<T>() + at);
  }
  // Tap k of a row of `points` taps, whose numbers begin here.
  MMDCNV4_DEVICE TapNumbers<Wide> load_tap(int32_t k, int32_t points) const {
    if (are_wider()) {
      const auto* from = as<float>();
      return {Wide(from[2 * k]), Wide(from[2 * k + 1]), Wide(from[2 * points + k])};
    }
    const auto* from = as<T>();
    return {load_one(from + 2 * k), load_one(from + 2 * k + 1), load_one(from + 2 * points + k)};
  }
  MMDCNV4_DEVICE void store(Wide number, int32_t at) const {
    if (are_wider()) {
      as<float>()[at] = float(number);
    } else {
      store_one(number, as<T>() + at);
    }
  }

  template <typename Number>
  MMDCNV4_HD auto* as() const {
    using Pointed = std::conditional_t<std::is_const<Byte>::value, const Number, Number>;
    return reinterpret_cast<Pointed*>(data);
  }
};

template <typename T>
using OffsetNumbers = NumbersOf<T, const unsigned char>; // offset_mask, [N, Ho, Wo, P]
template <typename T>
using OffsetGradients = NumbersOf<T, unsigned char>; // its gradient, [N, Ho, Wo, P]

} // namespace cuda
} // namespace mmdcnv4
