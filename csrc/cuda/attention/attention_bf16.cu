// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "attention_entries.cuh"

namespace mmdcnv4 {
namespace cuda {

MMDCNV4_ATTENTION_ENTRIES(BFloat16)

} // namespace cuda
} // namespace mmdcnv4
