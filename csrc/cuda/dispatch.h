// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dispatch.h — from numbers known at run time to template arguments, once for all kernels. What is
// not in a list raises and names the list.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "vector_io.cuh"

namespace mmdcnv4 {
namespace cuda {

enum class Dtype { kFloat64, kFloat32, kFloat16, kBFloat16 };

template <typename T>
struct Type {
  using type = T;
};

// visit(Type<T>) for the dtype of value. That of offset_mask is only checked: offset_numbers.cuh.
template <typename Visit>
void with_type(Dtype value, Dtype offset_mask, const Visit& visit) {
  if (value != offset_mask && (offset_mask != Dtype::kFloat32 || value == Dtype::kFloat64))
    throw std::invalid_argument("dcnv4: offset_mask must have the dtype of value, or be float32 "
                                "beside a half-precision value");
  switch (value) {
    case Dtype::kFloat64: return visit(Type<double>());
    case Dtype::kFloat32: return visit(Type<float>());
    case Dtype::kFloat16: return visit(Type<Half>());
    case Dtype::kBFloat16: return visit(Type<BFloat16>());
  }
  throw std::invalid_argument("dcnv4: the dtype must be one of 0, 1, 2, 3, got " +
                              std::to_string(int(value)));
}

// visit(std::integral_constant<int, vec>) for the vector widths of type T.
template <typename T, typename Visit>
void with_vec(int32_t vec, const Visit& visit) {
  constexpr int kMost = kMaxVectorBytes / int(sizeof(T)), kFew = kMinVectorBytes / int(sizeof(T));
  if (vec == 1) return visit(std::integral_constant<int, 1>());
  if constexpr (sizeof(T) < 8) {
    if (vec == kMost) return visit(std::integral_constant<int, kMost>());
    if (vec == kFew) return visit(std::integral_constant<int, kFew>());
  }
  throw std::invalid_argument("dcnv4: the vector width must be 1, " + std::to_string(kFew) +
                              " or " + std::to_string(kMost) + " (float64: 1), got " +
                              std::to_string(vec));
}

// visit(std::integral_constant<int, depth>) for the channels of a group on tensor cores, where
// value has type T: as many as are in 128 bytes of it at most.
template <typename T, typename Visit>
void with_depth(int64_t depth, const Visit& visit) {
  if (depth == 16) return visit(std::integral_constant<int, 16>());
  if (depth == 32) return visit(std::integral_constant<int, 32>());
  if constexpr (sizeof(T) == 2) {
    if (depth == 64) return visit(std::integral_constant<int, 64>());
  }
  throw std::invalid_argument("dcnv4: groups must have 16, 32 or (half types) 64 channels, got " +
                              std::to_string(depth));
}

} // namespace cuda
} // namespace mmdcnv4
