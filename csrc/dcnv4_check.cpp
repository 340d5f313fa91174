// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0

#include "dcnv4_check.h"

#include <cmath>
#include <limits>

namespace mmdcnv4 {
namespace {

constexpr int64_t kMaxKernel = 1024;
// Pixel coordinates are 32-bit; and 3 * kMaxKernel^2 * kMaxSide fits 64 bits.
constexpr int64_t kMaxSide = int64_t(1) << 30;

void check_pair(at::IntArrayRef pair, const char* name, int64_t minimum) {
  check_is_pair(pair, name);
  TORCH_CHECK_VALUE(pair[0] >= minimum && pair[1] >= minimum, "dcnv4: ", name, " must be >= ",
                    minimum, ", got (", pair[0], ", ", pair[1], ")");
  TORCH_CHECK_VALUE(pair[0] <= kMaxSide && pair[1] <= kMaxSide, "dcnv4: ", name, " must be <= ",
              kMaxSide, ", got (", pair[0], ", ", pair[1], ")");
}

void check_dtypes(const at::Tensor& value, const at::Tensor& offset_mask) {
  const auto dtype = value.scalar_type();
  const bool is_half = dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(is_half || dtype == at::kFloat || dtype == at::kDouble,
                   "dcnv4: value must be float64, float32, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_TYPE(
      offset_mask.scalar_type() == dtype || (is_half && offset_mask.scalar_type() == at::kFloat),
      "dcnv4: offset_mask must have the dtype of value (", dtype,
      "), or be float32 beside a half-precision value, got ", offset_mask.scalar_type());
  TORCH_CHECK_VALUE(offset_mask.device() == value.device(),
                    "dcnv4: offset_mask must be on the device of value (", value.device(),
                    "), got ", offset_mask.device());
}

void check_geometry(MMDCNV4_SCALARS) {
  check_pair(kernel_size, "kernel_size", 1);
  TORCH_CHECK_VALUE(kernel_size[0] <= kMaxKernel && kernel_size[1] <= kMaxKernel,
                    "dcnv4: kernel_size must be <= ", kMaxKernel, ", got (", kernel_size[0], ", ",
                    kernel_size[1], ")");
  TORCH_CHECK_VALUE(groups >= 1, "dcnv4: groups must be >= 1, got ", groups);
  TORCH_CHECK_VALUE(groups <= kMaxSide, "dcnv4: groups must be <= ", kMaxSide, ", got ", groups);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  TORCH_CHECK_VALUE(std::isfinite(offset_scale), "dcnv4: offset_scale must be finite, got ",
                    offset_scale);
  TORCH_CHECK_VALUE(!remove_center || (kernel_size[0] % 2 == 1 && kernel_size[1] % 2 == 1),
                    "dcnv4: remove_center must be False for a kernel_size with an even side, "
                    "which has no centre, got kernel_size (",
                    kernel_size[0], ", ", kernel_size[1], ")");
  TORCH_CHECK_VALUE(!remove_center || kernel_size[0] * kernel_size[1] > 1,
                    "dcnv4: remove_center must be False for kernel_size (1, 1), "
                    "which would keep no tap");
}

int64_t output_side(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                    const char* name) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  const int64_t room = size + 2 * pad;
  TORCH_CHECK_VALUE(room >= reach, "dcnv4: kernel_size must fit into the padded map: the kernel "
                    "spans ", reach, " pixels of ", name, ", the padded map has ", room);
  return (room - reach) / stride + 1;
}

} // namespace

void check_is_pair(at::IntArrayRef pair, const char* name) {
  TORCH_CHECK_VALUE(pair.size() == 2, "dcnv4: ", name, " must be a pair (height, width), got ",
                    pair.size(), " numbers");
}

Dcnv4Params check_dcnv4(const at::Tensor& value, const at::Tensor& offset_mask, MMDCNV4_SCALARS) {
  check_geometry(MMDCNV4_SCALAR_NAMES);
  check_dtypes(value, offset_mask);
  TORCH_CHECK_VALUE(value.dim() == 4, "dcnv4: value must have 4 dimensions (N, H, W, C), got ",
                    "shape ", value.sizes());
  TORCH_CHECK_VALUE(value.size(1) > 0 && value.size(2) > 0,
                    "dcnv4: value must have at least one pixel, got shape ", value.sizes());
  TORCH_CHECK_VALUE(value.size(1) <= kMaxSide && value.size(2) <= kMaxSide,
                    "dcnv4: value must have sides <= ", kMaxSide, ", got shape ", value.sizes());
  const int64_t channels = value.size(3);
  TORCH_CHECK_VALUE(channels > 0 && channels % groups == 0,
                    "dcnv4: groups must divide the channels of value (", channels, "), got ",
                    groups);
  Dcnv4Params p{};
  p.batch = value.size(0);
  p.height = value.size(1);
  p.width = value.size(2);
  p.groups = groups;
  p.group_channels = channels / groups;
  p.kernel_h = static_cast<int32_t>(kernel_size[0]);
  p.kernel_w = static_cast<int32_t>(kernel_size[1]);
  p.stride_h = static_cast<int32_t>(stride[0]);
  p.stride_w = static_cast<int32_t>(stride[1]);
  p.pad_h = static_cast<int32_t>(padding[0]);
  p.pad_w = static_cast<int32_t>(padding[1]);
  p.dilation_h = static_cast<int32_t>(dilation[0]);
  p.dilation_w = static_cast<int32_t>(dilation[1]);
  p.offset_scale = offset_scale;
  p.remove_center = remove_center;
  p.softmax = softmax;
  p.out_height = output_side(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h, "height");
  p.out_width = output_side(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w, "width");
  p.offset_mask_channels = (3 * int64_t(p.points()) * groups + 7) / 8 * 8;
  const at::DimVector expected{p.batch, p.out_height, p.out_width, p.offset_mask_channels};
  TORCH_CHECK_VALUE(offset_mask.sizes() == expected, "dcnv4: offset_mask must have shape ",
                    at::IntArrayRef(expected),
                    " = (N, Ho, Wo, groups * 3K rounded up to 8), got ", offset_mask.sizes());
  return p;
}

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                       const Dcnv4Params& p) {
  const at::DimVector expected{p.batch, p.out_height, p.out_width, p.channels()};
  TORCH_CHECK_VALUE(grad_output.sizes() == expected, "dcnv4: grad_output must have shape ",
                    at::IntArrayRef(expected), ", got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == value.scalar_type(),
                   "dcnv4: grad_output must have the dtype of value (", value.scalar_type(),
                   "), got ", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.device() == value.device(),
                    "dcnv4: grad_output must be on the device of value (", value.device(),
                    "), got ", grad_output.device());
}

} // namespace mmdcnv4
