// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_window_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template bool launch_dcnv4_window_backward(const Dcnv4Params&, const WindowBackwardPlan&, Stream,
                                           const float*, const float*, const OffsetNumbers<float>&,
                                           const WindowScratch&, float*,
                                           const OffsetGradients<float>&);

} // namespace cuda
} // namespace mmdcnv4
