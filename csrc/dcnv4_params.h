// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_params.h — sizes and geometry of one DCNv4 call: all that a kernel knows besides its
// pointers. No torch headers, so that host and device code can share it.
#pragma once

#include <cstdint>

namespace mmdcnv4 {

struct Dcnv4Params {
  // tensors: value [N, H, W, G, D], offset_mask [N, Ho, Wo, P], output [N, Ho, Wo, G, D]
  int64_t batch;                 // N
  int64_t height, width;         // H, W
  int64_t groups;                // G
  int64_t group_channels;        // D
  int64_t out_height, out_width; // Ho, Wo
  int64_t offset_mask_channels;  // P = G * 3K rounded up to 8
  // geometry, in input pixels
  int32_t kernel_h, kernel_w;
  int32_t stride_h, stride_w;
  int32_t pad_h, pad_w;
  int32_t dilation_h, dilation_w;
  double offset_scale; // factor on the kernel grid and on the offsets
  bool remove_center;  // the middle tap is left out
  bool softmax;        // masks are normalised over the taps of a group

  int64_t channels() const { return groups * group_channels; }                           // C
  int32_t points() const { return kernel_h * kernel_w - (remove_center ? 1 : 0); }       // K
  int64_t queries() const { return out_height * out_width; }                             // Q
  // from the first to the last tap of a window at rest, and to its centre, in pixels
  int64_t span_h() const { return int64_t(dilation_h) * (kernel_h - 1); }
  int64_t span_w() const { return int64_t(dilation_w) * (kernel_w - 1); }
  int64_t center_h() const { return span_h() / 2; }
  int64_t center_w() const { return span_w() / 2; }
};

// Calls visit(k, i, j) for every tap k at column i and row j of the kernel, column by column.
template <typename Visit>
inline void for_each_tap(const Dcnv4Params& p, const Visit& visit) {
  int32_t k = 0;
  for (int32_t i = 0; i < p.kernel_w; ++i) {
    for (int32_t j = 0; j < p.kernel_h; ++j) {
      if (p.remove_center && i == p.kernel_w / 2 && j == p.kernel_h / 2) continue;
      visit(k++, i, j);
    }
  }
}

} // namespace mmdcnv4
