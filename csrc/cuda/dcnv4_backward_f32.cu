// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const float*,
                                    const float*, const OffsetNumbers<float>&,
                                    const FloatSum<float>&, const OffsetGradients<float>&);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const float*,
                                    const float*, const OffsetNumbers<float>&,
                                    const FixedSum<float>&, const OffsetGradients<float>&);

} // namespace cuda
} // namespace mmdcnv4
