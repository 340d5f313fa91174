// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_forward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_forward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                   const OffsetNumbers<Half>&, Half*);

} // namespace cuda
} // namespace mmdcnv4
