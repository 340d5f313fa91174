// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_forward.inl — multi-scale deformable attention on the CPU.
//
// Computes    out[b,q,m,:] = sum_lk weight[b,q,m,l,k] * bilinear(value_l[b,:,:,m,:], x_lk, y_lk)
//             x_lk = location_x * width_l - 0.5, likewise y_lk
// Work split  per query, the coefficients of its samples at once, one lane per sample; then each
//             head is accumulated, one lane per channel
// Threads     queries
// Borders     a sample without a corner in its map is skipped: its pixel, even NaN, is never used
// Source      arXiv:2010.04159, eq. (3)
#pragma once

#include "kernel_scope.h"
#include "ms_deform_attn_samples.inl"
#include "vec.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Accumulates a strip of the channels of one head. Few vectors leave registers for one sum per
// corner, independent chains of additions; many vectors are chains enough.
template <int kLanes, int kVectors, typename T>
MMDCNV4_HD void gather_strip(const MsDeformAttnParams& p, const T* value, const T* weights,
                             SampleBlock<T>& block, int64_t first, T* output) {
  constexpr int kChains = kVectors >= 8 ? 1 : (kVectors >= 4 ? 2 : 4);
  Vec<T, kLanes> sum[kChains][kVectors] = {};
  const int64_t stride = p.heads * p.head_channels, count = p.samples();
  const int32_t* inside = block[Sample::kInside] + first;
  for (int64_t s = 0; s < count; ++s) {
    if (!inside[s]) continue;
    for (int c = 0; c < 4; ++c) {
      const T* from = value + block.pixel(c)[first + s] * stride;
      const T w = weights[s] * block.weight(c)[first + s];
      for (int v = 0; v < kVectors; ++v)
        sum[c % kChains][v].add_product(w, Vec<T, kLanes>::load(from + v * kLanes));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Vec<T, kLanes> total = sum[0][v];
    for (int c = 1; c < kChains; ++c) total = total + sum[c][v];
    total.store(output + v * kLanes);
  }
}

template <typename T>
void ms_deform_attn_forward(const MsDeformAttnParams& p, const T* value, const T* locations,
                            const T* weights, T* output, int64_t begin, int64_t end) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  SampleBlock<T> block(p, p.heads);
  for (int64_t query = begin; query < end; ++query) {
    const T* maps = value + query / p.queries * p.pixels * p.heads * p.head_channels;
    compute_samples<false>(locations + query * block.size * 2, block);
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t first = head * p.samples();
      const T* from = maps + head * p.head_channels;
      T* to = output + (query * p.heads + head) * p.head_channels;
      for_strips<kLanes, 8>(0, p.head_channels, [&](int64_t c, auto strip) MMDCNV4_INLINE {
        gather_strip<strip.kLanes, strip.kVectors>(
            p, from + c, weights + query * block.size + first, block, first, to + c);
      });
    }
  }
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
