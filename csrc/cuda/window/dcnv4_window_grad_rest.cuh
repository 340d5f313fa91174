// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_grad_rest.cuh — the gradient of value of far taps whose list is full: see
// far_lists.cuh. Two kernels that return at once where there is none.
//
// Work split  clear: warp = list; rest: team of threads with 16 bytes each = a row, its taps
// Memory      the memory of a full list is cleared, then the taps that would be in it are added
//             there, in float32
// Numerics    as dcnv4_backward.cuh: the order of additions is not fixed
#pragma once

#include "../dispatch.h"
#include "../launch.h"
#include "../sampling.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

// T: as many bytes as a thread clears at a time.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    dcnv4_window_clear_kernel(uint64_t count, const FarLists lists) { // of lists
  if (*lists.has_full == 0) return;
  const uint32_t lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (uint64_t list = uint64_t(blockIdx.x) * warps + threadIdx.x / kWarp; list < count;
       list += uint64_t(gridDim.x) * warps) {
    if (!lists.is_full(list)) continue;
    T* numbers = reinterpret_cast<T*>(lists.sums(list));
    for (uint32_t i = lane; i < lists.room * sizeof(float) / sizeof(T); i += kWarp)
      numbers[i] = T{};
  }
}

// `reach` is kReach: as a constant in here it would compile to other code than ran on GPUs.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    dcnv4_window_grad_rest_kernel(const WindowArguments a, int32_t reach, uint64_t rows,
                                  const T* __restrict__ grad_output,  // [N, Ho, Wo, G, D]
                                  const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                                  const FarLists lists) {
  constexpr int kVec = kChunkNumbers<T>;
  if (*lists.has_full == 0) return;
  const int32_t lane = int32_t(threadIdx.x) & ((1 << a.call.team_log2) - 1);
  const uint64_t teams = uint64_t(gridDim.x) * kMaxThreads >> a.call.team_log2;
  // rows are numbered as they lie in memory
  for (uint64_t number = (uint64_t(blockIdx.x) * kMaxThreads + threadIdx.x) >> a.call.team_log2;
       number < rows; number += teams) {
    const uint64_t query = number / uint32_t(a.call.groups);
    const uint64_t line = query / uint32_t(a.call.out_width);
    Row row{};
    row.group = int32_t(number - query * uint32_t(a.call.groups));
    row.x = int32_t(query - line * uint32_t(a.call.out_width));
    row.image = uint32_t(line / uint32_t(a.call.out_height));
    row.y = int32_t(line - uint64_t(row.image) * uint32_t(a.call.out_height));
    const OffsetNumbers<T> packed = offset_mask.from(
        int64_t(query * a.packed_channels + uint32_t(row.group) * uint32_t(3 * a.call.points)));
    const Place edge = edge_of_image(row.x + a.shift_x, row.y + a.shift_y);
    float grad[kVec];
    VectorIo<T, kVec>::widen(
        VectorIo<T, kVec>::load(grad_output + number * uint32_t(a.call.group_channels) +
                                lane * kVec),
        grad);
#pragma unroll 1
    for (int32_t k = 0; k < a.call.points; ++k) {
      const TapNumbers<float> tap = packed.load_tap(k, a.call.points);
      if (is_near(move_of_tap(a, k, tap.dx, tap.dy), edge, reach)) continue;
      const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{}, tap, k);
      const uint32_t bits = corner_bits(sample.bilinear);
      const Four<float> weights = sample_weights(sample);
      const float weight[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(bits >> c & 1)) continue;
        const uint32_t x = uint32_t(c % 2 ? sample.bilinear.x1 : sample.bilinear.x0);
        const uint32_t y = uint32_t(c / 2 ? sample.bilinear.y1 : sample.bilinear.y0);
        const uint64_t list =
            lists.list_of(row.image, x / kBlockSide, y / kBlockSide, uint32_t(row.group));
        if (!lists.is_full(list)) continue;
        float part[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) part[i] = weight[c] * grad[i];
        const uint32_t cell = y % kBlockSide * kBlockSide + x % kBlockSide;
        reduce_add_vector<kVec>(
            lists.sums(list) + cell * uint32_t(a.call.group_channels) + lane * kVec, part);
      }
    }
  }
}

} // namespace cuda
} // namespace mmdcnv4
