// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// listed_taps.cuh — what the taps of a list (far_lists.cuh) add to the gradient of value of their
// block of 4x4 input pixels: a part of dcnv4_window_grad_value.cuh, a warp's work.
//
// Idea        A^T [16 input pixels x 8 taps] . Y [8 taps, D], eight taps at a time. Y is gathered
//             from global memory, a number per lane and 8 channels: lists are short
// Work split  lane = tap while positions are computed, 32 at a time; then shuffles hand them to the
//             lanes that hold a fragment's weights
#pragma once

#include "fragments.cuh"
#include "window_numbers.cuh"

namespace mmdcnv4 {
namespace cuda {

// The taps of a block's list: lane = tap, up to 32 at a time.
struct ListedTap {
  uint32_t pixel; // of grad_output, in its image
  float x, y;     // where it samples, seen from the block
  float mask;

  // The weight of cell (cx, cy) of the block; zero also where a mask is NaN, if it is not sampled.
  static MMDCNV4_DEVICE float weight(float x, float y, float mask) {
    // a sample between two cells has both, one exactly on a cell the next as well, with weight zero
    const bool is_sampled = (x >= -1.0f) & (x < 1.0f) & (y >= -1.0f) & (y < 1.0f);
    return is_sampled ? mask * ((1.0f - fabsf(y)) * (1.0f - fabsf(x))) : 0.0f;
  }
};

template <typename T>
MMDCNV4_DEVICE ListedTap load_listed_tap(const WindowArguments& a, const Divisor& line_of_output,
                                         uint32_t group, const OffsetNumbers<T>& packed,
                                         uint32_t block_x, uint32_t block_y, uint32_t entry) {
  ListedTap listed;
  listed.pixel = entry / kTaps;
  const int32_t k = int32_t(entry - listed.pixel * kTaps);
  uint32_t x = listed.pixel;
  Row row{};
  row.y = int32_t(line_of_output.split(x));
  row.x = int32_t(x);
  const OffsetNumbers<T> numbers =
      packed.from(int64_t(uint64_t(listed.pixel) * a.packed_channels) +
                  int32_t(group) * 3 * a.call.points);
  const TapNumbers<float> tap = numbers.load_tap(k, a.call.points);
  const Position<float> at = position_of_tap(a.call, row, tap, k);
  listed.x = at.x - float(int32_t(block_x));
  listed.y = at.y - float(int32_t(block_y));
  listed.mask = tap.mask;
  return listed;
}

// Adds what the taps of a block's list give. grad_output: the image's, from the group's first
// channel on. Sums of taps that are not finite spread over the block unless kIsExact.
template <bool kIsExact, typename T, int kDepth>
MMDCNV4_DEVICE void add_listed(const WindowArguments& a, const Divisor& line_of_output,
                               uint32_t block_x, uint32_t block_y, uint32_t group, uint32_t lane,
                               const uint32_t* __restrict__ entries, uint32_t count,
                               const OffsetNumbers<T>& packed, const T* __restrict__ grad_output,
                               float (&sum)[kDepth / 8][4]) {
  const uint32_t g = lane / 4, t = lane % 4;
  // lane's rows of A^T: cell (cx, cy) and the one two lines below it
  const float cx = float(g % kBlockSide), cy = float(g / kBlockSide);
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kWarp) {
    const uint32_t here = count - first < uint32_t(kWarp) ? count - first : kWarp;
    ListedTap own{0, 2 * kBlockSide, 0, 0}; // with weight zero, and out of the block
    if (lane < here)
      own = load_listed_tap<T>(a, line_of_output, group, packed, block_x, block_y,
                               entries[first + lane]);
    if constexpr (kIsExact) {
#pragma unroll 1
      for (uint32_t i = 0; i < here; ++i) {
        const float x = __shfl_sync(kAllLanes, own.x, int(i)) - cx;
        const float y = __shfl_sync(kAllLanes, own.y, int(i)) - cy;
        const float mask = __shfl_sync(kAllLanes, own.mask, int(i));
        const T* from = grad_output + uint64_t(__shfl_sync(kAllLanes, own.pixel, int(i))) *
                                          a.call.channels + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float down = y - float(2 * half);
          if (!((x >= -1.0f) & (x < 1.0f) & (down >= -1.0f) & (down < 1.0f))) continue;
          const float weight = ListedTap::weight(x, down, mask);
#pragma unroll
          for (int j = 0; j < kDepth / 8; ++j) {
            float grad[2];
            VectorIo<T, 2>::widen(VectorIo<T, 2>::load(from + 8 * j), grad);
            sum[j][2 * half] += weight * grad[0];
            sum[j][2 * half + 1] += weight * grad[1];
          }
        }
      }
    } else {
#pragma unroll 1
      for (uint32_t eight = 0; eight < here; eight += 8) {
        using One = VectorIo<T, 1>;
        Tf32Fragment<T> weights;
        typename One::Raw grads[2][kDepth / 8]; // of tap t, t + 4
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int tap = int(eight + t) + 4 * i;
          const float x = __shfl_sync(kAllLanes, own.x, tap) - cx;
          const float y = __shfl_sync(kAllLanes, own.y, tap) - cy;
          const float mask = __shfl_sync(kAllLanes, own.mask, tap);
          const T* from =
              grad_output + uint64_t(__shfl_sync(kAllLanes, own.pixel, tap)) * a.call.channels + g;
          weights.put(2 * i, ListedTap::weight(x, y, mask));
          weights.put(2 * i + 1, ListedTap::weight(x, y - 2.0f, mask));
          const bool exists = tap < int(here);
#pragma unroll
          for (int j = 0; j < kDepth / 8; ++j)
            grads[i][j] = exists ? One::load(from + 8 * j) : typename One::Raw(0);
        }
#pragma unroll
        for (int j = 0; j < kDepth / 8; ++j)
          weights.multiply(One::first(grads[0][j]), One::first(grads[1][j]), sum[j]);
      }
    }
  }
}

} // namespace cuda
} // namespace mmdcnv4
