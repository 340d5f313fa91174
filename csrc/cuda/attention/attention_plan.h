// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_plan.h — multi-scale deformable attention on a GPU: how a call is cut into blocks, and
// its sizes in the form that the kernels want. Plain integer arithmetic on the host; no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../ms_deform_attn_params.h"
#include "../arguments.h"

namespace mmdcnv4 {
namespace cuda {

constexpr int32_t kMaxLevels = 256;         // their sizes are an argument of the kernels
constexpr int32_t kSamplesPerStep = 2;      // gathered together by the forward kernel
constexpr int32_t kForwardSlots = 16;       // coefficients of a row in shared memory at a time
constexpr int32_t kBackwardSlots = 32;      // samples that a team of the backward kernel takes
constexpr int32_t kFewestBackwardSlots = 8; // and where there would be few teams
constexpr int32_t kBackwardThreads = 128;
constexpr int32_t kSortThreads = 256;

struct Level {
  int32_t height, width, start; // start: its first pixel
};

// Passed by value: it lies in constant memory, levels too.
struct AttentionArguments {
  // value [B, S, M, D], locations [B, Q, M, L, K, 2], weights [B, Q, M, L, K], output [B, Q, M, D]
  int32_t queries, heads, head_channels, samples; // samples: of a row, L * K
  uint32_t pixels, channels;                      // S, M * D
  Divisor by_points, by_samples, by_heads, by_queries, by_query_blocks, by_pixels;
  int32_t team_log2, slots;
  Level levels[kMaxLevels];
};

// A row is one (query, head). Its team of threads holds its channels, `vec` neighbouring ones per
// thread, and goes over the rest in steps of team * vec.
struct AttentionPlan {
  int32_t vec;
  int32_t team;         // threads per row: a power of two, at most a warp
  int32_t threads;      // per block
  int32_t slots;        // samples whose coefficients a team has in shared memory at a time
  int32_t shared_bytes; // per block
  int64_t images;       // per launch

  int32_t teams() const { return threads / team; } // per block
  bool has_steps(const MsDeformAttnParams& p) const { return p.head_channels > vec * team; }
};

// What the plan needs to know about a call besides its sizes.
struct AttentionRequest {
  int32_t element_bytes; // of value
  int32_t alignment;     // bytes to which value, output and their gradients are aligned
};

// An odd number of coefficients per team spreads the teams over the banks.
constexpr MMDCNV4_HD int32_t slots_pitch(int32_t slots) { return slots | 1; }

// Throws std::length_error where sizes exceed what the kernels can count.
inline void check_attention_sizes(const MsDeformAttnParams& p) {
  const auto check = [](bool is_right, const char* rule, int64_t number) {
    if (!is_right)
      throw std::length_error(std::string("ms_deform_attn: ") + rule + " on a GPU, got " +
                              std::to_string(number));
  };
  constexpr int64_t kCount = INT32_MAX;
  check(p.levels <= kMaxLevels, "sizes must have at most 256 levels", p.levels);
  check(p.channels() < int64_t(1) << 29, "value must have fewer than 2**29 channels", p.channels());
  check(p.pixels <= kCount / p.heads, "an image must have fewer than 2**31 pixels times heads",
        p.pixels * p.heads);
  check(p.queries <= kCount / p.heads / p.levels / p.points,
        "an image must have fewer than 2**31 samples", p.queries * p.heads * p.samples());
}

inline AttentionPlan start_plan(const MsDeformAttnParams& p, const AttentionRequest& request) {
  const int32_t most = kMaxVectorBytes / request.element_bytes;
  const bool has_vectors = request.element_bytes < 8 && p.head_channels % most == 0 &&
                           request.alignment % kMaxVectorBytes == 0;
  AttentionPlan plan{};
  plan.vec = has_vectors ? most : 1;
  plan.team = 1;
  while (plan.team < kWarp && plan.team * plan.vec < p.head_channels) plan.team *= 2;
  return plan;
}

// Bytes of shared memory of a block whose teams have `slot_bytes` per slot.
inline int32_t slot_memory(const AttentionPlan& plan, int32_t slot_bytes) {
  return plan.teams() * slots_pitch(plan.slots) * slot_bytes;
}

// A block is rows of neighbouring queries and one head: they sample near each other.
inline AttentionPlan make_forward_plan(const MsDeformAttnParams& p, const AttentionRequest& request,
                                       const DeviceLimits& limits) {
  check_attention_sizes(p);
  AttentionPlan plan = start_plan(p, request);
  const auto blocks = [&](int32_t threads) { // of an image
    return p.heads * divide_up(p.queries, threads / plan.team);
  };
  plan.threads = kMaxThreads;
  while (plan.threads > 64 && p.batch * blocks(plan.threads) < 2 * limits.multiprocessors)
    plan.threads /= 2;
  plan.slots = int32_t(std::min<int64_t>(kForwardSlots, divide_up(p.samples(), kSamplesPerStep) *
                                                            kSamplesPerStep));
  const int32_t slot_bytes = tap_bytes(std::max(request.element_bytes, 4), false);
  while (plan.slots > kSamplesPerStep && slot_memory(plan, slot_bytes) > limits.shared_bytes)
    plan.slots -= kSamplesPerStep;
  while (plan.threads > kWarp && slot_memory(plan, slot_bytes) > limits.shared_bytes)
    plan.threads /= 2;
  plan.shared_bytes = slot_memory(plan, slot_bytes);
  plan.images = std::max<int64_t>(1, limits.blocks_per_launch / blocks(plan.threads));
  return plan;
}

// Bytes of a sample in shared memory: two words of four numbers, three if they are summed over
// steps along the channels.
inline int32_t sample_bytes(const MsDeformAttnParams& p, const AttentionPlan& plan,
                            int32_t accumulate_bytes) {
  return (plan.has_steps(p) ? 8 : 4) * accumulate_bytes + 4 * int32_t(sizeof(uint32_t));
}

// A team takes `slots` samples that are neighbours in space.
inline AttentionPlan make_backward_plan(const MsDeformAttnParams& p,
                                        const AttentionRequest& request,
                                        const DeviceLimits& limits) {
  check_attention_sizes(p);
  AttentionPlan plan = start_plan(p, request);
  plan.threads = kBackwardThreads;
  plan.slots = kBackwardSlots;
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  while (plan.slots > kFewestBackwardSlots &&
         samples / plan.slots * plan.team < int64_t(limits.multiprocessors) * 4 * kBackwardThreads)
    plan.slots /= 2;
  const int32_t slot_bytes = sample_bytes(p, plan, std::max(request.element_bytes, 4));
  while (plan.slots > 1 && slot_memory(plan, slot_bytes) > limits.shared_bytes) --plan.slots;
  plan.shared_bytes = slot_memory(plan, slot_bytes);
  const int64_t most = std::max(p.heads * p.pixels, p.queries * p.heads * p.samples());
  plan.images = std::max<int64_t>(1, limits.blocks_per_launch / std::max<int64_t>(1, most));
  return plan;
}

inline AttentionArguments make_arguments(const MsDeformAttnParams& p, const AttentionPlan& plan) {
  AttentionArguments a;
  a.queries = int32_t(p.queries);
  a.heads = int32_t(p.heads);
  a.head_channels = int32_t(p.head_channels);
  a.samples = int32_t(p.samples());
  a.pixels = uint32_t(p.pixels);
  a.channels = uint32_t(p.channels());
  a.by_points = Divisor(uint32_t(p.points));
  a.by_samples = Divisor(uint32_t(p.samples()));
  a.by_heads = Divisor(uint32_t(p.heads));
  a.by_queries = Divisor(uint32_t(std::max<int64_t>(1, p.queries)));
  a.by_query_blocks = Divisor(uint32_t(std::max<int64_t>(1, divide_up(p.queries, plan.teams()))));
  a.by_pixels = Divisor(uint32_t(p.pixels));
  a.team_log2 = log2_of(plan.team);
  a.slots = plan.slots;
  for (int64_t level = 0; level < p.levels; ++level)
    a.levels[level] = {p.heights[level], p.widths[level], p.starts[level]};
  return a;
}

// Calls visit(first image, images) for each launch.
template <typename Visit>
inline void for_each_launch(const MsDeformAttnParams& p, const AttentionPlan& plan,
                            const Visit& visit) {
  for (int64_t image = 0; image < p.batch; image += plan.images)
    visit(image, std::min(plan.images, p.batch - image));
}

} // namespace cuda
} // namespace mmdcnv4
