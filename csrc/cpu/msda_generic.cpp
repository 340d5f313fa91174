// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// msda_generic.cpp — multi-scale deformable attention for any processor.

#include "kernel_includes.h"
#include "msda_kernels.h"

namespace mmdcnv4 {
namespace cpu {
namespace generic {
namespace {

constexpr int kVectorBytes = 16;
#include "vec.h"

#include "msda_kernels.inl"

} // namespace
} // namespace generic

const MsdaTable& generic_msda() {
  static const MsdaTable table = {"generic",
                                  {generic::msda_forward<float>, generic::msda_backward<float>},
                                  {generic::msda_forward<double>, generic::msda_backward<double>}};
  return table;
}

} // namespace cpu
} // namespace mmdcnv4
