// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "window_plan.h"

#include <cmath>

namespace mmdcnv4 {
namespace {

// The kernel grid at rest, and samples a pixel away from it, should lie within the window.
bool is_call_for_windows(const Dcnv4Params& p, const LaunchRequest& request) {
  const bool is_3x3 = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 && p.dilation_w == 1;
  const int64_t depth = p.group_channels;
  const bool is_float = request.element_bytes == 4;
  const bool is_known = depth == 16 || depth == 32 || (depth == 64 && !is_float);
  return is_3x3 && p.stride_h == 1 && p.stride_w == 1 && !p.softmax && is_known &&
         request.element_bytes <= 4 && request.alignment % kMaxVectorBytes == 0 &&
         p.queries() < kIndexed32 && std::abs(p.offset_scale) <= 1;
}

// Grid for a tile of known shape and shared memory; false where the device does not hold a block.
bool fill_grid(const Dcnv4Params& p, const DeviceLimits& limits, WindowPlan& plan) {
  plan.slices = divide_up(p.channels(), plan.slice_channels);
  plan.tiles_h = divide_up(plan.is_mirrored ? p.height : p.out_height, plan.tile_h);
  plan.tiles_w = divide_up(plan.is_mirrored ? p.width : p.out_width, plan.tile_w);
  if (plan.shared_bytes > limits.most_shared_bytes ||
      plan.blocks_per_image() > limits.blocks_per_launch)
    return false;
  plan.images_per_launch = images_that_fit(p, limits, plan.blocks_per_image());
  return true;
}

int32_t cells_of(const WindowPlan& plan) {
  return (plan.tile_h + 2 * kReach) * (plan.tile_w + 2 * kReach);
}

// Threads and shared memory for a tile of output pixels: its cells, an area for each warp.
void fill_tile(const Dcnv4Params& p, const DeviceLimits& limits, WindowPlan& plan) {
  int32_t warps = std::min(kMaxThreads / kWarp, plan.units(p));
  const auto bytes = [&] {
    return cells_of(plan) * kWindowSliceBytes +
           warps * kWindowSide * kWindowSide * kWarp * int32_t(sizeof(float));
  };
  while (warps > 1 && bytes() > limits.most_shared_bytes) warps /= 2;
  plan.threads = warps * kWarp;
  plan.shared_bytes = bytes();
}

// The same for a tile of input pixels: a warp for each block of 4x4; the output pixels around them,
// their weights for one group, their numbers.
void fill_mirrored_tile(int32_t offset_bytes, WindowPlan& plan) {
  plan.threads = plan.tile_h * plan.tile_w / (kWindowBlock * kWindowBlock) * kWarp;
  plan.shared_bytes = stencil_pitch(cells_of(plan)).bytes +
                      cells_of(plan) * kWindowSliceBytes +
                      plan.threads * window_numbers_pitch(1, offset_bytes);
}

// What a block costs, in warp instructions for one group of each of its slice's pixels, as counted
// for D = 32. A tile of output pixels: rows of 32, and the copying of its cells. A tile of input
// pixels: its threads add up weights for the output pixels around it, before a warp multiplies for
// each 4x4 input pixels. Warps that have no more pixels wait for those that have: half as bad as
// working, since other blocks run meanwhile.
double block_cost(const WindowPlan& plan) {
  const double pixels = double(plan.tile_h) * plan.tile_w;
  if (!plan.is_mirrored) return 4.0 * pixels + cells_of(plan);
  const double warps = double(plan.threads) / kWarp;
  const double rounds = double(divide_up(cells_of(plan), kWarp));
  const double longest = double(divide_up(cells_of(plan), plan.threads));
  return 340.0 * 0.5 * (rounds + longest * warps) + 370.0 * warps;
}

// Blocks that a multiprocessor holds at a time: by shared memory, of which each block takes 1 KB
// more and all of them as much as one may opt in to and 1 KB, and by the registers of 16 warps, or
// of 24 in the kernels for value that have groups of less than 64 channels.
int64_t blocks_per_multiprocessor(const Dcnv4Params& p, const DeviceLimits& limits,
                                  const WindowPlan& plan) {
  constexpr int64_t kReserved = 1024;
  const int64_t by_memory =
      (limits.most_shared_bytes + kReserved) / (plan.shared_bytes + kReserved);
  const int64_t warps = plan.is_mirrored && p.group_channels < 64 ? 24 : 16;
  return std::max<int64_t>(1, std::min(by_memory, warps * kWarp / plan.threads));
}

// Warps of a multiprocessor that hide each other's waiting altogether: four instructions are issued
// in a cycle, and a warp takes about six cycles from one to its next.
constexpr double kWarpsToFill = 24.0;

// The cheapest tile; fill(plan) gives it threads and shared memory.
template <typename Fill>
WindowPlan choose_tile(const Dcnv4Params& p, const LaunchRequest& request,
                       const DeviceLimits& limits, bool is_mirrored, const Fill& fill) {
  WindowPlan best{};
  if (!is_call_for_windows(p, request)) return best;
  double least = 0;
  for (const auto& [tile_h, tile_w] : {std::pair(8, 16), std::pair(8, 8), std::pair(4, 8)}) {
    WindowPlan plan{};
    plan.is_made_for = true;
    plan.slice_channels = kWindowSliceBytes / request.element_bytes;
    plan.is_mirrored = is_mirrored;
    plan.tile_h = tile_h;
    plan.tile_w = tile_w;
    fill(plan);
    if (!fill_grid(p, limits, plan)) continue;
    // Waves of as many blocks as the device holds; the rest takes as long as its blocks'
    // instructions, and at least as long as eight warps that hide each other's waiting.
    const int64_t held = blocks_per_multiprocessor(p, limits, plan);
    const int64_t blocks = p.batch * plan.blocks_per_image();
    const int64_t waves = blocks / (held * limits.multiprocessors);
    const int64_t left = blocks - waves * held * limits.multiprocessors;
    const double last = left == 0 ? 0.0 : std::max(double(divide_up(left, limits.multiprocessors)),
                                                   8.0 * kWarp / plan.threads);
    // a wave takes as long as all its instructions, or as those of one warp one after the other
    const double wave = std::max(double(held), kWarpsToFill * kWarp / plan.threads);
    const double cost = (double(waves) * wave + last) * block_cost(plan);
    if (!best.is_made_for || cost < least) {
      least = cost;
      best = plan;
    }
  }
  return best;
}

} // namespace

WindowPlan make_window_plan(const Dcnv4Params& p, const LaunchRequest& request,
                            const DeviceLimits& limits) {
  check_sizes(p);
  return choose_tile(p, request, limits, false,
                     [&](WindowPlan& plan) { fill_tile(p, limits, plan); });
}

WindowBackwardPlan make_window_backward_plan(const Dcnv4Params& p, const LaunchRequest& request,
                                             int32_t offset_bytes, const DeviceLimits& limits) {
  WindowBackwardPlan plan{};
  plan.offset_mask = make_window_plan(p, request, limits);
  plan.value = choose_tile(p, request, limits, true,
                           [&](WindowPlan& of) { fill_mirrored_tile(offset_bytes, of); });
  // lists of far taps number them within an image
  if (!plan.offset_mask.is_made_for || p.queries() * kTapsPerPass >= kIndexed32)
    plan.value.is_made_for = false;
  plan.offset_mask.is_made_for = plan.value.is_made_for;
  plan.rest_blocks = std::min<int64_t>(8 * limits.multiprocessors, limits.blocks_per_launch);
  return plan;
}

std::string to_json(const WindowPlan& plan) {
  return to_json({{"is_made_for", plan.is_made_for}, {"threads", plan.threads},
                  {"tile_h", plan.tile_h}, {"tile_w", plan.tile_w},
                  {"shared_bytes", plan.shared_bytes}, {"slices", plan.slices},
                  {"tiles_h", plan.tiles_h}, {"tiles_w", plan.tiles_w},
                  {"images_per_launch", plan.images_per_launch}});
}

} // namespace mmdcnv4
