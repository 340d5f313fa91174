// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_forward.cuh — forward kernel of multi-scale deformable attention.
//
// Computes    out[b,q,m,:] = sum_lk weight[b,q,m,l,k] * bilinear(value_l[b,:,:,m,:], x_lk, y_lk)
//             x_lk = location_x * width_l - 0.5, likewise y_lk
// Work split  one thread  = kVec neighbouring channels of one row, a row = one (query, head)
//             team        = the threads of a row, within one warp; they share out its samples when
//                           coefficients are computed, its channels when it is summed
//             block       = neighbouring queries of one head and image
//             grid        = heads, query blocks, images; rows past the last query take part in the
//                           synchronisation and write nothing
// Memory      a team reads and writes neighbouring kVec * sizeof(T) bytes; the output is written
//             once, without a fill before
// Numerics    float32 inside, float64 for float64; no atomics; bitwise repeatable
// Borders     as in dcnv4_forward.cuh: a missing corner is clamped and weighs zero; a sample
//             without any corner reads a pixel that its row samples anyway, or nothing
// Limits      D % kVec == 0 and pointers aligned to kVec * sizeof(T), by the plan
// Source      arXiv:2010.04159, eq. (3)
#pragma once

#include "../dcnv4_forward.cuh"
#include "attention_samples.cuh"

namespace mmdcnv4 {
namespace cuda {

// A row of the forward kernel and the place of a thread in its team.
struct AttentionRow {
  uint32_t image;
  int32_t head;
  int64_t number;       // (b * Q + q) * M + m; 0 for a row that is none
  int32_t index, lane;  // within the block, the team
  bool is_valid;        // false: past the last query
};

MMDCNV4_DEVICE AttentionRow locate_row(const AttentionArguments& a, uint32_t block,
                                       int32_t thread, int32_t threads) {
  AttentionRow row;
  row.index = thread >> a.team_log2;
  row.lane = thread - (row.index << a.team_log2);
  uint32_t queries = a.by_heads.split(block); // leaves the head in `block`
  row.head = int32_t(block);
  row.image = a.by_query_blocks.split(queries);
  const int64_t query = int64_t(queries) * (threads >> a.team_log2) + row.index;
  row.is_valid = query < a.queries;
  row.number =
      row.is_valid ? (int64_t(row.image) * a.queries + query) * a.heads + row.head : 0;
  return row;
}

// Computes the samples first ... first + slots of a row; slots past the last sample get zero
// weights. Returns whether any lies inside its map.
template <typename T, typename V>
MMDCNV4_DEVICE bool fill_samples(const AttentionArguments& a, const AttentionRow& row,
                                 const OffsetNumbers<V>& locations,
                                 const OffsetNumbers<V>& weights, int32_t first, int32_t slots,
                                 Four<T>* weight, uint4* pixel) {
  const int32_t team = 1 << a.team_log2;
  uint32_t missing = 0;        // one bit per slot of this thread
  uint32_t sampled = kNoPixel; // a pixel that the row samples
#pragma unroll 1
  for (int32_t slot = row.lane, i = 0; slot < slots; slot += team, ++i) {
    Four<T> factors{};
    uint4 corners = make_uint4(0, 0, 0, 0);
    bool is_inside = false;
    const int32_t k = first + slot;
    if (row.is_valid && k < a.samples) {
      const Level level = a.levels[level_of(a, uint32_t(k))];
      const Bilinear<T> b = locate_sample(level, locations, k);
      is_inside = b.inside != 0;
      if (is_inside) {
        const CornerWeights<T> w =
            corner_weights(weights.load(k), b.wx0, b.wx1, b.wy0, b.wy1);
        factors = {w.w00, w.w01, w.w10, w.w11};
        const uint32_t top = uint32_t(level.start + b.y0 * level.width);
        const uint32_t bottom = uint32_t(level.start + b.y1 * level.width);
        corners = make_uint4(top + uint32_t(b.x0), top + uint32_t(b.x1),
                             bottom + uint32_t(b.x0), bottom + uint32_t(b.x1));
        sampled = corners.x;
      }
    }
    weight[slot] = factors;
    pixel[slot] = corners;
    missing |= is_inside ? 0u : 1u << i;
  }
  for (int32_t step = team >> 1; step > 0; step >>= 1) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, sampled, step);
    sampled = other < sampled ? other : sampled;
  }
  for (int32_t slot = row.lane; missing != 0; slot += team, missing >>= 1)
    if (missing & 1) pixel[slot] = make_uint4(sampled, sampled, sampled, sampled);
  return sampled != kNoPixel;
}

// Blocks of a multiprocessor. With bfloat16 the compiler wants more registers for sm_86 to 89.
template <typename T>
constexpr int attention_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860 && __CUDA_ARCH__ < 900
  if (std::is_same<T, BFloat16>::value) return 3;
#endif
  return sizeof(T) == 8 ? 2 : 4;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, attention_blocks<T>())
    attention_forward_kernel(const __grid_constant__ AttentionArguments a,
                             const T* __restrict__ value,       // [B, S, M, D]
                             const OffsetNumbers<T> locations,  // [B, Q, M, L, K, 2]
                             const OffsetNumbers<T> weights,    // [B, Q, M, L, K]
                             T* __restrict__ output) {          // [B, Q, M, D]
  using W = wide_t<T>;
  MMDCNV4_SHARED_MEMORY(shared);
  const AttentionRow row =
      locate_row(a, blockIdx.x, int32_t(threadIdx.x), int32_t(blockDim.x));
  const int32_t rows = int32_t(blockDim.x) >> a.team_log2, pitch = slots_pitch(a.slots);
  Four<W>* const weight = reinterpret_cast<Four<W>*>(shared) + row.index * pitch;
  uint4* const pixel =
      reinterpret_cast<uint4*>(reinterpret_cast<Four<W>*>(shared) + rows * pitch) +
      row.index * pitch;
  const OffsetNumbers<T> own_locations = locations.from(row.number * 2 * a.samples);
  const OffsetNumbers<T> own_weights = weights.from(row.number * a.samples);
  const T* image = value + int64_t(row.image) * a.pixels * a.channels +
                   int64_t(row.head) * a.head_channels;
  const int32_t step = kVec << a.team_log2;
  bool samples = false;
#pragma unroll 1
  for (int32_t begin = 0; begin < a.head_channels; begin += step) {
    const int32_t channel = begin + row.lane * kVec;
    const bool has_channels = row.is_valid && channel < a.head_channels;
    const char* pixels = reinterpret_cast<const char*>(image + channel);
    W sum[kVec] = {};
#pragma unroll 1
    for (int32_t first = 0; first < a.samples; first += a.slots) {
      const int32_t left =
          (a.samples - first + kSamplesPerStep - 1) / kSamplesPerStep * kSamplesPerStep;
      const int32_t slots = left < a.slots ? left : a.slots;
      if (begin == 0 || a.samples > a.slots) { // else they are still there
        __syncwarp();
        samples = fill_samples(a, row, own_locations, own_weights, first, slots, weight, pixel);
        __syncwarp();
      }
      if (!samples || !has_channels) continue;
#pragma unroll 1
      for (int32_t slot = 0; slot < slots; slot += kSamplesPerStep)
        add_taps<T, kVec, kSamplesPerStep>(pixels, a.channels * uint32_t(sizeof(T)),
                                           weight + slot, pixel + slot, sum);
    }
    if (has_channels)
      VectorIo<T, kVec>::store(sum, output + row.number * a.head_channels + channel);
  }
}

// visit(std::integral_constant<int, vec>) for the vector widths of type T.
template <typename T, typename Visit>
void with_attention_vec(int32_t vec, const Visit& visit) {
  constexpr int kMost = kMaxVectorBytes / int(sizeof(T));
  if (vec == 1) return visit(std::integral_constant<int, 1>());
  if constexpr (sizeof(T) < 8) {
    if (vec == kMost) return visit(std::integral_constant<int, kMost>());
  }
  throw std::invalid_argument("ms_deform_attn: the vector width must be 1 or " +
                              std::to_string(kMost) + " (float64: 1), got " + std::to_string(vec));
}

template <typename T>
void launch_attention_forward(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                              const T* value, const OffsetNumbers<T>& locations,
                              const OffsetNumbers<T>& weights, T* output) {
  const AttentionArguments arguments = make_arguments(p, plan);
  const int64_t blocks = p.heads * divide_up(p.queries, plan.teams()); // of an image
  with_attention_vec<T>(plan.vec, [&](auto vec) {
    for_each_launch(p, plan, [&](int64_t image, int64_t images) {
      const int64_t first_row = image * p.queries * p.heads;
      launch(&attention_forward_kernel<T, decltype(vec)::value>, images * blocks, plan.threads,
             plan.shared_bytes, stream, arguments, value + image * p.pixels * p.channels(),
             locations.from(first_row * 2 * p.samples()), weights.from(first_row * p.samples()),
             output + first_row * p.head_channels);
    });
  });
}

} // namespace cuda
} // namespace mmdcnv4
