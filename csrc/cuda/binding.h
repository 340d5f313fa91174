// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// binding.h — what the bindings of the operators to torch share. Like the bindings it is no part of
// the kernels, nor of their hash (setup.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../launch_plan.h"
#include "dispatch.h"

namespace mmdcnv4 {
namespace cuda {

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", tensor.scalar_type());
  }
}

inline int32_t device_number(cudaDeviceAttr attribute) {
  int device = 0, number = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&number, attribute, device));
  return number;
}

// Asked for once per device.
inline const DeviceLimits& current_device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> limits;
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  auto known = limits.find(device);
  if (known == limits.end()) {
    const DeviceLimits answer{device_number(cudaDevAttrMultiProcessorCount),
                              device_number(cudaDevAttrMaxSharedMemoryPerBlock),
                              device_number(cudaDevAttrMaxSharedMemoryPerBlockOptin), INT_MAX};
    known = limits.emplace(device, answer).first;
  }
  return known->second;
}

// Bytes, at most a vector, to which every tensor is aligned.
inline int32_t common_alignment(std::initializer_list<const at::Tensor*> tensors) {
  uintptr_t bits = kMaxVectorBytes;
  for (const at::Tensor* tensor : tensors)
    bits |= reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
  return int32_t(bits & (~bits + 1));
}

// In which type gradients of value are summed.
inline at::ScalarType sum_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// log2 of a power of two above the largest finite number of a tensor, in float64 on its device.
inline at::Tensor exponent_above(const at::Tensor& tensor) {
  const at::Tensor largest = tensor.nan_to_num(0.0, 0.0, 0.0).abs().amax().to(at::kDouble);
  return largest.log2().floor().add(1).clamp(-1100, 1024); // -1100: of zero
}

#define MMDCNV4_TEXT_OF(...) #__VA_ARGS__
#define MMDCNV4_TEXT(...) MMDCNV4_TEXT_OF(__VA_ARGS__)

// What the kernels were compiled for: {"sm_75", "sm_90"}.
inline std::vector<std::string> architectures() {
#ifdef __CUDA_ARCH_LIST__
  std::string list = MMDCNV4_TEXT(__CUDA_ARCH_LIST__); // 750,900
#else
  std::string list;
#endif
  list.erase(std::remove(list.begin(), list.end(), ' '), list.end());
  std::vector<std::string> names;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    names.push_back("sm_" + list.substr(begin, end - begin - 1));
    begin = end + 1;
  }
  return names;
}

// The standard check; of a device that there is no code for it says what to do.
inline void check_launches(const char* name) {
  if (cudaPeekAtLastError() == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();
    const int32_t major = device_number(cudaDevAttrComputeCapabilityMajor);
    const int32_t minor = device_number(cudaDevAttrComputeCapabilityMinor);
    std::string names;
    for (const std::string& name : architectures()) names += (names.empty() ? "" : ", ") + name;
    TORCH_CHECK(false, name, ": this build of mmdcnv4 has kernels for ", names,
                ", the device is sm_", major, minor, ": build it with TORCH_CUDA_ARCH_LIST=", major,
                ".", minor);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace cuda
} // namespace mmdcnv4
