// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_backward.inl — the gradients of DCNv4 on the CPU.
//
// Computes    grad_value += mask * weight * grad_output at the corners of every tap; the gradients
//             of mask and offset from the dot products of grad_output with the corners
// Work split  as in dcnv4_forward.inl
// Threads     (image, groups), each with its own slice of grad_value, so that no atomics are needed
//             and the sums have one fixed order
// Numerics, borders, source: as in dcnv4_forward.inl; derivatives are right-sided on the integers
#pragma once

#include "dcnv4_taps.inl"
#include "kernel_scope.h"
#include "vec.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Scatters a strip of the channels of one row and adds to the dot products of its taps.
template <int kPoints, int kLanes, int kVectors, bool kInterior, typename T, typename Index>
MMDCNV4_HD void scatter_strip(const T* grad_output, const T* image, T* grad_image,
                              Steps<Index> whole, TapBlock<T, Index>& taps, int64_t first) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  Vec<T, kLanes> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) grad[v] = Vec<T, kLanes>::load(grad_output + v * kLanes);
  for (int64_t k = 0; k < points; ++k) {
    const int32_t corners = taps.corners()[first + k];
    if (!kInterior && !exists(corners)) continue;
    const Steps<Index> step = kInterior ? whole : whole.between(corners);
    for (int c = 0; c < 4; ++c) {
      const int32_t needed = (c & 1 ? kHasX1 : kHasX0) | (c & 2 ? kHasY1 : kHasY0);
      if (!kInterior && (corners & needed) != needed) continue;
      const Index offset = taps.start()[first + k] + step.to(c);
      const T w = taps.weight(c)[first + k];
      Vec<T, kLanes> dot = grad[0] * Vec<T, kLanes>::load(image + offset);
      for (int v = 1; v < kVectors; ++v)
        dot = dot + grad[v] * Vec<T, kLanes>::load(image + offset + v * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        T* to = grad_image + offset + v * kLanes;
        Vec<T, kLanes> sum = Vec<T, kLanes>::load(to);
        sum.add_product(w, grad[v]);
        sum.store(to);
      }
      taps.dot(c)[first + k] += dot.sum();
    }
  }
}

// Writes the gradients of offsets and masks of one row from the dot products of its taps.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD void write_grad_offset_mask(const Dcnv4Params& p, TapBlock<T, Index>& taps,
                                       int64_t first, T* to) {
  const int64_t points = kPoints > 0 ? kPoints : p.points();
  const T scale = T(p.offset_scale);
  T expected = 0; // sum_j m_j h_j, for the softmax
  for (int64_t k = 0; k < points; ++k) {
    const int64_t s = first + k;
    const BilinearGrad<T> grad =
        bilinear_grad(taps.dot(0)[s], taps.dot(1)[s], taps.dot(2)[s], taps.dot(3)[s],
                      taps[Tap::kFractionX][s], taps[Tap::kFractionY][s]);
    const bool inside = exists(taps.corners()[s]);
    const T mask = taps[Tap::kMask][s];
    to[2 * k] = inside ? scale * mask * grad.x : T(0);
    to[2 * k + 1] = inside ? scale * mask * grad.y : T(0);
    to[2 * points + k] = inside ? grad.mask : T(0);
    if (inside) expected += mask * grad.mask;
  }
  if (!p.softmax) return;
  for (int64_t k = 0; k < points; ++k)
    to[2 * points + k] = taps[Tap::kMask][first + k] * (to[2 * points + k] - expected);
}

template <typename T>
void clear_channels(const Dcnv4Params& p, T* image, int64_t count) {
  for (int64_t pixel = 0; pixel < p.height * p.width; ++pixel)
    std::memset(image + pixel * p.channels(), 0, count * sizeof(T));
}

// The gradients of `positions` neighbouring outputs of one line, for the groups of one TapBlock.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD void backward_block(const Dcnv4Params& p, const T* grad_output, const T* pixels,
                               T* grad_pixels, T* grad_offset_mask, int64_t positions,
                               int64_t first, int64_t groups, TapBlock<T, Index>& taps) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  const Steps<Index> whole = steps_of<Index>(p);
  taps.clear_dots();
  for (int64_t i = 0; i < positions; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = (first + g) * p.group_channels, lane = taps.lane(i, g);
      const T* grad = grad_output + i * p.channels() + start;
      const bool interior = is_interior<kPoints>(taps, lane);
      for_strips<kLanes, 4>(0, p.group_channels, [&](int64_t c, auto strip) MMDCNV4_INLINE {
        constexpr int kWidth = strip.kLanes, kVectors = strip.kVectors;
        const T* from = pixels + start + c;
        T* to = grad_pixels + start + c;
        if (interior) {
          scatter_strip<kPoints, kWidth, kVectors, true>(grad + c, from, to, whole, taps, lane);
        } else {
          scatter_strip<kPoints, kWidth, kVectors, false>(grad + c, from, to, whole, taps, lane);
        }
      });
      write_grad_offset_mask<kPoints>(p, taps, lane, grad_offset_mask +
                                      i * p.offset_mask_channels + (first + g) * 3 * taps.points);
    }
  }
}

// Prefetches for the groups of one thread what a block of outputs on the next line reads and
// writes; the pointers are those of the block on this line.
template <typename T>
MMDCNV4_INLINE inline void prefetch_next_line(const Dcnv4Params& p, const T* grad, const T* packed,
                                              const T* grad_packed, int64_t positions,
                                              int64_t group_begin, int64_t group_end) {
  const int64_t channels = (group_end - group_begin) * p.group_channels;
  const int64_t numbers = (group_end - group_begin) * 3 * p.points();
  for (int64_t i = p.out_width; i < p.out_width + positions; ++i) {
    const int64_t first = i * p.offset_mask_channels + group_begin * 3 * p.points();
    prefetch<false>(grad + i * p.channels() + group_begin * p.group_channels, channels);
    prefetch<false>(packed + first, numbers);
    prefetch<true>(grad_packed + first, numbers);
  }
}

template <int kPoints, typename T, typename Index>
void backward_groups(const Dcnv4Params& p, const T* grad_output, const T* value,
                     const T* offset_mask, T* grad_value, T* grad_offset_mask, int64_t image,
                     int64_t group_begin, int64_t group_end) {
  TapBlock<T, Index> taps(p, group_end - group_begin, p.out_width);
  const int64_t image_size = p.height * p.width * p.channels();
  const int64_t packed = 3 * taps.points, used = p.groups * packed;
  const int64_t channel = group_begin * p.group_channels;
  const int64_t channels = (group_end - group_begin) * p.group_channels;
  const T* pixels = value + image * image_size;
  T* grad_pixels = grad_value + image * image_size;
  clear_channels(p, grad_pixels + channel, channels);
  for (int64_t line = 0; line < p.out_height; ++line) {
    const T base_y = center_y<T>(p, line);
    for (int64_t column = 0; column < p.out_width; column += taps.positions) {
      const int64_t positions = smaller(taps.positions, p.out_width - column);
      const int64_t query = (image * p.out_height + line) * p.out_width + column;
      const T base_x = center_x<T>(p, column);
      const T* grad = grad_output + query * p.channels();
      const T* from = offset_mask + query * p.offset_mask_channels;
      T* to = grad_offset_mask + query * p.offset_mask_channels;
      prefetch_below<false>(p, pixels + channel, line, column, positions, channels);
      prefetch_below<true>(p, grad_pixels + channel, line, column, positions, channels);
      if (line + 1 < p.out_height)
        prefetch_next_line(p, grad, from, to, positions, group_begin, group_end);
      for (int64_t first = group_begin; first < group_end; first += taps.groups) {
        const int64_t groups = smaller(taps.groups, group_end - first);
        for (int64_t i = 0; i < positions; ++i)
          unpack<kPoints>(p, from + i * p.offset_mask_channels + first * packed, i, groups, taps);
        compute_taps<true>(p, base_x, base_y, taps);
        backward_block<kPoints>(p, grad, pixels, grad_pixels, to, positions, first, groups, taps);
      }
      for (int64_t i = 0; i < positions && group_end == p.groups; ++i)
        std::memset(to + i * p.offset_mask_channels + used, 0,
                    (p.offset_mask_channels - used) * sizeof(T));
    }
  }
}

template <typename T>
void dcnv4_backward(const Dcnv4Params& p, const T* grad_output, const T* value,
                    const T* offset_mask, T* grad_value, T* grad_offset_mask, int64_t image,
                    int64_t group_begin, int64_t group_end) {
  with_index_and_points(p, [&](auto index, auto points) {
    backward_groups<points.kCount, T, decltype(index)>(p, grad_output, value, offset_mask,
                                                       grad_value, grad_offset_mask, image,
                                                       group_begin, group_end);
  });
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
