// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_kernels.inl — forward and backward of DCNv4 on the CPU, included once per instruction set
// inside a namespace of its own, with kVectorBytes defined.
// No function template of the standard library is used here: its instance might be compiled for a
// newer instruction set and be the one that the linker keeps for everybody.
//
// Computes    out[n,q,g,:] = sum_k mask[n,q,g,k] * bilinear(value[n,:,:,g,:], x_k, y_k)
// Work split  per output position, the coefficients of all taps of a block of groups are computed
//             at once, one lane per tap; then each group is accumulated, one lane per channel.
//             A block away from the borders skips all tests for corners outside the image
// Threads     forward: output rows; backward: (image, groups), each with its own slice of
//             grad_value, so that no atomics are needed and the sums have one fixed order
// Numerics    T throughout (the caller widens half inputs); bitwise repeatable for any thread count
// Borders     a tap without a corner in the image is skipped: its pixel, even NaN, is never used
// Source      arXiv:2401.06197, section 3

// Number of taps as a compile-time constant; 0: known at run time only.
template <int kCount_>
struct Points {
  static constexpr int kCount = kCount_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
    indices_ = reinterpret_cast<Index*>(numbers_ + kNumbers * size);
    flags_ = reinterpret_cast<int32_t*>(indices_ + size);
    fill_grid(p);
  }
  TapBlock(const TapBlock&) = delete;
  TapBlock& operator=(const TapBlock&) = delete;
  ~TapBlock() { std::free(memory_); }

  int64_t lane(int64_t position, int64_t group) const {
    return (position * groups + group) * points;
  }

  T* grid_x() { return numbers_; } // resting grid around the centre of the window
  T* grid_y() { return numbers_ + size; }
  T* offset_x() { return numbers_ + 2 * size; } // dx, as given
  T* offset_y() { return numbers_ + 3 * size; }
  T* mask() { return numbers_ + 4 * size; }
  T* weight(int corner) { return numbers_ + (5 + corner) * size; }
  T* fx() { return numbers_ + 9 * size; }
  T* fy() { return numbers_ + 10 * size; }
  T* dot(int corner) { return numbers_ + (11 + corner) * size; } // <grad_output, corner>
  T* column() { return numbers_ + 15 * size; } // window centre, from that of the first position
  Index* start() { return indices_; } // element offset of the first corner in the image
  int32_t* corners() { return flags_; } // which of them exist: a sum of the k... below
  void clear_dots() { std::memset(dot(0), 0, 4 * size * sizeof(T)); }

 private:
  static constexpr int64_t kNumbers = 16; // arrays of type T
  static constexpr int64_t kBytesPerLane = kNumbers * sizeof(T) + sizeof(Index) + sizeof(int32_t);
  static constexpr int64_t kPad = 16;           // lanes of the widest vector of floats
  static constexpr int64_t kLanesWanted = 144;  // long enough loops, short enough for L1
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
          column()[s] = T(position * p.stride_w);
          grid_x()[s] = T(int64_t(i) * p.dilation_w - p.center_w());
          grid_y()[s] = T(int64_t(j) * p.dilation_h - p.center_h());
        }
      }
    });
  }

  void* memory_;
  T* numbers_;
  Index* indices_;
  int32_t* flags_;
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
    T* MMDCNV4_RESTRICT dx = taps.offset_x() + first;
    T* MMDCNV4_RESTRICT dy = taps.offset_y() + first;
    T* MMDCNV4_RESTRICT mask = taps.mask() + first;
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

// Positions -> corner offsets and weights, for all lanes at once (this loop is vectorised).
template <bool kBackward, typename T, typename Index>
void compute_taps(const Dcnv4Params& p, T base_x, T base_y, TapBlock<T, Index>& taps) {
  const T scale = T(p.offset_scale);
  const int32_t height = int32_t(p.height), width = int32_t(p.width);
  const Index channels = Index(p.channels()), line = Index(p.width) * channels;
  const T *grid_x = taps.grid_x(), *grid_y = taps.grid_y(), *column = taps.column();
  const T *dx = taps.offset_x(), *dy = taps.offset_y(), *mask = taps.mask();
  T *w00 = taps.weight(0), *w01 = taps.weight(1), *w10 = taps.weight(2), *w11 = taps.weight(3);
  Index* start = taps.start();
  T *fx = taps.fx(), *fy = taps.fy();
  int32_t* corners = taps.corners();
  const int64_t size = taps.size;
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    // base + column is exact: a position does not depend on how the outputs are cut into blocks
    const Bilinear<T> b = make_bilinear((base_x + column[s]) + (grid_x[s] + dx[s]) * scale,
                                        base_y + (grid_y[s] + dy[s]) * scale, height, width);
    const T top = mask[s] * b.wy0, bottom = mask[s] * b.wy1;
    w00[s] = top * b.wx0;
    w01[s] = top * b.wx1;
    w10[s] = bottom * b.wx0;
    w11[s] = bottom * b.wx1;
    start[s] = Index(b.y0) * line + Index(b.x0) * channels;
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
  const T scale = T(p.offset_scale), limit_x = T(p.width), limit_y = T(p.height);
  const int32_t last_x = int32_t(p.width) - 2, last_y = int32_t(p.height) - 2; // of a first corner
  const Index channels = Index(p.channels()), line = Index(p.width) * channels;
  const T *grid_x = taps.grid_x(), *grid_y = taps.grid_y(), *column = taps.column();
  const T *dx = taps.offset_x(), *dy = taps.offset_y(), *mask = taps.mask();
  T *w00 = taps.weight(0), *w01 = taps.weight(1), *w10 = taps.weight(2), *w11 = taps.weight(3);
  Index* start = taps.start();
  const int64_t size = taps.size;
  int32_t outside = 0; // negative where a corner is missing
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    T x = (base_x + column[s]) + (grid_x[s] + dx[s]) * scale;
    T y = base_y + (grid_y[s] + dy[s]) * scale;
    x = x > T(-1) ? x : T(-1); // NaN too
    y = y > T(-1) ? y : T(-1);
    x = x < limit_x ? x : limit_x;
    y = y < limit_y ? y : limit_y;
    const T fx = x - std::floor(x), fy = y - std::floor(y);
    const int32_t x0 = static_cast<int32_t>(x - fx), y0 = static_cast<int32_t>(y - fy);
    outside |= (x0 | (last_x - x0)) | (y0 | (last_y - y0));
    const T top = mask[s] * (T(1) - fy), bottom = mask[s] * fy;
    w00[s] = top * (T(1) - fx);
    w01[s] = top * fx;
    w10[s] = bottom * (T(1) - fx);
    w11[s] = bottom * fx;
    start[s] = Index(y0) * line + Index(x0) * channels;
  }
  return outside >= 0;
}

// Whether the resting taps of a row of outputs keep away from the borders: a guess that it pays to
// try compute_interior_taps. `begin` and `end` - 1 are the first and the last output along an axis.
inline bool rests_inside(int64_t begin, int64_t end, int64_t stride, int64_t padding, int64_t reach,
                         int64_t size) {
  constexpr int64_t kMargin = 2; // pixels; most learned offsets are shorter
  return begin * stride - padding >= kMargin &&
         (end - 1) * stride - padding + reach < size - kMargin;
}

// Element offsets of the four corners of a tap from its first one. A corner that does not exist
// stands for its neighbour, with weight zero.
template <typename Index>
struct Steps {
  Index right, below;

  MMDCNV4_HD Index to(int corner) const {
    return (corner & 1 ? right : 0) + (corner & 2 ? below : 0);
  }
};

template <typename Index>
MMDCNV4_HD Steps<Index> steps(int32_t corners, Index channels, Index line) {
  return {(corners & kBothX) == kBothX ? channels : 0, (corners & kBothY) == kBothY ? line : 0};
}

// Whether each of the taps has its four corners: true for most rows, which then need no tests.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD bool is_interior(TapBlock<T, Index>& taps, int64_t first) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  const int32_t* corners = taps.corners() + first;
  int32_t all = kAllCorners;
  for (int64_t k = 0; k < points; ++k) all &= corners[k];
  return all == kAllCorners;
}

// Accumulates kRows * kLanes channels of one group. Few rows leave registers for one sum per
// corner, four independent chains of additions; many rows are chains enough.
template <int kPoints, int kLanes, int kRows, bool kInterior, typename T, typename Index>
MMDCNV4_HD void gather_rows(const T* image, Steps<Index> whole, TapBlock<T, Index>& taps,
                            int64_t first, T* output) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  constexpr int kChains = kRows >= 8 ? 1 : (kRows >= 4 ? 2 : 4);
  Vec<T, kLanes> sum[kChains][kRows] = {};
  const int32_t* corners = taps.corners() + first;
  const Index* start = taps.start() + first;
  const T* pixel[4];
  for (int c = 0; c < 4; ++c) pixel[c] = image + whole.to(c);
  using Weights = TapWeights<T, kLanes>;
  for (int64_t begin = 0; begin < points;) {
    const int64_t end = smaller(Weights::kCount, points - begin) + begin;
    Weights weights({taps.weight(0) + first + begin, taps.weight(1) + first + begin,
                     taps.weight(2) + first + begin, taps.weight(3) + first + begin});
    MMDCNV4_UNROLL_POINTS
    for (int64_t k = begin; k < end; ++k, weights.next()) {
      if (!kInterior && !exists(corners[k])) continue;
      const Steps<Index> step = steps(corners[k], whole.right, whole.below);
      for (int c = 0; c < 4; ++c) {
        const T* from = kInterior ? pixel[c] + start[k] : image + (start[k] + step.to(c));
        const auto w = weights.get(c);
        for (int r = 0; r < kRows; ++r)
          sum[c % kChains][r].add_product(w, Vec<T, kLanes>::load(from + r * kLanes));
      }
    }
    begin = end;
  }
  for (int r = 0; r < kRows; ++r) {
    Vec<T, kLanes> total = sum[0][r];
    for (int c = 1; c < kChains; ++c) total = total + sum[c][r];
    total.store(output + r * kLanes);
  }
}

// The same for `positions` neighbouring outputs and `groups` groups: the taps of one block. A
// function of its own leaves the registers to the innermost loop.
template <int kPoints, int kLanes, int kRows, typename T, typename Index>
MMDCNV4_NOINLINE void gather_block(const Dcnv4Params& p, const T* image, Steps<Index> whole,
                                   int64_t positions, int64_t groups, bool interior,
                                   TapBlock<T, Index>& taps, T* output) {
  for (int64_t i = 0; i < positions; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t lane = taps.lane(i, g), start = g * p.group_channels;
      T* to = output + i * p.channels() + start;
      if (interior || is_interior<kPoints>(taps, lane)) {
        gather_rows<kPoints, kLanes, kRows, true>(image + start, whole, taps, lane, to);
      } else {
        gather_rows<kPoints, kLanes, kRows, false>(image + start, whole, taps, lane, to);
      }
    }
  }
}

// Scatters kRows * kLanes channels of one group and adds to the dot products of its taps.
template <int kPoints, int kLanes, int kRows, bool kInterior, typename T, typename Index>
MMDCNV4_HD void scatter_rows(const T* grad_output, const T* image, T* grad_image,
                             Steps<Index> whole, TapBlock<T, Index>& taps, int64_t first) {
  const int64_t points = kPoints > 0 ? kPoints : taps.points;
  Vec<T, kLanes> grad[kRows];
  for (int r = 0; r < kRows; ++r) grad[r] = Vec<T, kLanes>::load(grad_output + r * kLanes);
  for (int64_t k = 0; k < points; ++k) {
    const int32_t corners = taps.corners()[first + k];
    if (!kInterior && !exists(corners)) continue;
    const Steps<Index> step = kInterior ? whole : steps(corners, whole.right, whole.below);
    for (int c = 0; c < 4; ++c) {
      const int32_t needed = (c & 1 ? kHasX1 : kHasX0) | (c & 2 ? kHasY1 : kHasY0);
      if (!kInterior && (corners & needed) != needed) continue;
      const Index offset = taps.start()[first + k] + step.to(c);
      const T w = taps.weight(c)[first + k];
      Vec<T, kLanes> dot = grad[0] * Vec<T, kLanes>::load(image + offset);
      for (int r = 1; r < kRows; ++r)
        dot = dot + grad[r] * Vec<T, kLanes>::load(image + offset + r * kLanes);
      for (int r = 0; r < kRows; ++r) {
        T* to = grad_image + offset + r * kLanes;
        Vec<T, kLanes> sum = Vec<T, kLanes>::load(to);
        sum.add_product(w, grad[r]);
        sum.store(to);
      }
      taps.dot(c)[first + k] += dot.sum();
    }
  }
}

// Calls visit(channel, RowShape<lanes, rows>) over the channels of a group, widest rows first.
template <int kLanes_, int kRows_>
struct RowShape {
  static constexpr int kLanes = kLanes_, kRows = kRows_;
};

template <int kLanes, int kRows, typename Visit>
MMDCNV4_HD void for_channel_rows(int64_t channel, int64_t count, const Visit& visit) {
  for (; count - channel >= kRows * kLanes; channel += kRows * kLanes)
    visit(channel, RowShape<kLanes, kRows>());
  if (channel == count) return;
  if constexpr (kRows > 1) {
    for_channel_rows<kLanes, kRows / 2>(channel, count, visit);
  } else if constexpr (kLanes > 1) {
    for_channel_rows<kLanes / 2, 1>(channel, count, visit);
  }
}

// Prefetches `count` numbers. All that prefetches is always inlined: GCC takes a function that does
// nothing else for one without effect and drops its calls. An address past the end does no harm.
template <bool kIsWrite, typename T>
MMDCNV4_INLINE inline void prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count; i += kLine) MMDCNV4_PREFETCH(from + i, kIsWrite);
}

// Prefetches what rows of outputs further down will be the first to sample, in the columns of
// `positions` outputs: `count` channels from `image` on. A processor foresees reads in order only;
// in maps beyond its caches the samples would wait for memory one by one.
template <bool kIsWrite, typename T>
MMDCNV4_INLINE inline void prefetch_below(const Dcnv4Params& p, const T* image, int64_t row,
                                          int64_t column, int64_t positions, int64_t count) {
  constexpr int64_t kRows = 4; // pixels below the resting taps; most learned offsets are shorter
  const int64_t y = row * p.stride_h - p.pad_h + p.dilation_h * (p.kernel_h - 1) + kRows;
  const int64_t x = column * p.stride_w - p.pad_w + p.center_w();
  if (y < 0 || y >= p.height || x < 0) return;
  const int64_t end = smaller(x + positions * p.stride_w, p.width);
  for (int64_t i = x; i < end; ++i)
    prefetch<kIsWrite>(image + (y * p.width + i) * p.channels(), count);
}

template <int kPoints, typename T, typename Index>
void forward_rows(const Dcnv4Params& p, const T* value, const T* offset_mask, T* output,
                  int64_t begin, int64_t end) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  TapBlock<T, Index> taps(p, p.groups, p.out_width);
  const Steps<Index> whole = {Index(p.channels()), Index(p.width) * Index(p.channels())};
  for (int64_t row = begin; row < end; ++row) {
    const T* image = value + row / p.out_height * p.height * p.width * p.channels();
    const T base_y = T(row % p.out_height * p.stride_h - p.pad_h + p.center_h());
    for (int64_t column = 0; column < p.out_width; column += taps.positions) {
      const int64_t positions = smaller(taps.positions, p.out_width - column);
      const int64_t query = row * p.out_width + column;
      const T base_x = T(column * p.stride_w - p.pad_w + p.center_w());
      prefetch_below<false>(p, image, row % p.out_height, column, positions, p.channels());
      prefetch<false>(offset_mask + (query + p.out_width) * p.offset_mask_channels,
                      positions * p.offset_mask_channels);
      const bool inner =
          rests_inside(row % p.out_height, row % p.out_height + 1, p.stride_h, p.pad_h,
                       p.dilation_h * (p.kernel_h - 1), p.height) &&
          rests_inside(column, column + positions, p.stride_w, p.pad_w,
                       p.dilation_w * (p.kernel_w - 1), p.width);
      for (int64_t first = 0; first < p.groups; first += taps.groups) {
        const int64_t groups = smaller(taps.groups, p.groups - first);
        const T* packed = offset_mask + query * p.offset_mask_channels + first * 3 * taps.points;
        for (int64_t i = 0; i < positions; ++i)
          unpack<kPoints>(p, packed + i * p.offset_mask_channels, i, groups, taps);
        const bool interior = inner && compute_interior_taps(p, base_x, base_y, taps);
        if (!interior) compute_taps<false>(p, base_x, base_y, taps);
        const T* from = image + first * p.group_channels;
        T* to = output + query * p.channels() + first * p.group_channels;
        for_channel_rows<kLanes, 8>(0, p.group_channels, [&](int64_t c, auto shape) {
          gather_block<kPoints, shape.kLanes, shape.kRows>(p, from + c, whole, positions, groups,
                                                           interior, taps, to + c);
        });
      }
    }
  }
}

// Writes the gradients of offsets and masks of one group from the dot products of its taps.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD void write_grad_offset_mask(const Dcnv4Params& p, TapBlock<T, Index>& taps,
                                       int64_t first, T* to) {
  const int64_t points = kPoints > 0 ? kPoints : p.points();
  const T scale = T(p.offset_scale);
  T expected = 0; // sum_j m_j h_j, for the softmax
  for (int64_t k = 0; k < points; ++k) {
    const int64_t s = first + k;
    const BilinearGrad<T> grad = bilinear_grad(taps.dot(0)[s], taps.dot(1)[s], taps.dot(2)[s],
                                               taps.dot(3)[s], taps.fx()[s], taps.fy()[s]);
    const bool inside = exists(taps.corners()[s]);
    const T mask = taps.mask()[s];
    to[2 * k] = inside ? scale * mask * grad.x : T(0);
    to[2 * k + 1] = inside ? scale * mask * grad.y : T(0);
    to[2 * points + k] = inside ? grad.mask : T(0);
    if (inside) expected += mask * grad.mask;
  }
  if (!p.softmax) return;
  for (int64_t k = 0; k < points; ++k)
    to[2 * points + k] = taps.mask()[first + k] * (to[2 * points + k] - expected);
}

template <typename T>
void clear_channels(const Dcnv4Params& p, T* image, int64_t count) {
  for (int64_t pixel = 0; pixel < p.height * p.width; ++pixel)
    std::memset(image + pixel * p.channels(), 0, count * sizeof(T));
}

// The gradients of `positions` neighbouring outputs of one row, for the groups of one TapBlock.
template <int kPoints, typename T, typename Index>
MMDCNV4_HD void backward_block(const Dcnv4Params& p, const T* grad_output, const T* pixels,
                               T* grad_pixels, T* grad_offset_mask, int64_t positions,
                               int64_t first, int64_t groups, TapBlock<T, Index>& taps) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  const Steps<Index> whole = {Index(p.channels()), Index(p.width) * Index(p.channels())};
  taps.clear_dots();
  for (int64_t i = 0; i < positions; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = (first + g) * p.group_channels, lane = taps.lane(i, g);
      const T* grad = grad_output + i * p.channels() + start;
      const bool interior = is_interior<kPoints>(taps, lane);
      for_channel_rows<kLanes, 4>(0, p.group_channels, [&](int64_t c, auto shape) MMDCNV4_INLINE {
        constexpr int kWidth = shape.kLanes, kRows = shape.kRows;
        const T* from = pixels + start + c;
        T* to = grad_pixels + start + c;
        if (interior) {
          scatter_rows<kPoints, kWidth, kRows, true>(grad + c, from, to, whole, taps, lane);
        } else {
          scatter_rows<kPoints, kWidth, kRows, false>(grad + c, from, to, whole, taps, lane);
        }
      });
      write_grad_offset_mask<kPoints>(p, taps, lane, grad_offset_mask +
                                      i * p.offset_mask_channels + (first + g) * 3 * taps.points);
    }
  }
}

template <int kPoints, typename T, typename Index>
void backward_groups(const Dcnv4Params& p, const T* grad_output, const T* value,
                     const T* offset_mask, T* grad_value, T* grad_offset_mask, int64_t image,
                     int64_t group_begin, int64_t group_end) {
  TapBlock<T, Index> taps(p, group_end - group_begin, p.out_width);
  const int64_t image_size = p.height * p.width * p.channels();
  const int64_t packed = 3 * taps.points, used = p.groups * packed;
  const int64_t channel = group_begin * p.group_channels, width = group_end - group_begin;
  const T* pixels = value + image * image_size;
  T* grad_pixels = grad_value + image * image_size;
  clear_channels(p, grad_pixels + channel, width * p.group_channels);
  for (int64_t row = 0; row < p.out_height; ++row) {
    const T base_y = T(row * p.stride_h - p.pad_h + p.center_h());
    for (int64_t column = 0; column < p.out_width; column += taps.positions) {
      const int64_t positions = smaller(taps.positions, p.out_width - column);
      const int64_t query = (image * p.out_height + row) * p.out_width + column;
      const T base_x = T(column * p.stride_w - p.pad_w + p.center_w());
      const T* grad = grad_output + query * p.channels();
      const T* from = offset_mask + query * p.offset_mask_channels;
      T* to = grad_offset_mask + query * p.offset_mask_channels;
      prefetch_below<false>(p, pixels + channel, row, column, positions, width * p.group_channels);
      prefetch_below<true>(p, grad_pixels + channel, row, column, positions,
                           width * p.group_channels);
      for (int64_t i = p.out_width; i < p.out_width + positions; ++i) { // in the next row
        const int64_t first = i * p.offset_mask_channels + group_begin * packed;
        prefetch<false>(grad + i * p.channels() + channel, width * p.group_channels);
        prefetch<false>(from + first, width * packed);
        prefetch<true>(to + first, width * packed);
      }
      for (int64_t first = group_begin; first < group_end; first += taps.groups) {
        const int64_t groups = smaller(taps.groups, group_end - first);
        for (int64_t i = 0; i < positions; ++i)
          unpack<kPoints>(p, from + i * p.offset_mask_channels + first * packed, i, groups, taps);
        compute_taps<true>(p, base_x, base_y, taps);
        backward_block<kPoints>(p, grad, pixels, grad_pixels, to, positions, first, groups, taps);
      }
      for (int64_t i = 0; i < positions && group_end == p.groups; ++i)
        std::memset(to + i * p.offset_mask_channels + used, 0,
                    (p.offset_mask_channels - used) * sizeof(T));
    }
  }
}

// 32-bit element offsets where an image allows them: half the traffic of the coefficients.
template <typename Visit>
void with_index_and_points(const Dcnv4Params& p, const Visit& visit) {
  // one row and column more: so far a position may lie outside before that is known
  const bool is_short = (p.height + 1) * (p.width + 1) <= INT32_MAX / p.channels();
  if (p.points() == 9) { // 3x3, known to the compiler
    is_short ? visit(int32_t(), Points<9>()) : visit(int64_t(), Points<9>());
  } else {
    is_short ? visit(int32_t(), Points<0>()) : visit(int64_t(), Points<0>());
  }
}

template <typename T>
void dcnv4_forward(const Dcnv4Params& p, const T* value, const T* offset_mask, T* output,
                   int64_t begin, int64_t end) {
  with_index_and_points(p, [&](auto index, auto points) {
    forward_rows<points.kCount, T, decltype(index)>(p, value, offset_mask, output, begin, end);
  });
}

template <typename T>
void dcnv4_backward(const Dcnv4Params& p, const T* grad_output, const T* value,
                    const T* offset_mask, T* grad_value, T* grad_offset_mask, int64_t image,
                    int64_t group_begin, int64_t group_end) {
  with_index_and_points(p, [&](auto index, auto points) {
    backward_groups<points.kCount, T, decltype(index)>(p, grad_output, value, offset_mask,
                                                       grad_value, grad_offset_mask, image,
                                                       group_begin, group_end);
  });
}
