// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_forward.inl — DCNv4 on the CPU.
//
// Computes    out[n,q,g,:] = sum_k mask[n,q,g,k] * bilinear(value[n,:,:,g,:], x_k, y_k)
// Work split  the coefficients of all taps of a block of outputs and groups are computed at once,
//             one lane per tap; then each row is accumulated, one lane per channel. A block away
//             from the borders skips all tests for corners outside the image
// Threads     lines of outputs
// Numerics    T throughout (the caller widens half inputs); bitwise repeatable for any thread count
// Borders     a tap without a corner in the image is skipped: its pixel, even NaN, is never used
// Source      arXiv:2401.06197, section 3
#pragma once

#include "dcnv4_taps.inl"
#include "kernel_scope.h"
#include "vec.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Accumulates a strip of the channels of one row. Few vectors leave registers for one sum per
// corner, four independent chains of additions; many vectors are chains enough.
template <int kPoints, int kLanes, int kVectors, bool kInterior, typename T, typename Index>
MMDCNV4_HD void gather_strip(const T* image, Steps<Index> whole, TapBlock<T, Index>& taps,
                             int64_t first, T* output) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  constexpr int kChains = kVectors >= 8 ? 1 : (kVectors >= 4 ? 2 : 4);
  Vec<T, kLanes> sum[kChains][kVectors] = {};
  const int32_t* corners = taps.corners() + first;
  const Index* start = taps.start() + first;
  const T* pixel[4];
  for (int c = 0; c < 4; ++c) pixel[c] = image + whole.to(c);
  using Weights = TapWeights<T, kLanes>;
  for (int64_t begin = 0; begin < points;) {
    const int64_t end = smaller(Weights::kCount, points - begin) + begin;
    Weights weights({taps.weight(0) + first + begin, taps.weight(1) + first + begin,
                     taps.weight(2) + first + begin, taps.weight(3) + first + begin});
    MMDCNV4_UNROLL_POINTS
    for (int64_t k = begin; k < end; ++k, weights.next()) {
      if (!kInterior && !exists(corners[k])) continue;
      const Steps<Index> step = whole.between(corners[k]);
      for (int c = 0; c < 4; ++c) {
        const T* from = kInterior ? pixel[c] + start[k] : image + (start[k] + step.to(c));
        const auto w = weights.get(c);
        for (int v = 0; v < kVectors; ++v)
          sum[c % kChains][v].add_product(w, Vec<T, kLanes>::load(from + v * kLanes));
      }
    }
    begin = end;
  }
  for (int v = 0; v < kVectors; ++v) {
    Vec<T, kLanes> total = sum[0][v];
    for (int c = 1; c < kChains; ++c) total = total + sum[c][v];
    total.store(output + v * kLanes);
  }
}

// The same strip of all rows of a block: `positions` neighbouring outputs and `groups` groups. A
// function of its own leaves the registers to the innermost loop.
template <int kPoints, int kLanes, int kVectors, typename T, typename Index>
MMDCNV4_NOINLINE void gather_block(const Dcnv4Params& p, const T* image, Steps<Index> whole,
                                   int64_t positions, int64_t groups, bool interior,
                                   TapBlock<T, Index>& taps, T* output) {
  for (int64_t i = 0; i < positions; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t lane = taps.lane(i, g), start = g * p.group_channels;
      T* to = output + i * p.channels() + start;
      if (interior || is_interior<kPoints>(taps, lane)) {
        gather_strip<kPoints, kLanes, kVectors, true>(image + start, whole, taps, lane, to);
      } else {
        gather_strip<kPoints, kLanes, kVectors, false>(image + start, whole, taps, lane, to);
      }
    }
  }
}

template <int kPoints, typename T, typename Index>
void forward_lines(const Dcnv4Params& p, const T* value, const T* offset_mask, T* output,
                   int64_t begin, int64_t end) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  TapBlock<T, Index> taps(p, p.groups, p.out_width);
  const Steps<Index> whole = steps_of<Index>(p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t line = task % p.out_height;
    const T* image = value + task / p.out_height * p.height * p.width * p.channels();
    const T base_y = center_y<T>(p, line);
    for (int64_t column = 0; column < p.out_width; column += taps.positions) {
      const int64_t positions = smaller(taps.positions, p.out_width - column);
      const int64_t query = task * p.out_width + column;
      const T base_x = center_x<T>(p, column);
      prefetch_below<false>(p, image, line, column, positions, p.channels());
      if (task + 1 < end) // the next line
        prefetch<false>(offset_mask + (query + p.out_width) * p.offset_mask_channels,
                        positions * p.offset_mask_channels);
      const bool inner =
          rests_inside(line, line + 1, p.stride_h, p.pad_h, p.span_h(), p.height) &&
          rests_inside(column, column + positions, p.stride_w, p.pad_w, p.span_w(), p.width);
      for (int64_t first = 0; first < p.groups; first += taps.groups) {
        const int64_t groups = smaller(taps.groups, p.groups - first);
        const T* packed = offset_mask + query * p.offset_mask_channels + first * 3 * taps.points;
        for (int64_t i = 0; i < positions; ++i)
          unpack<kPoints>(p, packed + i * p.offset_mask_channels, i, groups, taps);
        const bool interior = inner && compute_interior_taps(p, base_x, base_y, taps);
        if (!interior) compute_taps<false>(p, base_x, base_y, taps);
        const T* from = image + first * p.group_channels;
        T* to = output + query * p.channels() + first * p.group_channels;
        for_strips<kLanes, 8>(0, p.group_channels, [&](int64_t c, auto strip) {
          gather_block<kPoints, strip.kLanes, strip.kVectors>(p, from + c, whole, positions,
                                                              groups, interior, taps, to + c);
        });
      }
    }
  }
}

template <typename T>
void dcnv4_forward(const Dcnv4Params& p, const T* value, const T* offset_mask, T* output,
                   int64_t begin, int64_t end) {
  with_index_and_points(p, [&](auto index, auto points) {
    forward_lines<points.kCount, T, decltype(index)>(p, value, offset_mask, output, begin, end);
  });
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
