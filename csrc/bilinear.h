// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// bilinear.h — one bilinear sample: its four corners, weights and derivatives. Shared by every
// kernel. No torch headers.
//
// Positions are in pixels, pixel centres on the integers. A corner outside the image counts as
// zero; its coordinates are clamped, so that it may be loaded, and its weight is zero.
// Positions are clamped before they become integers: NaN, infinity and 1e9 are defined: outside.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MMDCNV4_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MMDCNV4_HD inline __attribute__((always_inline))
#else
#define MMDCNV4_HD inline
#endif

namespace mmdcnv4 {

template <typename T>
struct Bilinear {
  int32_t x0, x1, y0, y1; // corner coordinates, clamped into the image
  T fx, fy;               // position minus its floor
  T wx0, wx1, wy0, wy1;   // weights per axis, zero where the corner is missing
  int32_t has_x0, has_x1, has_y0, has_y1; // 0 or 1
  int32_t inside; // 0: no corner exists, the sample and all its gradients are zero
};

// Floor and fraction of a position on an axis of `size` <= 2^30 pixels. -1 and below, and NaN,
// which compares false, become `lowest`; what lies above the image becomes `size`.
// No branches, and minima and maxima in the form of the machine instructions: this is vectorised.
template <typename T>
MMDCNV4_HD int32_t floor_of(T position, T lowest, int32_t size, T& fraction) {
  T clamped = position > T(-1) ? position : lowest;
  clamped = clamped < T(size) ? clamped : T(size);
  fraction = clamped - std::floor(clamped);
  return static_cast<int32_t>(clamped - fraction); // exact
}

// One axis: position -> corners, fraction, presence.
template <typename T>
MMDCNV4_HD void bilinear_axis(T position, int32_t size, int32_t& lower, int32_t& upper, T& fraction,
                              int32_t& has_lower, int32_t& has_upper) {
  const int32_t base = floor_of(position, T(-2), size, fraction); // -2: a place without a corner
  const int32_t last = size - 1;
  has_lower = static_cast<uint32_t>(base) < static_cast<uint32_t>(size);
  has_upper = static_cast<uint32_t>(base + 1) < static_cast<uint32_t>(size);
  lower = base > 0 ? base : 0;
  lower = lower < last ? lower : last;
  upper = lower + (has_lower & has_upper); // the same pixel where one of the two is missing
}

template <typename T>
MMDCNV4_HD Bilinear<T> make_bilinear(T x, T y, int32_t height, int32_t width) {
  Bilinear<T> b;
  bilinear_axis(x, width, b.x0, b.x1, b.fx, b.has_x0, b.has_x1);
  bilinear_axis(y, height, b.y0, b.y1, b.fy, b.has_y0, b.has_y1);
  b.wx0 = b.has_x0 ? T(1) - b.fx : T(0);
  b.wx1 = b.has_x1 ? b.fx : T(0);
  b.wy0 = b.has_y0 ? T(1) - b.fy : T(0);
  b.wy1 = b.has_y1 ? b.fy : T(0);
  // the same as the flags say, but on a GPU they would stay in registers for it
  b.inside = (x > T(-1)) & (x < T(width)) & (y > T(-1)) & (y < T(height));
  return b;
}

// What a sample takes from each of its corners, times a factor (the mask).
template <typename T>
struct CornerWeights {
  T w00, w01, w10, w11; // (y0 x0), (y0 x1), (y1 x0), (y1 x1)
};

template <typename T>
MMDCNV4_HD CornerWeights<T> corner_weights(T factor, T wx0, T wx1, T wy0, T wy1) {
  const T top = factor * wy0, bottom = factor * wy1;
  return {top * wx0, top * wx1, bottom * wx0, bottom * wx1};
}

// From the dot products d_yx of grad_output with the four corners (zero where a corner is missing)
// to the gradients of the sample's weight and position (arXiv:2401.06197 leaves them implicit;
// they are the derivatives of the bilinear form, right-sided on the integers).
template <typename T>
struct BilinearGrad {
  T mask; // <grad_output, sample>
  T x, y; // derivative with respect to the position, per unit of mask
};

template <typename T>
MMDCNV4_HD BilinearGrad<T> bilinear_grad(T d00, T d01, T d10, T d11, T fx, T fy) {
  const T top_dx = d01 - d00, bottom_dx = d11 - d10;
  const T top = d00 + fx * top_dx, bottom = d10 + fx * bottom_dx;
  return {top + fy * (bottom - top), top_dx + fy * (bottom_dx - top_dx), bottom - top};
}

} // namespace mmdcnv4
