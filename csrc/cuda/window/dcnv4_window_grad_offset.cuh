// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_grad_offset.cuh — tensor-core kernel for the gradients of offsets and masks, the
// first of the kernels of dcnv4_window_backward.cuh.
//
// Computes    as dcnv4_backward.cuh: grad_mask = h_k,
//             grad_offset = offset_scale * m_k * d h_k / d(x, y)
// Idea        h_k needs the dot products of grad_output with the four cells of a sample. Tensor
//             cores compute them for all cells of a window at once, Y . V^T [16 pixels x cells]
//             (dense_window.cuh); then each tap of a row reads its four. Nothing is summed over
//             channels by shuffles any more
// Work split  as dcnv4_window_forward.cuh; lane = row while taps are read
// Left over   taps whose cells are not all in reach ("far"), or whose gradients are not finite (a
//             product with a cell outside the image may be 0 * NaN). The warp collects those of its
//             unit, and teams of lanes with 16 bytes each take them, gathering like
//             dcnv4_backward.cuh; what a far tap adds to value goes into lists, for
//             dcnv4_window_grad_value.cuh
// Memory      results go through shared memory and are written once, the padding included
// Numerics    products of 16-bit numbers are exact, float32 is split (fragments.cuh); sums in
//             float32; bitwise repeatable
// Source      arXiv:2401.06197, section 3, differentiated by hand
#pragma once

#include <cfloat>

#include "../dispatch.h"
#include "../gather_tap.cuh"
#include "../launch.h"
#include "fragments.cuh"
#include "window_numbers.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

// Words of the fragments of Y, of both matrices of a unit: of 16 channels each, in float32 of 8.
// grad_output is that of the image.
template <typename T, int kDepth>
using GradWords = uint32_t[2][kDepth / (2 * kChunkNumbers<T>)][4];

template <typename T, int kDepth>
MMDCNV4_DEVICE void load_grads(const WindowArguments& a, const Tile& tile, uint32_t unit,
                               uint32_t lane, const T* __restrict__ grad_output,
                               GradWords<T, kDepth>& grads) {
  using Layout = DenseWindow<T, kDepth>;
  const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = Layout::locate_row(a, tile, unit, m * kMatrixRows + half * 8 + g);
      constexpr int kInWord = int(sizeof(uint32_t) / sizeof(T));
      const T* from = grad_output +
                      uint64_t(row.is_valid ? pixel_of(a, row) : 0) * a.call.channels +
                      (row.is_valid ? uint32_t(row.group) * kDepth : 0) + kInWord * t;
#pragma unroll
      for (int i = 0; i < int(Layout::kTeam); ++i)
        grads[m][i / 2][half + i % 2 * 2] =
            row.is_valid ? VectorIo<T, kInWord>::load(from + kChunkNumbers<T> * i) : 0;
    }
}

// Y . V^T of both matrices of a unit, in float32, to the places of the weights of the forward
// kernel.
template <typename T, int kDepth>
MMDCNV4_DEVICE void dot_cells(const WindowArguments& a, uint32_t unit, uint32_t lane,
                              const GradWords<T, kDepth>& grads, const unsigned char* cells,
                              unsigned char* area) {
  using Layout = DenseWindow<T, kDepth>;
  constexpr int kTeam = Layout::kTeam, kLoads = kTeam / 2; // of four 8x8 matrices per 16 cells
  const uint32_t g = lane / 4, t = lane % 4;
  const uint32_t step_bytes = Layout::kStepLines * a.cells_w * kCellBytes;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const typename Layout::Matrix matrix = Layout::locate_matrix(a, 2 * unit + m);
    const unsigned char* cells_at[kLoads]; // lane's row for ldmatrix
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const uint32_t of = 4 * j + lane / 8; // the 8x8 matrix: 8 cells, then chunks, fastest
      const uint32_t cell = of / kTeam * 8 + lane % 8;
      cells_at[j] = cells + Layout::chunk_at(matrix.x + cell % Layout::kSide,
                                             matrix.y + cell / Layout::kSide, a.cells_w,
                                             matrix.group * kTeam + of % kTeam);
    }
    const auto grads_of = [&](int pair) { return GradFragment<T>(grads[m][pair]); };
    unsigned char* dots_at[2] = {area + Layout::weight_at(2 * t, m * kMatrixRows + g),
                                 area + Layout::weight_at(2 * t, m * kMatrixRows + 8 + g)};
#pragma unroll
    for (int step = 0; step < int(Layout::kSteps); ++step) {
      float dot[2][4] = {}; // of 8 cells each
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        uint32_t pixels[4];
        enter_step(SharedPhase::kPixels);
        load_matrices(cells_at[j] + step * step_bytes, pixels);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) // two chunks
          grads_of((4 * j + 2 * pair) % kTeam / 2)
              .multiply(pixels[2 * pair], pixels[2 * pair + 1], dot[(4 * j + 2 * pair) / kTeam]);
      }
      enter_step(SharedPhase::kCollect);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        write_shared(dots_at[i / 2 % 2] + (step * 16 + i / 4 * 8 + i % 2) * kWeightBytes,
                     dot[i / 4][i % 4]);
    }
  }
}

// Gradients of the taps of a row as they lie in memory: offsets, then, from 2 K on, masks.
struct RowGradients {
  float offset[2 * kTaps], mask[kTaps];
  uint32_t rest; // taps that are left over, as bits
};

template <typename Layout>
MMDCNV4_DEVICE RowGradients read_taps(const WindowArguments& a, uint32_t lane, const Row& row,
                                      const RowNumbers& numbers, const unsigned char* area) {
  const uint32_t x = lane % kBlockSide + kReach, y = lane / kBlockSide % kBlockSide + kReach;
  const Place edge = edge_of_image(row.x + a.shift_x, row.y + a.shift_y);
  RowGradients grad{};
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    enter_step(SharedPhase::kTaps);
    const Place move = move_of_tap(a, k, numbers.offset[2 * k], numbers.offset[2 * k + 1]);
    bool is_done = is_on_edge(move, edge);
    if (is_near(move, edge, kReach) && (k < kTaps - 1 || a.call.points == kTaps)) {
      const NearSample sample = near_sample(move);
      uint32_t at[4];
      Layout::corners_at((y + sample.line) * Layout::kSide + x + sample.column, lane, at);
      float dot[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) dot[c] = read_shared<float>(area + at[c]);
      const BilinearGrad<float> of =
          bilinear_grad(dot[0], dot[1], dot[2], dot[3], sample.fx, sample.fy);
      const float scale = a.call.scale * numbers.mask[k];
      grad.offset[2 * k] = scale * of.x;
      grad.offset[2 * k + 1] = scale * of.y;
      grad.mask[k] = of.mask;
      is_done = fabsf((grad.offset[2 * k] + grad.offset[2 * k + 1]) + of.mask) <= FLT_MAX;
    }
    if (!is_done) grad.rest |= 1u << k;
  }
  grad.rest &= (1u << a.call.points) - 1u;
  return grad;
}

template <typename Offset>
MMDCNV4_DEVICE void write_number(unsigned char* to, float number) {
  if constexpr (sizeof(Offset) == 4) {
    write_shared(to, number);
  } else {
    write_shared(to, uint16_t(narrow_pair(number, 0.0f, Offset())));
  }
}

// To the places where the numbers of the row were.
template <typename Offset>
MMDCNV4_DEVICE void write_row(const RowGradients& grad, int32_t points, unsigned char* to) {
  enter_step(SharedPhase::kFinish);
#pragma unroll
  for (int i = 0; i < 2 * kTaps; ++i)
    if (i < 2 * points) write_number<Offset>(to + i * sizeof(Offset), grad.offset[i]);
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    if (k < points) write_number<Offset>(to + (2 * points + k) * sizeof(Offset), grad.mask[k]);
}

// From there to grad_offset_mask of the image; after the last group the padding, zero.
template <typename T, typename Offset, int kDepth>
MMDCNV4_DEVICE void write_unit(const WindowArguments& a, const Tile& tile, uint32_t unit,
                               uint32_t lane, const unsigned char* area,
                               Offset* __restrict__ grad_packed) {
  using Layout = DenseWindow<T, kDepth>;
  using Numbers = NumbersLayout<Offset, (Layout::kGroups > 1 ? 2 : 1)>;
  // units of two groups begin with an even one, so that pairs of halves are aligned; where the
  // last group stands alone an odd number of them is followed by padding
  constexpr int32_t kTogether = sizeof(Offset) == 2 && Numbers::kPixels < kWarp ? 2 : 1;
  using Word = typename Words<kTogether * int(sizeof(Offset))>::type;
  const uint32_t first_group = tile.first_group + Layout::locate_matrix(a, 2 * unit).group;
  const int32_t left = a.call.groups - int32_t(first_group);
  const int32_t groups = left < kWarp / int32_t(Numbers::kPixels) ? left
                                                                  : kWarp / Numbers::kPixels;
  const int32_t used = groups * 3 * a.call.points;
  const int32_t count = groups < left ? used
                                      : int32_t(a.packed_channels) -
                                            int32_t(first_group) * 3 * a.call.points;
  constexpr int32_t kMost = kWarp / int32_t(Numbers::kPixels) * 3 * kTaps + 7; // with padding
  area += Numbers::lead(a, first_group) + lane * sizeof(Word);
  grad_packed += first_group * uint32_t(3 * a.call.points) + lane * kTogether;
#pragma unroll 4 // a line of a block
  for (uint32_t i = 0; i < Numbers::kPixels; ++i) {
    const Row row = Layout::locate_row(a, tile, unit, i);
    enter_step(SharedPhase::kFinish);
    if (!row.is_valid) continue;
    Offset* to = grad_packed + uint64_t(pixel_of(a, row)) * a.packed_channels;
#pragma unroll
    for (int32_t j = 0; j < kMost; j += kWarp * kTogether) {
      const int32_t number = int32_t(lane) * kTogether + j;
      if (number >= count) continue;
      Word word = 0;
      if (number < used)
        word = read_shared<Word>(area + i * Numbers::kPitch + j * int32_t(sizeof(Offset)));
      if (kTogether == 2 && number + 1 == used) word &= Word(0xffff);
      *reinterpret_cast<Word*>(to + j) = word;
    }
  }
}

// Where the gradients of rows lie in the area, until they are written.
template <typename T, int kDepth>
struct UnitGradients {
  using Layout = DenseWindow<T, kDepth>;
  template <typename Offset>
  using Numbers = NumbersLayout<Offset, (Layout::kGroups > 1 ? 2 : 1)>;
  static constexpr uint32_t kPairBytes = 2; // of a tap that is left over, see collect()
  static constexpr uint32_t kPairsAt = Layout::kAreaBytes - kPairBytes * kWarp * kTaps;
  static_assert(Numbers<float>::kBytes <= kPairsAt, "the left-over taps lie behind the gradients");

  const WindowArguments& a;
  uint32_t first_group;
  bool are_wider;
  unsigned char* area;

  MMDCNV4_DEVICE void put_row(uint32_t lane, const RowGradients& grad) const {
    if (are_wider) {
      write_row<float>(grad, a.call.points, area + Numbers<float>::place(a, first_group, lane));
    } else {
      write_row<T>(grad, a.call.points, area + Numbers<T>::place(a, first_group, lane));
    }
  }
  // Those of tap k, in place of what was there.
  MMDCNV4_DEVICE void put_tap(uint32_t row, int32_t k, float x, float y, float mask) const {
    if (are_wider) {
      put<float>(row, k, x, y, mask);
    } else {
      put<T>(row, k, x, y, mask);
    }
  }
  MMDCNV4_DEVICE void write(const Tile& tile, uint32_t unit, uint32_t lane,
                            unsigned char* grad_packed) const {
    if (are_wider) {
      write_unit<T, float, kDepth>(a, tile, unit, lane, area,
                                           reinterpret_cast<float*>(grad_packed));
    } else {
      write_unit<T, T, kDepth>(a, tile, unit, lane, area,
                                       reinterpret_cast<T*>(grad_packed));
    }
  }

  // Collects the taps that the lanes' rows have left over, as row + 32 * tap; returns how many.
  MMDCNV4_DEVICE uint32_t collect(uint32_t lane, uint32_t taps) const {
    const uint32_t own = uint32_t(__popc(taps));
    uint32_t end = own; // of the lanes up to this one
#pragma unroll
    for (uint32_t step = 1; step < uint32_t(kWarp); step *= 2) {
      const uint32_t before = __shfl_sync(kAllLanes, end, int(lane - step));
      end += lane >= step ? before : 0;
    }
    unsigned char* to = area + kPairsAt + (end - own) * kPairBytes;
    enter_step(SharedPhase::kFar);
#pragma unroll 1
    for (; taps != 0; taps &= taps - 1, to += kPairBytes)
      write_shared(to, uint16_t(lane | uint32_t(__ffs(taps) - 1) * kWarp));
    return __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  MMDCNV4_DEVICE uint32_t collected(uint32_t index) const {
    enter_step(SharedPhase::kFar);
    return read_shared<uint16_t>(area + kPairsAt + index * kPairBytes);
  }

 private:
  template <typename Offset>
  MMDCNV4_DEVICE void put(uint32_t row, int32_t k, float x, float y, float mask) const {
    enter_step(SharedPhase::kFar);
    unsigned char* to = area + Numbers<Offset>::place(a, first_group, row);
    write_number<Offset>(to + 2 * k * int32_t(sizeof(Offset)), x);
    write_number<Offset>(to + (2 * k + 1) * int32_t(sizeof(Offset)), y);
    write_number<Offset>(to + (2 * a.call.points + k) * int32_t(sizeof(Offset)), mask);
  }
};

// The gradients of the taps that are left over, and their place in the lists. grad_output, value
// and packed are those of the tile's image.
template <typename T, int kDepth>
MMDCNV4_DEVICE void take_left_over(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                   uint32_t lane, uint32_t count,
                                   const T* __restrict__ grad_output, const T* __restrict__ value,
                                   const OffsetNumbers<T>& packed, const FarLists& lists,
                                   const UnitGradients<T, kDepth>& gradients) {
  using Layout = DenseWindow<T, kDepth>;
  constexpr int kVec = kChunkNumbers<T>, kTeam = Layout::kTeam;
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kWarp / kTeam) {
    const uint32_t index = first + lane / kTeam;
    const bool has_tap = index < count;
    const uint32_t pair = gradients.collected(has_tap ? index : 0);
    const Row row = Layout::locate_row(a, tile, unit, pair % kWarp);
    const uint32_t pixel = pixel_of(a, row), group = uint32_t(row.group);
    const int32_t k = int32_t(pair / kWarp);
    const OffsetNumbers<T> numbers =
        packed.from(int64_t(uint64_t(pixel) * a.packed_channels) +
                    int32_t(group) * 3 * a.call.points);
    const TapNumbers<float> tap = numbers.load_tap(k, a.call.points);
    const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{}, tap, k);
    const uint32_t bits = has_tap ? corner_bits(sample.bilinear) : 0;
    const Channels<T> channels{
        grad_output, value, int64_t(uint64_t(pixel) * a.call.channels + group * kDepth),
        int64_t(group * kDepth), a.call.channels, int32_t(lane % kTeam) * kVec, kDepth, kDepth};
    float grad[kVec], dot[4] = {};
    VectorIo<T, kVec>::widen(
        VectorIo<T, kVec>::load(grad_output + channels.row + channels.begin), grad);
    if (bits != 0) {
      gather_tap(channels, corner_pixels(a.call, sample.bilinear), bits, grad, dot,
                 [](int, uint32_t, int32_t) {});
      const Place move = move_of_tap(a, k, tap.dx, tap.dy);
      if (!is_near(move, edge_of_image(row.x + a.shift_x, row.y + a.shift_y), kReach))
        list_tap<kTeam>(lists, tile.image, group, sample.bilinear, pixel * kTaps + uint32_t(k),
                        lane % kTeam);
    }
    BilinearGrad<float> sum = bilinear_grad(dot[0], dot[1], dot[2], dot[3], sample.bilinear.fx,
                                            sample.bilinear.fy);
    sum = {team_sum(sum.mask, kTeam), team_sum(sum.x, kTeam), team_sum(sum.y, kTeam)};
    const float scale = a.call.scale * sample.mask;
    if (has_tap && lane % kTeam == 0)
      gradients.put_tap(pair % kWarp, k, bits ? scale * sum.x : 0.0f, bits ? scale * sum.y : 0.0f,
                        sum.mask);
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(window_threads<T>(kDepth),
                                  window_threads<T>(kDepth) < kMaxThreads ? 3 : 2)
    dcnv4_window_grad_offset_kernel(const WindowArguments a,
                                    const T* __restrict__ grad_output,         // [N, Ho, Wo, G, D]
                                    const T* __restrict__ value,               // [N, H, W, G, D]
                                    const OffsetNumbers<T> offset_mask,        // [N, Ho, Wo, P]
                                    const OffsetGradients<T> grad_offset_mask, // [N, Ho, Wo, P]
                                    const FarLists lists) {
#if MMDCNV4_HAS_TENSOR_CORES
  using Layout = DenseWindow<T, kDepth>;
  using Numbers = UnitNumbers<T, kDepth>;
  MMDCNV4_SHARED_MEMORY(shared);
  const uint32_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Tile tile = Layout::locate_tile(a, blockIdx.x);
  const uint64_t in_pixels =
      uint64_t(tile.image) * uint32_t(a.call.height) * uint32_t(a.call.width);
  const uint64_t out_pixels =
      uint64_t(tile.image) * uint32_t(a.call.out_height) * uint32_t(a.call.out_width);
  grad_output += out_pixels * a.call.channels;
  value += in_pixels * a.call.channels;
  const int64_t first_number = int64_t(out_pixels * a.packed_channels);
  const OffsetNumbers<T> packed = offset_mask.from(first_number);
  const OffsetGradients<T> grad_packed = grad_offset_mask.from(first_number);
  unsigned char* area = shared + warp * Layout::kAreaBytes;
  unsigned char* cells = shared + warps * Layout::kAreaBytes;
  copy_cells<T, kDepth>(a, tile, value, cells);
#pragma unroll 1
  for (uint32_t unit = warp; unit < a.units; unit += warps) {
    // addresses kept from one unit to the next would fill the registers
    const uint32_t lane = forget(threadIdx.x) % kWarp;
    const Row row = Layout::locate_row(a, tile, unit, lane);
    const uint32_t first_group = tile.first_group + Layout::locate_matrix(a, 2 * unit).group;
    Numbers::copy_unit(a, tile, unit, lane, packed, area);
    commit_copies(); // the first time with the cells
    GradWords<T, kDepth> grads; // on their way at the same time
    load_grads<T, kDepth>(a, tile, unit, lane, grad_output, grads);
    wait_copies<0>();
    if (unit == warp) __syncthreads();
    __syncwarp();
    const RowNumbers numbers = Numbers::load(a, lane, first_group, packed, area);
    __syncwarp();
    dot_cells<T, kDepth>(a, unit, lane, grads, cells, area);
    __syncwarp();
    const RowGradients grad = read_taps<Layout>(a, lane, row, numbers, area);
    __syncwarp();
    const UnitGradients<T, kDepth> gradients{a, first_group, packed.are_wider(), area};
    gradients.put_row(lane, grad);
    const uint32_t left_over = row.is_valid ? grad.rest : 0;
    if (__any_sync(kAllLanes, left_over != 0)) {
      const uint32_t count = gradients.collect(lane, left_over);
      __syncwarp();
      take_left_over<T, kDepth>(a, tile, unit, lane, count, grad_output, value, packed,
                                        lists, gradients);
    }
    __syncwarp();
    gradients.write(tile, unit, lane, grad_packed.data);
    __syncwarp();
  }
#endif
}

} // namespace cuda
} // namespace mmdcnv4
