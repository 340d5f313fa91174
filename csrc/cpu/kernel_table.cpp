// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernel_table.cpp — which instruction sets this processor has, and which one is in use.

#include "kernel_table.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

namespace mmdcnv4 {
namespace cpu {
namespace {

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables{&generic_kernels()};
#ifdef MMDCNV4_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) tables.push_back(&avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512_kernels());
#endif
  return tables;
}

std::atomic<const KernelTable*>& active_table() {
  static std::atomic<const KernelTable*> table{supported_tables().back()};
  return table;
}

void set_instruction_set(std::string name) {
  const auto tables = supported_tables();
  if (name == "auto") name = tables.back()->instruction_set;
  std::string known;
  for (const KernelTable* table : tables) {
    if (name == table->instruction_set) {
      active_table() = table;
      return;
    }
    known += std::string(" ") + table->instruction_set;
  }
  TORCH_CHECK_VALUE(false, "dcnv4: the instruction set must be one of auto", known, ", got ", name);
}

std::string info() {
  std::string built = "\"generic\"", supported;
#ifdef MMDCNV4_X86
  built += ", \"avx2\", \"avx512\"";
#endif
  for (const KernelTable* table : supported_tables())
    supported += std::string(supported.empty() ? "\"" : ", \"") + table->instruction_set + "\"";
  return "{\"built\": [" + built + "], \"supported\": [" + supported + "], \"active\": \"" +
         active_kernels().instruction_set + "\", \"compiler\": \"" MMDCNV4_COMPILER "\"}";
}

} // namespace

const KernelTable& active_kernels() { return *active_table().load(); }

} // namespace cpu
} // namespace mmdcnv4

TORCH_LIBRARY_IMPL(mmdcnv4, CompositeExplicitAutograd, m) {
  m.impl("_cpu_info", mmdcnv4::cpu::info);
  m.impl("_set_cpu_instruction_set", mmdcnv4::cpu::set_instruction_set);
}
