// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// far_taps.cuh — samples of the tensor-core forward kernel that lie outside the window of their
// pixel: four of them make one more step of its product.
//
//     far taps of a unit    row 3: tap 0    row 9: tap 6    row 17: tap 2    row 30: taps 0 and 2
//     first round           cells 0 ... 3   cells 4 ... 7   cells 8 ... 11   cells 12 ... 15: tap 2
//     second round                                                           cells 0 ... 3: tap 0
//
// The four cells of a tap are the corners of its sample: left and right above, then below.
#pragma once

#include "window_numbers.cuh"

namespace mmdcnv4 {
namespace cuda {

// Taps of a row outside its window that are still to be added, as bits; the numbers of the last of
// them, the mask scaled.
struct FarTaps {
  uint32_t bits;
  TapNumbers<float> last;
};

// Fragment of A: the weights of one matrix for 16 cells. With bfloat16 `low` is what rounding left.
template <typename T>
struct WeightFragment {
  static constexpr bool kIsSplit = std::is_same<T, BFloat16>::value;
  uint32_t high[4], low[kIsSplit ? 4 : 1];

  // `upper` and `lower`: weights of cell 2t of rows g and g + 8 of the matrix
  MMDCNV4_DEVICE void load(const unsigned char* upper, const unsigned char* lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = (i % 2 ? lower : upper) + i / 2 * (8 * kWeightBytes);
      const float even = read_shared<float>(from), odd = read_shared<float>(from + kWeightBytes);
      high[i] = narrow_pair(even, odd, T());
      if constexpr (kIsSplit) {
        const float2 rounded = widen_pair(high[i], T());
        low[i] = narrow_pair(even - rounded.x, odd - rounded.y, T());
      }
    }
  }

  // `to` += these weights . the 16 cells of a fragment of V
  MMDCNV4_DEVICE void multiply(uint32_t b0, uint32_t b1, float (&to)[4]) const {
    multiply_add(to, high, b0, b1, T());
    if constexpr (kIsSplit) multiply_add(to, low, b0, b1, T());
  }
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

// Far taps, four at a time: a round. The corners of four taps are sixteen more cells, and their
// weights one more step of the product, so that tensor cores multiply these as well. At most one
// tap of a row is in a round; both matrices of the unit take the same cells, with weights of zero
// for taps of the other one. Pixels wait in registers while the product of the window goes on.
template <typename T, int kDepth, int kReach>
struct FarRound {
  using Layout = DenseWindow<kDepth, kReach>;
  static constexpr int kRows = 4;                   // of a round: a tap each, four cells each
  static constexpr int kCopies = Layout::kTeam / 2; // chunks of 16 cells, by 32 lanes
  using Fragment = WeightFragment<T>;
  static constexpr int kParts = Fragment::kIsSplit ? 2 : 1;

  uint32_t rows[kRows];        // those of the round, kAllLanes where there are fewer
  uint32_t weights[kParts][2]; // of the lane's own tap: upper and lower pair of corners
  uint4 chunks[kCopies];       // of the round's cells

  // Where chunk `chunk` of cell 0 ... 15 is in a warp's area; eight cells meet every bank once.
  static MMDCNV4_HD uint32_t chunk_at(uint32_t cell, uint32_t chunk) {
    const uint32_t key = cell * Layout::kTeam / 8 % Layout::kTeam;
    return (cell * Layout::kTeam + (chunk ^ key)) * kChunkBytes;
  }

  // Takes the first rows of `waiting`, those with far taps, and asks for the pixels of their last.
  MMDCNV4_DEVICE void fetch(const WindowArguments& a, const Tile& tile, uint32_t unit,
                            uint32_t lane, uint32_t waiting, float factor, const Image<T>& image,
                            FarTaps& far) {
    uint32_t later = waiting;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = uint32_t(__ffs(int(later)) - 1);
      later &= later - 1;
    }
    uint32_t pixel = 0, right = 0, below = 0; // upper left corner; distance to the others
#pragma unroll
    for (int part = 0; part < kParts; ++part) weights[part][0] = weights[part][1] = 0;
    if ((waiting & ~later) >> lane & 1) {
      const Row row = Layout::locate_row(a, tile, unit, lane);
      const int32_t k = 31 - __clz(int(far.bits));
      const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{}, far.last, k);
      if (sample.bilinear.inside) {
        const Four<float> weight = sample_weights(sample);
        pack(0, weight.x, weight.y);
        pack(1, weight.z, weight.w);
        const uint4 corners = corner_pixels(a.call, sample.bilinear);
        pixel = corners.x;
        right = corners.y - corners.x;
        below = corners.z - corners.x;
      }
      far.bits ^= 1u << k;
      if (far.bits != 0) {
        far.last = numbers_of(a, row, image).load_tap(31 - __clz(int(far.bits)), a.call.points);
        far.last.mask *= factor;
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t cell = (lane + i * kWarp) / Layout::kTeam;
      const uint32_t row = row_of_cell(cell);
      uint32_t from = __shfl_sync(kAllLanes, pixel, int(row % kWarp));
      const uint32_t to_right = __shfl_sync(kAllLanes, right, int(row % kWarp));
      const uint32_t to_below = __shfl_sync(kAllLanes, below, int(row % kWarp));
      if (cell % 2 != 0) from += to_right;
      if (cell / 2 % 2 != 0) from += to_below;
      const uint32_t group =
          tile.first_group + Layout::locate_matrix(a, 2 * unit + row % kWarp / kMatrixRows).group;
      const uint32_t channel = group * kDepth + lane % Layout::kTeam * kChunkNumbers;
      chunks[i] = make_uint4(0, 0, 0, 0);
      if (row != kAllLanes)
        chunks[i] = VectorIo<T, kChunkNumbers>::load(image.value +
                                                     uint64_t(from) * a.call.channels + channel);
    }
  }

  // Adds the round to the sums.
  MMDCNV4_DEVICE void multiply(uint32_t lane, unsigned char* area,
                               float (&sum)[2][kDepth / 8][4]) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t cell = (lane + i * kWarp) / Layout::kTeam;
      enter_step(SharedPhase::kFar);
      write_shared(area + chunk_at(cell, lane % Layout::kTeam), chunks[i]);
    }
    const uint32_t g = lane / 4, t = lane % 4;
    Fragment fragment[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) { // cells 2t, 2t + 1, and those eight further on
      const uint32_t row = t / 2 != 0 ? rows[2 * half + 1] : rows[2 * half];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t upper = __shfl_sync(kAllLanes, weights[part][0], int(row % kWarp));
        const uint32_t lower = __shfl_sync(kAllLanes, weights[part][1], int(row % kWarp));
        const uint32_t pair = t % 2 != 0 ? lower : upper;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t* to = (part == 0 ? fragment[m].high : fragment[m].low) + 2 * half;
          to[0] = row == m * kMatrixRows + g ? pair : 0;
          to[1] = row == m * kMatrixRows + 8 + g ? pair : 0;
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < kCopies; ++pair) { // 16 channels at a time
      uint32_t pixels[4];
      enter_step(SharedPhase::kFar);
      load_matrices_transposed(area + chunk_at(lane % 16, 2 * pair + lane / 16), pixels);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          fragment[m].multiply(pixels[2 * half], pixels[2 * half + 1], sum[m][2 * pair + half]);
    }
    __syncwarp();
  }

 private:
  MMDCNV4_DEVICE void pack(int line, float left, float right) {
    weights[0][line] = narrow_pair(left, right, T());
    if constexpr (Fragment::kIsSplit) {
      const float2 rounded = widen_pair(weights[0][line], T());
      weights[1][line] = narrow_pair(left - rounded.x, right - rounded.y, T());
    }
  }

  // The row to whose tap a cell belongs.
  MMDCNV4_DEVICE uint32_t row_of_cell(uint32_t cell) const {
    const uint32_t upper = cell / 4 % 2 != 0 ? rows[1] : rows[0];
    const uint32_t lower = cell / 4 % 2 != 0 ? rows[3] : rows[2];
    return cell / 8 != 0 ? lower : upper;
  }
};

} // namespace cuda
} // namespace mmdcnv4
