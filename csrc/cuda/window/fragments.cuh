// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// fragments.cuh — the factors of the tensor-core kernels' products, by the type of value:
//
//     float16    m16n8k16, weights rounded to float16
//     bfloat16   m16n8k16, twice: weights are the sum of two bfloat16
//     float32    m16n8k8 in TF32, three times: both factors are the sum of two TF32, and the
//                product of the two small ones, 2^-21 of the whole at most, is left out (Ootomo and
//                Yokota, arXiv:2203.03341). Of its sixteen cells a lane takes 2t, 2t + 1, 2t + 8
//                and 2t + 9, as for the others: columns of A and rows of B are put in that order
#pragma once

#include "dense_window.cuh"

namespace mmdcnv4 {
namespace cuda {

// A fragment of A in TF32, whose factor in B is of type T: exact in TF32 unless that is float32.
template <typename T>
struct Tf32Fragment {
  static constexpr bool kIsSplit = sizeof(T) == sizeof(float);
  uint32_t high[4], low[kIsSplit ? 4 : 1];

  MMDCNV4_DEVICE void put(int i, float number) {
    if constexpr (kIsSplit) {
      // to nearest, in fewer instructions than round_to_tf32(): what is not finite spoils `low`
      high[i] = (__float_as_uint(number) + kHalfOfLast) & kFirstBits;
      low[i] = __float_as_uint(number - __uint_as_float(high[i]));
    } else {
      high[i] = round_to_tf32(number);
    }
  }

  // `to` += these numbers . two of B, widened
  MMDCNV4_DEVICE void multiply(float b0, float b1, float (&to)[4]) const {
    if constexpr (kIsSplit) {
      const float high0 = first_bits(b0), high1 = first_bits(b1);
      multiply_add_tf32_cut(to, low, high0, high1); // what is small first
      multiply_add_tf32_cut(to, high, b0 - high0, b1 - high1);
      multiply_add_tf32_cut(to, high, high0, high1);
    } else {
      multiply_add_tf32(to, high, b0, b1);
    }
  }

 private:
  static constexpr uint32_t kFirstBits = 0xffffe000u, kHalfOfLast = 0x1000u; // of TF32

  static MMDCNV4_DEVICE float first_bits(float number) {
    return __uint_as_float(__float_as_uint(number) & kFirstBits);
  }
};

// Fragment of A: the weights of one matrix for kEights eights of cells, two but for float32. With
// bfloat16 `low` is what rounding left.
template <typename T, int kEights = 2>
struct WeightFragment {
  static_assert(kEights == 2, "m16n8k16");
  static constexpr int kTiles = 2; // of 8 channels, in a fragment of V
  static constexpr int kParts = std::is_same<T, BFloat16>::value ? 2 : 1;
  uint32_t high[4], low[kParts == 2 ? 4 : 1];

  // `upper` and `lower`: weights of cell 2t of rows g and g + 8 of the matrix
  MMDCNV4_DEVICE void load(const unsigned char* upper, const unsigned char* lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = (i % 2 ? lower : upper) + i / 2 * (8 * kWeightBytes);
      const float even = read_shared<float>(from), odd = read_shared<float>(from + kWeightBytes);
      uint32_t parts[kParts];
      pack(even, odd, parts);
#pragma unroll
      for (int part = 0; part < kParts; ++part) put(i, part, parts[part]);
    }
  }

  // The weights of two neighbouring cells in kParts words, and back: into place `i` of load().
  static MMDCNV4_DEVICE void pack(float even, float odd, uint32_t (&parts)[kParts]) {
    parts[0] = narrow_pair(even, odd, T());
    if constexpr (kParts == 2) {
      const float2 rounded = widen_pair(parts[0], T());
      parts[1] = narrow_pair(even - rounded.x, odd - rounded.y, T());
    }
  }
  MMDCNV4_DEVICE void put(int i, int part, uint32_t word) { (part == 0 ? high : low)[i] = word; }

  // `to` += these weights . the 16 cells of a fragment of V
  MMDCNV4_DEVICE void multiply(const uint32_t (&pixels)[4], float (*to)[4]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add(to[tile], high, pixels[2 * tile], pixels[2 * tile + 1], T());
      if constexpr (kParts == 2)
        multiply_add(to[tile], low, pixels[2 * tile], pixels[2 * tile + 1], T());
    }
  }
};

template <int kEights>
struct WeightFragment<float, kEights> {
  static constexpr int kTiles = 1;
  static constexpr int kParts = 2;
  Tf32Fragment<float> eight[kEights]; // cells each

  MMDCNV4_DEVICE void load(const unsigned char* upper, const unsigned char* lower) {
#pragma unroll
    for (int i = 0; i < 2 * kEights; ++i) {
      const unsigned char* from = (i % 2 ? lower : upper) + i / 2 * (8 * kWeightBytes);
      eight[i / 2].put(i % 2, read_shared<float>(from));
      eight[i / 2].put(2 + i % 2, read_shared<float>(from + kWeightBytes));
    }
  }

  static MMDCNV4_DEVICE void pack(float even, float odd, uint32_t (&parts)[kParts]) {
    parts[0] = __float_as_uint(even);
    parts[1] = __float_as_uint(odd);
  }
  MMDCNV4_DEVICE void put(int i, int part, uint32_t word) {
    eight[i / 2].put(2 * part + i % 2, __uint_as_float(word));
  }

  MMDCNV4_DEVICE void multiply(const uint32_t (&pixels)[2 * kEights], float (*to)[4]) const {
#pragma unroll
    for (int i = 0; i < kEights; ++i)
      eight[i].multiply(__uint_as_float(pixels[2 * i]), __uint_as_float(pixels[2 * i + 1]), to[0]);
  }
};

// Fragment of Y, grad_output, whose factor is of the same type.
template <typename T>
struct GradFragment {
  uint32_t words[4];

  MMDCNV4_DEVICE explicit GradFragment(const uint32_t (&from)[4])
      : words{from[0], from[1], from[2], from[3]} {}
  MMDCNV4_DEVICE void multiply(uint32_t b0, uint32_t b1, float (&to)[4]) const {
    multiply_add(to, words, b0, b1, T());
  }
};
template <>
struct GradFragment<float> {
  Tf32Fragment<float> numbers;

  MMDCNV4_DEVICE explicit GradFragment(const uint32_t (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers.put(i, __uint_as_float(from[i]));
  }
  MMDCNV4_DEVICE void multiply(uint32_t b0, uint32_t b1, float (&to)[4]) const {
    numbers.multiply(__uint_as_float(b0), __uint_as_float(b1), to);
  }
};

// A window's cells as rows of B: fragments of 16 of them and as many channels as 16 bytes hold
// twice, or once in float32.
template <typename T, int kDepth>
class CellRows {
 public:
  using Layout = DenseWindow<T, kDepth>;
  static constexpr int kLoads = Layout::kTeam / 2; // for all channels of a group

  // The window begins at cell (x, y) of the tile; `group` is counted within the slice.
  MMDCNV4_DEVICE CellRows(const WindowArguments& a, uint32_t x, uint32_t y, uint32_t group,
                          uint32_t lane, const unsigned char* cells)
      : step_bytes_(Layout::kStepLines * a.cells_w * kCellBytes) {
    // a loop of one turn: written without it, it compiles to other code than ran on GPUs
#pragma unroll
    for (uint32_t step = 0; step < 1; ++step) {
      const uint32_t cell = 16 * step + lane % 16; // lane's row for ldmatrix
      const uint32_t at = Layout::chunk_at(x + cell % Layout::kSide, y + cell / Layout::kSide,
                                           a.cells_w, group * Layout::kTeam + lane / 16);
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
        at_[load] = cells + (at ^ (2 * load * kChunkBytes));
    }
  }

  MMDCNV4_DEVICE void load(int step, int load, uint32_t (&to)[4]) const {
    load_matrices_transposed(at_[load] + step * step_bytes_, to);
  }

 private:
  const unsigned char* at_[kLoads];
  uint32_t step_bytes_;
};

template <int kDepth>
class CellRows<float, kDepth> {
 public:
  using Layout = DenseWindow<float, kDepth>;
  static constexpr int kLoads = Layout::kTeam / 2;

  MMDCNV4_DEVICE CellRows(const WindowArguments& a, uint32_t x, uint32_t y, uint32_t group,
                          uint32_t lane, const unsigned char* cells)
      : cells_(cells), step_bytes_(Layout::kStepLines * a.cells_w * kCellBytes) {
    const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint32_t line = 0; line < 2; ++line)
      at_[line] = Layout::chunk_at(x + 2 * t, y + line, a.cells_w, group * Layout::kTeam + g / 4) +
                  g % 4 * uint32_t(sizeof(float));
  }

  // Cells 2t and 2t + 1 of two lines, channel g. The two halves of a warp want neighbouring chunks
  // of cells two apart, so that each bank is met once; of the odd cells those are exchanged.
  MMDCNV4_DEVICE void load(int step, int load, uint32_t (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = read_shared<uint32_t>(cells_ + (at_[i / 2] ^ ((2 * load + i % 2) * kChunkBytes)) +
                                    i % 2 * kCellBytes + step * step_bytes_);
  }

 private:
  const unsigned char* cells_;
  uint32_t at_[2], step_bytes_;
};

} // namespace cuda
} // namespace mmdcnv4
