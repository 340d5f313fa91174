// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_backward.inl — the gradients of multi-scale deformable attention on the CPU.
//
// Work split  as in ms_deform_attn_forward.inl
// Threads     (sample of the batch, head), each with its own slice of grad_value: no atomics, and
//             sums of one fixed order
// Borders, source: as in ms_deform_attn_forward.inl; derivatives are right-sided on the integers
#pragma once

#include "kernel_scope.h"
#include "ms_deform_attn_samples.inl"
#include "vec.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Scatters a strip of the channels of one head; adds to `dots`, <grad_output, corner>, four per
// sample.
template <int kLanes, int kVectors, typename T>
MMDCNV4_HD void scatter_strip(const MsDeformAttnParams& p, const T* grad_output, const T* value,
                              T* grad_value, const T* weights, SampleBlock<T>& block, T* dots) {
  Vec<T, kLanes> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) grad[v] = Vec<T, kLanes>::load(grad_output + v * kLanes);
  const int64_t stride = p.heads * p.head_channels, count = p.samples();
  for (int64_t s = 0; s < count; ++s) {
    if (!block[Sample::kInside][s]) continue;
    for (int c = 0; c < 4; ++c) {
      if (!block.has(c)[s]) continue;
      const int64_t offset = block.pixel(c)[s] * stride;
      const T w = weights[s] * block.weight(c)[s];
      Vec<T, kLanes> dot = grad[0] * Vec<T, kLanes>::load(value + offset);
      for (int v = 1; v < kVectors; ++v)
        dot = dot + grad[v] * Vec<T, kLanes>::load(value + offset + v * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        T* to = grad_value + offset + v * kLanes;
        Vec<T, kLanes> sum = Vec<T, kLanes>::load(to);
        sum.add_product(w, grad[v]);
        sum.store(to);
      }
      dots[4 * s + c] += dot.sum();
    }
  }
}

// Gradients of locations and weights of one query and head from the dot products of its samples.
template <typename T>
MMDCNV4_HD void write_sample_grads(const T* dots, const T* weights, SampleBlock<T>& block,
                                   T* grad_locations, T* grad_weights) {
  for (int64_t s = 0; s < block.size; ++s) {
    const BilinearGrad<T> grad =
        bilinear_grad(dots[4 * s], dots[4 * s + 1], dots[4 * s + 2], dots[4 * s + 3],
                      block[Sample::kFractionX][s], block[Sample::kFractionY][s]);
    const bool inside = block[Sample::kInside][s] != 0;
    grad_locations[2 * s] = inside ? T(block[Sample::kWidth][s]) * weights[s] * grad.x : T(0);
    grad_locations[2 * s + 1] = inside ? T(block[Sample::kHeight][s]) * weights[s] * grad.y : T(0);
    grad_weights[s] = inside ? grad.mask : T(0);
  }
}

template <typename T>
void ms_deform_attn_backward(const MsDeformAttnParams& p, const T* grad_output, const T* value,
                             const T* locations, const T* weights, T* grad_value,
                             T* grad_locations, T* grad_weights, int64_t sample, int64_t head) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  SampleBlock<T> block(p, 1);
  T* dots = static_cast<T*>(std::calloc(4 * block.size, sizeof(T)));
  if (dots == nullptr) throw std::bad_alloc();
  const int64_t stride = p.heads * p.head_channels;
  const int64_t maps = sample * p.pixels * stride + head * p.head_channels;
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel)
    std::memset(grad_value + maps + pixel * stride, 0, p.head_channels * sizeof(T));
  for (int64_t query = sample * p.queries; query < (sample + 1) * p.queries; ++query) {
    const int64_t row = query * p.heads + head, first = row * block.size;
    std::memset(dots, 0, 4 * block.size * sizeof(T));
    compute_samples<true>(locations + first * 2, block);
    for_strips<kLanes, 4>(0, p.head_channels, [&](int64_t c, auto strip) MMDCNV4_INLINE {
      scatter_strip<strip.kLanes, strip.kVectors>(p, grad_output + row * p.head_channels + c,
                                                  value + maps + c, grad_value + maps + c,
                                                  weights + first, block, dots);
    });
    write_sample_grads(dots, weights + first, block, grad_locations + first * 2,
                       grad_weights + first);
  }
  std::free(dots);
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
