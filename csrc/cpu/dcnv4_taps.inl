// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_taps.inl — from offsets and masks to the coefficients of the taps: which pixels a block of
// outputs samples, and with which weights. One lane per tap; no channel is touched here.
#pragma once

#include "kernel_scope.h"
#include "vec.h"

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

// Number of taps as a compile-time constant; 0: known at run time only.
template <int kCount_>
struct Points {
  static constexpr int kCount = kCount_;
};

// Arrays of a TapBlock, one number per lane.
//
//   array                 | written by                          | read by
//   grid, column          | the constructor                     | compute_taps
//   offset                | unpack                              | compute_taps
//   mask                  | unpack                              | compute_taps, gradients
//   weight, start         | compute_taps, compute_interior_taps | gather, scatter
//   fraction              | compute_taps of the backward pass   | gradients
//   dot                   | scatter                             | gradients
//   corners (beside them) | compute_taps                        | gather, scatter, gradients
struct Tap {
  enum Array : int {
    kGridX, // resting place of the tap, from the centre of its window, in pixels
    kGridY,
    kOffsetX, // dx, dy as given
    kOffsetY,
    kMask,
    kWeight00, // mask times bilinear weight of the corners (y0 x0), (y0 x1), (y1 x0), (y1 x1)
    kWeight01,
    kWeight10,
    kWeight11,
    kFractionX, // position minus its floor
    kFractionY,
    kDot00, // <grad_output, pixel> of the corners
    kDot01,
    kDot10,
    kDot11,
    kColumn, // centre of the window, from that of the block's first position, in pixels
    kArrays
  };
};

// Coefficients of the taps of a few neighbouring output positions and groups, as arrays with one
// lane per tap: lane s = (position * groups + group) * K + k. Arrays of one cache-aligned block.
template <typename T, typename Index>
class TapBlock {
 public:
  const int64_t points, groups, positions; // K, and what one block covers
  const int64_t size;                      // lanes, a multiple of kPad

  TapBlock(const Dcnv4Params& p, int64_t most_groups, int64_t most_positions)
      : points(p.points()),
        groups(share(most_groups, kLanesWanted / points)),
        positions(share(most_positions, kLanesWanted / (points * groups))),
        size((points * groups * positions + kPad - 1) / kPad * kPad),
        memory_(std::calloc(size * kBytesPerLane + kAlignment, 1)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto start = (reinterpret_cast<uintptr_t>(memory_) + kAlignment - 1) & -kAlignment;
    numbers_ = reinterpret_cast<T*>(start);
    starts_ = reinterpret_cast<Index*>(numbers_ + Tap::kArrays * size);
    corners_ = reinterpret_cast<int32_t*>(starts_ + size);
    fill_grid(p);
  }
  TapBlock(const TapBlock&) = delete;
  TapBlock& operator=(const TapBlock&) = delete;
  ~TapBlock() { std::free(memory_); }

  int64_t lane(int64_t position, int64_t group) const {
    return (position * groups + group) * points;
  }

  T* operator[](Tap::Array array) { return numbers_ + array * size; }
  T* weight(int corner) { return numbers_ + (Tap::kWeight00 + corner) * size; }
  T* dot(int corner) { return numbers_ + (Tap::kDot00 + corner) * size; }
  Index* start() { return starts_; }      // element offset of the first corner in the image
  int32_t* corners() { return corners_; } // which of them exist: a sum of the kHas... below
  void clear_dots() { std::memset(dot(0), 0, 4 * size * sizeof(T)); }

 private:
  static constexpr int64_t kBytesPerLane =
      Tap::kArrays * sizeof(T) + sizeof(Index) + sizeof(int32_t);
  static constexpr int64_t kPad = 16;          // lanes of the widest vector of floats
  static constexpr int64_t kLanesWanted = 144; // long enough loops, short enough for L1
  static constexpr uintptr_t kAlignment = 64;

  // Splits `most` into equal parts of at most `wanted`, at least 1.
  static int64_t share(int64_t most, int64_t wanted) {
    if (wanted <= 1) return 1;
    const int64_t parts = (most + wanted - 1) / wanted;
    return (most + parts - 1) / parts;
  }

  void fill_grid(const Dcnv4Params& p) {
    for_each_tap(p, [&](int32_t k, int32_t i, int32_t j) {
      for (int64_t position = 0; position < positions; ++position) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t s = lane(position, g) + k;
          (*this)[Tap::kColumn][s] = T(position * p.stride_w);
          (*this)[Tap::kGridX][s] = T(int64_t(i) * p.dilation_w - p.center_w());
          (*this)[Tap::kGridY][s] = T(int64_t(j) * p.dilation_h - p.center_h());
        }
      }
    });
  }

  void* memory_;
  T* numbers_;
  Index* starts_;
  int32_t* corners_;
};

template <typename T>
void softmax_in_place(T* logits, int64_t count) {
  T largest = logits[0];
  for (int64_t k = 1; k < count; ++k) largest = logits[k] > largest ? logits[k] : largest;
  T total = 0;
  for (int64_t k = 0; k < count; ++k) total += logits[k] = std::exp(logits[k] - largest);
  for (int64_t k = 0; k < count; ++k) logits[k] /= total;
}

// Splits the packed offsets and masks of one position into the lanes of `count` groups.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD void unpack(const Dcnv4Params& p, const T* packed, int64_t position, int64_t count,
                       TapBlock<T, Index>& taps) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t first = taps.lane(position, g);
    const T* MMDCNV4_RESTRICT from = packed + g * 3 * points;
    T* MMDCNV4_RESTRICT dx = taps[Tap::kOffsetX] + first;
    T* MMDCNV4_RESTRICT dy = taps[Tap::kOffsetY] + first;
    T* MMDCNV4_RESTRICT mask = taps[Tap::kMask] + first;
    int64_t k = 0;
    for (; k + 8 <= points; k += 8) split_pairs(from + 2 * k, dx + k, dy + k);
    for (; k < points; ++k) {
      dx[k] = from[2 * k];
      dy[k] = from[2 * k + 1];
    }
    std::memcpy(mask, from + 2 * points, points * sizeof(T));
    if (p.softmax) softmax_in_place(mask, points);
  }
}

// Corners of a tap that exist.
constexpr int32_t kHasX0 = 1, kHasX1 = 2, kHasY0 = 4, kHasY1 = 8;
constexpr int32_t kBothX = kHasX0 | kHasX1, kBothY = kHasY0 | kHasY1, kAllCorners = kBothX | kBothY;

// Whether there is any: a tap without one is skipped.
inline bool exists(int32_t corners) { return (corners & kBothX) && (corners & kBothY); }

// Whether each of the taps has its four corners: true for most rows, which then need no tests.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD bool is_interior(TapBlock<T, Index>& taps, int64_t first) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  const int32_t* corners = taps.corners() + first;
  int32_t all = kAllCorners;
  for (int64_t k = 0; k < points; ++k) all &= corners[k];
  return all == kAllCorners;
}

// From a corner of a sample to its neighbours, in elements of value.
template <typename Index>
struct Steps {
  Index right, below;

  MMDCNV4_HD Index to(int corner) const {
    return (corner & 1 ? right : 0) + (corner & 2 ? below : 0);
  }
  // Those of a tap of which some corners are missing: a missing corner stands for its neighbour,
  // with weight zero.
  MMDCNV4_HD Steps between(int32_t corners) const {
    return {(corners & kBothX) == kBothX ? right : 0, (corners & kBothY) == kBothY ? below : 0};
  }
};

template <typename Index>
MMDCNV4_HD Steps<Index> steps_of(const Dcnv4Params& p) {
  return {Index(p.channels()), Index(p.width) * Index(p.channels())};
}

// Where the window of an output position has its centre, in pixels: the x of a column, the y of a
// line of outputs.
template <typename T>
MMDCNV4_HD T center_x(const Dcnv4Params& p, int64_t column) {
  return T(column * p.stride_w - p.pad_w + p.center_w());
}
template <typename T>
MMDCNV4_HD T center_y(const Dcnv4Params& p, int64_t line) {
  return T(line * p.stride_h - p.pad_h + p.center_h());
}

// Positions -> corner offsets and weights, for all lanes at once (this loop is vectorised).
template <bool kBackward, typename T, typename Index>
void compute_taps(const Dcnv4Params& p, T base_x, T base_y, TapBlock<T, Index>& taps) {
  const T scale = T(p.offset_scale);
  const int32_t height = int32_t(p.height), width = int32_t(p.width);
  const Steps<Index> step = steps_of<Index>(p);
  const T *grid_x = taps[Tap::kGridX], *grid_y = taps[Tap::kGridY], *column = taps[Tap::kColumn];
  const T *dx = taps[Tap::kOffsetX], *dy = taps[Tap::kOffsetY], *mask = taps[Tap::kMask];
  T *w00 = taps.weight(0), *w01 = taps.weight(1), *w10 = taps.weight(2), *w11 = taps.weight(3);
  Index* start = taps.start();
  T *fx = taps[Tap::kFractionX], *fy = taps[Tap::kFractionY];
  int32_t* corners = taps.corners();
  const int64_t size = taps.size;
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    // base + column is exact: a position does not depend on how the outputs are cut into blocks
    const Bilinear<T> b = make_bilinear((base_x + column[s]) + (grid_x[s] + dx[s]) * scale,
                                        base_y + (grid_y[s] + dy[s]) * scale, height, width);
    const CornerWeights<T> w = corner_weights(mask[s], b.wx0, b.wx1, b.wy0, b.wy1);
    w00[s] = w.w00;
    w01[s] = w.w01;
    w10[s] = w.w10;
    w11[s] = w.w11;
    start[s] = Index(b.y0) * step.below + Index(b.x0) * step.right;
    int32_t present = b.has_x0 ? kHasX0 : 0;
    present = b.has_x1 ? present | kHasX1 : present;
    present = b.has_y0 ? present | kHasY0 : present;
    present = b.has_y1 ? present | kHasY1 : present;
    corners[s] = present;
    if (kBackward) {
      fx[s] = b.fx;
      fy[s] = b.fy;
    }
  }
}

// The same results with half of the work for a block whose taps have all their corners. Returns
// whether that is so; if not, the arrays are to be computed again.
template <typename T, typename Index>
bool compute_interior_taps(const Dcnv4Params& p, T base_x, T base_y, TapBlock<T, Index>& taps) {
  const T scale = T(p.offset_scale);
  const int32_t height = int32_t(p.height), width = int32_t(p.width);
  const Steps<Index> step = steps_of<Index>(p);
  const T *grid_x = taps[Tap::kGridX], *grid_y = taps[Tap::kGridY], *column = taps[Tap::kColumn];
  const T *dx = taps[Tap::kOffsetX], *dy = taps[Tap::kOffsetY], *mask = taps[Tap::kMask];
  T *w00 = taps.weight(0), *w01 = taps.weight(1), *w10 = taps.weight(2), *w11 = taps.weight(3);
  Index* start = taps.start();
  const int64_t size = taps.size;
  int32_t outside = 0; // negative where a corner is missing
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    T fx, fy;
    const int32_t x0 = floor_of((base_x + column[s]) + (grid_x[s] + dx[s]) * scale, T(-1), width,
                                fx);
    const int32_t y0 = floor_of(base_y + (grid_y[s] + dy[s]) * scale, T(-1), height, fy);
    outside |= (x0 | (width - 2 - x0)) | (y0 | (height - 2 - y0));
    const CornerWeights<T> w = corner_weights(mask[s], T(1) - fx, fx, T(1) - fy, fy);
    w00[s] = w.w00;
    w01[s] = w.w01;
    w10[s] = w.w10;
    w11[s] = w.w11;
    start[s] = Index(y0) * step.below + Index(x0) * step.right;
  }
  return outside >= 0;
}

// Whether the resting taps of outputs `begin` to `end` - 1 of an axis keep away from its borders: a
// guess that it pays to try compute_interior_taps.
inline bool rests_inside(int64_t begin, int64_t end, int64_t stride, int64_t padding, int64_t span,
                         int64_t size) {
  constexpr int64_t kMargin = 2; // pixels; most learned offsets are shorter
  return begin * stride - padding >= kMargin &&
         (end - 1) * stride - padding + span < size - kMargin;
}

// Prefetches `count` numbers. All that prefetches is always inlined: GCC takes a function that does
// nothing else for one without effect and drops its calls.
template <bool kIsWrite, typename T>
MMDCNV4_INLINE inline void prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count; i += kLine) MMDCNV4_PREFETCH(from + i, kIsWrite);
}

// Prefetches what lines of outputs further down will be the first to sample, in the columns of
// `positions` outputs: `count` channels from `image` on. A processor foresees reads in order only;
// in maps beyond its caches the samples would wait for memory one by one.
template <bool kIsWrite, typename T>
MMDCNV4_INLINE inline void prefetch_below(const Dcnv4Params& p, const T* image, int64_t line,
                                          int64_t column, int64_t positions, int64_t count) {
  constexpr int64_t kLines = 4; // below the resting taps; most learned offsets are shorter
  const int64_t y = line * p.stride_h - p.pad_h + p.span_h() + kLines;
  const int64_t x = column * p.stride_w - p.pad_w + p.center_w();
  if (y < 0 || y >= p.height || x < 0) return;
  const int64_t end = smaller(x + positions * p.stride_w, p.width);
  for (int64_t i = x; i < end; ++i)
    prefetch<kIsWrite>(image + (y * p.width + i) * p.channels(), count);
}

// 32-bit element offsets where an image allows them: half the traffic of the coefficients.
template <typename Visit>
void with_index_and_points(const Dcnv4Params& p, const Visit& visit) {
  // one line and column more: so far a position may lie outside before that is known
  const bool is_short = (p.height + 1) * (p.width + 1) <= INT32_MAX / p.channels();
  if (p.points() == 9) { // 3x3, known to the compiler
    is_short ? visit(int32_t(), Points<9>()) : visit(int64_t(), Points<9>());
  } else {
    is_short ? visit(int32_t(), Points<0>()) : visit(int64_t(), Points<0>());
  }
}

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
