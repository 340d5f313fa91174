// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_window_forward.cuh"

namespace mmdcnv4 {
namespace cuda {

template bool launch_dcnv4_window_forward(const Dcnv4Params&, const WindowPlan&, Stream,
                                          const BFloat16*, const OffsetNumbers<BFloat16>&,
                                          BFloat16*);

} // namespace cuda
} // namespace mmdcnv4
