// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// msda_kernels.inl — forward and backward of multi-scale deformable attention on the CPU, included
// once per instruction set inside a namespace of its own, with kVectorBytes defined. As in
// dcnv4_kernels.inl no function template of the standard library is used.
//
// Computes    out[b,q,m,:] = sum_lp weight[b,q,m,l,p] * bilinear(value_l[b,:,:,m,:], x_lp, y_lp)
//             x_lp = location_x * width_l - 0.5, likewise y_lp
// Work split  per query, the coefficients of its samples at once, one lane per sample; then each
//             head is accumulated, one lane per channel
// Threads     forward: queries; backward: (sample of the batch, head), each with its own slice of
//             grad_value, so that no atomics are needed and the sums have one fixed order
// Borders     a sample without a corner in its map is skipped: its pixel, even NaN, is never used
// Source      arXiv:2010.04159, eq. (3)

// Coefficients of the samples of one query and some of its heads, one lane per sample.
template <typename T>
class SampleBlock {
 public:
  const int64_t size; // lanes

  SampleBlock(const MsdaParams& p, int64_t heads)
      : size(heads * p.samples()), memory_(std::calloc(size * kBytesPerLane + kAlignment, 1)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto start = (reinterpret_cast<uintptr_t>(memory_) + kAlignment - 1) & -kAlignment;
    numbers_ = reinterpret_cast<T*>(start);
    integers_ = reinterpret_cast<int32_t*>(numbers_ + kNumbers * size);
    for (int64_t s = 0; s < size; ++s) {
      const int64_t level = s / p.points % p.levels;
      width()[s] = p.widths[level];
      height()[s] = p.heights[level];
      start_of()[s] = p.starts[level];
    }
  }
  SampleBlock(const SampleBlock&) = delete;
  SampleBlock& operator=(const SampleBlock&) = delete;
  ~SampleBlock() { std::free(memory_); }

  T* weight(int corner) { return numbers_ + corner * size; } // without that of the attention
  T* fx() { return numbers_ + 4 * size; }
  T* fy() { return numbers_ + 5 * size; }
  int32_t* width() { return integers_; }
  int32_t* height() { return integers_ + size; }
  int32_t* start_of() { return integers_ + 2 * size; }
  int32_t* inside() { return integers_ + 3 * size; }
  int32_t* pixel(int corner) { return integers_ + (4 + corner) * size; }
  int32_t* present(int corner) { return integers_ + (8 + corner) * size; }

 private:
  static constexpr int64_t kNumbers = 6, kIntegers = 12;
  static constexpr int64_t kBytesPerLane = kNumbers * sizeof(T) + kIntegers * sizeof(int32_t);
  static constexpr uintptr_t kAlignment = 64;

  void* memory_;
  T* numbers_;
  int32_t* integers_;
};

// Locations -> corner pixels and weights, for all lanes at once (this loop is vectorised).
template <bool kBackward, typename T>
void compute_samples(const T* locations, SampleBlock<T>& block) {
  const int32_t *width = block.width(), *height = block.height(), *start = block.start_of();
  T *w00 = block.weight(0), *w01 = block.weight(1), *w10 = block.weight(2), *w11 = block.weight(3);
  T *fx = block.fx(), *fy = block.fy();
  int32_t *p00 = block.pixel(0), *p01 = block.pixel(1), *p10 = block.pixel(2),
          *p11 = block.pixel(3), *inside = block.inside();
  int32_t *h00 = block.present(0), *h01 = block.present(1), *h10 = block.present(2),
          *h11 = block.present(3);
  const int64_t size = block.size;
  MMDCNV4_VECTORIZE
  for (int64_t s = 0; s < size; ++s) {
    const Bilinear<T> b =
        make_bilinear(locations[2 * s] * T(width[s]) - T(0.5),
                      locations[2 * s + 1] * T(height[s]) - T(0.5), height[s], width[s]);
    w00[s] = b.wy0 * b.wx0;
    w01[s] = b.wy0 * b.wx1;
    w10[s] = b.wy1 * b.wx0;
    w11[s] = b.wy1 * b.wx1;
    const int32_t top = start[s] + b.y0 * width[s], bottom = start[s] + b.y1 * width[s];
    p00[s] = top + b.x0;
    p01[s] = top + b.x1;
    p10[s] = bottom + b.x0;
    p11[s] = bottom + b.x1;
    inside[s] = b.inside;
    if (kBackward) {
      fx[s] = b.fx;
      fy[s] = b.fy;
      h00[s] = b.has_x0 & b.has_y0;
      h01[s] = b.has_x1 & b.has_y0;
      h10[s] = b.has_x0 & b.has_y1;
      h11[s] = b.has_x1 & b.has_y1;
    }
  }
}

// Accumulates kRows * kLanes channels of one head. Few rows leave registers for one sum per
// corner, independent chains of additions; many rows are chains enough.
template <int kLanes, int kRows, typename T>
MMDCNV4_HD void gather_samples(const MsdaParams& p, const T* value, const T* weights,
                               SampleBlock<T>& block, int64_t first, T* output) {
  constexpr int kChains = kRows >= 8 ? 1 : (kRows >= 4 ? 2 : 4);
  Vec<T, kLanes> sum[kChains][kRows] = {};
  const int64_t stride = p.heads * p.channels, count = p.samples();
  const int32_t* inside = block.inside() + first;
  for (int64_t s = 0; s < count; ++s) {
    if (!inside[s]) continue;
    for (int c = 0; c < 4; ++c) {
      const T* from = value + block.pixel(c)[first + s] * stride;
      const T w = weights[s] * block.weight(c)[first + s];
      for (int r = 0; r < kRows; ++r)
        sum[c % kChains][r].add_product(w, Vec<T, kLanes>::load(from + r * kLanes));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Vec<T, kLanes> total = sum[0][r];
    for (int c = 1; c < kChains; ++c) total = total + sum[c][r];
    total.store(output + r * kLanes);
  }
}

// Scatters kRows * kLanes channels of one head; adds to `dots`, <grad_output, corner>, 4 per sample.
template <int kLanes, int kRows, typename T>
MMDCNV4_HD void scatter_samples(const MsdaParams& p, const T* grad_output, const T* value,
                                T* grad_value, const T* weights, SampleBlock<T>& block, T* dots) {
  Vec<T, kLanes> grad[kRows];
  for (int r = 0; r < kRows; ++r) grad[r] = Vec<T, kLanes>::load(grad_output + r * kLanes);
  const int64_t stride = p.heads * p.channels, count = p.samples();
  for (int64_t s = 0; s < count; ++s) {
    if (!block.inside()[s]) continue;
    for (int c = 0; c < 4; ++c) {
      if (!block.present(c)[s]) continue;
      const int64_t offset = block.pixel(c)[s] * stride;
      const T w = weights[s] * block.weight(c)[s];
      Vec<T, kLanes> dot = grad[0] * Vec<T, kLanes>::load(value + offset);
      for (int r = 1; r < kRows; ++r)
        dot = dot + grad[r] * Vec<T, kLanes>::load(value + offset + r * kLanes);
      for (int r = 0; r < kRows; ++r) {
        T* to = grad_value + offset + r * kLanes;
        Vec<T, kLanes> sum = Vec<T, kLanes>::load(to);
        sum.add_product(w, grad[r]);
        sum.store(to);
      }
      dots[4 * s + c] += dot.sum();
    }
  }
}

// Calls visit(channel, ChannelRows<lanes, rows>) over the channels of a head, widest rows first.
template <int kLanes_, int kRows_>
struct ChannelRows {
  static constexpr int kLanes = kLanes_, kRows = kRows_;
};

template <int kLanes, int kRows, typename Visit>
MMDCNV4_HD void for_rows_of(int64_t channel, int64_t count, const Visit& visit) {
  for (; count - channel >= kRows * kLanes; channel += kRows * kLanes)
    visit(channel, ChannelRows<kLanes, kRows>());
  if (channel == count) return;
  if constexpr (kRows > 1) {
    for_rows_of<kLanes, kRows / 2>(channel, count, visit);
  } else if constexpr (kLanes > 1) {
    for_rows_of<kLanes / 2, 1>(channel, count, visit);
  }
}

template <typename T>
void msda_forward(const MsdaParams& p, const T* value, const T* locations, const T* weights,
                  T* output, int64_t begin, int64_t end) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  SampleBlock<T> block(p, p.heads);
  for (int64_t query = begin; query < end; ++query) {
    const T* maps = value + query / p.queries * p.pixels * p.heads * p.channels;
    compute_samples<false>(locations + query * block.size * 2, block);
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t first = head * p.samples();
      const T* from = maps + head * p.channels;
      T* to = output + (query * p.heads + head) * p.channels;
      for_rows_of<kLanes, 8>(0, p.channels, [&](int64_t c, auto shape) MMDCNV4_INLINE {
        gather_samples<shape.kLanes, shape.kRows>(
            p, from + c, weights + query * block.size + first, block, first, to + c);
      });
    }
  }
}

// Gradients of locations and weights of one query and head from the dot products of its samples.
template <typename T>
MMDCNV4_HD void write_sample_grads(const T* dots, const T* weights, SampleBlock<T>& block,
                                   T* grad_locations, T* grad_weights) {
  for (int64_t s = 0; s < block.size; ++s) {
    const BilinearGrad<T> grad = bilinear_grad(dots[4 * s], dots[4 * s + 1], dots[4 * s + 2],
                                               dots[4 * s + 3], block.fx()[s], block.fy()[s]);
    const bool inside = block.inside()[s] != 0;
    grad_locations[2 * s] = inside ? T(block.width()[s]) * weights[s] * grad.x : T(0);
    grad_locations[2 * s + 1] = inside ? T(block.height()[s]) * weights[s] * grad.y : T(0);
    grad_weights[s] = inside ? grad.mask : T(0);
  }
}

template <typename T>
void msda_backward(const MsdaParams& p, const T* grad_output, const T* value, const T* locations,
                   const T* weights, T* grad_value, T* grad_locations, T* grad_weights,
                   int64_t sample, int64_t head) {
  constexpr int kLanes = kVectorBytes / int(sizeof(T));
  SampleBlock<T> block(p, 1);
  T* dots = static_cast<T*>(std::calloc(4 * block.size, sizeof(T)));
  if (dots == nullptr) throw std::bad_alloc();
  const int64_t stride = p.heads * p.channels;
  const int64_t maps = sample * p.pixels * stride + head * p.channels;
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel)
    std::memset(grad_value + maps + pixel * stride, 0, p.channels * sizeof(T));
  for (int64_t query = sample * p.queries; query < (sample + 1) * p.queries; ++query) {
    const int64_t row = query * p.heads + head, first = row * block.size;
    std::memset(dots, 0, 4 * block.size * sizeof(T));
    compute_samples<true>(locations + first * 2, block);
    for_rows_of<kLanes, 4>(0, p.channels, [&](int64_t c, auto shape) MMDCNV4_INLINE {
      scatter_samples<shape.kLanes, shape.kRows>(p, grad_output + row * p.channels + c,
                                                 value + maps + c, grad_value + maps + c,
                                                 weights + first, block, dots);
    });
    write_sample_grads(dots, weights + first, block, grad_locations + first * 2,
                       grad_weights + first);
  }
  std::free(dots);
}
