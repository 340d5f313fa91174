// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernels.inl — the kernels of both operators for one instruction set (kernel_scope.h), and their
// table.
#pragma once

#include "dcnv4_backward.inl"
#include "dcnv4_forward.inl"
#include "ms_deform_attn_backward.inl"
#include "ms_deform_attn_forward.inl"

#define MMDCNV4_STRING_OF(name) #name
#define MMDCNV4_STRING(macro) MMDCNV4_STRING_OF(macro)
#define MMDCNV4_JOIN_TO(a, b) a##b
#define MMDCNV4_JOIN(macro, b) MMDCNV4_JOIN_TO(macro, b)

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

template <typename T>
constexpr Kernels<T> kKernels = {dcnv4_forward<T>, dcnv4_backward<T>, ms_deform_attn_forward<T>,
                                 ms_deform_attn_backward<T>};

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET

const KernelTable& MMDCNV4_JOIN(MMDCNV4_INSTRUCTION_SET, _kernels)() {
  using namespace MMDCNV4_INSTRUCTION_SET;
  static const KernelTable table = {MMDCNV4_STRING(MMDCNV4_INSTRUCTION_SET), kKernels<float>,
                                    kKernels<double>};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4
