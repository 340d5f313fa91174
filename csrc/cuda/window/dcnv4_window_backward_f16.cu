// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_window_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template bool launch_dcnv4_window_backward(const Dcnv4Params&, const WindowBackwardPlan&, Stream,
                                           const Half*, const Half*, const OffsetNumbers<Half>&,
                                           const WindowScratch&, Half*,
                                           const OffsetGradients<Half>&);

} // namespace cuda
} // namespace mmdcnv4
