// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_samples.cuh — where a sample of multi-scale deformable attention lies.
#pragma once

#include "../sampling.cuh"
#include "attention_launch.h"

namespace mmdcnv4 {
namespace cuda {

// Sample `k` of the row whose locations begin at `locations`; `level` is that of the sample.
template <typename V>
MMDCNV4_DEVICE Bilinear<wide_t<V>> locate_sample(const Level& level,
                                                 const OffsetNumbers<V>& locations, int32_t k) {
  using T = wide_t<V>;
  const T x = locations.load(2 * k) * T(level.width) - T(0.5);
  const T y = locations.load(2 * k + 1) * T(level.height) - T(0.5);
  return make_bilinear(x, y, level.height, level.width);
}

// Number of the level of sample `k` of a row.
MMDCNV4_DEVICE uint32_t level_of(const AttentionArguments& a, uint32_t k) {
  return a.by_points.split(k);
}

// A sample by its number among those of a launch.
struct SampleIndex {
  uint32_t row, k; // row: (b * Q + q) * M + m

  static MMDCNV4_DEVICE SampleIndex of(const AttentionArguments& a, uint32_t sample) {
    const uint32_t row = a.by_samples.split(sample);
    return {row, sample};
  }
};

// Number of the cell of a sample that is inside its map.
template <typename T>
MMDCNV4_DEVICE uint32_t cell_of(const AttentionArguments& a, const Level& level, uint32_t row,
                                const Bilinear<T>& b) {
  uint32_t query = row;
  query = a.by_heads.split(row); // leaves the head in `row`
  const uint32_t image = a.by_queries.split(query);
  const uint32_t pixel = uint32_t(level.start) + uint32_t(b.y0) * uint32_t(level.width) +
                         uint32_t(b.x0);
  return (image * uint32_t(a.heads) + row) * a.pixels + pixel;
}

} // namespace cuda
} // namespace mmdcnv4
