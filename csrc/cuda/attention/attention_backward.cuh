// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_backward.cuh — all gradients of multi-scale deformable attention in one pass over its
// samples, which come sorted by the cell in which they lie (attention_sort.cuh).
//
// Computes    with h = <grad_out, sample>: grad_weight = h; grad_location = size * weight * dh;
//             grad_value[corner] += weight * bilinear weight(corner) * grad_out
// Idea        samples of one cell have the same four corners. Whoever takes them one after another
//             loads the corners once and keeps the sums of their gradients in registers: additions
//             to global memory and loads of value are per cell, not per sample
// Work split  one thread  = kVec neighbouring channels of the samples of its team
//             team        = the threads of a row, within one warp; takes `slots` samples in order
//             block       = teams that follow each other
// Memory      per sample a row of grad_output is read; from a cell to the next along x, two of the
//             four corners stay in registers
// Numerics    float32 inside, float64 for float64; the order of the additions to grad_value is not
//             fixed. With FixedSum and a fixed order of the samples it is bitwise repeatable
// Borders     a cell is named by the first of its pixels that exists: at a border a sample has one
//             pixel along an axis, with the weight and the derivative of the corner that exists.
//             Missing corners add nothing, not even a NaN
// Limits      as in attention_forward.cuh; grad_value is aligned to 16 bytes
// Source      arXiv:2010.04159, eq. (3), differentiated by hand
#pragma once

#include "attention_forward.cuh"

namespace mmdcnv4 {
namespace cuda {

// Bits of a sample, beside its level.
enum SampleBits : uint32_t {
  kIsInside = 1,
  kHasBothX = 2, // both pixels along x exist
  kHasBothY = 4,
  kIsBeforeX = 8, // left of the first pixel: the one pixel along x is the upper corner
  kIsBeforeY = 16,
  kHasNextX = 32, // the cell has a second pixel along x
  kHasNextY = 64,
  kLevelShift = 8
};

// The samples of a team in shared memory.
template <typename T>
struct TeamSamples {
  Four<T>* numbers; // fraction of x, fraction of y, weight
  Four<T>* sums;    // gradients: of the weight, of x, of y; in the place of `numbers` where all
                    // channels are summed at once
  uint4* words;     // cell, bits and level, row, sample
};

template <typename T>
MMDCNV4_DEVICE TeamSamples<T> samples_of_team(unsigned char* shared, int32_t teams, int32_t team,
                                              int32_t pitch, bool has_steps) {
  Four<T>* numbers = reinterpret_cast<Four<T>*>(shared);
  Four<T>* sums = has_steps ? numbers + teams * pitch : numbers;
  uint4* words = reinterpret_cast<uint4*>(sums + teams * pitch);
  return {numbers + team * pitch, sums + team * pitch, words + team * pitch};
}

template <typename T>
MMDCNV4_DEVICE uint32_t sample_bits(const Bilinear<T>& b, const Level& level, uint32_t number) {
  if (!b.inside) return number << kLevelShift;
  return kIsInside | (b.has_x0 & b.has_x1 ? kHasBothX : 0u) |
         (b.has_y0 & b.has_y1 ? kHasBothY : 0u) |
         (b.has_x0 ? 0u : kIsBeforeX) | (b.has_y0 ? 0u : kIsBeforeY) |
         (b.x0 + 1 < level.width ? kHasNextX : 0u) | (b.y0 + 1 < level.height ? kHasNextY : 0u) |
         number << kLevelShift;
}

template <typename T, typename V>
MMDCNV4_DEVICE void fill_team(const AttentionArguments& a, const AttentionBackward<V>& call,
                              const uint32_t* order, uint32_t first, uint32_t count, int32_t lane,
                              const TeamSamples<T>& samples) {
#pragma unroll 1
  for (int32_t slot = lane; slot < a.slots; slot += 1 << a.team_log2) {
    Four<T> numbers{};
    uint4 words = make_uint4(kNoCell, 0, 0, 0);
    if (first + uint32_t(slot) < count) {
      const uint32_t sample = order[first + uint32_t(slot)];
      const SampleIndex index = SampleIndex::of(a, sample);
      const uint32_t number = level_of(a, index.k);
      const Level level = a.levels[number];
      const Bilinear<T> b = locate_sample(
          level, call.locations.from(int64_t(sample - index.k) * 2), int32_t(index.k));
      numbers = {b.fx, b.fy, call.weights.from(sample).load(0), T(0)};
      words = make_uint4(b.inside ? cell_of(a, level, index.row, b) : kNoCell,
                         sample_bits(b, level, number), index.row, sample);
    }
    samples.numbers[slot] = numbers;
    samples.words[slot] = words;
  }
}

// One cell after the other, as one thread sees them: kVec channels of its pixels (x0 y0), (x1 y0),
// (x0 y1), (x1 y1) and the sums of their gradients.
template <typename T, int kVec, typename Sum>
struct CellRun {
  using W = wide_t<T>;
  AddedChannels added; // channels of `sum`
  int32_t channel;     // the first of those of `pixel`
  W pixel[4][kVec];
  W sum[4][kVec];
  int64_t at;        // of the first pixel in value and grad_value
  uint32_t below;    // from a line to the next
  uint32_t cell;
  uint32_t bits;     // of the cell
  uint32_t touched;  // pixels that have a sum, one bit each

  MMDCNV4_DEVICE int64_t offset(const AttentionArguments& a, int corner) const {
    return at + (corner & 1 ? a.channels : 0u) + (corner & 2 ? int64_t(below) : 0);
  }

  MMDCNV4_DEVICE void flush(const AttentionArguments& a, const Sum& grad_value, int corner) {
    if (touched >> corner & 1) {
      with_reduction_width([&](auto width) {
        if constexpr (kAddsOneByOne<kVec, decltype(width)>) {
          const int64_t to = offset(a, corner) + added.first - channel;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const W number[1] = {sum[corner][i]};
            grad_value.add(to + i * added.pitch, number);
          }
        } else {
          grad_value.add(offset(a, corner), sum[corner]);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[corner][i] = W(0);
  }

  // Of a row of grad_output, the numbers of the channels that this thread adds to; `own`: of those
  // whose dot products it takes.
  MMDCNV4_DEVICE void load_added(const T* row, const W (&own)[kVec], W (&to)[kVec]) const {
    with_reduction_width([&](auto width) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if constexpr (kAddsOneByOne<kVec, decltype(width)>) {
          to[i] = load_one(row + added.first + i * added.pitch);
        } else {
          to[i] = own[i];
        }
      }
    });
  }

  MMDCNV4_DEVICE void load(const AttentionArguments& a, const T* value, int corner) {
    const bool exists =
        (!(corner & 1) || (bits & kHasNextX)) && (!(corner & 2) || (bits & kHasNextY));
    if (exists)
      VectorIo<T, kVec>::widen(VectorIo<T, kVec>::load(value + offset(a, corner)), pixel[corner]);
  }

  MMDCNV4_DEVICE void start(const AttentionArguments& a, int32_t begin, int32_t lane) {
    added = AddedChannels::of(begin, a.head_channels, lane, 1 << a.team_log2, kVec);
    channel = begin + lane * kVec;
    cell = kNoCell - 1; // no cell, nor is there one after it
    bits = touched = 0;
#pragma unroll
    for (int i = 0; i < 4 * kVec; ++i) pixel[i / kVec][i % kVec] = sum[i / kVec][i % kVec] = W(0);
  }

  MMDCNV4_DEVICE void finish(const AttentionArguments& a, const Sum& grad_value) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) flush(a, grad_value, corner);
  }

  // To the cell of a sample.
  MMDCNV4_DEVICE void move(const AttentionArguments& a, const T* value, const Sum& grad_value,
                           const uint4& words) {
    if (words.x == cell) return;
    const bool is_next = words.x == cell + 1 && (bits & kHasNextX);
    flush(a, grad_value, 0);
    flush(a, grad_value, 2);
    cell = words.x;
    if (is_next) {
      at += a.channels;
#pragma unroll
      for (int corner = 0; corner < 4; corner += 2) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          pixel[corner][i] = pixel[corner + 1][i];
          sum[corner][i] = sum[corner + 1][i];
          sum[corner + 1][i] = W(0);
        }
      }
      touched = touched >> 1 & 5;
      bits = words.y;
    } else {
      flush(a, grad_value, 1);
      flush(a, grad_value, 3);
      touched = 0;
      bits = words.y;
      uint32_t pixel_index = cell;
      const uint32_t map = a.by_pixels.split(pixel_index);
      uint32_t head = map;
      const uint32_t image = a.by_heads.split(head);
      at = (int64_t(image) * a.pixels + pixel_index) * a.channels +
           int64_t(head) * a.head_channels + channel;
      below = uint32_t(a.levels[bits >> kLevelShift].width) * a.channels;
      load(a, value, 0);
      load(a, value, 2);
    }
    load(a, value, 1);
    load(a, value, 3);
  }

  // Adds a sample to the sums; returns <grad, sample> and its derivatives, over these channels.
  // `of_added`: grad_output of the channels that this thread adds to.
  MMDCNV4_DEVICE BilinearGrad<W> add(const Four<W>& numbers, uint32_t own, const W (&grad)[kVec],
                                     const W (&of_added)[kVec]) {
    const bool both_x = own & kHasBothX, both_y = own & kHasBothY;
    const bool exists[4] = {true, both_x, both_y, both_x && both_y};
    const W ax = own & kIsBeforeX ? numbers.x : W(1) - numbers.x;
    const W ay = own & kIsBeforeY ? numbers.y : W(1) - numbers.y;
    const W top = numbers.z * ay, bottom = numbers.z * numbers.y;
    const W factor[4] = {top * ax, top * numbers.x, bottom * ax, bottom * numbers.x};
    W dot[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (!exists[corner]) continue;
      touched |= 1u << corner;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        dot[corner] += grad[i] * pixel[corner][i];
        sum[corner][i] += factor[corner] * of_added[i];
      }
    }
    const W line = ax * dot[0] + numbers.x * dot[1], next = ax * dot[2] + numbers.x * dot[3];
    const W dx = own & kIsBeforeX ? W(1) : W(-1), dy = own & kIsBeforeY ? W(1) : W(-1);
    return {ay * line + numbers.y * next,
            ay * (dx * dot[0] + dot[1]) + numbers.y * (dx * dot[2] + dot[3]), dy * line + next};
  }
};

template <typename T, typename V>
MMDCNV4_DEVICE void write_sample_grads(const AttentionArguments& a,
                                       const AttentionBackward<V>& call, uint32_t first,
                                       uint32_t count, int32_t lane,
                                       const TeamSamples<T>& samples) {
#pragma unroll 1
  for (int32_t slot = lane; slot < a.slots; slot += 1 << a.team_log2) {
    if (first + uint32_t(slot) >= count) continue;
    const uint4 words = samples.words[slot];
    const Four<T> sums = samples.sums[slot];
    const bool is_inside = words.y & kIsInside;
    const Level level = a.levels[words.y >> kLevelShift];
    const OffsetGradients<V> to = call.grad_locations.from(int64_t(words.w) * 2);
    to.store(is_inside ? T(level.width) * sums.y : T(0), 0);
    to.store(is_inside ? T(level.height) * sums.z : T(0), 1);
    call.grad_weights.from(words.w).store(is_inside ? sums.x : T(0), 0);
  }
}

template <typename T, int kVec, typename Sum>
__global__ void __launch_bounds__(kBackwardThreads, 4)
    attention_backward_kernel(const __grid_constant__ AttentionArguments a,
                              const AttentionBackward<T> call, const uint32_t* __restrict__ order,
                              const uint32_t* __restrict__ inside, uint32_t all,
                              const Sum grad_value) {
  using W = wide_t<T>;
  using Io = VectorIo<T, kVec>;
  MMDCNV4_SHARED_MEMORY(shared);
  const int32_t team = int32_t(threadIdx.x) >> a.team_log2;
  const int32_t lane = int32_t(threadIdx.x) - (team << a.team_log2);
  const int32_t teams = kBackwardThreads >> a.team_log2, step = kVec << a.team_log2;
  const bool has_steps = a.head_channels > step;
  const TeamSamples<W> samples =
      samples_of_team<W>(shared, teams, team, slots_pitch(a.slots), has_steps);
  const uint32_t count = inside != nullptr ? *inside : all;
  const uint32_t block_first = blockIdx.x * uint32_t(teams) * uint32_t(a.slots);
  if (block_first >= count) return; // the whole block
  const uint32_t first = block_first + uint32_t(team) * uint32_t(a.slots);
  fill_team(a, call, order, first, count, lane, samples);
  __syncwarp();
  CellRun<T, kVec, Sum> run;
#pragma unroll 1
  for (int32_t begin = 0; begin < a.head_channels; begin += step) {
    const int32_t channel = begin + lane * kVec;
    const bool has_channels = channel < a.head_channels;
    const T* grads = call.grad_output + (has_channels ? channel : 0);
    run.start(a, begin, lane);
    typename Io::Raw next = Io::load(grads + int64_t(samples.words[0].z) * a.head_channels);
#pragma unroll 1
    for (int32_t slot = 0; slot < a.slots; ++slot) {
      const uint4 words = samples.words[slot];
      const Four<W> numbers = samples.numbers[slot];
      W grad[kVec];
      Io::widen(next, grad);
      if (slot + 1 < a.slots)
        next = Io::load(grads + int64_t(samples.words[slot + 1].z) * a.head_channels);
      BilinearGrad<W> sums{};
      if (has_channels && words.y & kIsInside) {
        W of_added[kVec];
        run.load_added(call.grad_output + int64_t(words.z) * a.head_channels, grad, of_added);
        run.move(a, call.value, grad_value, words);
        sums = run.add(numbers, words.y, grad, of_added);
      }
      sums = {team_sum(sums.mask, 1 << a.team_log2), team_sum(sums.x, 1 << a.team_log2),
              team_sum(sums.y, 1 << a.team_log2)};
      __syncwarp(); // the team has read what is overwritten
      if (lane == 0) {
        Four<W> total{sums.mask, numbers.z * sums.x, numbers.z * sums.y, W(0)};
        if (begin > 0) {
          const Four<W> before = samples.sums[slot];
          total = {total.x + before.x, total.y + before.y, total.z + before.z, W(0)};
        }
        samples.sums[slot] = total;
      }
    }
    run.finish(a, grad_value);
  }
  __syncwarp();
  write_sample_grads(a, call, first, count, lane, samples);
}

template <int kVec, typename T, typename Sum>
void launch_backward(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                     const AttentionBackward<T>& call, const uint32_t* order,
                     const uint32_t* count, const Sum& grad_value) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  launch(&attention_backward_kernel<T, kVec, Sum>,
         divide_up(samples, int64_t(plan.teams()) * plan.slots), plan.threads, plan.shared_bytes,
         stream, make_arguments(p, plan), call, order, count, uint32_t(samples), grad_value);
}

template <typename T>
void launch_attention_backward(const MsDeformAttnParams& p, const AttentionPlan& plan,
                               Stream stream, const AttentionBackward<T>& call,
                               const uint32_t* order, const uint32_t* count,
                               const FloatSum<wide_t<T>>& grad_value) {
  with_attention_vec<T>(plan.vec, [&](auto vec) {
    launch_backward<decltype(vec)::value>(p, plan, stream, call, order, count, grad_value);
  });
}

template <typename T>
void launch_attention_backward(const MsDeformAttnParams& p, const AttentionPlan& plan,
                               Stream stream, const AttentionBackward<T>& call,
                               const uint32_t* order, const uint32_t* count,
                               const FixedSum<wide_t<T>>& grad_value) {
  if (plan.vec != 1)
    throw std::invalid_argument("ms_deform_attn: the vector width must be 1 for sums in fixed "
                                "point, got " + std::to_string(plan.vec));
  launch_backward<1>(p, plan, stream, call, order, count, grad_value);
}

} // namespace cuda
} // namespace mmdcnv4
