// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// window_taps.cuh — where the taps of the tensor-core kernels sample, seen from their pixels, and
// which of them the gradient kernels take themselves: all three must agree on that to the last bit.
#pragma once

#include "dense_window.cuh"

namespace mmdcnv4 {
namespace cuda {

struct Place {
  float x, y;
};

// From a pixel at rest to the sample of its tap k; with a constant k all but the offset is, too.
MMDCNV4_DEVICE Place move_of_tap(const WindowArguments& a, int k, float dx, float dy) {
  // taps go column by column; without the middle one, those after it have moved up
  const bool is_ring = a.call.points < 9;
  const int next = k < 4 ? k : k + 1;
  const float tap_x = float((is_ring ? next : k) / 3 - 1);
  const float tap_y = float((is_ring ? next : k) % 3 - 1);
  return {(tap_x + dx) * a.call.scale, (tap_y + dy) * a.call.scale};
}

// Column and line -1 of the image, seen from a pixel that rests at (x, y): a sample exactly there
// is outside the image, though cells to its right or below it are not.
MMDCNV4_DEVICE Place edge_of_image(int32_t x, int32_t y) { return {float(-1 - x), float(-1 - y)}; }

// Such a sample has no value, and its gradients are zero: whatever its taps are, they are done.
MMDCNV4_DEVICE bool is_on_edge(const Place& move, const Place& edge) {
  return (move.x == edge.x) | (move.y == edge.y);
}

// Whether the four cells of a sample are within reach of its pixel.
MMDCNV4_DEVICE bool is_near(const Place& move, const Place& edge, int reach) {
  const float far = float(reach);
  return (move.x >= -far) & (move.x < far) & (move.y >= -far) & (move.y < far) & // not so for NaN
         !is_on_edge(move, edge);
}

// Cell of a sample that is near, counted from its pixel, and its place between the cells.
struct NearSample {
  int32_t column, line;
  float fx, fy;
};
MMDCNV4_DEVICE NearSample near_sample(const Place& move) {
  const float column = floorf(move.x), line = floorf(move.y);
  return {int32_t(column), int32_t(line), move.x - column, move.y - line};
}

} // namespace cuda
} // namespace mmdcnv4
