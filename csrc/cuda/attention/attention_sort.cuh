// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_sort.cuh — sorts the samples of multi-scale deformable attention by the cell in which
// they lie, for the backward pass: counting sort, one thread per sample.
//
// The rank of a sample within its cell is the order of the additions to the cell's counter, which
// varies from run to run.
#pragma once

#include "attention_samples.cuh"

namespace mmdcnv4 {
namespace cuda {

// The cell of a sample, kNoCell for one outside its map.
template <typename T>
MMDCNV4_DEVICE uint32_t find_cell(const AttentionArguments& a, const OffsetNumbers<T>& locations,
                                  uint32_t sample) {
  const SampleIndex index = SampleIndex::of(a, sample);
  const Level level = a.levels[level_of(a, index.k)];
  const Bilinear<wide_t<T>> b =
      locate_sample(level, locations.from(int64_t(sample - index.k) * 2), int32_t(index.k));
  return b.inside ? cell_of(a, level, index.row, b) : kNoCell;
}

// counts == nullptr: `ranks` gets the cells.
template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    attention_rank_kernel(const __grid_constant__ AttentionArguments a, uint32_t samples,
                          const OffsetNumbers<T> locations, uint32_t* __restrict__ counts,
                          uint32_t* __restrict__ ranks) {
  const uint32_t sample = blockIdx.x * kSortThreads + threadIdx.x;
  if (sample >= samples) return;
  const uint32_t cell = find_cell(a, locations, sample);
  if (counts == nullptr) {
    ranks[sample] = cell;
  } else if (cell != kNoCell) {
    ranks[sample] = fetch_add(counts + cell, 1);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    attention_place_kernel(const __grid_constant__ AttentionArguments a, uint32_t samples,
                           const OffsetNumbers<T> locations, const uint32_t* __restrict__ ends,
                           const uint32_t* __restrict__ ranks, uint32_t* __restrict__ order,
                           const OffsetGradients<T> grad_locations,
                           const OffsetGradients<T> grad_weights) {
  const uint32_t sample = blockIdx.x * kSortThreads + threadIdx.x;
  if (sample >= samples) return;
  const uint32_t cell = find_cell(a, locations, sample);
  if (cell != kNoCell) {
    order[ends[cell] - 1 - ranks[sample]] = sample;
  } else {
    const OffsetGradients<T> to = grad_locations.from(int64_t(sample) * 2);
    to.store(0, 0);
    to.store(0, 1);
    grad_weights.from(sample).store(0, 0);
  }
}

template <typename T>
void launch_attention_rank(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                           const OffsetNumbers<T>& locations, uint32_t* counts, uint32_t* ranks) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  launch(&attention_rank_kernel<T>, divide_up(samples, kSortThreads), kSortThreads, 0, stream,
         make_arguments(p, plan), uint32_t(samples), locations, counts, ranks);
}

template <typename T>
void launch_attention_cells(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                            const OffsetNumbers<T>& locations, uint32_t* cells) {
  launch_attention_rank(p, plan, stream, locations, nullptr, cells);
}

template <typename T>
void launch_attention_place(const MsDeformAttnParams& p, const AttentionPlan& plan, Stream stream,
                            const AttentionBackward<T>& call, const uint32_t* ends,
                            const uint32_t* ranks, uint32_t* order) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  launch(&attention_place_kernel<T>, divide_up(samples, kSortThreads), kSortThreads, 0, stream,
         make_arguments(p, plan), uint32_t(samples), call.locations, ends, ranks, order,
         call.grad_locations, call.grad_weights);
}

} // namespace cuda
} // namespace mmdcnv4
