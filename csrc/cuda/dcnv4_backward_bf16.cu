// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const BFloat16*,
                                    const BFloat16*, const OffsetNumbers<BFloat16>&,
                                    const FloatSum<float>&, const OffsetGradients<BFloat16>&);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const BFloat16*,
                                    const BFloat16*, const OffsetNumbers<BFloat16>&,
                                    const FixedSum<float>&, const OffsetGradients<BFloat16>&);

} // namespace cuda
} // namespace mmdcnv4
