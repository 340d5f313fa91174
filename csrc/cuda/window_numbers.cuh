// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// window_numbers.cuh — the numbers of offset_mask as the tensor-core kernels take them: copied unit
// by unit into shared memory, read from there row by row into registers, masks scaled.
#pragma once

#include "dense_window.cuh"
#include "sampling.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr int32_t kTaps = 9;

// How the numbers of a unit lie in its warp's area before A does: pixel by pixel, all bytes of the
// unit's groups, in the chunks of 16 bytes that cover them.
template <typename Offset, int kDepth, int kReach>
struct NumbersLayout {
  using Layout = DenseWindow<kDepth, kReach>;
  static constexpr uint32_t kUnitGroups = Layout::kGroups > 1 ? 2 : 1;
  static constexpr uint32_t kPixels = kWarp / kUnitGroups;
  static constexpr uint32_t kMostBytes = kUnitGroups * 3 * kTaps * sizeof(Offset);
  static constexpr uint32_t kChunks = kMostBytes / kChunkBytes >= 8 ? 16 : 8;
  static constexpr uint32_t kPitch = (kChunks + 1) * kChunkBytes; // odd: few pixels share a bank
  static_assert(kMostBytes - sizeof(Offset) + kChunkBytes <= kChunks * kChunkBytes,
                "the chunks cover the numbers wherever they begin");
  static_assert(kPixels * kPitch <= Layout::kAreaBytes, "the numbers fit into the area");

  // Bytes of the numbers of a group before this one, and from a chunk's start to the first number.
  static MMDCNV4_DEVICE uint32_t group_bytes(const WindowArguments& a) {
    return uint32_t(3 * a.call.points) * uint32_t(sizeof(Offset));
  }
  static MMDCNV4_DEVICE uint32_t lead(const WindowArguments& a, const Row& first) {
    return uint32_t(first.group) * group_bytes(a) % kChunkBytes;
  }

  // Copies the numbers of a unit from those of its image; zeros for rows that are none. `first` is
  // the unit's first row.
  static MMDCNV4_DEVICE void copy(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                  uint32_t lane, const Row& first,
                                  const Offset* __restrict__ packed, unsigned char* area) {
    const uint32_t chunk = lane % kChunks;
    const uint32_t groups = kUnitGroups == 2 && first.group + 1 < a.call.groups ? 2 : 1;
    const bool has_chunk =
        chunk * kChunkBytes < lead(a, first) + groups * group_bytes(a);
    const char* from = reinterpret_cast<const char*>(packed) +
                       uint64_t(uint32_t(first.group)) * group_bytes(a) - lead(a, first) +
                       chunk * kChunkBytes;
#pragma unroll
    for (uint32_t i = 0; i < kPixels * kChunks / kWarp; ++i) {
      const uint32_t pixel = lane / kChunks + i * (kWarp / kChunks);
      const Row row = Layout::locate_row(a, tile, unit, pixel);
      const bool exists = row.is_valid & has_chunk;
      const uint32_t at = exists ? pixel_of(a, row) : 0;
      enter_step(SharedPhase::kCopy);
      copy_async(area + pixel * kPitch + chunk * kChunkBytes,
                 from + uint64_t(at) * (a.packed_channels * uint32_t(sizeof(Offset))), exists);
    }
  }

  static MMDCNV4_DEVICE uint32_t place(const WindowArguments& a, const Row& first, uint32_t lane) {
    return lane % kPixels * kPitch + lead(a, first) + lane / kPixels * group_bytes(a);
  }
};

// Offsets and masks of one row, in registers.
template <typename Offset>
struct RowNumbers {
  uint32_t offset[2 * kTaps], mask[kTaps]; // float32

  MMDCNV4_DEVICE void load(const unsigned char* area, uint32_t at, uint32_t points) {
    enter_step(SharedPhase::kNumbers);
#pragma unroll
    for (int i = 0; i < 2 * kTaps; ++i) offset[i] = read_shared<uint32_t>(area + at + 4 * i);
#pragma unroll
    for (int i = 0; i < kTaps; ++i)
      mask[i] = read_shared<uint32_t>(area + at + 8 * points + 4 * i);
  }
  MMDCNV4_DEVICE float dx(int k) const { return __uint_as_float(offset[2 * k]); }
  MMDCNV4_DEVICE float dy(int k) const { return __uint_as_float(offset[2 * k + 1]); }
  MMDCNV4_DEVICE float mask_of(int k) const { return __uint_as_float(mask[k]); }
};

template <typename Offset>
struct RowNumbersHalf {
  static constexpr int kMaskPairs = (kTaps + 1) / 2;
  uint32_t offset[kTaps], mask[kMaskPairs]; // pairs

  // A row may begin in the middle of a word: pairs are cut out of neighbouring words.
  MMDCNV4_DEVICE void load(const unsigned char* area, uint32_t at, uint32_t points) {
    const uint32_t shift = at % 4 * 8;
    const unsigned char* words = area + (at & ~3u);
    enter_step(SharedPhase::kNumbers);
    cut(words, shift, offset);
    cut(words + 4 * points, shift, mask);
  }
  MMDCNV4_DEVICE float dx(int k) const { return widen_pair(offset[k], Offset()).x; }
  MMDCNV4_DEVICE float dy(int k) const { return widen_pair(offset[k], Offset()).y; }
  MMDCNV4_DEVICE float mask_of(int k) const {
    const float2 pair = widen_pair(mask[k / 2], Offset());
    return k % 2 ? pair.y : pair.x;
  }

 private:
  template <int kCount>
  static MMDCNV4_DEVICE void cut(const unsigned char* words, uint32_t shift,
                                 uint32_t (&pairs)[kCount]) {
    uint32_t word = read_shared<uint32_t>(words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t next = read_shared<uint32_t>(words + 4 * (i + 1));
      pairs[i] = funnel_shift_right(word, next, shift);
      word = next;
    }
  }
};
template <>
struct RowNumbers<Half> : RowNumbersHalf<Half> {};
template <>
struct RowNumbers<BFloat16> : RowNumbersHalf<BFloat16> {};

// The power of two that brings the largest mask of a row to 2^11 ... 2^12, and its inverse; masks
// that are not finite stay so. One for types whose range is that of float32.
struct Scale {
  float factor, inverse;
};
template <typename T, typename Numbers>
MMDCNV4_DEVICE Scale scale_of_row(const Numbers& numbers, uint32_t points) {
  if constexpr (std::is_same<T, Half>::value) {
    float largest = 0;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k < int(points)) largest = fmaxf(largest, fabsf(numbers.mask_of(k)));
    const int32_t wanted = 2 * 127 + 11 - int32_t(__float_as_uint(largest) >> 23);
    const int32_t factor = wanted < 253 ? wanted : 253; // neither of the two is subnormal
    return {__uint_as_float(uint32_t(factor) << 23), __uint_as_float(uint32_t(254 - factor) << 23)};
  } else {
    return {1.0f, 1.0f};
  }
}

} // namespace cuda
} // namespace mmdcnv4
