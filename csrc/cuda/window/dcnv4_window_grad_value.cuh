// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_grad_value.cuh — tensor-core kernel for the gradient of value, the last of the
// kernels of dcnv4_window_backward.cuh.
//
// Computes    as dcnv4_backward.cuh: grad_value[cell] = sum of m_k * weight(cell) * grad_output
// Idea        the forward product the other way round: who owns cells gathers from pixels. The
//             samples of the output pixels within reach of 4x4 input pixels fill a matrix A^T
//             [16 input pixels x 8x8 output pixels], and tensor cores compute A^T . Y for all
//             channels of a group. Each gradient is written once, in its own type, without atomics
//             or a zeroed tensor
// Work split  block = a tile of input pixels and the output pixels around it, group after group;
//             thread = output pixel while weights are added up; warp = 4x4 input pixels while they
//             are multiplied
//
//               tile and halo                     a pixel's stencil: the cells that it may sample
//             o o o o o o o o o o o o             -2  . . . . .
//             o o o o o o o o o o o o             -1  . . . . .     line: cell above or below it
//             o o [ 4x4 ] [ 4x4 ] o o              0  . . o . .     column: left or right of it
//             o o [ 4x4 ] [ 4x4 ] o o              1  . . . . .     a sample adds to 2x2 of them
//             o o o o o o o o o o o o              2  . . . . .
//             o o o o o o o o o o o o                -2 -1 0 1 2
//             one line of [ 4x4 ] is four of pixels: a warp's cells, whose window of 8x8 pixels
//             reaches two further on each side
//
// Layout      weights in float32 [line][column][output pixel], line and column from -2 to 2 around
//             the pixel (stencil_pitch()): a sample adds to four neighbouring planes at its
//             thread's place, and only its thread does. Output pixels as the cells of
//             dense_window.cuh
// Far taps    those that are not near, see window_taps.cuh, are in a list of their block
//             (far_lists.cuh). They make another product, eight taps at a time, A^T [16 input
//             pixels x 8 taps] . Y. Where a list is full, its sums are added in its place
// NaN         A^T . Y multiplies every pixel of a window with every cell, and 0 * NaN is NaN. Sums
//             that are not finite are thrown away and taken again over the pixels that sample the
//             cell: places that no sample has added to hold -0.0, and no sum makes -0.0
// Numerics    weights are rounded to TF32 (11 bits, the range of float32), grad_output is exact in
//             it, or float32 and both are split (fragments.cuh); sums in float32; bitwise
//             repeatable, unless taps are far: lists have no order
// Source      arXiv:2401.06197, section 3, differentiated by hand
#pragma once

#include <cfloat>

#include "fragments.cuh"
#include "listed_taps.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr uint32_t kUntouched = 0x80000000u; // -0.0

// One of the output pixels around a tile.
struct PixelAround {
  uint32_t number; // within its image, kNoPixel where there is none
  Place edge;      // see edge_of_image()

  MMDCNV4_DEVICE PixelAround(const WindowArguments& a, const Tile& tile, uint32_t index) {
    uint32_t x = index, y = a.cell_lines.split(x);
    x += tile.x - kReach;
    y += tile.y - kReach;
    edge = edge_of_image(int32_t(x), int32_t(y));
    x += uint32_t(a.shift_x);
    y += uint32_t(a.shift_y);
    number = index < a.cells && x < uint32_t(a.map_w) && y < uint32_t(a.map_h)
                 ? y * uint32_t(a.map_w) + x
                 : kNoPixel;
  }
};

// Clears the weights of a pixel, if it has any; `at` is their first place.
MMDCNV4_DEVICE void clear_stencil(const WindowArguments& a, bool exists, unsigned char* at) {
#pragma unroll
  for (int line = 0; line <= 2 * kReach; ++line, at += a.stencil.line)
#pragma unroll
    for (int column = 0; column <= 2 * kReach; ++column) {
      enter_step(SharedPhase::kClear);
      if (exists) write_shared(at + column * a.stencil.column, uint32_t(kUntouched));
    }
}

// Adds the weights of a pixel's row; `at` is its place in line 0, column 0.
MMDCNV4_DEVICE void add_stencil(const WindowArguments& a, const PixelAround& pixel,
                                const RowNumbers& numbers, unsigned char* at) {
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    enter_step(SharedPhase::kScatter);
    const Place move = move_of_tap(a, k, numbers.offset[2 * k], numbers.offset[2 * k + 1]);
    if (pixel.number == kNoPixel || !is_near(move, pixel.edge, kReach) ||
        (k == kTaps - 1 && a.call.points < kTaps))
      continue;
    const NearSample sample = near_sample(move);
    unsigned char* corner[4];
    corner[0] = at + (sample.line * a.stencil.line + sample.column * a.stencil.column);
    corner[1] = corner[0] + a.stencil.column;
    corner[2] = corner[0] + a.stencil.line;
    corner[3] = corner[1] + a.stencil.line;
    const CornerWeights<float> w = corner_weights(numbers.mask[k], 1.0f - sample.fx, sample.fx,
                                                  1.0f - sample.fy, sample.fy);
    // + 0.0f: of what is -0.0 it makes 0.0
    const float weight[4] = {w.w00 + 0.0f, w.w01 + 0.0f, w.w10 + 0.0f, w.w11 + 0.0f};
    float sum[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = read_shared<float>(corner[c]) + weight[c];
#pragma unroll
    for (int c = 0; c < 4; ++c) write_shared(corner[c], sum[c]);
  }
}

// A warp's 4x4 input pixels, as rows of A^T, and a lane's part of it.
struct OwnedBlock {
  uint32_t x, y;   // of the first cell in the tile, also of the first pixel of its window
  uint32_t cx, cy; // lane's first row: cell (cx, cy) of the block; the other: two lines below it

  MMDCNV4_DEVICE OwnedBlock(const WindowArguments& a, uint32_t warp, uint32_t lane) {
    const uint32_t blocks_w_log2 = a.tile_w_log2 - 2, line = warp >> blocks_w_log2;
    x = (warp - (line << blocks_w_log2)) * kBlockSide;
    y = line * kBlockSide;
    cx = lane / 4 % kBlockSide;
    cy = lane / 4 / kBlockSide;
  }

  // Where the weight of pixel (wx, wy) of the window for a lane's row is among the weights; may lie
  // outside of them, see has_weight().
  MMDCNV4_DEVICE int32_t weight_at(const WindowArguments& a, uint32_t wx, uint32_t wy) const {
    return (2 * kReach + int32_t(cy) - int32_t(wy)) * a.stencil.line +
           (2 * kReach + int32_t(cx) - int32_t(wx)) * a.stencil.column +
           int32_t(((y + wy) * a.cells_w + x + wx) * sizeof(float));
  }
};

// Along one axis: whether cell `cell` of a block is within reach of pixel `pixel` of its window.
MMDCNV4_DEVICE bool has_weight(uint32_t pixel, uint32_t cell) {
  return pixel - cell <= 2 * kReach; // wraps
}

// A^T . Y for a warp's block; `group` within the slice.
template <typename T, int kDepth>
MMDCNV4_DEVICE void multiply_stencil(const WindowArguments& a, const OwnedBlock& block,
                                     uint32_t group, uint32_t lane, const unsigned char* weights,
                                     const unsigned char* pixels, float (&sum)[kDepth / 8][4]) {
  using Layout = DenseWindow<T, kDepth>;
  const uint32_t wx = lane % 4 * 2; // the first of a lane's two pixels of each line
  int32_t weight_at = 0;
  // a loop of one turn: written without it, it compiles to other code than ran on GPUs
#pragma unroll
  for (uint32_t line = 0; line < 1; ++line) weight_at = block.weight_at(a, wx, line);
  using Rows = CellRows<T, kDepth>;
  const Rows rows(a, block.x, block.y, group, lane, pixels);
  const int32_t down = int32_t(a.cells_w * sizeof(float)) - a.stencil.line;
  const int32_t beside = int32_t(sizeof(float)) - a.stencil.column; // the next pixel of the line
#pragma unroll
  for (int step = 0; step < int(Layout::kSteps); ++step) {
    Tf32Fragment<T> fragment[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) { // line, pixel, row
      const int line = 2 * step + i / 4, odd = i / 2 % 2, half = i % 2;
      enter_step(SharedPhase::kWeights);
      float weight = 0;
      // lines that no row of this half reaches need no test
      if (line >= 2 * half && line <= 2 * half + 1 + 2 * kReach &&
          has_weight(wx + odd, block.cx) && has_weight(line, block.cy + 2 * half))
        weight = read_shared<float>(weights + weight_at + line * down + odd * beside +
                                    half * 2 * a.stencil.line);
      fragment[i / 4].put(i % 4, weight);
    }
#pragma unroll
    for (int load = 0; load < Rows::kLoads; ++load) {
      uint32_t grads[4];
      enter_step(SharedPhase::kPixels);
      rows.load(step, load, grads);
      if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          fragment[i].multiply(__uint_as_float(grads[2 * i]), __uint_as_float(grads[2 * i + 1]),
                               sum[load]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) { // 8 channels, 8 pixels: two of each fall to a lane
          const float2 two = widen_pair(grads[i], T());
          fragment[i % 2].multiply(two.x, two.y, sum[2 * load + i / 2]);
        }
      }
    }
  }
}

// The same, over the pixels that sample a cell and no others.
template <typename T, int kDepth>
MMDCNV4_DEVICE void sum_exactly(const WindowArguments& a, const OwnedBlock& block, uint32_t group,
                                uint32_t lane, const unsigned char* weights,
                                const unsigned char* pixels, float (&sum)[kDepth / 8][4]) {
  using Layout = DenseWindow<T, kDepth>;
#pragma unroll
  for (int i = 0; i < kDepth / 2; ++i) sum[i / 4][i % 4] = 0;
#pragma unroll 1
  for (uint32_t pixel = 0; pixel < Layout::kCells; ++pixel) {
    const uint32_t wx = pixel % Layout::kSide, wy = pixel / Layout::kSide;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      enter_step(SharedPhase::kWeights);
      if (!has_weight(wx, block.cx) || !has_weight(wy, block.cy + 2 * half))
        continue;
      const uint32_t weight = read_shared<uint32_t>(
          weights + block.weight_at(a, wx, wy) + half * 2 * a.stencil.line);
      if (weight == kUntouched) continue;
#pragma unroll
      for (int i = 0; i < kDepth / 8; ++i) {
        using Two = VectorIo<T, 2>;
        const uint32_t channel = 8 * i + lane % 4 * 2;
        float grad[2];
        Two::widen(read_shared<typename Two::Raw>(
                       pixels +
                       Layout::chunk_at(block.x + wx, block.y + wy, a.cells_w,
                                        group * Layout::kTeam + channel / kChunkNumbers<T>) +
                       channel % kChunkNumbers<T> * sizeof(T)),
                   grad);
        sum[i][2 * half] += __uint_as_float(weight) * grad[0];
        sum[i][2 * half + 1] += __uint_as_float(weight) * grad[1];
      }
    }
  }
}

// Writes the gradients of a warp's block; `more`, if not null, is added to them: sums of its 16
// cells. grad_value points to the first channel of the group in the image.
template <typename T, int kDepth>
MMDCNV4_DEVICE void write_block(const WindowArguments& a, const Tile& tile,
                                const OwnedBlock& block, uint32_t lane,
                                const float (&sum)[kDepth / 8][4], const float* __restrict__ more,
                                T* __restrict__ grad_value) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t x = tile.x + block.x + block.cx, y = tile.y + block.y + block.cy + 2 * half;
    if (x >= uint32_t(a.rows_w) || y >= uint32_t(a.rows_h)) continue;
    const uint64_t first = (uint64_t(y) * uint32_t(a.rows_w) + x) * a.call.channels + lane % 4 * 2;
    const uint32_t cell = (block.cy + 2 * half) * kBlockSide + block.cx;
#pragma unroll
    for (int i = 0; i < kDepth / 8; ++i) {
      float two[2] = {sum[i][2 * half], sum[i][2 * half + 1]};
      if (more != nullptr) {
        float rest[2];
        VectorIo<float, 2>::widen(
            VectorIo<float, 2>::load(more + cell * kDepth + lane % 4 * 2 + 8 * i), rest);
        two[0] += rest[0];
        two[1] += rest[1];
      }
      VectorIo<T, 2>::store(two, grad_value + first + 8 * i);
    }
  }
}

// Blocks of a multiprocessor: there is shared memory for three; with groups of 64 channels there
// are registers for two, from sm_100 on with those of 32 in float32.
template <typename T, int kDepth>
constexpr int value_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kMostBytes = 64; // of a group, for three
#else
  constexpr int kMostBytes = 128;
#endif
  return kDepth == 64 || (sizeof(T) == 4 && kDepth * sizeof(T) > kMostBytes) ? 2 : 3;
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kMaxThreads, (value_blocks<T, kDepth>()))
    dcnv4_window_grad_value_kernel(const WindowArguments a,
                                   const T* __restrict__ grad_output,  // [N, Ho, Wo, G, D]
                                   const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                                   const FarLists lists, const Divisor line_of_output,
                                   T* __restrict__ grad_value) {       // [N, H, W, G, D]
#if MMDCNV4_HAS_TENSOR_CORES
  using Layout = DenseWindow<T, kDepth>;
  using Numbers = StagedNumbers<T, 1>;
  MMDCNV4_SHARED_MEMORY(weights);
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned char* pixels = weights + a.stencil.bytes;
  unsigned char* staged = pixels + a.cells * kCellBytes + warp * Numbers::bytes(offset_mask);
  const Tile tile = Layout::locate_tile(a, blockIdx.x);
  const uint64_t in_pixels = uint64_t(tile.image) * uint32_t(a.rows_h) * uint32_t(a.rows_w);
  const uint64_t out_pixels = uint64_t(tile.image) * uint32_t(a.map_h) * uint32_t(a.map_w);
  const OffsetNumbers<T> packed = offset_mask.from(int64_t(out_pixels * a.packed_channels));
  const auto fetch_numbers = [&](uint32_t group, const PixelAround& pixel) {
    Numbers::copy(a, lane, pixel.number, group, packed, staged);
    commit_copies();
  };
  fetch_numbers(tile.first_group, PixelAround(a, tile, threadIdx.x));
  copy_cells<T, kDepth>(a, tile, grad_output + out_pixels * a.call.channels, pixels);
  commit_copies();
  wait_copies<1>(); // pixels may take until the weights are there
#pragma unroll 1
  for (uint32_t pass = 0; pass < Layout::kGroups; ++pass) {
    const uint32_t group = tile.first_group + pass;
    if (group >= uint32_t(a.call.groups)) break;
    const bool is_last = pass + 1 == Layout::kGroups || group + 1 == uint32_t(a.call.groups);
    // a warp leaves when it has no more pixels; all of them have some
#pragma unroll 1
    for (uint32_t index = threadIdx.x; index - lane < a.cells; index += blockDim.x) {
      unsigned char* stencil = weights + index * sizeof(float);
      clear_stencil(a, index < a.cells, stencil); // no other thread adds there
      if (index != threadIdx.x || pass != 0) wait_copies<0>();
      __syncwarp();
      const RowNumbers numbers = Numbers::load(a, lane, group, packed, staged);
      __syncwarp();
      const bool is_done = index - lane + blockDim.x >= a.cells;
      if (!is_done || !is_last)
        fetch_numbers(is_done ? group + 1 : group,
                      PixelAround(a, tile, is_done ? threadIdx.x : index + blockDim.x));
      const PixelAround pixel(a, tile, index);
      add_stencil(a, pixel, numbers,
                          stencil + kReach * (a.stencil.line + a.stencil.column));
    }
    wait_copies<0>();
    __syncthreads();
    // addresses kept from one pass to the next would fill the registers
    const uint32_t thread = forget(threadIdx.x), own_lane = thread % kWarp;
    const OwnedBlock block(a, thread / kWarp, own_lane);
    const uint32_t block_x = tile.x + block.x, block_y = tile.y + block.y;
    if (block_x < uint32_t(a.rows_w) && block_y < uint32_t(a.rows_h)) { // so for all of the warp
      const uint64_t list =
          lists.list_of(tile.image, block_x / kBlockSide, block_y / kBlockSide, group);
      const uint32_t count = lists.count[list];
      const bool is_full = count > lists.room;
      const uint32_t listed = is_full ? 0 : count;
      float sum[kDepth / 8][4] = {};
      multiply_stencil<T, kDepth>(a, block, pass, own_lane, weights, pixels, sum);
      const auto add_list = [&](auto is_exact) {
        add_listed<decltype(is_exact)::value, T, kDepth>(
            a, line_of_output, block_x, block_y, group, own_lane,
            lists.entries + list * lists.room, listed, packed,
            grad_output + out_pixels * a.call.channels + group * kDepth, sum);
      };
      add_list(std::false_type());
      float total = 0;
#pragma unroll
      for (int i = 0; i < kDepth / 2; ++i) total += sum[i / 4][i % 4];
      if (__any_sync(kAllLanes, !(fabsf(total) <= FLT_MAX))) {
        sum_exactly<T, kDepth>(a, block, pass, own_lane, weights, pixels, sum);
        add_list(std::true_type());
      }
      write_block<T, kDepth>(a, tile, block, own_lane, sum, is_full ? lists.sums(list) : nullptr,
                             grad_value + in_pixels * a.call.channels + group * kDepth);
    }
    if (is_last) break;
    __syncthreads();
  }
#endif
}

} // namespace cuda
} // namespace mmdcnv4
