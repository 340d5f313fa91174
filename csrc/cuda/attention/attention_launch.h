// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_launch.h — the entries of the kernels of multi-scale deformable attention, on plain
// pointers. Each type of value is compiled in a file of its own. No torch headers.
#pragma once

#include "../offset_numbers.cuh"
#include "attention_plan.h"

namespace mmdcnv4 {
namespace cuda {

// locations and weights have the type of value, or float32 beside a half type, each by itself.
template <typename T>
void launch_attention_forward(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                              const T* value,                    // [B, S, M, D]
                              const OffsetNumbers<T>& locations, // [B, Q, M, L, K, 2]
                              const OffsetNumbers<T>& weights,   // [B, Q, M, L, K]
                              T* output);                        // [B, Q, M, D], written whole

// The backward pass of some images. A sample is numbered ((b * Q + q) * M + m) * L * K + l * K + k,
// a cell ((b * M + m) * S + pixel), the pixel being the first of the four (the only one, at a
// border) that a sample lies between.
template <typename T>
struct AttentionBackward {
  const T* grad_output; // [B, Q, M, D]
  const T* value;
  OffsetNumbers<T> locations, weights;
  OffsetGradients<T> grad_locations, grad_weights; // written whole

  // The call from an image on.
  AttentionBackward from(const MsDeformAttnParams& p, int64_t image) const {
    const int64_t row = image * p.queries * p.heads, sample = row * p.samples();
    return {grad_output + row * p.head_channels,
            value + image * p.pixels * p.channels(),
            locations.from(2 * sample),
            weights.from(sample),
            grad_locations.from(2 * sample),
            grad_weights.from(sample)};
  }
};

constexpr uint32_t kNoCell = INT32_MAX; // of a sample outside its map

// Without an order of their own: counts[cell], zero before, are the samples of a cell, and
// ranks[sample] tells which of them a sample is.
template <typename T>
void launch_attention_rank(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                           const OffsetNumbers<T>& locations, uint32_t* counts, uint32_t* ranks);
// order[ends[cell] - 1 - rank] = sample, where ends is the sum over counts up to a cell; writes the
// gradients of samples outside, which are zero.
template <typename T>
void launch_attention_place(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                            const AttentionBackward<T>& call, const uint32_t* ends,
                            const uint32_t* ranks, uint32_t* order);
// For another sort: cells[sample], or kNoCell.
template <typename T>
void launch_attention_cells(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                            const OffsetNumbers<T>& locations, uint32_t* cells);

// All gradients of the samples in `order`, which are sorted by cell. `count`, on the device: how
// many there are; null: all of the call.
template <typename T>
void launch_attention_backward(const MsDeformAttnParams& p, const AttentionPlan& plan,
                               Stream stream, const AttentionBackward<T>& call,
                               const uint32_t* order, const uint32_t* count,
                               const FloatSum<wide_t<T>>& grad_value); // [B, S, M, D], added to
// The same, bitwise repeatable if the order is; for plans of vector width 1.
template <typename T>
void launch_attention_backward(const MsDeformAttnParams& p, const AttentionPlan& plan,
                               Stream stream, const AttentionBackward<T>& call,
                               const uint32_t* order, const uint32_t* count,
                               const FixedSum<wide_t<T>>& grad_value);

// Bits that one addition to an element of grad_value may have in fixed point, so that 63 hold the
// sum: each sample adds to it at most once.
inline int32_t fixed_sum_bits(const MsDeformAttnParams& p) {
  int32_t bits = 62;
  for (int64_t most = p.queries * p.samples(); most > 1; most = (most + 1) / 2) --bits;
  return bits;
}

} // namespace cuda
} // namespace mmdcnv4
