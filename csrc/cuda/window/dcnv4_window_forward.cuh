// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_window_forward.cuh — tensor-core forward kernel of DCNv4, for 3x3 kernels of stride 1.
//
// Computes    as dcnv4_forward.cuh: out[n,q,g,:] = sum_k mask * bilinear(value, x_k, y_k)
// Idea        near its pixel, a sample is four weights in a small dense matrix: per row 36 numbers
//             are added to A instead of 36 D multiplications done, and tensor cores compute A . V
//             for all channels (dense_window.cuh: shapes, tiles, layouts)
// Work split  block = a tile; warp = one unit at a time: lane = row while A is built, fragments
//             while it is multiplied, teams of lanes with 16 bytes each per row at the end
// Far taps    samples outside the window are noted, one bit per tap of a row, and multiplied on as
//             cells of their own (far_taps.cuh): any offset is as exact as one within the window.
//             A unit with many of them, judged by two taps of each row, is gathered without a
//             product (unit_gather.cuh)
// NaN         A . V multiplies every cell of a window with every row, and 0 * NaN is NaN. A finite
//             result proves that no such cell was there; results that are not finite are thrown
//             away and the row's channels gathered tap by tap, as in dcnv4_forward.cuh. So NaN and
//             infinity, of pixels and of masks, reach the outputs that sample them and no others
// Borders     cells outside the image are zero
// Numerics    sums in float32. With float16 A is rounded to it after a power of two has brought the
//             largest mask of each row to 2^11 ... 2^12 (nine of them do not overflow, smaller ones
//             keep their digits); with bfloat16 A is split into two of them, which keep 16 bits of
//             it; with float32 A and V are (fragments.cuh). No atomics; bitwise repeatable
// Limits      K = 8 or 9, no softmax, D in {16, 32} or, half types, 64, tensors aligned to 16
//             bytes: see make_window_plan(); sm_80 and newer
// Source      arXiv:2401.06197, section 3
#pragma once

#include <cfloat>

#include "../dispatch.h"
#include "../launch.h"
#include "far_taps.cuh"
#include "unit_gather.cuh"

namespace mmdcnv4 {
namespace cuda {

// A sample seen from the window of its row. Numbers from 2^23 on are whole: their last bits are the
// floor of what was added to that.
struct WindowSample {
  static constexpr float kWhole = 8388608.0f;         // 2^23
  static constexpr uint32_t kWholeBits = 0x4b000000u; // its bits
  float x, y, column_up, line_up;
  uint32_t column, line; // of its upper left cell

  MMDCNV4_DEVICE WindowSample(const WindowArguments& a, uint32_t lane, int k, float dx, float dy) {
    const Place moved = move_of_tap(a, k, dx, dy);
    x = float(lane % kBlockSide + kReach) + moved.x; // from where the row's pixel is
    y = float(lane / kBlockSide % kBlockSide + kReach) + moved.y;
    column_up = __fadd_rd(x, kWhole);
    line_up = __fadd_rd(y, kWhole);
    column = __float_as_uint(column_up) - kWholeBits;
    line = __float_as_uint(line_up) - kWholeBits;
  }
  MMDCNV4_DEVICE bool is_near() const { // not so below zero, nor for NaN
    constexpr uint32_t kLast = kWindowSide - 1;
    return (column < kLast) & (line < kLast);
  }
};

// Whether the product is cheaper than gathering all taps of a unit, judged by two taps of each row
// that exists. Wider groups make the product cheaper, for as many taps; where both take the same
// time was measured on an H200 with half types.
template <typename Layout, int kDepth>
MMDCNV4_DEVICE bool is_worth_a_product(const WindowArguments& a, const Tile& tile, uint32_t unit,
                                       uint32_t lane, const RowNumbers& numbers) {
  const bool exists = Layout::locate_row(a, tile, unit, lane).is_valid;
  const auto count = [&](bool is_counted) {
    return uint32_t(__popc(__ballot_sync(kAllLanes, is_counted)));
  };
  uint32_t far = 0;
#pragma unroll
  for (int k = 1; k < 8; k += 4) {
    const WindowSample sample(a, lane, k, numbers.offset[2 * k], numbers.offset[2 * k + 1]);
    far += count(exists & !sample.is_near());
  }
  constexpr uint32_t kRowsPerFar = kDepth == 16 ? 8 : kDepth == 32 ? 4 : 3;
  return kRowsPerFar * far <= count(exists);
}

// Adds the weights of a row to its column of A; returns the taps outside the window.
template <typename Layout>
MMDCNV4_DEVICE FarTaps add_weights(const WindowArguments& a, uint32_t lane,
                                   const RowNumbers& numbers, float factor, unsigned char* area) {
  const bool is_ring = a.call.points < kTaps;
  FarTaps far{};
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    enter_step(SharedPhase::kScatter);
    if (k == kTaps - 1 && is_ring) continue;
    const float dx = numbers.offset[2 * k], dy = numbers.offset[2 * k + 1];
    const WindowSample sample(a, lane, k, dx, dy);
    const float mask = numbers.mask[k] * factor;
    if (!sample.is_near()) {
      far = {far.bits | 1u << k, {dx, dy, mask}};
    } else {
      const float fx = sample.x - (sample.column_up - WindowSample::kWhole);
      const float fy = sample.y - (sample.line_up - WindowSample::kWhole);
      const CornerWeights<float> w = corner_weights(mask, 1.0f - fx, fx, 1.0f - fy, fy);
      const uint32_t cell = sample.line * Layout::kSide + sample.column;
      const float weight[4] = {w.w00, w.w01, w.w10, w.w11};
      uint32_t at[4];
      Layout::corners_at(cell, lane, at);
      float sum[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = read_shared<float>(area + at[c]) + weight[c];
#pragma unroll
      for (int c = 0; c < 4; ++c) write_shared(area + at[c], sum[c]);
    }
  }
  return far;
}

// A . V of both matrices of a unit; sum[matrix][8 channels][fragment].
template <typename T, int kDepth>
MMDCNV4_DEVICE void multiply(const WindowArguments& a, uint32_t unit, uint32_t lane,
                             const unsigned char* area, const unsigned char* cells,
                             float (&sum)[2][kDepth / 8][4]) {
  using Layout = DenseWindow<T, kDepth>;
  const uint32_t g = lane / 4, t = lane % 4;
  using Rows = CellRows<T, kDepth>;
  const unsigned char* weights_at[2][2]; // rows g and g + 8 of each matrix
  const auto rows_of = [&](uint32_t m) {
    const typename Layout::Matrix matrix = Layout::locate_matrix(a, 2 * unit + m);
    return Rows(a, matrix.x, matrix.y, matrix.group, lane, cells);
  };
  const Rows rows[2] = {rows_of(0), rows_of(1)};
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      weights_at[m][half] = area + Layout::weight_at(2 * t, m * kMatrixRows + half * 8 + g);
#pragma unroll
  for (int step = 0; step < int(Layout::kSteps); ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      WeightFragment<T> weights;
      enter_step(SharedPhase::kWeights);
      weights.load(weights_at[m][0] + step * (16 * kWeightBytes),
                   weights_at[m][1] + step * (16 * kWeightBytes));
#pragma unroll
      for (int load = 0; load < Rows::kLoads; ++load) {
        uint32_t pixels[4];
        enter_step(SharedPhase::kPixels);
        rows[m].load(step, load, pixels);
        weights.multiply(pixels, sum[m] + WeightFragment<T>::kTiles * load);
      }
    }
  }
}

// sum += all taps of a row, for the channels of a chunk from `image` on.
template <typename T>
MMDCNV4_DEVICE void gather_taps(const WindowArguments& a, const Row& row,
                                const OffsetNumbers<T>& packed, const T* __restrict__ image,
                                float (&sum)[kChunkNumbers<T>]) {
  using Io = VectorIo<T, kChunkNumbers<T>>;
#pragma unroll 1
  for (int32_t k = 0; k < a.call.points; ++k) {
    const Sample<float> sample = make_sample<false>(a.call, row, MaskRule<float>{},
                                                    packed.load_tap(k, a.call.points), k);
    if (!sample.bilinear.inside) continue;
    const Four<float> weights = sample_weights(sample);
    const uint4 from = corner_pixels(a.call, sample.bilinear);
    const uint32_t pixel[4] = {from.x, from.y, from.z, from.w};
    const float weight[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float number[kChunkNumbers<T>];
      Io::widen(Io::load(image + uint64_t(pixel[c]) * a.call.channels), number);
#pragma unroll
      for (int i = 0; i < int(kChunkNumbers<T>); ++i) sum[i] += weight[c] * number[i];
    }
  }
}

// Whether all numbers are finite; false also where their sum is not.
MMDCNV4_DEVICE bool are_finite(const float (&n)[4]) {
  return fabsf((n[0] + n[1]) + (n[2] + n[3])) <= FLT_MAX;
}
MMDCNV4_DEVICE bool are_finite(const float (&n)[8]) {
  const float sum = ((n[0] + n[1]) + (n[2] + n[3])) + ((n[4] + n[5]) + (n[6] + n[7]));
  return fabsf(sum) <= FLT_MAX;
}

// Brings the sums from fragments to rows: a chunk of a row per lane, a team per row.
template <typename T, int kDepth>
MMDCNV4_DEVICE void collect(uint32_t lane, const float (&sum)[2][kDepth / 8][4],
                            unsigned char* area) {
  using Layout = DenseWindow<T, kDepth>;
  const uint32_t g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kDepth / 8; ++i) {
    unsigned char* to = area + Layout::result_at(g, 8 * i + 2 * t);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        enter_step(SharedPhase::kCollect);
        write_shared(to + (m * kMatrixRows + half * 8) * Layout::kResultBytes,
                     make_float2(sum[m][i][2 * half], sum[m][i][2 * half + 1]));
      }
  }
}

// The part of finish() that is one row of each team. Rows without finite sums wait for kGather;
// returns whether this lane's does.
template <bool kGather, typename T, int kDepth>
MMDCNV4_DEVICE bool finish_row(const WindowArguments& a, const Tile& tile, uint32_t unit,
                               uint32_t pass, uint32_t lane, float inverse, const Image<T>& image,
                               const unsigned char* area) {
  using Layout = DenseWindow<T, kDepth>;
  const uint32_t first = lane / Layout::kTeam, index = pass * (kWarp / Layout::kTeam) + first;
  const uint32_t column = lane % Layout::kTeam * kChunkNumbers<T>;
  const Row row = Layout::locate_row(a, tile, unit, index);
  float factor = 1.0f;
  if constexpr (std::is_same<T, Half>::value)
    factor = __shfl_sync(kAllLanes, inverse, int(index));
  enter_step(SharedPhase::kFinish);
  const unsigned char* from = area + pass * (kWarp / Layout::kTeam) * Layout::kResultBytes;
  float number[kChunkNumbers<T>];
#pragma unroll
  for (int i = 0; i < int(kChunkNumbers<T>); i += 4) {
    const float4 four = read_shared<float4>(from + Layout::result_at(first, column + i));
    number[i] = four.x;
    number[i + 1] = four.y;
    number[i + 2] = four.z;
    number[i + 3] = four.w;
  }
  if (!row.is_valid || are_finite(number) == kGather) return row.is_valid && !kGather;
  const uint32_t pixel = pixel_of(a, row), channel = uint32_t(row.group) * kDepth + column;
#pragma unroll
  for (int i = 0; i < int(kChunkNumbers<T>); ++i) number[i] = kGather ? 0 : number[i] * factor;
  if constexpr (kGather)
    gather_taps(a, row, numbers_of(a, row, image), image.value + channel, number);
  const uint32_t pitch = uint32_t(a.call.channels) * uint32_t(sizeof(T));
  char* to = reinterpret_cast<char*>(image.output + channel) + uint64_t(pixel) * pitch;
  VectorIo<T, kChunkNumbers<T>>::store(number, reinterpret_cast<T*>(to));
  return false;
}

// Undoes the scale of the rows and writes the outputs of a unit.
template <typename T, int kDepth>
MMDCNV4_DEVICE void finish(const WindowArguments& a, const Tile& tile, uint32_t unit, uint32_t lane,
                           float inverse, Image<T> image, const unsigned char* area) {
  constexpr uint32_t kPasses = DenseWindow<T, kDepth>::kTeam;
  image.output = forget(image.output); // else the compiler computes it anew for each pass
  bool has_more = false;
#pragma unroll
  for (uint32_t pass = 0; pass < kPasses; ++pass)
    has_more |=
        finish_row<false, T, kDepth>(a, tile, unit, pass, lane, inverse, image, area);
  if (!__any_sync(kAllLanes, has_more)) return;
#pragma unroll 1
  for (uint32_t pass = 0; pass < kPasses; ++pass)
    finish_row<true, T, kDepth>(a, tile, unit, pass, lane, inverse, image, area);
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(window_threads<T>(kDepth),
                                  window_threads<T>(kDepth) < kMaxThreads ? 3 : 2)
    dcnv4_window_forward_kernel(const WindowArguments a,
                                const T* __restrict__ value,        // [N, H, W, G, D]
                                const OffsetNumbers<T> offset_mask, // [N, Ho, Wo, P]
                                T* __restrict__ output) {           // [N, Ho, Wo, G, D]
#if MMDCNV4_HAS_TENSOR_CORES
  using Layout = DenseWindow<T, kDepth>;
  using Numbers = UnitNumbers<T, kDepth>;
  MMDCNV4_SHARED_MEMORY(shared);
  const uint32_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const uint32_t points = uint32_t(a.call.points);
  const Tile tile = Layout::locate_tile(a, blockIdx.x);
  const uint64_t in_pixels =
      uint64_t(tile.image) * uint32_t(a.call.height) * uint32_t(a.call.width);
  const uint64_t out_pixels =
      uint64_t(tile.image) * uint32_t(a.call.out_height) * uint32_t(a.call.out_width);
  const Image<T> image{value + in_pixels * a.call.channels,
                       offset_mask.from(int64_t(out_pixels * a.packed_channels)),
                       output + out_pixels * a.call.channels};
  unsigned char* area = shared + warp * Layout::kAreaBytes;
  unsigned char* cells = shared + warps * Layout::kAreaBytes;
#pragma unroll 1
  for (uint32_t unit = warp; unit < a.units; unit += warps) {
    // addresses kept from one unit to the next would fill the registers
    const uint32_t lane = forget(threadIdx.x) % kWarp;
    const uint32_t first_group = tile.first_group + Layout::locate_matrix(a, 2 * unit).group;
    Numbers::copy_unit(a, tile, unit, lane, image.packed, area);
    commit_copies();
    if (unit == warp) copy_cells<T, kDepth>(a, tile, image.value, cells);
    commit_copies();
    wait_copies<1>(); // the cells may take until A is there
    __syncwarp();
    const RowNumbers numbers = Numbers::load(a, lane, first_group, image.packed, area);
    __syncwarp();
    const bool has_product =
        is_worth_a_product<Layout, kDepth>(a, tile, unit, lane, numbers);
    Scale scale{1.0f, 1.0f};
    FarTaps far{};
    FarLayer<T, kDepth> layer;
    bool has_far = false;
    if (has_product) {
#pragma unroll
      for (uint32_t i = 0; i < Layout::kAreaBytes; i += kWarp * 16) {
        enter_step(SharedPhase::kClear);
        write_shared(area + i + lane * 16, make_uint4(0, 0, 0, 0));
      }
      scale = scale_of_row<T>(numbers, points);
      __syncwarp();
      far = add_weights<Layout>(a, lane, numbers, scale.factor, area);
      // what was read as the numbers of a group that does not exist may be anything
      if (first_group + lane / Numbers::kPixels >= uint32_t(a.call.groups)) far.bits = 0;
      has_far = __any_sync(kAllLanes, far.bits != 0);
      if (has_far) layer.take(a, tile, unit, lane, scale.factor, image, far);
    } else {
      write_taps<T, kDepth>(a, tile, unit, lane, numbers, area);
    }
    if (unit == warp) {
      wait_copies<0>();
      __syncthreads();
    }
    __syncwarp();
    if (has_product) {
      float sum[2][kDepth / 8][4] = {};
      multiply<T, kDepth>(a, unit, lane, area, cells, sum);
      __syncwarp();
#pragma unroll 1
      while (has_far) {
        layer.add(a, tile, unit, lane, image, area, cells, sum);
        has_far = __any_sync(kAllLanes, far.bits != 0);
        if (has_far) layer.take(a, tile, unit, lane, scale.factor, image, far);
      }
      collect<T, kDepth>(lane, sum, area);
      __syncwarp();
      finish<T, kDepth>(a, tile, unit, lane, scale.inverse, image, area);
    } else {
      gather_unit<T, kDepth>(a, tile, unit, lane, image.value, image.output, area, cells);
    }
    __syncwarp();
  }
#endif
}

// Returns false, and does nothing, where the device has no code for it.
template <typename T>
bool launch_dcnv4_window_forward(const Dcnv4Params& p, const WindowPlan& plan, Stream stream,
                                 const T* value, const OffsetNumbers<T>& offset_mask, T* output) {
  const WindowArguments arguments = make_window_arguments(p, plan);
  bool is_launched = false;
  with_depth<T>(p.group_channels, [&](auto depth) {
    auto* kernel = &dcnv4_window_forward_kernel<T, decltype(depth)::value>;
    if (!prepare_tensor_core_kernel(kernel)) return;
    for_each_launch(p, plan, [&](int64_t image, int64_t blocks) {
      launch(kernel, blocks, plan.threads, plan.shared_bytes, stream, arguments,
             value + image * p.height * p.width * p.channels(),
             offset_mask.from(image * p.queries() * p.offset_mask_channels),
             output + image * p.queries() * p.channels());
    });
    is_launched = true;
  });
  return is_launched;
}

} // namespace cuda
} // namespace mmdcnv4
