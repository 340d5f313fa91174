// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// window_plan.h — the same as launch_plan.h for the tensor-core kernels (cuda/window/): a block
// covers a tile of output pixels of one image, or of input pixels, and a slice of its channels.
#pragma once

#include "launch_plan.h"

namespace mmdcnv4 {

constexpr int32_t kWindowBlock = 4;          // output pixels that share a window, along each axis
constexpr int32_t kWindowSliceBytes = 128;   // of a pixel: 64 numbers of 16 bits, or 32 of float32
constexpr int32_t kReach = 2; // pixels; samples this near to their pixel are in its block's window
constexpr int32_t kWindowSide = kWindowBlock + 2 * kReach;

struct WindowPlan {
  bool is_made_for;         // else the call is not one for these kernels, or the device too small
  int32_t slice_channels;   // a multiple of a group's
  bool is_mirrored;         // tiles of input pixels, not of output pixels: gradient of value
  int32_t tile_h, tile_w;   // output pixels per block, powers of two, at least kWindowBlock
  int32_t threads;          // per block
  int32_t shared_bytes;     // per block, perhaps more than without opting in
  int64_t slices;           // blocks along the channels
  int64_t tiles_h, tiles_w; // blocks along the output map
  int64_t images_per_launch;

  int64_t blocks_per_image() const { return slices * tiles_h * tiles_w; }
  // Pairs of (4x4 pixels, group) in a tile; a warp computes one at a time.
  int32_t units(const Dcnv4Params& p) const {
    return tile_h * tile_w / (kWindowBlock * kWindowBlock) *
           int32_t(slice_channels / p.group_channels) / 2;
  }
};

WindowPlan make_window_plan(const Dcnv4Params& p, const LaunchRequest& request,
                            const DeviceLimits& limits);

// How the gradient of value keeps its weights in shared memory: for each column and line from
// -kReach to kReach around a pixel, one float32 for each of `pixels` pixels. Pitches in bytes; by a
// column the banks shift by 8 or back by 8, by a line by an odd number, so that a fragment meets
// every bank once.
struct StencilPitch {
  int32_t column, line, bytes;
};
inline StencilPitch stencil_pitch(int32_t pixels) {
  constexpr int32_t kSide = 2 * kReach + 1;
  const int32_t column = (pixels + 7) / 16 * 16 + 8;
  const int32_t line = kSide * column | 1;
  return {4 * column, 4 * line, (4 * kSide * line + 15) / 16 * 16};
}

// Lists of the taps whose samples are out of reach (cuda/window/far_lists.cuh): one for each group
// of each block of input pixels, with room for as many words as the block has numbers of value.
constexpr int64_t window_blocks(int64_t pixels) {
  return (pixels + kWindowBlock - 1) / kWindowBlock;
}
inline int64_t window_lists(const Dcnv4Params& p) {
  return p.batch * window_blocks(p.height) * window_blocks(p.width) * p.groups;
}
inline int64_t window_list_room(const Dcnv4Params& p) {
  return kWindowBlock * kWindowBlock * p.group_channels;
}

// Bytes of the chunks of 16 that hold the numbers of `groups` groups of a pixel in offset_mask,
// wherever they begin; an odd number of chunks, so that few pixels share a bank.
constexpr int32_t window_numbers_pitch(int32_t groups, int32_t offset_bytes) {
  const int32_t bytes = groups * 3 * 9 * offset_bytes - offset_bytes + kMaxVectorBytes;
  return ((bytes + kMaxVectorBytes - 1) / kMaxVectorBytes | 1) * kMaxVectorBytes;
}

// The tensor-core gradients take two kernels: of offset_mask, cut as the forward kernel is, and of
// value, cut into tiles of input pixels. They are made for the same calls.
struct WindowBackwardPlan {
  WindowPlan offset_mask, value;
  int64_t rest_blocks; // of the kernels for what the two leave over, which loop
};
WindowBackwardPlan make_window_backward_plan(const Dcnv4Params& p, const LaunchRequest& request,
                                             int32_t offset_bytes, const DeviceLimits& limits);

std::string to_json(const WindowPlan& plan);

} // namespace mmdcnv4
