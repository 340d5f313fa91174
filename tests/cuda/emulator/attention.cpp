// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention.cpp — what is needed of attention_cuda.cu, without torch.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/attention/attention_launch.h"
#include "../../../csrc/cuda/dispatch.h"
#include "buffer.h"

namespace {

using namespace mmdcnv4;
using namespace mmdcnv4::cuda;

struct AttentionCall {
  std::string file;
  int schedule, alignment, dtype;
  bool float_locations, float_weights, is_deterministic;
  double scale;
  DeviceLimits limits;
  std::vector<int32_t> heights, widths, starts;
  MsDeformAttnParams p;
};

void read_call(std::istream& line, AttentionCall& call) {
  line >> call.file >> call.schedule >> call.alignment >> call.dtype >> call.float_locations;
  line >> call.float_weights >> call.is_deterministic >> call.scale;
  line >> call.limits.multiprocessors >> call.limits.shared_bytes;
  line >> call.limits.most_shared_bytes >> call.limits.blocks_per_launch;
  MsDeformAttnParams& p = call.p;
  line >> p.batch >> p.queries >> p.heads >> p.head_channels >> p.points >> p.levels;
  p.pixels = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    int32_t height = 0, width = 0;
    line >> height >> width;
    call.heights.push_back(height);
    call.widths.push_back(width);
    call.starts.push_back(int32_t(p.pixels));
    p.pixels += int64_t(height) * width;
  }
  if (!line) throw std::invalid_argument("emulator: a number is missing");
  p.heights = call.heights.data();
  p.widths = call.widths.data();
  p.starts = call.starts.data();
}

// Of the images that `p` has; `at`: where they begin in grad_value.
template <typename T>
void run_sorted(const MsDeformAttnParams& p, const AttentionPlan& plan,
                const AttentionBackward<T>& call, const FloatSum<wide_t<T>>& grad_value) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  const int64_t cells = p.batch * p.heads * p.pixels;
  Buffer<uint32_t> counts(cells, 4, 0), ranks(samples, 4, 0xff), order(samples, 4, 0xff);
  launch_attention_rank(p, plan, Stream(), call.locations, counts.data(), ranks.data());
  std::partial_sum(counts.data(), counts.data() + cells, counts.data());
  launch_attention_place(p, plan, Stream(), call, counts.data(), ranks.data(), order.data());
  launch_attention_backward(p, plan, Stream(), call, order.data(), counts.data() + cells - 1,
                            grad_value);
}

template <typename T>
void run_sorted(const MsDeformAttnParams& p, const AttentionPlan& plan,
                const AttentionBackward<T>& call, const FixedSum<wide_t<T>>& grad_value) {
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  Buffer<uint32_t> cells(samples, 4, 0xff), order(samples, 4, 0);
  launch_attention_cells(p, plan, Stream(), call.locations, cells.data());
  std::iota(order.data(), order.data() + samples, 0u);
  std::stable_sort(order.data(), order.data() + samples,
                   [&](uint32_t a, uint32_t b) { return cells.data()[a] < cells.data()[b]; });
  const uint32_t* const all = nullptr;
  launch_attention_backward(p, plan, Stream(), call, order.data(), all, grad_value);
}

template <typename T, typename Sum>
void run_backward(const AttentionCall& call, const AttentionPlan& plan,
                  const AttentionBackward<T>& tensors, const Sum& grad_value) {
  for_each_launch(call.p, plan, [&](int64_t image, int64_t images) {
    MsDeformAttnParams part = call.p;
    part.batch = images;
    run_sorted(part, plan, tensors.from(call.p, image),
               grad_value.from(image * call.p.pixels * call.p.channels()));
  });
}

std::string to_json(const AttentionPlan& plan) {
  return mmdcnv4::to_json({{"vec", plan.vec}, {"team", plan.team}, {"threads", plan.threads},
                           {"slots", plan.slots}, {"shared_bytes", plan.shared_bytes},
                           {"images", plan.images}});
}

template <typename T>
void run(AttentionCall& call, std::fstream& file) {
  const MsDeformAttnParams& p = call.p;
  const int alignment = call.alignment, bytes = int(sizeof(T));
  const int location_bytes = OffsetNumbers<T>{nullptr, call.float_locations}.number_bytes();
  const int weight_bytes = OffsetNumbers<T>{nullptr, call.float_weights}.number_bytes();
  const int64_t in = p.batch * p.pixels * p.channels();
  const int64_t out = p.batch * p.queries * p.channels();
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  using Bytes = Buffer<unsigned char>;
  Buffer<T> value(in, alignment, 0), grad_output(out, alignment, 0), output(out, alignment, 0xff);
  Bytes locations(2 * samples * location_bytes, location_bytes, 0);
  Bytes weights(samples * weight_bytes, weight_bytes, 0);
  Bytes grad_locations(2 * samples * location_bytes, location_bytes, 0xff);
  Bytes grad_weights(samples * weight_bytes, weight_bytes, 0xff);
  value.read(file);
  locations.read(file);
  weights.read(file);
  grad_output.read(file);
  if (!file) throw std::invalid_argument("emulator: the file is too short");
  const AttentionBackward<T> tensors{grad_output.data(),
                                     value.data(),
                                     {locations.data(), call.float_locations},
                                     {weights.data(), call.float_weights},
                                     {grad_locations.data(), call.float_locations},
                                     {grad_weights.data(), call.float_weights}};
  const AttentionPlan forward = make_forward_plan(p, {bytes, alignment}, call.limits);
  const AttentionPlan backward =
      make_backward_plan(p, {bytes, call.is_deterministic ? bytes : alignment}, call.limits);
  launch_attention_forward(p, forward, Stream(), tensors.value, tensors.locations, tensors.weights,
                           output.data());
  file.seekp(0, std::ios::end);
  output.write(file);
  Buffer<wide_t<T>> sum(in, 16, 0);
  emulator::take_reductions();
  if (call.is_deterministic) {
    Buffer<uint64_t> fixed(in, 16, 0);
    const double scale = std::ldexp(call.scale, fixed_sum_bits(p));
    run_backward(call, backward, tensors, FixedSum<wide_t<T>>{fixed.data(), sum.data(), &scale});
    Buffer<double> total(in, 16, 0xff);
    for (int64_t i = 0; i < in; ++i)
      total.data()[i] = double(int64_t(fixed.data()[i])) / scale + sum.data()[i];
    total.write(file);
  } else {
    run_backward(call, backward, tensors, FloatSum<wide_t<T>>{sum.data()});
    sum.write(file);
  }
  grad_locations.write(file);
  grad_weights.write(file);
  const auto [numbers, sectors] = emulator::take_reductions();
  std::cout << "[" << to_json(forward) << ", " << to_json(backward) << ", "
            << mmdcnv4::to_json({{"numbers", numbers}, {"sectors", sectors}}) << "]\n";
}

} // namespace

void run_attention(std::istream& line) {
  AttentionCall call{};
  read_call(line, call);
  std::fstream file(call.file, std::ios::in | std::ios::out | std::ios::binary);
  emulator::set_schedule(call.schedule);
  with_type(Dtype(call.dtype), Dtype(call.dtype),
            [&](auto type) { run<typename decltype(type)::type>(call, file); });
}
