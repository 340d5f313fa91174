// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// window_numbers.cuh — the numbers of offset_mask as the tensor-core kernels take them: copied unit
// by unit into shared memory, in their own type, read from there row by row into registers, masks
// scaled.
#pragma once

#include "dense_window.cuh"
#include "far_lists.cuh"
#include "../sampling.cuh"

namespace mmdcnv4 {
namespace cuda {

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
                                  uint32_t first_group, const unsigned char* __restrict__ packed,
                                  unsigned char* to) {
    const uint32_t chunk = lane % kChunks;
    const uint32_t groups =
        kUnitGroups == 2 && first_group + 1 < uint32_t(a.call.groups) ? 2 : 1;
    const bool has_chunk = chunk * kChunkBytes < lead(a, first_group) + groups * group_bytes(a);
    const unsigned char* from = packed + uint64_t(first_group) * group_bytes(a) -
                                lead(a, first_group) + chunk * kChunkBytes;
#pragma unroll 2 // kernels hold this for two types of numbers: more would be much code
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

// Offsets and masks of one row, in registers.
struct RowNumbers {
  float offset[2 * kTaps], mask[kTaps];

  // From shared memory, where those of type Offset begin at `from`.
  template <typename Offset>
  MMDCNV4_DEVICE void load(const unsigned char* from, uint32_t points) {
    enter_step(SharedPhase::kNumbers);
    if constexpr (sizeof(Offset) == sizeof(float)) {
#pragma unroll
      for (int i = 0; i < 2 * kTaps; ++i) offset[i] = read_shared<float>(from + 4 * i);
#pragma unroll
      for (int i = 0; i < kTaps; ++i) mask[i] = read_shared<float>(from + 8 * points + 4 * i);
    } else {
      // a row may begin in the middle of a word: pairs are cut out of neighbouring words
      const uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(from)) % 4 * 8;
      const unsigned char* words = from - shift / 8;
      cut<Offset>(words, shift, offset);
      cut<Offset>(words + 4 * points, shift, mask);
    }
  }

 private:
  template <typename Offset, int kCount>
  static MMDCNV4_DEVICE void cut(const unsigned char* words, uint32_t shift,
                                 float (&to)[kCount]) {
    uint32_t word = read_shared<uint32_t>(words);
#pragma unroll
    for (int i = 0; i < (kCount + 1) / 2; ++i) {
      const uint32_t next = read_shared<uint32_t>(words + 4 * (i + 1));
      const float2 pair = widen_pair(funnel_shift_right(word, next, shift), Offset());
      to[2 * i] = pair.x;
      if (2 * i + 1 < kCount) to[2 * i + 1] = pair.y;
      word = next;
    }
  }
};

// Copies and loads by the type that the numbers turn out to have.
template <typename T, int kUnitGroups>
struct StagedNumbers {
  template <typename Offset>
  using Of = NumbersLayout<Offset, kUnitGroups>;
  static constexpr uint32_t kPixels = kWarp / kUnitGroups;

  static MMDCNV4_DEVICE uint32_t bytes(const OffsetNumbers<T>& packed) {
    return packed.are_wider() ? Of<float>::kBytes : Of<T>::kBytes;
  }
  static MMDCNV4_DEVICE void copy(const WindowArguments& a, uint32_t lane, uint32_t pixel,
                                  uint32_t first_group, const OffsetNumbers<T>& packed,
                                  unsigned char* to) {
    if (packed.are_wider()) {
      Of<float>::copy(a, lane, pixel, first_group, packed.data, to);
    } else {
      Of<T>::copy(a, lane, pixel, first_group, packed.data, to);
    }
  }
  // Those of a lane's row.
  static MMDCNV4_DEVICE RowNumbers load(const WindowArguments& a, uint32_t lane,
                                        uint32_t first_group, const OffsetNumbers<T>& packed,
                                        const unsigned char* from) {
    const uint32_t points = uint32_t(a.call.points);
    RowNumbers numbers;
    if (packed.are_wider()) {
      numbers.load<float>(from + Of<float>::place(a, first_group, lane), points);
    } else {
      numbers.load<T>(from + Of<T>::place(a, first_group, lane), points);
    }
    return numbers;
  }
};

// Those of a unit, in its warp's area.
template <typename T, int kDepth>
struct UnitNumbers : StagedNumbers<T, (DenseWindow<T, kDepth>::kGroups > 1 ? 2 : 1)> {
  using Layout = DenseWindow<T, kDepth>;
  using Base = StagedNumbers<T, (Layout::kGroups > 1 ? 2 : 1)>;
  static_assert(Base::template Of<float>::kBytes <= Layout::kAreaBytes,
                "the numbers fit into the area");

  static MMDCNV4_DEVICE void copy_unit(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                       uint32_t lane, const OffsetNumbers<T>& packed,
                                       unsigned char* area) {
    const Row row = Layout::locate_row(a, tile, unit, lane % Base::kPixels);
    Base::copy(a, lane, row.is_valid ? pixel_of(a, row) : kNoPixel, uint32_t(row.group), packed,
               area);
  }
};

// The power of two that brings the largest mask of a row to 2^11 ... 2^12, and its inverse; masks
// that are not finite stay so. One for types whose range is that of float32.
struct Scale {
  float factor, inverse;
};
template <typename T>
MMDCNV4_DEVICE Scale scale_of_row(const RowNumbers& numbers, uint32_t points) {
  if constexpr (std::is_same<T, Half>::value) {
    float largest = 0;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k < int(points)) largest = fmaxf(largest, fabsf(numbers.mask[k]));
    const int32_t wanted = 2 * 127 + 11 - int32_t(__float_as_uint(largest) >> 23);
    const int32_t factor = wanted < 253 ? wanted : 253; // neither of the two is subnormal
    return {__uint_as_float(uint32_t(factor) << 23), __uint_as_float(uint32_t(254 - factor) << 23)};
  } else {
    return {1.0f, 1.0f};
  }
}

} // namespace cuda
} // namespace mmdcnv4
