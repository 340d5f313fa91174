// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernel_scope.h — the instruction set for which a file of kernels is compiled. The file that has
// chosen one (kernels_avx2.cpp, ...) defines
//   MMDCNV4_INSTRUCTION_SET  its name, also that of the namespace
//   MMDCNV4_VECTOR_BYTES     the size of a vector register
// Without them the kernels are those for any processor: what an editor sees that opens one file.
//
// No kernel uses a function template of the standard library: its instance might be compiled for a
// newer instruction set and be the one that the linker keeps for everybody.
#pragma once

#include "kernel_includes.h"

#ifndef MMDCNV4_INSTRUCTION_SET
#define MMDCNV4_INSTRUCTION_SET generic
#define MMDCNV4_VECTOR_BYTES 16
#endif

namespace mmdcnv4 {
namespace cpu {
namespace MMDCNV4_INSTRUCTION_SET {
namespace {

constexpr int kVectorBytes = MMDCNV4_VECTOR_BYTES;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

} // namespace
} // namespace MMDCNV4_INSTRUCTION_SET
} // namespace cpu
} // namespace mmdcnv4
