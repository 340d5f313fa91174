// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// dcnv4_generic.cpp — the CPU kernels for any processor.

#include "kernel_includes.h"

namespace mmdcnv4 {
namespace cpu {
namespace generic {
namespace {

constexpr int kVectorBytes = 16;
#include "vec.h"

#include "dcnv4_kernels.inl"

} // namespace
} // namespace generic

const KernelTable& generic_kernels() {
  static const KernelTable table = {"generic",
                                    {generic::forward<float>, generic::backward<float>},
                                    {generic::forward<double>, generic::backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4
