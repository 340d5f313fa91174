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


// How the numbers of 32 rows lie in shared memory: pixel by pixel, all bytes of kUnitGroups groups,
// in the chunks of 16 bytes that cover them.
template <typename Offset, int kUnitGroups>
struct NumbersLayout {
  static constexpr uint32_t kPixels = kWarp / kUnitGroups;
  static constexpr uint32_t kPitch = window_numbers_pitch(kUnitGroups, sizeof(Offset));
  static constexpr uint32_t kChunks = kPitch > 8 * kChunkBytes + kChunkBytes ? 16 : 8; // of copies
  static constexpr uint32_t kBytes = kPixels * kPitch;
  static_assert(kUnitGroups * 3 * kTaps * sizeof(Offset) - sizeof(Offset) + kChunkBytes <=
                    kChunks * kChunkBytes,
                "the chunks cover the numbers wherever they begin");

  // Bytes of the numbers of a group, and from a chunk's start to the first number.
  static MMDCNV4_DEVICE uint32_t group_bytes(const WindowArguments& a) {
    return uint32_t(3 * a.call.points) * uint32_t(sizeof(Offset));
  }
  static MMDCNV4_DEVICE uint32_t lead(const WindowArguments& a, uint32_t first_group) {
    return first_group * group_bytes(a) % kChunkBytes;
  }

  // Copies the numbers of groups from `first_group` on, which must exist, from those of an image;
  // zeros where there is no pixel. `pixel`: number of the lane's pixel in the image, or kNoPixel.
  static MMDCNV4_DEVICE void copy(const WindowArguments& a, uint32_t lane, uint32_t pixel,
                                  uint32_t first_group, const Offset* __restrict__ packed,
                                  unsigned char* to) {
    const uint32_t chunk = lane % kChunks;
    const uint32_t groups =
        kUnitGroups == 2 && first_group + 1 < uint32_t(a.call.groups) ? 2 : 1;
    const bool has_chunk = chunk * kChunkBytes < lead(a, first_group) + groups * group_bytes(a);
    const char* from = reinterpret_cast<const char*>(packed) +
                       uint64_t(first_group) * group_bytes(a) - lead(a, first_group) +
                       chunk * kChunkBytes;
#pragma unroll
    for (uint32_t i = 0; i < kPixels * kChunks / kWarp; ++i) {
      const uint32_t index = lane / kChunks + i * (kWarp / kChunks);
      const uint32_t number = __shfl_sync(kAllLanes, pixel, int(index));
      const bool exists = (number != kNoPixel) & has_chunk;
      enter_step(SharedPhase::kCopy);
      if (chunk * kChunkBytes >= kPitch) continue;
      copy_async(to + index * kPitch + chunk * kChunkBytes,
                 from + uint64_t(exists ? number : 0) *
                            (a.packed_channels * uint32_t(sizeof(Offset))),
                 exists);
    }
  }

  // Where the numbers of a lane's row begin: its pixel first, then its group.
  static MMDCNV4_DEVICE uint32_t place(const WindowArguments& a, uint32_t first_group,
                                       uint32_t lane) {
    return lane % kPixels * kPitch + lead(a, first_group) + lane / kPixels * group_bytes(a);
  }
};

// Those of a unit, in its warp's area.
template <typename Offset, int kDepth, int kReach>
struct UnitNumbers : NumbersLayout<Offset, (DenseWindow<kDepth, kReach>::kGroups > 1 ? 2 : 1)> {
  using Layout = DenseWindow<kDepth, kReach>;
  using Base = NumbersLayout<Offset, (Layout::kGroups > 1 ? 2 : 1)>;
  static_assert(Base::kBytes <= Layout::kAreaBytes, "the numbers fit into the area");

  static MMDCNV4_DEVICE void copy(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                  uint32_t lane, const Offset* __restrict__ packed,
                                  unsigned char* area) {
    const Row row = Layout::locate_row(a, tile, unit, lane % Base::kPixels);
    Base::copy(a, lane, row.is_valid ? pixel_of(a, row) : kNoPixel, uint32_t(row.group), packed,
               area);
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
