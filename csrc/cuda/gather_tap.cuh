// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// gather_tap.cuh — dot products of the gradient of a row's output with the corners of a sample,
// from which follow the gradients of offsets and masks; a team of threads shares the channels.
#pragma once

#include "sampling.cuh"

namespace mmdcnv4 {
namespace cuda {

// The channels of a row, as one thread of its team sees them.
template <typename T>
struct Channels {
  const T* grad_output;
  const T* value;
  int64_t row;              // offset of the row in grad_output
  int64_t image;            // offset of the row's group in its image in value and grad_value
  uint32_t stride;          // channels of a pixel
  int32_t begin, end, step; // begin: first channel of this thread

  MMDCNV4_DEVICE int64_t offset(uint32_t pixel, int32_t channel) const {
    return image + int64_t(uint64_t(pixel) * stride) + channel;
  }
};

// dot[c] += <grad_output, corner c>, over the channels of this thread; `bits`: corners that exist.
// For each of them then calls add(corner, its pixel, first channel). `grad` holds the first
// channels of grad_output.
template <typename T, int kVec, typename Add>
MMDCNV4_DEVICE void gather_tap(const Channels<T>& channels, const uint4& pixel, uint32_t bits,
                               wide_t<T> (&grad)[kVec], wide_t<T> (&dot)[4], const Add& add) {
  using Io = VectorIo<T, kVec>;
  const uint32_t from[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll 1
  for (int32_t channel = channels.begin; channel < channels.end; channel += channels.step) {
    if (channels.step < channels.end)
      Io::widen(Io::load(channels.grad_output + channels.row + channel), grad);
    // two corners at a time: four would need more registers than three blocks per processor leave
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
      const typename Io::Raw corner[2] = {
          Io::load(channels.value + channels.offset(from[pair], channel)),
          Io::load(channels.value + channels.offset(from[pair + 1], channel))};
#pragma unroll
      for (int c = pair; c < pair + 2; ++c) {
        if (!(bits >> c & 1)) continue;
        wide_t<T> number[kVec];
        Io::widen(corner[c - pair], number);
#pragma unroll
        for (int i = 0; i < kVec; ++i) dot[c] += grad[i] * number[i];
        add(c, from[c], channel);
      }
    }
  }
}

} // namespace cuda
} // namespace mmdcnv4
