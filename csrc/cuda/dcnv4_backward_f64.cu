// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_backward.cuh"

namespace mmdcnv4 {
namespace cuda {

template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const double*,
                                    const double*, const OffsetNumbers<double>&,
                                    const FloatSum<double>&, const OffsetGradients<double>&);
template void launch_dcnv4_backward(const Dcnv4Params&, const LaunchPlan&, Stream, const double*,
                                    const double*, const OffsetNumbers<double>&,
                                    const FixedSum<double>&, const OffsetGradients<double>&);

} // namespace cuda
} // namespace mmdcnv4
