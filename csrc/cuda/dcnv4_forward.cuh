// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_forward.cuh — forward kernel of DCNv4.
//
// Computes    out[n,q,g,:] = sum_k mask[n,q,g,k] * bilinear(value[n,:,:,g,:], x_k, y_k)
// Work split  one thread  = kVec neighbouring channels of one row, a row = one (query, group)
//             team        = the threads of a row, within one warp; they share out the taps of the
//                           row when coefficients are computed, its channels when it is summed
//             block       = a tile of output pixels of one image x a slice of neighbouring groups
//             grid        = slices, tiles, images (launch_plan.h); rows past the last pixel or
//                           group take part in the synchronisation and write nothing
// Memory      channels last: a team reads and writes neighbouring kVec * sizeof(T) bytes; the
//             output is written once, without a fill before
// Numerics    float32 inside, float64 for float64; no atomics; bitwise repeatable
// Borders     a missing corner is clamped into the image and weighs zero. A tap without any corner
//             would so read a pixel of its own choice, and a NaN there would count: it reads one
//             that its row samples anyway, and a row without any corner reads nothing
// Limits      D % kVec == 0 and pointers aligned to kVec * sizeof(T), by the launch plan
// Source      arXiv:2401.06197, section 3
#pragma once

#include "dispatch.h"
#include "launch.h"
#include "sampling.cuh"

namespace mmdcnv4 {
namespace cuda {

constexpr int32_t kTapsPerStep = 3; // gathered together where K is known at run time only

// Computes the taps first ... first + slots of a row; slots past the last tap get zero weights.
// Returns whether the row samples the image at all.
template <bool kMaybeSoftmax, typename T, typename V>
MMDCNV4_DEVICE bool fill_forward_taps(const KernelArguments<T>& a, const Row& row,
                                      const MaskRule<T>& rule, const OffsetNumbers<V>& packed,
                                      int32_t first, int32_t slots, const Taps<T>& taps) {
  const int32_t team = 1 << a.team_log2;
  uint32_t missing = 0;        // one bit per slot of this thread
  uint32_t sampled = kNoPixel; // a pixel that the row samples
#pragma unroll 1
  for (int32_t slot = row.lane, i = 0; slot < slots; slot += team, ++i) {
    Four<T> weight{};
    uint4 pixel = make_uint4(0, 0, 0, 0);
    bool is_inside = false;
    if (row.is_valid && first + slot < a.points) {
      const int32_t k = first + slot;
      const Sample<T> sample =
          make_sample<kMaybeSoftmax>(a, row, rule, packed.load_tap(k, a.points), k);
      is_inside = sample.bilinear.inside != 0;
      if (is_inside) {
        weight = sample_weights(sample);
        pixel = corner_pixels(a, sample.bilinear);
        sampled = pixel.x;
      }
    }
    taps.weight[slot] = weight;
    taps.pixel[slot] = pixel;
    missing |= is_inside ? 0u : 1u << i;
  }
  for (int32_t step = team >> 1; step > 0; step >>= 1) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, sampled, step);
    sampled = other < sampled ? other : sampled;
  }
  for (int32_t slot = row.lane; missing != 0; slot += team, missing >>= 1)
    if (missing & 1) taps.pixel[slot] = make_uint4(sampled, sampled, sampled, sampled);
  return sampled != kNoPixel;
}

// sum += kCount taps of kVec channels, the loads of a few taps at a time in flight.
template <typename T, int kVec, int kCount>
MMDCNV4_DEVICE void add_taps(const char* __restrict__ pixels, uint32_t pixel_bytes,
                             const Four<wide_t<T>>* weight, const uint4* pixel,
                             wide_t<T> (&sum)[kVec]) {
  using Io = VectorIo<T, kVec>;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const uint4 from = pixel[k];
    const typename Io::Raw corner[4] = {Io::load(pixels + uint64_t(from.x) * pixel_bytes),
                                        Io::load(pixels + uint64_t(from.y) * pixel_bytes),
                                        Io::load(pixels + uint64_t(from.z) * pixel_bytes),
                                        Io::load(pixels + uint64_t(from.w) * pixel_bytes)};
    const Four<wide_t<T>> weights = weight[k];
    const wide_t<T> w[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      wide_t<T> number[kVec];
      Io::widen(corner[c], number);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += w[c] * number[i];
    }
  }
}

// kIsPlain: K == 9, all taps unrolled, and no softmax.
template <typename T, int kVec, bool kIsPlain>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 2 : kIsPlain ? 4 : 3)
    dcnv4_forward_kernel(const KernelArguments<wide_t<T>> a,
                         const T* __restrict__ value,        // [N, H, W, G, D]
                         const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                         T* __restrict__ output) {           // [N, Ho, Wo, G, D]
  MMDCNV4_SHARED_MEMORY(shared);
  const Row row = locate(a, blockIdx.x, int32_t(threadIdx.x));
  const int32_t points = kIsPlain ? kTapsPerPass : a.points;
  const int32_t step = kVec << a.team_log2;
  const Taps<wide_t<T>> taps =
      taps_of_row<false, wide_t<T>>(shared, int32_t(blockDim.x) >> a.team_log2, row.index);
  const int64_t query = row.query(a), first_channel = int64_t(row.group) * a.group_channels;
  const OffsetNumbers<T> packed =
      offset_mask.from(query * a.offset_mask_channels + int64_t(row.group) * 3 * points);
  const int64_t image_pixels = int64_t(a.height) * a.width;
  const T* image = value + row.image * image_pixels * a.channels + first_channel;
  MaskRule<wide_t<T>> rule{};
  if (!kIsPlain && a.softmax) rule = make_mask_rule(a, row, packed);
  bool samples = false;
  const auto fill = [&](int32_t first, int32_t slots) {
    __syncwarp();
    samples = fill_forward_taps<!kIsPlain>(a, row, rule, packed, first, slots, taps);
    __syncwarp();
  };
  if (kIsPlain) fill(0, kTapsPerPass); // here: in the loop it would keep registers for later
#pragma unroll 1
  for (int32_t begin = 0; begin < a.group_channels; begin += step) {
    const int32_t channel = begin + row.lane * kVec;
    const bool has_channels = row.is_valid && channel < a.group_channels;
    const char* pixels = reinterpret_cast<const char*>(image + channel);
    wide_t<T> sum[kVec] = {};
#pragma unroll 1
    for (int32_t first = 0; first < points; first += kTapsPerPass) {
      const int32_t left = (points - first + kTapsPerStep - 1) / kTapsPerStep * kTapsPerStep;
      const int32_t slots = kIsPlain || left > kTapsPerPass ? kTapsPerPass : left;
      if (!kIsPlain && (begin == 0 || points > kTapsPerPass)) // else they are still there
        fill(first, slots);
      if (!samples || !has_channels) continue;
      constexpr int kCount = kIsPlain ? kTapsPerPass : kTapsPerStep;
#pragma unroll 1
      for (int32_t slot = 0; slot < slots; slot += kCount)
        add_taps<T, kVec, kCount>(pixels, a.channels * uint32_t(sizeof(T)), taps.weight + slot,
                                  taps.pixel + slot, sum);
    }
    if (has_channels)
      VectorIo<T, kVec>::store(sum, output + query * a.channels + first_channel + channel);
  }
}

template <typename T>
void launch_dcnv4_forward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                          const T* value, const OffsetNumbers<T>& offset_mask, T* output) {
  const auto arguments = make_arguments<wide_t<T>>(p, plan);
  with_vec<T>(plan.vec, [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    auto* kernel = &dcnv4_forward_kernel<T, kVec, false>;
    if constexpr (kVec * sizeof(T) == kMaxVectorBytes) {
      if (p.points() == kTapsPerPass && !p.softmax)
        kernel = &dcnv4_forward_kernel<T, kVec, true>;
    }
    for_each_launch(p, plan, [&](int64_t image, int64_t blocks) {
      launch(kernel, blocks, plan.threads, plan.shared_bytes, stream, arguments,
             value + image * p.height * p.width * p.channels(),
             offset_mask.from(image * p.queries() * p.offset_mask_channels),
             output + image * p.queries() * p.channels());
    });
  });
}

} // namespace cuda
} // namespace mmdcnv4
