// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_backward.cuh — all gradients of DCNv4 in one pass.
//
// Computes    with h_k = <grad_out, sample_k>:
//             grad_mask = h_k, or with softmax m_k (h_k - sum_j m_j h_j);
//             grad_offset = offset_scale * m_k * d h_k / d(x, y);
//             grad_value[corner] += m_k * weight(corner) * grad_out
// Work split  as in dcnv4_forward.cuh. With softmax the taps are gone over twice, first for the sum
//             over j: it keeps nothing per tap, so that any K fits
// Memory      grad_value is added to, by reductions that fill sectors of 32 bytes where a team has
//             enough channels: of up to four float32 at once (sm_90 and newer) or of one;
//             grad_offset_mask is summed over the team by shuffles, collected in shared
//             memory and written once, in its own type, its padding included
// Numerics    float32 inside, float64 for float64; the order of the additions to grad_value is not
//             fixed, its last bits vary from run to run, and float32 reductions flush subnormal
//             numbers. With FixedSum it is bitwise repeatable, and slow; grad_offset_mask always is
// Borders     corners outside the image add nothing, not even a NaN; so do taps without corners
// Limits      as in dcnv4_forward.cuh; grad_value is aligned to 16 bytes
// Source      arXiv:2401.06197, section 3, differentiated by hand
#pragma once

#include "dispatch.h"
#include "gather_tap.cuh"
#include "launch.h"

namespace mmdcnv4 {
namespace cuda {

template <bool kMaybeSoftmax, typename T, typename V>
MMDCNV4_DEVICE void fill_backward_taps(const KernelArguments<T>& a, const Row& row,
                                       const MaskRule<T>& rule, const OffsetNumbers<V>& packed,
                                       int32_t first, int32_t count, const Taps<T>& taps) {
#pragma unroll 1
  for (int32_t slot = row.lane; slot < count; slot += 1 << a.team_log2) {
    Four<T> weight{}, extra{};
    uint4 pixel = make_uint4(0, 0, 0, 0);
    if (row.is_valid) {
      const int32_t k = first + slot;
      const Sample<T> sample =
          make_sample<kMaybeSoftmax>(a, row, rule, packed.load_tap(k, a.points), k);
      weight = sample_weights(sample);
      pixel = corner_pixels(a, sample.bilinear);
      extra = {sample.mask, sample.bilinear.fx, sample.bilinear.fy,
               T(corner_bits(sample.bilinear))};
    }
    taps.weight[slot] = weight;
    taps.pixel[slot] = pixel;
    taps.extra[slot] = extra;
  }
}

// What a thread adds to grad_value: see AddedChannels.
template <typename T, typename Sum, int kVec>
struct Scatter {
  Channels<T> channels;
  Sum grad_value;
  int32_t lane, team;
  int32_t first = -1;          // where channels are added one by one, the first of them
  wide_t<T> number[kVec] = {}; // of grad_output, of those channels

  MMDCNV4_DEVICE void add(uint32_t pixel, int32_t channel, wide_t<T> weight,
                          const wide_t<T> (&grad)[kVec]) {
    with_reduction_width([&](auto width) {
      if constexpr (kAddsOneByOne<kVec, decltype(width)>) {
        const AddedChannels to =
            AddedChannels::of(channel - lane * kVec, channels.end, lane, team, kVec);
        if (first != to.first) {
          first = to.first;
#pragma unroll
          for (int i = 0; i < kVec; ++i)
            number[i] = load_one(channels.grad_output + channels.row + first + i * to.pitch);
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const wide_t<T> part[1] = {weight * number[i]};
          grad_value.add(channels.offset(pixel, first + i * to.pitch), part);
        }
      } else {
        wide_t<T> part[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) part[i] = weight * grad[i];
        grad_value.add(channels.offset(pixel, channel), part);
      }
    });
  }
};

// Writes the gradients of `count` taps, collected in taps.extra, and after the last tap of the last
// group the padding.
template <typename T, typename V>
MMDCNV4_DEVICE void write_grad_offset_mask(const KernelArguments<T>& a, const Row& row,
                                           int32_t first, int32_t count, const Taps<T>& taps,
                                           const OffsetGradients<V>& to) {
  const int32_t team = 1 << a.team_log2;
#pragma unroll 1
  for (int32_t i = row.lane; i < 3 * count; i += team) {
    const bool is_mask = i >= 2 * count;
    const int32_t slot = is_mask ? i - 2 * count : i >> 1;
    const Four<T>& grad = taps.extra[slot];
    to.store(is_mask ? grad.z : i & 1 ? grad.y : grad.x,
             is_mask ? 2 * a.points + first + slot : 2 * first + i);
  }
  if (row.group + 1 < a.groups || first + count < a.points) return;
  const int64_t padding = a.offset_mask_channels - int64_t(a.groups) * 3 * a.points;
#pragma unroll 1
  for (int32_t i = row.lane; i < padding; i += team) to.store(T(0), 3 * a.points + i);
}

// kMaybeSoftmax: a.softmax, which is rare and takes registers, may be set.
template <typename T, int kVec, bool kMaybeSoftmax, typename Sum>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) < 8 ? 3 : 2)
    dcnv4_backward_kernel(const KernelArguments<wide_t<T>> a,
                          const T* __restrict__ grad_output,   // [N, Ho, Wo, G, D]
                          const T* __restrict__ value,         // [N, H, W, G, D]
                          const OffsetNumbers<T> offset_mask,  // [N, Ho, Wo, P]
                          const Sum grad_value,                // [N, H, W, G, D]
                          const OffsetGradients<T> grad_offset_mask) { // [N, Ho, Wo, P]
  using W = wide_t<T>;
  MMDCNV4_SHARED_MEMORY(shared);
  const Row row = locate(a, blockIdx.x, int32_t(threadIdx.x));
  const int32_t team = 1 << a.team_log2;
  const Taps<W> taps =
      taps_of_row<true, W>(shared, int32_t(blockDim.x) >> a.team_log2, row.index);
  const int64_t query = row.query(a), first_channel = int64_t(row.group) * a.group_channels;
  const int64_t packed = query * a.offset_mask_channels + int64_t(row.group) * 3 * a.points;
  const int64_t image = row.image * (int64_t(a.height) * a.width) * a.channels + first_channel;
  const Channels<T> channels{grad_output,
                             value,
                             query * a.channels + first_channel,
                             image,
                             a.channels,
                             row.lane * kVec,
                             a.group_channels,
                             team * kVec};
  Scatter<T, Sum, kVec> scatter{channels, grad_value, row.lane, team};
  W grad[kVec] = {};
  if (row.is_valid && channels.begin < channels.end)
    VectorIo<T, kVec>::widen(
        VectorIo<T, kVec>::load(grad_output + channels.row + channels.begin), grad);
  const bool has_softmax = kMaybeSoftmax && a.softmax;
  MaskRule<W> rule{};
  if (has_softmax) rule = make_mask_rule(a, row, offset_mask.from(packed));
  W expected = 0; // sum_j m_j h_j
#pragma unroll 1
  for (bool is_last = !has_softmax;; is_last = true) {
#pragma unroll 1
    for (int32_t first = 0; first < a.points; first += kTapsPerPass) {
      const int32_t count = a.points - first < kTapsPerPass ? a.points - first : kTapsPerPass;
      __syncwarp();
      fill_backward_taps<kMaybeSoftmax>(a, row, rule, offset_mask.from(packed), first, count,
                                        taps);
      __syncwarp();
#pragma unroll 1
      for (int32_t slot = 0; slot < count; ++slot) {
        const uint32_t bits = uint32_t(taps.extra[slot].w);
        W dot[4] = {};
        if (bits != 0) {
          const Four<W>& of = taps.weight[slot];
          const W weight[4] = {of.x, of.y, of.z, of.w};
          gather_tap(channels, taps.pixel[slot], bits, grad, dot,
                     [&](int corner, uint32_t pixel, int32_t channel) {
                       if (!kMaybeSoftmax || is_last)
                         scatter.add(pixel, channel, weight[corner], grad);
                     });
        }
        BilinearGrad<W> sum = bilinear_grad(dot[0], dot[1], dot[2], dot[3], taps.extra[slot].y,
                                            taps.extra[slot].z);
        if (kMaybeSoftmax && !is_last) {
          if (bits != 0) expected += taps.extra[slot].x * sum.mask;
          continue;
        }
        sum = {team_sum(sum.mask, team), team_sum(sum.x, team), team_sum(sum.y, team)};
        __syncwarp(); // the team has read what is overwritten
        if (row.lane == 0) {
          const W mask = taps.extra[slot].x, scale = a.scale * mask;
          taps.extra[slot] = {bits ? scale * sum.x : W(0), bits ? scale * sum.y : W(0),
                              has_softmax ? mask * (sum.mask - expected) : sum.mask, W(0)};
        }
      }
      __syncwarp();
      if (row.is_valid && (!kMaybeSoftmax || is_last))
        write_grad_offset_mask(a, row, first, count, taps, grad_offset_mask.from(packed));
    }
    if (!kMaybeSoftmax || is_last) break;
    expected = team_sum(expected, team);
  }
}

template <int kVec, bool kMaybeSoftmax, typename T, typename Sum>
void launch_backward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                     const T* grad_output, const T* value, const OffsetNumbers<T>& offset_mask,
                     const Sum& grad_value, const OffsetGradients<T>& grad_offset_mask) {
  const auto arguments = make_arguments<wide_t<T>>(p, plan);
  for_each_launch(p, plan, [&](int64_t image, int64_t blocks) {
    const int64_t value_begin = image * p.height * p.width * p.channels();
    const int64_t output_begin = image * p.queries() * p.channels();
    const int64_t packed_begin = image * p.queries() * p.offset_mask_channels;
    launch(&dcnv4_backward_kernel<T, kVec, kMaybeSoftmax, Sum>, blocks, plan.threads,
           plan.shared_bytes, stream, arguments, grad_output + output_begin, value + value_begin,
           offset_mask.from(packed_begin), grad_value.from(value_begin),
           grad_offset_mask.from(packed_begin));
  });
}

template <typename T>
void launch_dcnv4_backward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                           const T* grad_output, const T* value,
                           const OffsetNumbers<T>& offset_mask,
                           const FloatSum<wide_t<T>>& grad_value,
                           const OffsetGradients<T>& grad_offset_mask) {
  with_vec<T>(plan.vec, [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    if constexpr (kVec > kMostAdded) {
      throw std::invalid_argument("dcnv4: the vector width of gradients must be at most " +
                                  std::to_string(kMostAdded) + ", got " + std::to_string(kVec));
    } else {
      auto* launch_it = &launch_backward<kVec, true, T, FloatSum<wide_t<T>>>;
      if constexpr (kVec == kMostAdded) {
        if (!p.softmax) launch_it = &launch_backward<kVec, false, T, FloatSum<wide_t<T>>>;
      }
      launch_it(p, plan, stream, grad_output, value, offset_mask, grad_value, grad_offset_mask);
    }
  });
}

template <typename T>
void launch_dcnv4_backward(const Dcnv4Params& p, const LaunchPlan& plan, Stream stream,
                           const T* grad_output, const T* value,
                           const OffsetNumbers<T>& offset_mask,
                           const FixedSum<wide_t<T>>& grad_value,
                           const OffsetGradients<T>& grad_offset_mask) {
  if (plan.vec != 1)
    throw std::invalid_argument("dcnv4: the vector width must be 1 for sums in fixed point, got " +
                                std::to_string(plan.vec));
  launch_backward<1, true>(p, plan, stream, grad_output, value, offset_mask, grad_value,
                           grad_offset_mask);
}

} // namespace cuda
} // namespace mmdcnv4
