// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// instruction_set.inl — the kernels of both operators for one instruction set and their table.
// The including file has chosen the instruction set and defines
//   MMDCNV4_INSTRUCTION_SET  its name, also that of the namespace
//   MMDCNV4_VECTOR_BYTES     the size of a vector register

#define MMDCNV4_STRING_OF(name) #name
#define MMDCNV4_STRING(macro) MMDCNV4_STRING_OF(macro)
#define MMDCNV4_JOIN_TO(a, b) a##b
#define MMDCNV4_JOIN(macro, b) MMDCNV4_JOIN_TO(macro, b)

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

constexpr int kVectorBytes = MMDCNV4_VECTOR_BYTES;
#include "vec.h"

#include "dcnv4_kernels.inl"

#include "msda_kernels.inl"

template <typename T>
constexpr Kernels<T> kKernels = {dcnv4_forward<T>, dcnv4_backward<T>, msda_forward<T>,
                                 msda_backward<T>};

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
