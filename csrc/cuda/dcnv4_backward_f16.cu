// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const OffsetNumbers<Half>&, const FloatSum<float>&,
                                    const OffsetGradients<Half>&);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const OffsetNumbers<Half>&, const FixedSum<float>&,
                                    const OffsetGradients<Half>&);

} // namespace cuda
} // namespace mmdcnv4
