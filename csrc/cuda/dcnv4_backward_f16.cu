// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const Half*, const FloatSum<float>&, Half*);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const float*, const FloatSum<float>&, float*);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const Half*, const FixedSum<float>&, Half*);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const Half*,
                                    const Half*, const float*, const FixedSum<float>&, float*);

} // namespace cuda
} // namespace mmdcnv4
