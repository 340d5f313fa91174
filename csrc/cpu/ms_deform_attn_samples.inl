// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_samples.inl — from locations to the coefficients of the samples of a query: which
// pixels of which map, with which weights. One lane per sample; no channel is touched here.
#pragma once

#include "kernel_scope.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Arrays of a SampleBlock, one number per lane. Width, height and start are written by the
// constructor, the others by compute_samples; fraction and has by that of the backward pass alone.
struct Sample {
  enum Array : int {
    kWeight00, // bilinear weight of the corners (y0 x0), (y0 x1), (y1 x0), (y1 x1)
    kWeight01,
    kWeight10,
    kWeight11,
    kFractionX, // position minus its floor
    kFractionY,
    kArrays
  };
  enum Integers : int {
    kWidth, // of the map of the sample's level
    kHeight,
    kStart,   // its first pixel
    kInside,  // whether any corner exists
    kPixel00, // number of the corner's pixel
    kPixel01,
    kPixel10,
    kPixel11,
    kHas00, // whether the corner exists
    kHas01,
    kHas10,
    kHas11,
    kIntegers
  };
};

// Coefficients of the samples of one query and some of its heads, one lane per sample.
template <typename T>
class SampleBlock {
 public:
  const int64_t size; // lanes

  SampleBlock(const MsDeformAttnParams& p, int64_t heads)
      : size(heads * p.samples()), memory_(std::calloc(size * kBytesPerLane + kAlignment, 1)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto start = (reinterpret_cast<uintptr_t>(memory_) + kAlignment - 1) & -kAlignment;
    numbers_ = reinterpret_cast<T*>(start);
    integers_ = reinterpret_cast<int32_t*>(numbers_ + Sample::kArrays * size);
    for (int64_t s = 0; s < size; ++s) {
      const int64_t level = s / p.points % p.levels;
      (*this)[Sample::kWidth][s] = p.widths[level];
      (*this)[Sample::kHeight][s] = p.heights[level];
      (*this)[Sample::kStart][s] = p.starts[level];
    }
  }
  SampleBlock(const SampleBlock&) = delete;
  SampleBlock& operator=(const SampleBlock&) = delete;
  ~SampleBlock() { std::free(memory_); }

  T* operator[](Sample::Array array) { return numbers_ + array * size; }
  int32_t* operator[](Sample::Integers array) { return integers_ + array * size; }
  T* weight(int corner) { return numbers_ + (Sample::kWeight00 + corner) * size; }
  int32_t* pixel(int corner) { return integers_ + (Sample::kPixel00 + corner) * size; }
  int32_t* has(int corner) { return integers_ + (Sample::kHas00 + corner) * size; }

 private:
  static constexpr int64_t kBytesPerLane =
      Sample::kArrays * sizeof(T) + Sample::kIntegers * sizeof(int32_t);
  static constexpr uintptr_t kAlignment = 64;

  void* memory_;
  T* numbers_;
  int32_t* integers_;
};

// Locations -> corner pixels and weights, for all lanes at once (this loop is vectorised).
template <bool kBackward, typename T>
void compute_samples(const T* locations, SampleBlock<T>& block) {
  const int32_t *width = block[Sample::kWidth], *height = block[Sample::kHeight];
  const int32_t* start = block[Sample::kStart];
  T *w00 = block.weight(0), *w01 = block.weight(1), *w10 = block.weight(2), *w11 = block.weight(3);
  T *fx = block[Sample::kFractionX], *fy = block[Sample::kFractionY];
  int32_t *p00 = block.pixel(0), *p01 = block.pixel(1), *p10 = block.pixel(2),
          *p11 = block.pixel(3), *inside = block[Sample::kInside];
  int32_t *h00 = block.has(0), *h01 = block.has(1), *h10 = block.has(2), *h11 = block.has(3);
  const int64_t size = block.size;
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    const Bilinear<T> b =
        make_bilinear(locations[2 * s] * T(width[s]) - T(0.5),
                      locations[2 * s + 1] * T(height[s]) - T(0.5), height[s], width[s]);
    const CornerWeights<T> w = corner_weights(T(1), b.wx0, b.wx1, b.wy0, b.wy1);
    w00[s] = w.w00;
    w01[s] = w.w01;
    w10[s] = w.w10;
    w11[s] = w.w11;
    const int32_t top = start[s] + b.y0 * width[s], bottom = start[s] + b.y1 * width[s];
    p00[s] = top + b.x0;
    p01[s] = top + b.x1;
    p10[s] = bottom + b.x0;
    p11[s] = bottom + b.x1;
    inside[s] = b.inside;
    if (kBackward) {
      fx[s] = b.fx;
      fy[s] = b.fy;
      h00[s] = b.has_x0 & b.has_y0;
      h01[s] = b.has_x1 & b.has_y0;
      h10[s] = b.has_x0 & b.has_y1;
      h11[s] = b.has_x1 & b.has_y1;
    }
  }
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
