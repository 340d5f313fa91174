// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// sampling.cuh — what a team of threads computes once for its row, before any channel is touched:
// the coefficients of up to kTapsPerPass taps, in shared memory. Teams lie within a warp, so that
// __syncwarp() is all the synchronisation there is.
#pragma once

#include <cmath>

#include "arguments.h"
#include "offset_numbers.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNoPixel = 0xffffffffu; // images have fewer pixels, see make_launch_plan

template <typename T>
struct alignas(16) Four {
  T x, y, z, w;
};

// Coefficients of a row, kTapsPerPass long. That it is odd spreads the rows over the banks.
template <typename T>
struct Taps {
  Four<T>* weight; // of the corners (x0 y0), (x1 y0), (x0 y1), (x1 y1), times the mask
  uint4* pixel;    // y * W + x of the corners, clamped into the image
  Four<T>* extra;  // gradients only: mask, fraction of x, fraction of y, corners that exist as bits
};

// Where the taps of a row lie in the shared memory of a block of `rows` rows; see tap_bytes().
template <bool kBackward, typename T>
MMDCNV4_DEVICE Taps<T> taps_of_row(unsigned char* shared, int32_t rows, int32_t row) {
  Four<T>* weight = reinterpret_cast<Four<T>*>(shared);
  Four<T>* extra = weight + rows * kTapsPerPass;
  uint4* pixel = reinterpret_cast<uint4*>(kBackward ? extra + rows * kTapsPerPass : extra);
  const int32_t first = row * kTapsPerPass;
  return {weight + first, pixel + first, kBackward ? extra + first : nullptr};
}

template <typename T>
MMDCNV4_DEVICE T team_sum(T number, int32_t team) {
#pragma unroll 1
  for (int32_t step = team >> 1; step > 0; step >>= 1)
    number += __shfl_xor_sync(kAllLanes, number, step);
  return number;
}

// From the logits of a row to its masks, with softmax.
template <typename T>
struct MaskRule {
  T largest, factor; // largest logit, one over the sum of the exponentials

  MMDCNV4_DEVICE T operator()(T logit) const { return exp(logit - largest) * factor; }
};

// `packed` begins with the numbers of the row.
template <typename T, typename V>
MMDCNV4_DEVICE MaskRule<T> make_mask_rule(const KernelArguments<T>& a, const Row& row,
                                          const OffsetNumbers<V>& packed) {
  const int32_t team = 1 << a.team_log2;
  const int32_t logits = 2 * a.points;
  T largest = row.is_valid ? packed.load(logits) : T(0);
#pragma unroll 1
  for (int32_t k = row.lane; row.is_valid && k < a.points; k += team) {
    const T logit = packed.load(logits + k);
    largest = logit > largest ? logit : largest;
  }
#pragma unroll 1
  for (int32_t step = team >> 1; step > 0; step >>= 1) {
    const T other = __shfl_xor_sync(kAllLanes, largest, step);
    largest = other > largest ? other : largest;
  }
  T total = 0;
#pragma unroll 1
  for (int32_t k = row.lane; row.is_valid && k < a.points; k += team)
    total += exp(packed.load(logits + k) - largest);
  return {largest, T(1) / team_sum(total, team)};
}

template <typename T>
struct Sample {
  Bilinear<T> bilinear;
  T mask;
};

template <typename T>
struct Position {
  T x, y;
};

// Where tap k of a row samples the image.
template <typename T>
MMDCNV4_DEVICE Position<T> position_of_tap(const KernelArguments<T>& a, const Row& row,
                                           const TapNumbers<T>& tap, int32_t k) {
  uint32_t j = uint32_t(k + int32_t(k >= a.removed_tap)); // taps go column by column
  const uint32_t i = a.kernel_h.split(j);
  return {T(row.x) * a.stride_x + a.origin_x +
              (T(int32_t(i)) * a.dilation_x - a.center_x + tap.dx) * a.scale,
          T(row.y) * a.stride_y + a.origin_y +
              (T(int32_t(j)) * a.dilation_y - a.center_y + tap.dy) * a.scale};
}

// The same, and with which mask. kMaybeSoftmax: `rule` holds where a.softmax is set; else that is
// known to be false.
template <bool kMaybeSoftmax, typename T>
MMDCNV4_DEVICE Sample<T> make_sample(const KernelArguments<T>& a, const Row& row,
                                     const MaskRule<T>& rule, const TapNumbers<T>& tap,
                                     int32_t k) {
  const Position<T> at = position_of_tap(a, row, tap, k);
  return {make_bilinear(at.x, at.y, a.height, a.width),
          kMaybeSoftmax && a.softmax ? rule(tap.mask) : tap.mask};
}

template <typename T>
MMDCNV4_DEVICE Four<T> sample_weights(const Sample<T>& sample) {
  const Bilinear<T>& b = sample.bilinear;
  const CornerWeights<T> w = corner_weights(sample.mask, b.wx0, b.wx1, b.wy0, b.wy1);
  return {w.w00, w.w01, w.w10, w.w11};
}

template <typename T>
MMDCNV4_DEVICE uint4 corner_pixels(const KernelArguments<T>& a, const Bilinear<T>& b) {
  const uint32_t top = uint32_t(b.y0) * uint32_t(a.width);
  const uint32_t bottom = uint32_t(b.y1) * uint32_t(a.width);
  return make_uint4(top + uint32_t(b.x0), top + uint32_t(b.x1), bottom + uint32_t(b.x0),
                    bottom + uint32_t(b.x1));
}

template <typename T>
MMDCNV4_DEVICE uint32_t corner_bits(const Bilinear<T>& b) {
  const uint32_t bits = uint32_t(b.has_x0 & b.has_y0) | uint32_t(b.has_x1 & b.has_y0) << 1 |
                        uint32_t(b.has_x0 & b.has_y1) << 2 | uint32_t(b.has_x1 & b.has_y1) << 3;
  return b.inside ? bits : 0u;
}

} // namespace cuda
} // namespace mmdcnv4
