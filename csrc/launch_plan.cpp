// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "launch_plan.h"

namespace mmdcnv4 {
namespace {

constexpr int64_t kSliceBytes = 128; // a line of the L1 cache
constexpr int32_t kFewestThreads = 64;

// The widest vector that divides the channels of a group and the alignment of the pointers; float64
// is for checks, and has none. Of gradients not more than a reduction adds at a time: with eight
// numbers of a half type per thread, added in two reductions, each of these would fill half of the
// sectors that it meets (csrc/cuda/dcnv4_backward.cuh).
int32_t choose_vec(const Dcnv4Params& p, const LaunchRequest& request) {
  if (request.element_bytes == 8) return 1;
  for (const int32_t bytes : {kMaxVectorBytes, kMinVectorBytes}) {
    const int32_t vec = bytes / request.element_bytes;
    if (request.backward && vec > kMostAdded) continue;
    if (p.group_channels % vec == 0 && request.alignment % bytes == 0) return vec;
  }
  return 1;
}

// The largest team of which at most a quarter is idle in the last step over the channels.
int32_t choose_team(int64_t vectors) {
  int32_t team = kWarp;
  while (team > 1 && 4 * (divide_up(vectors, team) * team - vectors) > vectors) team /= 2;
  return team;
}

// Neighbouring groups that fill a cache line, as long as at most a fifth of the last slice is idle.
int32_t choose_groups_per_block(const Dcnv4Params& p, int32_t element_bytes, int32_t rows) {
  int32_t groups = 1;
  while (groups < rows && groups * p.group_channels * element_bytes < kSliceBytes &&
         groups < p.groups)
    groups *= 2;
  while (groups > 1 && 5 * (divide_up(p.groups, groups) * groups - p.groups) > p.groups)
    groups /= 2;
  return groups;
}

// Width of the tile of `pixels` output pixels for which the map takes the fewest computed pixels
// and the fewest input pixels that are read by more than one block.
int32_t choose_tile_w(const Dcnv4Params& p, int32_t pixels) {
  const auto span = [](int64_t tile, int64_t stride, int64_t dilation, int64_t kernel) {
    return double(tile - 1) * double(stride) + double(dilation) * double(kernel - 1) + 2;
  };
  double least = 0;
  int32_t best = 0;
  for (int32_t width = 1; width <= pixels; width *= 2) {
    const int32_t height = pixels / width;
    const double tiles =
        double(divide_up(p.out_width, width)) * double(divide_up(p.out_height, height));
    const double read = span(width, p.stride_w, p.dilation_w, p.kernel_w) *
                        span(height, p.stride_h, p.dilation_h, p.kernel_h);
    const double cost = tiles * (4.0 * pixels + read);
    if (best == 0 || cost < least) {
      least = cost;
      best = width;
    }
  }
  return best;
}

void cut(const Dcnv4Params& p, const LaunchRequest& request, LaunchPlan& plan) {
  const int32_t rows = plan.threads / plan.team;
  plan.groups_per_block = choose_groups_per_block(p, request.element_bytes, rows);
  const int32_t pixels = rows / plan.groups_per_block;
  plan.tile_w = choose_tile_w(p, pixels);
  plan.tile_h = pixels / plan.tile_w;
  plan.slices = divide_up(p.groups, plan.groups_per_block);
  plan.tiles_h = divide_up(p.out_height, plan.tile_h);
  plan.tiles_w = divide_up(p.out_width, plan.tile_w);
  plan.shared_bytes = rows * kTapsPerPass * tap_bytes(request.accumulate_bytes, request.backward);
}

} // namespace

LaunchPlan make_launch_plan(const Dcnv4Params& p, const LaunchRequest& request,
                            const DeviceLimits& limits) {
  check_sizes(p);
  LaunchPlan plan{};
  plan.vec = choose_vec(p, request);
  plan.team = choose_team(p.group_channels / plan.vec);
  plan.threads = kMaxThreads;
  cut(p, request, plan);
  // smaller blocks where shared memory is short, or where a few large ones leave the device idle
  while (plan.threads > kWarp && plan.shared_bytes > limits.shared_bytes) {
    plan.threads /= 2;
    cut(p, request, plan);
  }
  while (plan.threads > kFewestThreads &&
         p.batch * plan.blocks_per_image() < 2 * int64_t(limits.multiprocessors)) {
    plan.threads /= 2;
    cut(p, request, plan);
  }
  if (plan.shared_bytes > limits.shared_bytes || plan.blocks_per_image() > limits.blocks_per_launch)
    throw std::length_error("dcnv4: the call does not fit on this device: it needs " +
                            std::to_string(plan.shared_bytes) + " bytes of shared memory and " +
                            std::to_string(plan.blocks_per_image()) + " blocks per image");
  plan.images_per_launch = images_that_fit(p, limits, plan.blocks_per_image());
  return plan;
}

std::string to_json(std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  std::string text;
  for (const auto& [name, number] : numbers)
    text += (text.empty() ? "{\"" : ", \"") + std::string(name) + "\": " + std::to_string(number);
  return text + "}";
}

std::string to_json(const LaunchPlan& plan) {
  return to_json({{"vec", plan.vec}, {"team", plan.team}, {"threads", plan.threads},
                  {"groups_per_block", plan.groups_per_block}, {"tile_h", plan.tile_h},
                  {"tile_w", plan.tile_w}, {"shared_bytes", plan.shared_bytes},
                  {"slices", plan.slices}, {"tiles_h", plan.tiles_h}, {"tiles_w", plan.tiles_w},
                  {"images_per_launch", plan.images_per_launch}});
}

} // namespace mmdcnv4
