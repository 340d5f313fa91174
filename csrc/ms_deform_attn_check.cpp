// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "ms_deform_attn_check.h"

namespace mmdcnv4 {
namespace {

constexpr int64_t kMaxSide = int64_t(1) << 30; // pixel coordinates are 32-bit

void check_tensor(const at::Tensor& tensor, const at::Tensor& value, at::IntArrayRef shape,
                  const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == value.device(), "ms_deform_attn: ", name,
                    " must be on the device of value (", value.device(), "), got ",
                    tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "ms_deform_attn: ", name, " must have shape ", shape,
                    ", got ", tensor.sizes());
}

// locations and weights.
void check_numbers(const at::Tensor& tensor, const at::Tensor& value, at::IntArrayRef shape,
                   const char* name) {
  const auto dtype = value.scalar_type();
  const bool is_half = dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype || (is_half && tensor.scalar_type() == at::kFloat),
                   "ms_deform_attn: ", name, " must have the dtype of value (", dtype,
                   "), or be float32 beside a half-precision value, got ", tensor.scalar_type());
  check_tensor(tensor, value, shape, name);
}

void check_levels(at::IntArrayRef sizes, MsDeformAttnCall& call) {
  TORCH_CHECK_VALUE(!sizes.empty() && sizes.size() % 2 == 0,
                    "ms_deform_attn: sizes must be height and width of each level, got ", sizes);
  int64_t pixels = 0;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    TORCH_CHECK_VALUE(sizes[i] > 0 && sizes[i + 1] > 0,
                      "ms_deform_attn: sizes must be positive, got ", sizes);
    TORCH_CHECK_VALUE(sizes[i] <= kMaxSide && sizes[i + 1] <= kMaxSide,
                      "ms_deform_attn: sizes must have sides <= ", kMaxSide, ", got ", sizes);
    call.heights.push_back(int32_t(sizes[i]));
    call.widths.push_back(int32_t(sizes[i + 1]));
    call.starts.push_back(int32_t(pixels));
    pixels += sizes[i] * sizes[i + 1];
    TORCH_CHECK_VALUE(pixels <= INT32_MAX, "ms_deform_attn: sizes must have at most ", INT32_MAX,
                      " pixels together, got ", sizes);
  }
  call.params.pixels = pixels;
}

} // namespace

MsDeformAttnCall check_ms_deform_attn(const at::Tensor& value, const at::Tensor& locations,
                                      const at::Tensor& weights, at::IntArrayRef sizes) {
  MsDeformAttnCall call;
  check_levels(sizes, call);
  const auto dtype = value.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
                       dtype == at::kBFloat16,
                   "ms_deform_attn: value must be float64, float32, float16 or bfloat16, got ",
                   dtype);
  MsDeformAttnParams& p = call.params;
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(1) == p.pixels && value.size(2) > 0 &&
                        value.size(3) > 0,
                    "ms_deform_attn: value must have shape (B, ", p.pixels,
                    ", heads, channels), the pixels of sizes, got ", value.sizes());
  TORCH_CHECK_VALUE(locations.dim() == 6 && locations.size(4) > 0,
                    "ms_deform_attn: locations must have shape (B, Q, heads, levels, points, 2), "
                    "got ", locations.sizes());
  p.batch = value.size(0);
  p.heads = value.size(2);
  p.head_channels = value.size(3);
  p.queries = locations.size(1);
  p.levels = int64_t(call.heights.size());
  p.points = locations.size(4);
  check_numbers(locations, value, {p.batch, p.queries, p.heads, p.levels, p.points, 2},
                "locations");
  check_numbers(weights, value, {p.batch, p.queries, p.heads, p.levels, p.points}, "weights");
  p.heights = call.heights.data();
  p.widths = call.widths.data();
  p.starts = call.starts.data();
  return call;
}

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                       const MsDeformAttnParams& p) {
  TORCH_CHECK_TYPE(grad_output.scalar_type() == value.scalar_type(),
                   "ms_deform_attn: grad_output must have the dtype of value (",
                   value.scalar_type(), "), got ", grad_output.scalar_type());
  check_tensor(grad_output, value, {p.batch, p.queries, p.channels()}, "grad_output");
}

} // namespace mmdcnv4
