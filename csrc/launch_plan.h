// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// launch_plan.h — how a DCNv4 call is cut into blocks and threads on a GPU: a function of the sizes
// and of the limits of the device, without a table of shapes. No torch and no CUDA headers, so that
// it is tested on any machine. Here what all kernels share, and the direct ones; those on tensor
// cores: window_plan.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "dcnv4_params.h"

namespace mmdcnv4 {

constexpr int32_t kWarp = 32;          // threads that run in step
constexpr int32_t kMaxThreads = 256;   // per block; the kernels are compiled for at most as many
constexpr int32_t kTapsPerPass = 9;    // taps whose coefficients are in shared memory at a time
// What a thread loads at once, if not one number: as many bytes, or as few.
constexpr int32_t kMaxVectorBytes = 16, kMinVectorBytes = 8;
constexpr int32_t kMostAdded = 4; // numbers of a gradient that a thread has, and adds, at a time

// What the plan needs to know about a device.
struct DeviceLimits {
  int32_t multiprocessors;
  int32_t shared_bytes;      // per block, without opting in to more
  int32_t most_shared_bytes; // per block, opted in
  int64_t blocks_per_launch; // largest grid along x
};

// What the plan needs to know about a call besides its sizes.
struct LaunchRequest {
  int32_t element_bytes;    // of value
  int32_t accumulate_bytes; // of the type in which is computed: 4 or 8
  int32_t alignment;        // bytes to which every pointer of value's type is aligned
  bool backward;
};

// What is indexed with 32 bits: pixels of an image, bytes of a pixel, coordinates with a sign.
constexpr int64_t kIndexed32 = int64_t(1) << 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Throws std::length_error where sizes exceed what the kernels can index.
inline void check_sizes(const Dcnv4Params& p) {
  constexpr int64_t kLargestSide = int64_t(1) << 30;
  if (p.height * p.width >= kIndexed32)
    throw std::length_error("dcnv4: an image must have fewer than 2**32 pixels on a GPU, got " +
                            std::to_string(p.height) + " x " + std::to_string(p.width));
  if (p.out_height > kLargestSide || p.out_width > kLargestSide)
    throw std::length_error("dcnv4: an output must have sides <= 2**30 on a GPU, got " +
                            std::to_string(p.out_height) + " x " + std::to_string(p.out_width));
  if (p.channels() >= kIndexed32 / 8)
    throw std::length_error("dcnv4: value must have fewer than 2**29 channels on a GPU, got " +
                            std::to_string(p.channels()));
}

// Images per launch, as many as the grid holds.
inline int64_t images_that_fit(const Dcnv4Params& p, const DeviceLimits& limits, int64_t blocks) {
  return std::max<int64_t>(1, std::min(p.batch, limits.blocks_per_launch / blocks));
}

// Calls visit(first image, blocks) for each launch of a plan.
template <typename Plan, typename Visit>
inline void for_each_launch(const Dcnv4Params& p, const Plan& plan, const Visit& visit) {
  for (int64_t image = 0; image < p.batch; image += plan.images_per_launch) {
    const int64_t left = p.batch - image;
    const int64_t images = left < plan.images_per_launch ? left : plan.images_per_launch;
    visit(image, images * plan.blocks_per_image());
  }
}

// A row is one (query, group). Its team of threads holds its channels, `vec` neighbouring ones per
// thread, and goes over the rest in steps of team * vec. A block covers a tile of output pixels of
// one image and a slice of neighbouring groups; its rows are numbered group first, then x, then y.
struct LaunchPlan {
  int32_t vec;              // channels that a thread holds at a time; divides D
  int32_t team;             // threads per row: a power of two, at most a warp
  int32_t threads;          // per block: a power of two, at least a warp
  int32_t groups_per_block; // a power of two
  int32_t tile_h, tile_w;   // output pixels per block, powers of two
  int32_t shared_bytes;     // per block
  int64_t slices;           // blocks along the groups
  int64_t tiles_h, tiles_w; // blocks along the output map
  int64_t images_per_launch; // more images take more launches

  int64_t blocks_per_image() const { return slices * tiles_h * tiles_w; }
};

// Bytes of the coefficients of one tap of one row in shared memory: four weights and four pixels,
// for the gradients also mask, fraction x, fraction y and the corners that exist.
constexpr int32_t tap_bytes(int32_t accumulate_bytes, bool backward) {
  return (backward ? 8 : 4) * accumulate_bytes + 4 * int32_t(sizeof(uint32_t));
}

// Throws std::length_error where sizes exceed what the kernels can index.
LaunchPlan make_launch_plan(const Dcnv4Params& p, const LaunchRequest& request,
                            const DeviceLimits& limits);

// Bits that one addition to an element of grad_value may have in fixed point, so that 63 hold the
// sum: each tap of each query adds to it at most once.
inline int32_t fixed_sum_bits(const Dcnv4Params& p) {
  int32_t bits = 62;
  for (int64_t most = p.queries() * p.points(); most > 1; most = (most + 1) / 2) --bits;
  return bits;
}

// Plans as JSON, for tests and for those who want to see them.
std::string to_json(std::initializer_list<std::pair<const char*, int64_t>> numbers);
std::string to_json(const LaunchPlan& plan);

} // namespace mmdcnv4
