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

// Adds to grad_value number by number: see AddedChannels. Teams of less than eight threads, of
// groups that fill sectors, do it together with those of the rows beside them, whose taps are in
// shared memory as well: eight threads add eight neighbouring numbers of a row, then of the next.
template <typename T, int kVec>
class OneByOne {
  using W = wide_t<T>;
  static constexpr int32_t kTogether = 8; // numbers of a sector

public:
  MMDCNV4_DEVICE void start(const KernelArguments<W>& a, const Row& row,
                            const Channels<T>& channels) {
    rows_log2_ = 0;
    first_ = -1;
    if (channels.step == channels.end && channels.end % kTogether == 0)
      while (kTogether >> rows_log2_ > 1 << a.team_log2) ++rows_log2_;
    if (rows_log2_ == 0) return;
    const int32_t place = row.index & (rows() - 1); // of its row among those
    first_ = row.lane + (place << a.team_log2);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int32_t other = row.index - place + (i << rows_log2_) / kVec;
      const int64_t from = __shfl_sync(kAllLanes, row.is_valid ? channels.row : int64_t(-1),
                                       other << a.team_log2 & (kWarp - 1));
      const int32_t channel = first_ + (i & (of_row() - 1)) * kTogether;
      number_[i] = from < 0 ? W(0) : load_one(channels.grad_output + from + channel);
    }
  }

  // A tap of its row, whose corners are `bits`, or of all the rows.
  template <typename Sum>
  MMDCNV4_DEVICE void add(const KernelArguments<W>& a, const Row& row, const Channels<T>& channels,
                          const Sum& grad_value, const Taps<W>& taps, int32_t slot,
                          uint32_t bits) {
    if (rows_log2_ == 0 && bits == 0) return; // there may be no such row
#pragma unroll 1
    for (int32_t begin = 0; begin < channels.end; begin += channels.step) {
      const AddedChannels to =
          AddedChannels::of(begin, channels.end, row.lane, 1 << a.team_log2, kVec);
      if (rows_log2_ == 0 && first_ != to.first) {
        if (row.lane >= to.pitch) return; // no channels are left for this thread
        first_ = to.first;
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          number_[i] = load_one(channels.grad_output + channels.row + first_ + i * to.pitch);
      }
      add_rows(a, row, channels, grad_value, taps, slot,
               rows_log2_ == 0 ? to.pitch : kTogether);
    }
  }

private:
  template <typename Sum>
  MMDCNV4_DEVICE void add_rows(const KernelArguments<W>& a, const Row& row,
                               const Channels<T>& channels, const Sum& grad_value,
                               const Taps<W>& taps, int32_t slot, int32_t pitch) {
    const int32_t groups = (1 << a.groups_log2) - 1, begin = row.index & -rows();
#pragma unroll 1
    for (int32_t other = begin; other < begin + rows(); ++other) {
      const int32_t tap = slot + (other - row.index) * kTapsPerPass;
      const uint32_t bits = uint32_t(taps.extra[tap].w);
      const Four<W> weight = taps.weight[tap];
      const uint4 pixel = taps.pixel[tap];
      const W weights[4] = {weight.x, weight.y, weight.z, weight.w};
      const uint32_t pixels[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
      const int32_t channel =
          ((other & groups) - (row.index & groups)) * a.group_channels + first_;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(bits >> c & 1)) continue;
        const int64_t at = channels.offset(pixels[c], channel);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const W part[1] = {weights[c] * number_[i]};
          if (i < of_row()) grad_value.add(at + i * pitch, part);
        }
      }
      take_next();
    }
  }

  MMDCNV4_DEVICE int32_t rows() const { return 1 << rows_log2_; }
  MMDCNV4_DEVICE int32_t of_row() const { return kVec >> rows_log2_; } // numbers

  // The numbers of the next row come first; those of the last are followed by those of the first.
  MMDCNV4_DEVICE void take_next() {
    static_assert(kVec <= 4, "with others, of_row() is 1 or 2");
    if (of_row() == 1) turn<1>();
    if (of_row() == 2) turn<2>();
  }
  template <int kBy>
  MMDCNV4_DEVICE void turn() {
    W turned[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) turned[i] = number_[(i + kBy) % kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) number_[i] = turned[i];
  }

  int32_t rows_log2_; // of the rows that are added to together
  int32_t first_;     // channel of number_[0]
  W number_[kVec];    // of grad_output; of the first of the rows, then of the next
};

// Dot products of a tap with grad_output, and if `scatters`, what it adds to grad_value.
template <typename T, typename Sum, int kVec>
MMDCNV4_DEVICE void take_tap(bool scatters, const KernelArguments<wide_t<T>>& a, const Row& row,
                             const Channels<T>& channels, const Sum& grad_value,
                             const Taps<wide_t<T>>& taps, int32_t slot, uint32_t bits,
                             OneByOne<T, kVec>& one_by_one, wide_t<T> (&grad)[kVec],
                             wide_t<T> (&dot)[4]) {
  with_reduction_width([&](auto width) {
    constexpr bool kOneByOne = kAddsOneByOne<kVec, decltype(width)>;
    if constexpr (kOneByOne) {
      if (scatters) one_by_one.add(a, row, channels, grad_value, taps, slot, bits);
    }
    if (bits == 0) return;
    const Four<wide_t<T>>& of = taps.weight[slot];
    const wide_t<T> weight[4] = {of.x, of.y, of.z, of.w};
    gather_tap(channels, taps.pixel[slot], bits, grad, dot,
               [&](int corner, uint32_t pixel, int32_t channel) {
                 if constexpr (!kOneByOne) {
                   if (!scatters) return;
                   wide_t<T> part[kVec];
#pragma unroll
                   for (int i = 0; i < kVec; ++i) part[i] = weight[corner] * grad[i];
                   grad_value.add(channels.offset(pixel, channel), part);
                 }
               });
  });
}

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
  OneByOne<T, kVec> one_by_one;
  with_reduction_width([&](auto width) {
    if constexpr (kAddsOneByOne<kVec, decltype(width)>) one_by_one.start(a, row, channels);
  });
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
        take_tap(!kMaybeSoftmax || is_last, a, row, channels, grad_value, taps, slot, bits,
                 one_by_one, grad, dot);
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
