// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// far_taps.cuh — samples of the tensor-core forward kernel that lie outside the window of their
// pixel: four of them make one more step of its product, in float32 two half a step.
//
//     far taps of a unit      row 3: tap 0   row 9: tap 6   row 17: tap 2   row 30: taps 0 and 2
//     first layer, a round    cells 0 ... 3  cells 4 ... 7  cells 8 ... 11  cells 12 ... 15: tap 2
//     second layer, a round                                                 cells 0 ... 3: tap 0
//
// The four cells of a tap are the corners of its sample: left and right above, then below.
#pragma once

#include "fragments.cuh"
#include "tap_place.cuh"
#include "window_numbers.cuh"

namespace mmdcnv4 {
namespace cuda {

// Taps of a row outside its window that are still to be added, as bits; the numbers of the last of
// them, the mask scaled.
struct FarTaps {
  uint32_t bits;
  TapNumbers<float> last;
};

// Pointers of one image.
template <typename T>
struct Image {
  const T* value;          // [H, W, G, D]
  OffsetNumbers<T> packed; // [Ho, Wo, P]
  T* output;               // [Ho, Wo, G, D]
};

// Those of offset_mask for a row.
template <typename T>
MMDCNV4_DEVICE OffsetNumbers<T> numbers_of(const WindowArguments& a, const Row& row,
                                           const Image<T>& image) {
  return image.packed.from(int64_t(uint64_t(pixel_of(a, row)) * a.packed_channels +
                                   uint32_t(row.group) * uint32_t(3 * a.call.points)));
}

// One far tap of each row that has any, the lane's own: a layer. Its rows take turns in rounds of
// four, in float32 of two. The corners of four taps are sixteen more cells, and their weights one
// more step of the product; both matrices of the unit take the same cells, with weights of zero
// for taps of the other one. Where all corners of a round are among the tile's cells, it reads
// them there.
template <typename T, int kDepth>
struct FarLayer {
  using Layout = DenseWindow<T, kDepth>;
  static constexpr int kPairs = sizeof(T) == sizeof(float) ? 1 : 2;
  static constexpr int kRows = 2 * kPairs;         // of a round: a tap each, four cells each
  static constexpr int kLoads = Layout::kTeam / 2; // of fragments of cells
  static constexpr int kCopies = 4 * kRows * Layout::kTeam / kWarp; // chunks of cells, by 32 lanes
  using Fragment = WeightFragment<T, kPairs>;
  static constexpr int kParts = Fragment::kParts;

  uint32_t weights[2][kParts]; // of the lane's tap: upper and lower pair of corners
  TapPlace place;              // none where the lane has no tap in this layer

  // Where chunk `chunk` of cell 0 ... 15 is in a warp's area; eight cells meet every bank once.
  static MMDCNV4_HD uint32_t chunk_at(uint32_t cell, uint32_t chunk) {
    const uint32_t key = cell * Layout::kTeam / 8 % Layout::kTeam;
    return (cell * Layout::kTeam + (chunk ^ key)) * kChunkBytes;
  }

  // Takes the last far tap of each row, and asks for the numbers of the next.
  MMDCNV4_DEVICE void take(const WindowArguments& a, const Tile& tile, uint32_t unit, uint32_t lane,
                           float factor, const Image<T>& image, FarTaps& far) {
    place = TapPlace::none();
#pragma unroll
    for (int part = 0; part < kParts; ++part) weights[0][part] = weights[1][part] = 0;
    if (far.bits == 0) return;
    const Row row = Layout::locate_row(a, tile, unit, lane);
    const int32_t k = 31 - __clz(int(far.bits));
    const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{}, far.last, k);
    far.bits ^= 1u << k;
    if (far.bits != 0) {
      far.last = numbers_of(a, row, image).load_tap(31 - __clz(int(far.bits)), a.call.points);
      far.last.mask *= factor;
    }
    if (!sample.bilinear.inside) return;
    const Four<float> weight = sample_weights(sample);
    Fragment::pack(weight.x, weight.y, weights[0]);
    Fragment::pack(weight.z, weight.w, weights[1]);
    place = TapPlace::make<Layout>(
        a, tile, sample.bilinear, (uint32_t(row.group) - tile.first_group) * Layout::kTeam);
  }

  // Adds all taps of the layer to the sums.
  MMDCNV4_DEVICE void add(const WindowArguments& a, const Tile& tile, uint32_t unit, uint32_t lane,
                          const Image<T>& image, unsigned char* area, const unsigned char* cells,
                          float (&sum)[2][kDepth / 8][4]) const {
    uint32_t waiting = __ballot_sync(kAllLanes, place.exists());
    const uint32_t elsewhere = __ballot_sync(kAllLanes, !place.is_cell());
#pragma unroll 1
    while (waiting != 0) {
      uint32_t rows[kRows], later = waiting; // kAllLanes where there are fewer
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows[i] = uint32_t(__ffs(int(later)) - 1);
        later &= later - 1;
      }
      Fragment fragment[2];
      spread_weights(lane, rows, fragment);
      const bool are_cells = (waiting & ~later & elsewhere) == 0;
      if (!are_cells) {
        copy_corners(a, tile, unit, lane, rows, image, area, cells);
        __syncwarp();
      }
      const unsigned char* base = are_cells ? cells : area;
      uint32_t at[kAddresses];
      locate_corners(lane, rows, are_cells, at);
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        uint32_t pixels[2 * kPairs];
        enter_step(SharedPhase::kFar);
        load_corners(base, at, 2 * load * kChunkBytes, pixels);
#pragma unroll
        for (int m = 0; m < 2; ++m) fragment[m].multiply(pixels, sum[m] + Fragment::kTiles * load);
      }
      __syncwarp();
      waiting = later;
    }
  }

 private:
  // Of a lane: with ldmatrix that of a row, else those of the numbers that it gets.
  static constexpr int kAddresses = sizeof(T) == sizeof(float) ? 2 * kPairs : 1;

  // Where the first of them are, from `base` on. What a row's corners would be, of a round with
  // fewer: those of another row, weighing zero.
  MMDCNV4_DEVICE void locate_corners(uint32_t lane, const uint32_t (&rows)[kRows], bool are_cells,
                                     uint32_t (&at)[kAddresses]) const {
    if constexpr (kAddresses == 1) {
      const uint32_t cell = lane % 16, chunk = lane / 16, row = row_of_cell(rows, cell);
      const TapPlace from = place.of_lane(row < uint32_t(kWarp) ? row : rows[0]);
      at[0] = are_cells ? from.cell(cell % 4) ^ (chunk * kChunkBytes) : chunk_at(cell, chunk);
    } else {
      const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
      for (uint32_t i = 0; i < 2 * kPairs; ++i) { // 2t and 2t + 1 of each eight cells
        const uint32_t cell = i / 2 * 8 + 2 * t + i % 2, row = row_of_cell(rows, cell);
        const TapPlace from = place.of_lane(row < uint32_t(kWarp) ? row : rows[0]);
        at[i] = (are_cells ? from.cell(cell % 4) ^ (g / 4 * kChunkBytes) : chunk_at(cell, g / 4)) +
                g % 4 * uint32_t(sizeof(float));
      }
    }
  }
  static MMDCNV4_DEVICE void load_corners(const unsigned char* base,
                                          const uint32_t (&at)[kAddresses], uint32_t chunk,
                                          uint32_t (&pixels)[2 * kPairs]) {
    if constexpr (kAddresses == 1) {
      load_matrices_transposed(base + (at[0] ^ chunk), pixels);
    } else {
#pragma unroll
      for (int i = 0; i < kAddresses; ++i)
        pixels[i] = read_shared<uint32_t>(base + (at[i] ^ chunk));
    }
  }

  // The row to whose tap a cell of a round belongs.
  static MMDCNV4_DEVICE uint32_t row_of_cell(const uint32_t (&rows)[kRows], uint32_t cell) {
    const uint32_t upper = cell / 4 % 2 != 0 ? rows[1] : rows[0];
    if constexpr (kPairs == 1) {
      return upper;
    } else {
      const uint32_t lower = cell / 4 % 2 != 0 ? rows[3] : rows[2];
      return cell / 8 != 0 ? lower : upper;
    }
  }

  // Weights of a round as fragments of A.
  MMDCNV4_DEVICE void spread_weights(uint32_t lane, const uint32_t (&rows)[kRows],
                                     Fragment (&fragment)[2]) const {
    const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < kPairs; ++half) { // cells 2t, 2t + 1, and those eight further on
      const uint32_t row = t / 2 != 0 ? rows[2 * half + 1] : rows[2 * half];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t upper = __shfl_sync(kAllLanes, weights[0][part], int(row % kWarp));
        const uint32_t lower = __shfl_sync(kAllLanes, weights[1][part], int(row % kWarp));
        const uint32_t pair = t % 2 != 0 ? lower : upper;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          fragment[m].put(2 * half, part, row == m * kMatrixRows + g ? pair : 0);
          fragment[m].put(2 * half + 1, part, row == m * kMatrixRows + 8 + g ? pair : 0);
        }
      }
    }
  }

  // Brings the corners of a round into the area, from the image and from the cells.
  MMDCNV4_DEVICE void copy_corners(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                   uint32_t lane, const uint32_t (&rows)[kRows],
                                   const Image<T>& image, unsigned char* area,
                                   const unsigned char* cells) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t cell = (lane + i * kWarp) / Layout::kTeam, chunk = lane % Layout::kTeam;
      const uint32_t row = row_of_cell(rows, cell);
      const TapPlace from = place.of_lane(row);
      const uint32_t group =
          tile.first_group + Layout::locate_matrix(a, 2 * unit + row % kWarp / kMatrixRows).group;
      uint4 pixels = make_uint4(0, 0, 0, 0);
      enter_step(SharedPhase::kFar);
      if (row < uint32_t(kWarp)) {
        pixels = from.is_cell()
                     ? read_shared<uint4>(cells + (from.cell(cell % 4) ^ (chunk * kChunkBytes)))
                     : VectorIo<T, kChunkNumbers<T>>::load(
                           image.value + uint64_t(from.pixel(cell % 4)) * a.call.channels +
                           group * kDepth + chunk * kChunkNumbers<T>);
      }
      enter_step(SharedPhase::kFar);
      write_shared(area + chunk_at(cell, chunk), pixels);
    }
  }
};

} // namespace cuda
} // namespace mmdcnv4
