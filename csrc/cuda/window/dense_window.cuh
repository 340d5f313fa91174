// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dense_window.cuh — how the tensor-core kernels see a call.
//
// The samples of 4x4 output pixels that lie within reach of their pixels, two pixels, fall into a
// window of 8x8 input pixels ("cells"). One group's outputs there are a product
//
//     out [16 pixels, D] = A [16 pixels, 64 cells] . V [64 cells, D]
//
// where row p of A holds the sums of mask * bilinear weight by which pixel p takes from each cell.
// Two such matrices make a unit, the work of a warp at a time: lane = row, 16 pixels of each.
//
//     tile     tile_w x tile_h output pixels (multiples of 4) of one image x a slice of 64
//              channels, in float32 of 32
//     matrix   a 4x4 block of the tile and a group of the slice; number = block * groups + group
//     unit     matrices 2u and 2u + 1: two groups of a block, or two blocks where a group fills the
//              slice
//
// Shared memory of a thread block:
//     cells    [tile_h + 4][tile_w + 4] of 128 bytes, 16-byte chunk c of cell (x, y) at
//              c ^ (x + 4 y) % 8: any eight cells in a row, of the tile or of a window, lie in
//              different banks; cells outside the image are zero
//     warps    one area each, 64 * 128 bytes, first A [cell][row] in float32, row r of cell i at
//              r ^ 8 (i / 2 % 4); before that the numbers of offset_mask, after that the results
#pragma once

#include "../../window_plan.h"
#include "../arguments.h"
#include "tensor_core.cuh"

namespace mmdcnv4 {
namespace cuda {

// Indices within a tile are unsigned: divisions by powers of two are single instructions then.
constexpr uint32_t kBlockSide = kWindowBlock; // output pixels of a block along each axis
constexpr uint32_t kMatrixRows = kBlockSide * kBlockSide;
constexpr uint32_t kRowBytes = 4; // of a weight: float32
constexpr uint32_t kWeightBytes = uint32_t(kWarp) * kRowBytes; // of a cell, for all rows of a unit
constexpr uint32_t kCellBytes = kWindowSliceBytes;             // of the channels of a cell
constexpr uint32_t kChunkBytes = 16;
template <typename T>
constexpr uint32_t kChunkNumbers = kChunkBytes / uint32_t(sizeof(T)); // of a chunk

// Most threads of a block: where a group fills the slice, a tile has units for four warps.
template <typename T>
constexpr int window_threads(int depth) {
  return depth * int(sizeof(T)) == kWindowSliceBytes ? kMaxThreads / 2 : kMaxThreads;
}

// Rows belong to the pixels of one map, cells to those of another: output and input, except for the
// gradient of value, where it is the other way round.
struct WindowArguments {
  KernelArguments<float> call; // its division of work is not used
  int32_t rows_w, rows_h, map_w, map_h; // the two maps: of rows, of cells
  int32_t shift_x, shift_y; // from a pixel of the rows to the same place among the cells
  uint32_t tile_w_log2, tile_h_log2;
  uint32_t cells_w, cells; // of a tile: per line, in all
  uint32_t units; // of a tile
  uint32_t packed_channels; // P
  StencilPitch stencil; // gradient of value only
  Divisor slices, tiles_w, tiles_h, cell_lines;
};

inline WindowArguments make_window_arguments(const Dcnv4Params& p, const WindowPlan& plan) {
  WindowArguments a{};
  set_call(p, a.call);
  a.tile_w_log2 = uint32_t(log2_of(plan.tile_w));
  a.tile_h_log2 = uint32_t(log2_of(plan.tile_h));
  a.cells_w = uint32_t(plan.tile_w + 2 * kReach);
  a.cells = a.cells_w * uint32_t(plan.tile_h + 2 * kReach);
  a.units = uint32_t(plan.units(p));
  a.packed_channels = uint32_t(p.offset_mask_channels);
  const int32_t sign = plan.is_mirrored ? -1 : 1;
  a.shift_x = sign * int32_t(p.center_w() - p.pad_w);
  a.shift_y = sign * int32_t(p.center_h() - p.pad_h);
  a.rows_w = int32_t(plan.is_mirrored ? p.width : p.out_width);
  a.rows_h = int32_t(plan.is_mirrored ? p.height : p.out_height);
  a.map_w = int32_t(plan.is_mirrored ? p.out_width : p.width);
  a.map_h = int32_t(plan.is_mirrored ? p.out_height : p.height);
  a.stencil = stencil_pitch(int32_t(a.cells));
  a.slices = Divisor(uint32_t(plan.slices));
  a.tiles_w = Divisor(uint32_t(plan.tiles_w));
  a.tiles_h = Divisor(uint32_t(plan.tiles_h));
  a.cell_lines = Divisor(a.cells_w);
  return a;
}

struct Tile {
  uint32_t first_group; // of its slice
  uint32_t x, y;        // first output pixel
  uint32_t image;
};

template <typename T, int kDepth>
struct DenseWindow {
  static constexpr uint32_t kSide = kWindowSide;
  static constexpr uint32_t kCells = kSide * kSide;
  static constexpr uint32_t kSteps = kCells / 16; // of the product, 16 cells each
  static constexpr uint32_t kStepLines = 16 / kSide; // lines of cells in a step
  static constexpr uint32_t kAreaBytes = kCells * kWeightBytes; // of a warp
  static constexpr uint32_t kGroups = kCellBytes / (kDepth * sizeof(T)); // of a slice
  static constexpr uint32_t kTeam = kDepth / kChunkNumbers<T>; // lanes that finish a row together
  static_assert(kStepLines == 2, "the order of chunks repeats with every second line");

  static MMDCNV4_HD Tile locate_tile(const WindowArguments& a, uint32_t block) {
    uint32_t tile_x = a.slices.split(block); // leaves the slice in `block`
    uint32_t tile_y = a.tiles_w.split(tile_x);
    const uint32_t image = a.tiles_h.split(tile_y);
    return {block * kGroups, tile_x << a.tile_w_log2, tile_y << a.tile_h_log2, image};
  }

  // First pixel of a matrix' block, and its group, both within the tile.
  struct Matrix {
    uint32_t x, y, group;
  };
  static MMDCNV4_HD Matrix locate_matrix(const WindowArguments& a, uint32_t matrix) {
    const uint32_t block = matrix / kGroups, blocks_w_log2 = a.tile_w_log2 - 2;
    const uint32_t line = block >> blocks_w_log2;
    return {(block - (line << blocks_w_log2)) * kBlockSide, line * kBlockSide, matrix % kGroups};
  }

  // Row 0 ... 31 of a unit.
  static MMDCNV4_HD Row locate_row(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                   uint32_t index) {
    const Matrix matrix = locate_matrix(a, 2 * unit + index / kMatrixRows);
    Row row;
    row.group = int32_t(tile.first_group + matrix.group);
    row.x = int32_t(tile.x + matrix.x + index % kBlockSide);
    row.y = int32_t(tile.y + matrix.y + index / kBlockSide % kBlockSide);
    row.image = tile.image;
    row.lane = 0;
    row.index = int32_t(index);
    row.is_valid = row.group < a.call.groups && row.x < a.rows_w && row.y < a.rows_h;
    return row;
  }

  // Where the weight of `row` for `cell` is in a warp's area.
  static MMDCNV4_HD uint32_t weight_at(uint32_t cell, uint32_t row) {
    return cell * kWeightBytes + ((row * kRowBytes) ^ ((cell & 6) << 4));
  }

  // Where the weights of `row` for the four cells of a sample are, `cell` being the upper left one:
  // right of it, below it, below on the right.
  static MMDCNV4_HD void corners_at(uint32_t cell, uint32_t row, uint32_t (&at)[4]) {
    constexpr uint32_t kDown = kSide * kWeightBytes;
    static_assert(kSide % 8 == 0, "a line further down, the order of rows is the same");
    at[0] = weight_at(cell, row);
    at[1] = weight_at(cell + 1, row);
    at[2] = at[0] + kDown;
    at[3] = at[1] + kDown;
  }

  // Where chunk `chunk` of cell (x, y) of the tile is among the cells.
  static MMDCNV4_HD uint32_t chunk_at(uint32_t x, uint32_t y, uint32_t cells_w, uint32_t chunk) {
    return (y * cells_w + x) * kCellBytes + ((chunk ^ ((x + 4 * y) & 7)) * kChunkBytes);
  }

  // Where number `column` of row `row` of the results is in a warp's area, in float32: row after
  // row, in lines of 128 bytes whose eight chunks are exchanged by a key.
  //
  //     collect()     a quarter-warp writes pairs: 4 lanes a chunk and its neighbour of a row, the
  //                   four rows beside them in other lines: 64 bytes of each bank half, no conflict
  //     finish_row()  a team reads whole rows, a chunk per lane and access
  //
  // The key repeats every eight rows, and every kWarp / kTeam rows: those are constant distances.
  static MMDCNV4_HD uint32_t result_at(uint32_t row, uint32_t column) {
    constexpr uint32_t kLine = 32; // numbers
    const uint32_t line = kDepth < kLine ? row / (kLine / kDepth)
                                         : row * (kDepth / kLine) + column / kLine;
    const uint32_t key = kDepth == 64 ? line & 7 : (line & 3) << 1 | (line & 1);
    return ((row * kDepth + column) * 4) ^ (key * kChunkBytes);
  }
  static constexpr uint32_t kResultBytes = kDepth * 4; // of a row
};

// Number of a row's pixel within its image.
MMDCNV4_HD uint32_t pixel_of(const WindowArguments& a, const Row& row) {
  return uint32_t(row.y) * uint32_t(a.rows_w) + uint32_t(row.x);
}

// Copies the cells of a tile into shared memory, 16 bytes at a time, by all warps of the block,
// line after line, each lane the same chunk of every fourth cell. Lines have a multiple of four.
template <typename T, int kDepth>
MMDCNV4_DEVICE void copy_cells(const WindowArguments& a, const Tile& tile,
                               const T* __restrict__ image, unsigned char* cells) {
  using Layout = DenseWindow<T, kDepth>;
  constexpr uint32_t kStep = 4; // cells that a warp copies at a time, 8 chunks each
  const uint32_t lane = threadIdx.x % kWarp, chunk = lane % 8, first = lane / 8;
  const uint32_t channel = tile.first_group * kDepth + chunk * kChunkNumbers<T>;
  const bool has_channel = channel < a.call.channels;
  const char* from = reinterpret_cast<const char*>(image + (has_channel ? channel : 0));
  const uint32_t pitch = uint32_t(a.call.channels) * uint32_t(sizeof(T));
  const uint32_t in_x = tile.x + uint32_t(a.shift_x) - kReach; // of cell (0, 0); wraps if negative
  const uint32_t in_y = tile.y + uint32_t(a.shift_y) - kReach;
  const uint32_t lines = (1u << a.tile_h_log2) + 2 * kReach;
#pragma unroll 1
  for (uint32_t y = threadIdx.x / kWarp; y < lines; y += blockDim.x / kWarp) {
    const bool has_line = has_channel & (in_y + y < uint32_t(a.map_h));
    const uint32_t line = (in_y + y) * uint32_t(a.map_w);
    uint32_t at = Layout::chunk_at(first, y, a.cells_w, chunk);
#pragma unroll 3
    for (uint32_t x = first; x < a.cells_w; x += kStep) {
      const bool exists = has_line & (in_x + x < uint32_t(a.map_w));
      const uint32_t pixel = exists ? line + in_x + x : 0;
      enter_step(SharedPhase::kCopy);
      copy_async(cells + at, from + uint64_t(pixel) * pitch, exists);
      at = (at + kStep * kCellBytes) ^ (kStep * kChunkBytes); // chunk_at() of the next x
    }
  }
}

} // namespace cuda
} // namespace mmdcnv4
