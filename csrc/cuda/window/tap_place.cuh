// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// tap_place.cuh — where the corners of a sample are, in 12 bytes: among the cells of the tile,
// which are in shared memory, or in the image.
#pragma once

#include "dense_window.cuh"
#include "../sampling.cuh"

namespace mmdcnv4 {
namespace cuda {

struct TapPlace {
  // Corners left and right above: numbers of pixels; of cells, bytes from the first cell to the
  // chunk that begins a group's channels.
  uint32_t left, right;
  // From there to those below, 0 if that is the same line. kIsCell is set for cells, and kSwap
  // where the order of their chunks changes by a line, see DenseWindow::chunk_at(); kNone: no
  // corner.
  uint32_t step;
  static constexpr uint32_t kIsCell = 1u << 31, kSwap = 4 * kChunkBytes, kNone = 0xffffffffu;

  static MMDCNV4_HD TapPlace none() { return {0, 0, kNone}; }

  // Of a sample that has corners, which are clamped into the image; `chunk`: of a cell, where its
  // group begins.
  template <typename Layout>
  static MMDCNV4_DEVICE TapPlace make(const WindowArguments& a, const Tile& tile,
                                      const Bilinear<float>& b, uint32_t chunk) {
    const uint32_t x = uint32_t(b.x0) - (tile.x + uint32_t(a.shift_x) - kReach); // of the cells
    const uint32_t y = uint32_t(b.y0) - (tile.y + uint32_t(a.shift_y) - kReach);
    const uint32_t across = uint32_t(b.x1 - b.x0); // 0 or 1
    if (x < a.cells_w - 1 && y < (1u << a.tile_h_log2) + 2 * kReach - 1)
      return {Layout::chunk_at(x, y, a.cells_w, chunk),
              Layout::chunk_at(x + across, y, a.cells_w, chunk),
              kIsCell | (b.y1 != b.y0 ? a.cells_w * kCellBytes | kSwap : 0)};
    const uint32_t pixel = uint32_t(b.y0) * uint32_t(a.call.width) + uint32_t(b.x0);
    return {pixel, pixel + across, b.y1 != b.y0 ? uint32_t(a.call.width) : 0};
  }

  MMDCNV4_HD bool exists() const { return step != kNone; }
  MMDCNV4_HD bool is_cell() const { return exists() && (step & kIsCell) != 0; }
  // Corner 0 ... 3: left and right above, left and right below.
  MMDCNV4_HD uint32_t pixel(uint32_t corner) const {
    return (corner % 2 != 0 ? right : left) + (corner / 2 != 0 ? step : 0);
  }
  MMDCNV4_HD uint32_t cell(uint32_t corner) const {
    const uint32_t above = corner % 2 != 0 ? right : left;
    return corner / 2 != 0 ? (above ^ (step & kSwap)) + (step & ~(kIsCell | kSwap)) : above;
  }

  MMDCNV4_DEVICE TapPlace of_lane(uint32_t lane) const {
    const auto from = [&](uint32_t number) { return __shfl_sync(kAllLanes, number, int(lane)); };
    return {from(left), from(right), from(step)};
  }
};

} // namespace cuda
} // namespace mmdcnv4
