// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// ms_deform_attn_params.h — sizes of one call of multi-scale deformable attention, the one struct
// that its kernels know, on every device. No torch headers.
#pragma once

#include <cstdint>

namespace mmdcnv4 {

// A level l is a map of heights[l] x widths[l] pixels from pixel starts[l] on.
struct MsDeformAttnParams {
  int64_t batch;         // B
  int64_t pixels;        // S, of all levels together
  int64_t queries;       // Q
  int64_t heads;         // M
  int64_t head_channels; // D
  int64_t levels;        // L
  int64_t points;        // K, of one head and level
  const int32_t *heights, *widths, *starts;

  int64_t samples() const { return levels * points; } // of one query and head
  int64_t channels() const { return heads * head_channels; }
};

} // namespace mmdcnv4
