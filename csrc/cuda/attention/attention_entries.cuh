// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention_entries.cuh — the entries of attention_launch.h, instantiated for one type of value.
#pragma once

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_sort.cuh"

#define MMDCNV4_ATTENTION_ENTRIES(T)                                                              \
  template void launch_attention_forward(const MsDeformAttnParams&, const AttentionPlan&, Stream, \
                                         const T*, const OffsetNumbers<T>&,                       \
                                         const OffsetNumbers<T>&, T*);                            \
  template void launch_attention_rank(const MsDeformAttnParams&, const AttentionPlan&, Stream,    \
                                      const OffsetNumbers<T>&, uint32_t*, uint32_t*);             \
  template void launch_attention_cells(const MsDeformAttnParams&, const AttentionPlan&, Stream,   \
                                       const OffsetNumbers<T>&, uint32_t*);                       \
  template void launch_attention_place(const MsDeformAttnParams&, const AttentionPlan&, Stream,   \
                                       const AttentionBackward<T>&, const uint32_t*,              \
                                       const uint32_t*, uint32_t*);                               \
  template void launch_attention_backward(const MsDeformAttnParams&, const AttentionPlan&,        \
                                          Stream, const AttentionBackward<T>&, const uint32_t*,   \
                                          const uint32_t*, const FloatSum<wide_t<T>>&);           \
  template void launch_attention_backward(const MsDeformAttnParams&, const AttentionPlan&,        \
                                          Stream, const AttentionBackward<T>&, const uint32_t*,   \
                                          const uint32_t*, const FixedSum<wide_t<T>>&);
