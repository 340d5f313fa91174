// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// unit_gather.cuh — a unit of the tensor-core forward kernel without its product: where many
// samples lie outside the windows of their pixels, gathering all of them is cheaper.
//
// Work split  as in dcnv4_forward.cuh, but for 32 rows at once: lane = row while the coefficients
//             of its nine taps are written to the warp's area, then teams of lanes with 16 bytes
//             each sum them up for a row each, three taps at a time
// Memory      trained offsets seldom lead far: samples whose corners are among the tile's cells are
//             read there, only the others from global memory
#pragma once

#include "tap_place.cuh"
#include "window_numbers.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

// How the taps of a unit lie in its warp's area, [tap][row] of each: weights of the four corners,
// and a TapPlace, its corners above and its step apart.
struct GatherLayout {
  static constexpr uint32_t kTapBytes = 16 * kWarp, kCorners = kTaps * kTapBytes;
  static constexpr uint32_t kSteps = kCorners + kTaps * 8 * kWarp;
  static constexpr uint32_t kBytes = kSteps + kTaps * 4 * kWarp;
};

// Writes the taps of the lane's row.
template <typename T, int kDepth>
MMDCNV4_DEVICE void write_taps(const WindowArguments& a, const Tile& tile, uint32_t unit,
                               uint32_t lane, const RowNumbers& numbers, unsigned char* area) {
  using Window = DenseWindow<T, kDepth>;
  using Layout = GatherLayout;
  static_assert(Layout::kBytes <= Window::kAreaBytes, "the taps fit into the area");
  const Row row = Window::locate_row(a, tile, unit, lane);
  const uint32_t chunk = (uint32_t(row.group) - tile.first_group) * Window::kTeam;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    Four<float> weight{};
    TapPlace place = TapPlace::none();
    const Place moved =
        move_of_tap(a, k, numbers.offset[2 * k], numbers.offset[2 * k + 1]);
    const Bilinear<float> b =
        make_bilinear(float(row.x + a.shift_x) + moved.x, float(row.y + a.shift_y) + moved.y,
                      a.call.height, a.call.width);
    if (b.inside && row.is_valid && k < a.call.points) {
      weight = sample_weights(Sample<float>{b, numbers.mask[k]});
      place = TapPlace::make<Window>(a, tile, b, chunk);
    }
    enter_step(SharedPhase::kTaps);
    write_shared(area + k * Layout::kTapBytes + lane * 16, weight);
    write_shared(area + Layout::kCorners + k * (Layout::kTapBytes / 2) + lane * 8,
                 make_uint2(place.left, place.right));
    write_shared(area + Layout::kSteps + k * (Layout::kTapBytes / 4) + lane * 4, place.step);
  }
}

// Sums up the taps of a unit and writes its outputs.
template <typename T, int kDepth>
MMDCNV4_DEVICE void gather_unit(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                uint32_t lane, const T* __restrict__ value, T* __restrict__ output,
                                const unsigned char* area, const unsigned char* cells) {
  using Window = DenseWindow<T, kDepth>;
  using Layout = GatherLayout;
  using Io = VectorIo<T, kChunkNumbers<T>>;
  constexpr uint32_t kTeam = Window::kTeam;
  constexpr uint32_t kTogether = 3; // taps whose corners are under way at a time
  const uint32_t pitch = uint32_t(a.call.channels) * uint32_t(sizeof(T));
#pragma unroll 1
  for (uint32_t pass = 0; pass < kTeam; ++pass) {
    const uint32_t index = pass * (kWarp / kTeam) + lane / kTeam;
    const Row row = Window::locate_row(a, tile, unit, index);
    const uint32_t column = lane % kTeam * kChunkNumbers<T>;
    const uint32_t channel = uint32_t(row.is_valid ? row.group : 0) * kDepth + column;
    const char* from = reinterpret_cast<const char*>(value + channel);
    const uint32_t chunk = lane % kTeam * kChunkBytes;
    const unsigned char* taps = area + index * 4;
    float sum[kChunkNumbers<T>] = {};
#pragma unroll 1
    for (uint32_t first = 0; first < kTaps; first += kTogether) {
      uint4 corner[kTogether][4];
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) {
        enter_step(SharedPhase::kFar);
        const uint32_t step = read_shared<uint32_t>(
            taps + Layout::kSteps + (first + i) * (Layout::kTapBytes / 4));
        const uint2 above = read_shared<uint2>(
            taps + index * 4 + Layout::kCorners + (first + i) * (Layout::kTapBytes / 2));
        TapPlace place{above.x, above.y, step};
        if (!place.exists()) {
#pragma unroll
          for (int c = 0; c < 4; ++c) corner[i][c] = make_uint4(0, 0, 0, 0);
        } else if (place.is_cell()) {
          place.left ^= chunk; // from the first chunk of the group to the lane's
          place.right ^= chunk;
#pragma unroll
          for (int c = 0; c < 4; ++c) corner[i][c] = read_shared<uint4>(cells + place.cell(c));
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c)
            corner[i][c] = Io::load(from + uint64_t(place.pixel(c)) * pitch);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) {
        enter_step(SharedPhase::kFar);
        const auto weights =
            read_shared<Four<float>>(taps + index * 12 + (first + i) * Layout::kTapBytes);
        const float weight[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float number[kChunkNumbers<T>];
          Io::widen(corner[i][c], number);
#pragma unroll
          for (int j = 0; j < int(kChunkNumbers<T>); ++j) sum[j] += weight[c] * number[j];
        }
      }
    }
    if (row.is_valid)
      Io::store(sum, reinterpret_cast<T*>(reinterpret_cast<char*>(output + channel) +
                                          uint64_t(pixel_of(a, row)) * pitch));
  }
}

} // namespace cuda
} // namespace mmdcnv4
