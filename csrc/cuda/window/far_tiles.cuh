// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// far_tiles.cuh — tiles of the tensor-core forward kernel where many samples lie outside the windows
// of their pixels: to gather all of them is cheaper there, and by a kernel that needs half of the
// registers. A block judges its tile before anything else, marks it if it is far, and leaves it to
// the kernel below, which looks at all marks and computes as dcnv4_forward.cuh.
//
// Work split  of that kernel: block = 8x4 pixels of a tile and its slice of groups, one after the
//             other, as many blocks as the device holds
#pragma once

#include "../dcnv4_forward.cuh"
#include "dense_window.cuh"
#include "window_taps.cuh"

namespace mmdcnv4 {
namespace cuda {

// A sample seen from the window of its row. Numbers from 2^23 on are whole: their last bits are the
// floor of what was added to that.
template <typename Layout, int kReach>
struct WindowSample {
  static constexpr float kWhole = 8388608.0f;         // 2^23
  static constexpr uint32_t kWholeBits = 0x4b000000u; // its bits
  float x, y, column_up, line_up;
  uint32_t column, line; // of its upper left cell

  // `row`: of the matrix, pixel by pixel of its block.
  MMDCNV4_DEVICE WindowSample(const WindowArguments& a, uint32_t row, int k, float dx, float dy) {
    const Place moved = move_of_tap(a, k, dx, dy);
    x = float(row % kBlockSide + kReach) + moved.x; // from where the row's pixel is
    y = float(row / kBlockSide % kBlockSide + kReach) + moved.y;
    column_up = __fadd_rd(x, kWhole);
    line_up = __fadd_rd(y, kWhole);
    column = __float_as_uint(column_up) - kWholeBits;
    line = __float_as_uint(line_up) - kWholeBits;
  }
  MMDCNV4_DEVICE bool is_near() const { // not so below zero, nor for NaN
    constexpr uint32_t kLast = Layout::kSide - 1;
    return (column < kLast) & (line < kLast);
  }
};

struct FarTiles {
  uint8_t* marks; // [N, tiles_h, tiles_w, slices]: 1 where a tile is far
  uint32_t tile_w_log2, tile_h_log2, tiles_w, tiles_h, slices, slice_groups;

  FarTiles from(int64_t tile) const { // for the host
    FarTiles tiles = *this;
    tiles.marks += tile;
    return tiles;
  }
  MMDCNV4_DEVICE bool has(const Row& row) const {
    const uint32_t line = row.image * tiles_h + (uint32_t(row.y) >> tile_h_log2);
    const uint32_t tile = line * tiles_w + (uint32_t(row.x) >> tile_w_log2);
    return marks[tile * slices + uint32_t(row.group) / slice_groups] != 0;
  }
};

inline FarTiles make_far_tiles(const Dcnv4Params& p, const WindowPlan& plan, uint8_t* marks) {
  return {marks,
          uint32_t(log2_of(plan.tile_w)),
          uint32_t(log2_of(plan.tile_h)),
          uint32_t(plan.tiles_w),
          uint32_t(plan.tiles_h),
          uint32_t(plan.slices),
          uint32_t(plan.slice_channels / p.group_channels)};
}

// Whether the product is dearer than gathering, judged by two taps of a row for each thread; the
// answer is the block's. The larger a group, the cheaper the product for as many taps; where both
// take the same time was measured on an H200. `counts`: a word for each warp.
template <typename T, int kDepth, int kReach>
MMDCNV4_DEVICE bool is_far_tile(const WindowArguments& a, const Tile& tile,
                                const OffsetNumbers<T>& packed, unsigned char* counts) {
  using Layout = DenseWindow<T, kDepth, kReach>;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t pixel =
      (threadIdx.x << (a.tile_w_log2 + a.tile_h_log2)) / blockDim.x; // spread over the tile
  const uint32_t y = pixel >> a.tile_w_log2, x = pixel - (y << a.tile_w_log2);
  Row row{};
  row.group = int32_t(tile.first_group + (x + y + threadIdx.x) % Layout::kGroups);
  row.x = int32_t(tile.x + x);
  row.y = int32_t(tile.y + y);
  row.is_valid = row.group < a.call.groups && row.x < a.rows_w && row.y < a.rows_h;
  uint32_t far = 0;
  const auto count = [&](bool is_counted) {
    return uint32_t(__popc(__ballot_sync(kAllLanes, is_counted)));
  };
#pragma unroll
  for (int k = 1; k < 8; k += 4) {
    bool is_far = false;
    if (row.is_valid) {
      const OffsetNumbers<T> numbers =
          packed.from(int64_t(uint64_t(pixel_of(a, row)) * a.packed_channels) +
                      row.group * 3 * a.call.points);
      is_far = !WindowSample<Layout, kReach>(a, y % kBlockSide * kBlockSide + x % kBlockSide, k,
                                             numbers.load(2 * k), numbers.load(2 * k + 1))
                    .is_near();
    }
    far += count(is_far);
  }
  constexpr uint32_t kAll = 16; // bits of `far`
  const uint32_t own = count(row.is_valid) << kAll | far;
  enter_step(SharedPhase::kTaps);
  if (lane == 0) write_shared(counts + warp * sizeof(uint32_t), own);
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < blockDim.x / kWarp; ++i) {
    enter_step(SharedPhase::kTaps);
    sum += read_shared<uint32_t>(counts + i * sizeof(uint32_t));
  }
  constexpr uint32_t kRowsPerFar = sizeof(T) == sizeof(float) ? (kDepth == 16 ? 14 : 10)
                                   : kDepth == 16             ? 12
                                   : kDepth == 32             ? 5
                                                              : 4;
  return kRowsPerFar * (sum & ((1u << kAll) - 1)) > sum >> kAll;
}

// `items`: of 8x4 pixels and a slice. All pointers are those of the launch's first image.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 4)
    dcnv4_window_far_tiles_kernel(const KernelArguments<float> a, uint32_t items,
                                  const T* __restrict__ value,        // [N, H, W, G, D]
                                  const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                                  const FarTiles tiles,
                                  T* __restrict__ output) { // [N, Ho, Wo, G, D]
  MMDCNV4_SHARED_MEMORY(shared);
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Row row = locate(a, item, int32_t(threadIdx.x));
    if (tiles.has(row))
      forward_row<T, int(kChunkNumbers<T>), true>(a, row, value, offset_mask, output, shared);
  }
}

template <typename T>
void launch_far_tiles(const Dcnv4Params& p, const WindowPlan& plan, Stream stream, const T* value,
                      const OffsetNumbers<T>& offset_mask, const FarTiles& tiles, T* output) {
  constexpr int32_t kItemW = 8, kItemH = 4; // pixels; a tile has whole ones
  LaunchPlan direct{};
  direct.team = int32_t(p.group_channels / kChunkNumbers<T>);
  direct.groups_per_block = int32_t(plan.slice_channels / p.group_channels);
  direct.tile_w = kItemW;
  direct.tile_h = kItemH;
  direct.slices = plan.slices;
  direct.tiles_w = plan.tiles_w * (plan.tile_w / kItemW);
  direct.tiles_h = plan.tiles_h * (plan.tile_h / kItemH);
  const int32_t rows = kItemW * kItemH * direct.groups_per_block;
  const int32_t shared_bytes = rows * kTapsPerPass * tap_bytes(sizeof(float), false);
  for (int64_t image = 0; image < p.batch; image += plan.images_per_launch) {
    const int64_t images = std::min(plan.images_per_launch, p.batch - image);
    const int64_t items = images * direct.blocks_per_image();
    launch(&dcnv4_window_far_tiles_kernel<T>, std::min(items, plan.far_blocks), rows * direct.team,
           shared_bytes, stream, make_arguments<float>(p, direct), uint32_t(items),
           value + image * p.height * p.width * p.channels(),
           offset_mask.from(image * p.queries() * p.offset_mask_channels),
           tiles.from(image * plan.blocks_per_image()), output + image * p.queries() * p.channels());
  }
}

} // namespace cuda
} // namespace mmdcnv4
