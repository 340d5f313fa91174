// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// arguments.h — sizes, geometry and division of work in the form that the kernels want: 32-bit
// numbers, shifts and multiplications in place of divisions. Built on the host for each call.
#pragma once

#include <cstdint>

#include "../bilinear.h"
#include "../launch_plan.h"

namespace mmdcnv4 {
namespace cuda {

// Division of 0 <= n < 2^31 by a number known on the host (Granlund and Montgomery, PLDI 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor), shift_(0), magic_(0) {
    while ((uint64_t(1) << shift_) < divisor) ++shift_;
    magic_ = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - divisor)) / divisor + 1);
  }
  // Returns n / divisor and leaves the remainder in n.
  MMDCNV4_HD uint32_t split(uint32_t& n) const {
    const uint32_t high = uint32_t((uint64_t(magic_) * n) >> 32);
    const uint32_t quotient = (high + n) >> shift_;
    n -= quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_, shift_, magic_;
};

// T: the type in which the kernel computes.
template <typename T>
struct KernelArguments {
  // value [N, H, W, G, D], offset_mask [N, Ho, Wo, P], output [N, Ho, Wo, G, D]
  int32_t height, width, out_height, out_width;
  int32_t groups, group_channels, points;
  int64_t offset_mask_channels;
  uint32_t channels;
  // geometry: tap (i, j) of output (x, y) rests at origin + stride * x + (dilation * i - center)
  T origin_x, origin_y, stride_x, stride_y, dilation_x, dilation_y, center_x, center_y, scale;
  Divisor kernel_h;
  int32_t removed_tap; // taps from here on have moved up by one; `points` where none is removed
  bool softmax;
  // division of work, see launch_plan.h
  int32_t team_log2, groups_log2, tile_w_log2, tile_h_log2;
  Divisor slices, tiles_w, tiles_h;
};

inline int32_t log2_of(int32_t power) {
  int32_t exponent = 0;
  while ((1 << exponent) < power) ++exponent;
  return exponent;
}

// Fills in all but the division of work.
template <typename T>
void set_call(const Dcnv4Params& p, KernelArguments<T>& a) {
  a.height = int32_t(p.height);
  a.width = int32_t(p.width);
  a.out_height = int32_t(p.out_height);
  a.out_width = int32_t(p.out_width);
  a.groups = int32_t(p.groups);
  a.group_channels = int32_t(p.group_channels);
  a.points = p.points();
  a.offset_mask_channels = p.offset_mask_channels;
  a.channels = uint32_t(p.channels());
  a.origin_x = T(p.center_w() - p.pad_w);
  a.origin_y = T(p.center_h() - p.pad_h);
  a.stride_x = T(p.stride_w);
  a.stride_y = T(p.stride_h);
  a.dilation_x = T(p.dilation_w);
  a.dilation_y = T(p.dilation_h);
  a.center_x = T(p.center_w());
  a.center_y = T(p.center_h());
  a.scale = T(p.offset_scale);
  a.kernel_h = Divisor(p.kernel_h);
  a.removed_tap = p.remove_center ? p.kernel_w / 2 * p.kernel_h + p.kernel_h / 2 : a.points;
  a.softmax = p.softmax;
}

template <typename T>
KernelArguments<T> make_arguments(const Dcnv4Params& p, const LaunchPlan& plan) {
  KernelArguments<T> a;
  set_call(p, a);
  a.team_log2 = log2_of(plan.team);
  a.groups_log2 = log2_of(plan.groups_per_block);
  a.tile_w_log2 = log2_of(plan.tile_w);
  a.tile_h_log2 = log2_of(plan.tile_h);
  a.slices = Divisor(uint32_t(plan.slices));
  a.tiles_w = Divisor(uint32_t(plan.tiles_w));
  a.tiles_h = Divisor(uint32_t(plan.tiles_h));
  return a;
}

// One (query, group) and the place of a thread in its team.
struct Row {
  int32_t group, x, y; // y and x of the output position
  uint32_t image;
  int32_t lane;  // of the team
  int32_t index; // of the row within the block
  bool is_valid; // false: past the last group or pixel; the thread only keeps its team company

  // Number of the output position among all of the batch, 0 for a row that is none.
  template <typename T>
  MMDCNV4_HD int64_t query(const KernelArguments<T>& a) const {
    return is_valid ? (int64_t(image) * a.out_height + y) * a.out_width + x : 0;
  }
};

template <typename T>
MMDCNV4_HD Row locate(const KernelArguments<T>& a, uint32_t block, int32_t thread) {
  Row row;
  row.index = thread >> a.team_log2;
  row.lane = thread - (row.index << a.team_log2);
  const int32_t pixel = row.index >> a.groups_log2;
  const int32_t pixel_y = pixel >> a.tile_w_log2;
  const uint32_t tile = a.slices.split(block); // leaves the slice in `block`
  row.group = int32_t(block << a.groups_log2) + row.index - (pixel << a.groups_log2);
  uint32_t tile_x = tile;
  uint32_t tile_y = a.tiles_w.split(tile_x);
  row.image = a.tiles_h.split(tile_y);
  row.x = int32_t(tile_x << a.tile_w_log2) + pixel - (pixel_y << a.tile_w_log2);
  row.y = int32_t(tile_y << a.tile_h_log2) + pixel_y;
  row.is_valid = row.group < a.groups && row.x < a.out_width && row.y < a.out_height;
  return row;
}

} // namespace cuda
} // namespace mmdcnv4
