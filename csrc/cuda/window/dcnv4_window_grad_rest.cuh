// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_grad_rest.cuh — all gradients of the taps that the other two kernels of
// dcnv4_window_backward.cuh leave over: the direct backward kernel, tap by tap.
//
// Work split  team of D / 8 threads = a row of the list, over the bits of its taps. The list has as
//             many rows as it has: blocks of a fixed number go through it together
// Memory      grad_value is added to a tensor in float32, which is cleared before, by another
//             kernel; both return at once where no tap is left over. grad_offset and grad_mask are
//             written to their places, where the first kernel has left zeros
// Numerics    as dcnv4_backward.cuh: the order of additions to grad_value is not fixed
// Left over   taps that are near, though not finite, have been added to grad_value by its own
//             kernel, which takes any number
#pragma once

#include "../dcnv4_backward.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr int32_t kClearedPerThread = 4; // times 16 bytes

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    dcnv4_window_clear_kernel(const uint64_t* __restrict__ rest_count, uint64_t count,
                              T* __restrict__ numbers) { // of 16 bytes
  if (*rest_count == 0) return;
  uint64_t i = uint64_t(blockIdx.x) * (kMaxThreads * kClearedPerThread) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kClearedPerThread; ++j, i += kMaxThreads)
    if (i < count) numbers[i] = T{};
}

// All gradients of one row of the list, by its team.
template <typename T>
MMDCNV4_DEVICE void add_row(const WindowArguments& a, int32_t reach, const LeftOver& left,
                            const T* __restrict__ grad_output, const T* __restrict__ value,
                            const OffsetNumbers<T>& offset_mask, float* __restrict__ rest_sum,
                            const OffsetGradients<T>& grad_offset_mask) {
  constexpr int kVec = kChunkNumbers;
  const int32_t team = 1 << a.call.team_log2, lane = int32_t(threadIdx.x) & (team - 1);
  uint32_t taps = left.taps;
  const uint64_t number = left.row;
  const uint64_t query = number / uint32_t(a.call.groups);
  const uint64_t line = query / uint32_t(a.call.out_width);
  Row row{};
  row.group = int32_t(number - query * uint32_t(a.call.groups));
  row.x = int32_t(query - line * uint32_t(a.call.out_width));
  row.image = uint32_t(line / uint32_t(a.call.out_height));
  row.y = int32_t(line - uint64_t(row.image) * uint32_t(a.call.out_height));
  const int64_t first_number =
      int64_t(query * a.packed_channels + uint32_t(row.group) * uint32_t(3 * a.call.points));
  const OffsetNumbers<T> packed = offset_mask.from(first_number);
  const OffsetGradients<T> grad_packed = grad_offset_mask.from(first_number);
  const uint64_t image = uint64_t(row.image) * uint32_t(a.call.height) * uint32_t(a.call.width) *
                             a.call.channels +
                         uint32_t(row.group) * uint32_t(a.call.group_channels);
  const Channels<T, FloatSum<float>> channels{grad_output,
                                              value,
                                              {rest_sum},
                                              int64_t(number * uint32_t(a.call.group_channels)),
                                              int64_t(image),
                                              a.call.channels,
                                              lane * kVec,
                                              a.call.group_channels,
                                              team * kVec};
  const Place edge = edge_of_image(row.x + a.shift_x, row.y + a.shift_y);
  float grad[kVec];
  VectorIo<T, kVec>::widen(
      VectorIo<T, kVec>::load(grad_output + channels.row + channels.begin), grad);
#pragma unroll 1
  for (; __any_sync(kAllLanes, taps != 0); taps &= taps - 1) {
    const bool has_tap = taps != 0;
    const int32_t k = has_tap ? __ffs(taps) - 1 : 0;
    const TapNumbers<float> tap = packed.load_tap(k, a.call.points);
    const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{}, tap, k);
    const uint32_t bits = has_tap ? corner_bits(sample.bilinear) : 0;
    const uint4 pixel = corner_pixels(a.call, sample.bilinear);
    float dot[4] = {};
    if (bits != 0) {
      const Place move = move_of_tap(a, k, tap.dx, tap.dy);
      gather_tap(!is_near(move, edge, reach), channels, pixel, sample_weights(sample), bits, grad,
                 dot);
    }
    BilinearGrad<float> sum = bilinear_grad(dot[0], dot[1], dot[2], dot[3], sample.bilinear.fx,
                                            sample.bilinear.fy);
    sum = {team_sum(sum.mask, team), team_sum(sum.x, team), team_sum(sum.y, team)};
    if (!has_tap || lane != 0) continue;
    const float scale = a.call.scale * sample.mask;
    grad_packed.store(bits ? scale * sum.x : 0.0f, 2 * k);
    grad_packed.store(bits ? scale * sum.y : 0.0f, 2 * k + 1);
    grad_packed.store(sum.mask, 2 * a.call.points + k);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    dcnv4_window_grad_rest_kernel(const WindowArguments a, int32_t reach,
                                  const T* __restrict__ grad_output,  // [N, Ho, Wo, G, D]
                                  const T* __restrict__ value,        // [N, H, W, G, D]
                                  const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                                  const uint64_t* __restrict__ rest,  // [rest_count]
                                  const uint64_t* __restrict__ rest_count,
                                  float* __restrict__ rest_sum, // [N, H, W, G, D]
                                  const OffsetGradients<T> grad_offset_mask) { // [N, Ho, Wo, P]
  const uint64_t count = *rest_count;
  const uint32_t lane = threadIdx.x % kWarp, rows_of_warp = kWarp >> a.call.team_log2;
  const uint64_t step = uint64_t(gridDim.x) * (kMaxThreads / kWarp) * rows_of_warp;
  uint64_t first =
      (uint64_t(blockIdx.x) * (kMaxThreads / kWarp) + threadIdx.x / kWarp) * rows_of_warp;
#pragma unroll 1
  for (; first < count; first += step) { // the same for all lanes of a warp
    const uint64_t index = first + (lane >> a.call.team_log2);
    add_row(a, reach, LeftOver(index < count ? rest[index] : 0), grad_output, value, offset_mask,
            rest_sum, grad_offset_mask);
  }
}

} // namespace cuda
} // namespace mmdcnv4
