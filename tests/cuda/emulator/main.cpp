// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// main.cpp — runs calls of DCNv4 on the emulator, or checks how they are cut into blocks.
//
//     emulator run < calls     <file> <schedule> <alignment> <dtype> <offset dtype> <device> <sizes>
//     emulator fixed < calls   the same; the backward kernel with sums in fixed point alone
//     emulator window < calls  the same; the forward kernel on tensor cores alone
//     emulator window_backward < calls  the same; the backward kernels on tensor cores alone
//     emulator attention < calls  multi-scale deformable attention: attention.h
//     emulator cover < calls   <alignment> <dtype> <backward> <device> <sizes>
//
// One line is one call. <schedule>: number of an emulator::Schedule. <device>: multiprocessors,
// shared bytes without and with opting in, blocks per launch. <sizes>: N, H, W, G, D, then kernel,
// stride, padding and dilation as pairs (height, width), offset_scale, remove_center, softmax.
// <file> holds value, offset_mask and grad_output; output, grad_value (in the type in which it is
// summed) and grad_offset_mask are appended; with window, the output alone. The plans go to
// standard output, as JSON; with run, also the reductions of the backward kernel; with window,
// [plan, accesses to shared memory], which are counted where the program has `count` as a second
// argument: it takes its time. With `before_sm_90` there reductions add one number each.

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/arguments.h"
#include "../../../csrc/cuda/dispatch.h"
#include "../../../csrc/cuda/window/dense_window.cuh"
#include "../../../csrc/cuda/launch.h"
#include "attention.h"
#include "buffer.h"

namespace {

using namespace mmdcnv4;
using namespace mmdcnv4::cuda;

Dcnv4Params read_sizes(std::istream& from) {
  Dcnv4Params p{};
  from >> p.batch >> p.height >> p.width >> p.groups >> p.group_channels;
  from >> p.kernel_h >> p.kernel_w >> p.stride_h >> p.stride_w >> p.pad_h >> p.pad_w;
  from >> p.dilation_h >> p.dilation_w >> p.offset_scale >> p.remove_center >> p.softmax;
  if (!from) throw std::invalid_argument("emulator: a number is missing");
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  p.offset_mask_channels = (3 * p.points() * p.groups + 7) / 8 * 8;
  return p;
}

DeviceLimits read_device(std::istream& from) {
  DeviceLimits limits{};
  from >> limits.multiprocessors >> limits.shared_bytes >> limits.most_shared_bytes;
  from >> limits.blocks_per_launch;
  return limits;
}

// Bytes of a number of offset_mask: beside half types it may be float32.
template <typename T>
int offset_bytes(bool are_float) {
  return OffsetNumbers<T>{nullptr, are_float}.number_bytes();
}

template <typename T>
void run(const Dcnv4Params& p, const DeviceLimits& limits, int alignment, bool are_float,
         std::fstream& file) {
  constexpr int kUnwritten = 0xff; // NaN in every type
  const int64_t value_count = p.batch * p.height * p.width * p.channels();
  const int64_t output_count = p.batch * p.queries() * p.channels();
  const int64_t packed_bytes =
      p.batch * p.queries() * p.offset_mask_channels * offset_bytes<T>(are_float);
  Buffer<T> value(value_count, alignment, 0), grad_output(output_count, alignment, 0);
  Buffer<T> output(output_count, alignment, kUnwritten);
  Buffer<unsigned char> packed(packed_bytes, offset_bytes<T>(are_float), 0);
  Buffer<unsigned char> grad_packed(packed_bytes, offset_bytes<T>(are_float), kUnwritten);
  Buffer<wide_t<T>> grad_value(value_count, kMaxVectorBytes, 0);
  value.read(file);
  packed.read(file);
  grad_output.read(file);
  if (!file) throw std::invalid_argument("emulator: the file is too short");
  const int bytes = sizeof(T), wide = sizeof(wide_t<T>);
  const LaunchPlan forward = make_launch_plan(p, {bytes, wide, alignment, false}, limits);
  const LaunchPlan backward = make_launch_plan(p, {bytes, wide, alignment, true}, limits);
  launch_dcnv4_forward(p, forward, Stream(), static_cast<const T*>(value.data()),
                       OffsetNumbers<T>{packed.data(), are_float}, output.data());
  emulator::take_reductions();
  launch_dcnv4_backward(p, backward, Stream(), static_cast<const T*>(grad_output.data()),
                        static_cast<const T*>(value.data()),
                        OffsetNumbers<T>{packed.data(), are_float},
                        FloatSum<wide_t<T>>{grad_value.data()},
                        OffsetGradients<T>{grad_packed.data(), are_float});
  file.seekp(0, std::ios::end);
  output.write(file);
  grad_value.write(file);
  grad_packed.write(file);
  const auto [numbers, sectors] = emulator::take_reductions();
  std::cout << "[" << to_json(forward) << ", " << to_json(backward) << ", "
            << to_json({{"numbers", numbers}, {"sectors", sectors}}) << "]\n";
}

// The backward kernel with sums in fixed point: what is needed of dcnv4_cuda.cu, without torch.
template <typename T>
void run_fixed(const Dcnv4Params& p, const DeviceLimits& limits, bool are_float,
               std::fstream& file) {
  const int bytes = sizeof(T), wide = sizeof(wide_t<T>);
  const int64_t in = p.batch * p.height * p.width * p.channels(), rows = p.batch * p.queries();
  Buffer<T> value(in, bytes, 0), grad_output(rows * p.channels(), bytes, 0);
  const int64_t packed_bytes = rows * p.offset_mask_channels * offset_bytes<T>(are_float);
  Buffer<unsigned char> packed(packed_bytes, 16, 0), grad_packed(packed_bytes, 16, 0xff);
  Buffer<uint64_t> sum(in, 16, 0);
  Buffer<wide_t<T>> not_finite(in, 16, 0);
  value.read(file);
  packed.read(file);
  grad_output.read(file);
  double scale = 0;
  file.read(reinterpret_cast<char*>(&scale), sizeof(scale));
  if (!file) throw std::invalid_argument("emulator: the file is too short");
  scale = std::ldexp(scale, fixed_sum_bits(p));
  const LaunchPlan plan = make_launch_plan(p, {bytes, wide, bytes, true}, limits);
  launch_dcnv4_backward(p, plan, Stream(), static_cast<const T*>(grad_output.data()),
                        static_cast<const T*>(value.data()),
                        OffsetNumbers<T>{packed.data(), are_float},
                        FixedSum<wide_t<T>>{sum.data(), not_finite.data(), &scale},
                        OffsetGradients<T>{grad_packed.data(), are_float});
  Buffer<double> grad_value(in, 16, 0xff);
  for (int64_t i = 0; i < in; ++i)
    grad_value.data()[i] = double(int64_t(sum.data()[i])) / scale + not_finite.data()[i];
  file.seekp(0, std::ios::end);
  grad_value.write(file);
  grad_packed.write(file);
  std::cout << to_json(plan) << "\n";
}

const char* const kPhases[] = {"copy",   "numbers", "clear", "scatter", "weights",
                               "pixels", "collect", "taps",  "far",     "finish"};

// The forward kernel on tensor cores, with its accesses to shared memory counted.
template <typename T>
void run_window(const Dcnv4Params& p, const DeviceLimits& limits, int alignment, bool are_float,
                std::fstream& file) {
  Buffer<T> value(p.batch * p.height * p.width * p.channels(), alignment, 0);
  Buffer<unsigned char> packed(
      p.batch * p.queries() * p.offset_mask_channels * offset_bytes<T>(are_float), alignment, 0);
  Buffer<T> output(p.batch * p.queries() * p.channels(), alignment, 0xff);
  value.read(file);
  packed.read(file);
  if (!file) throw std::invalid_argument("emulator: the file is too short");
  const WindowPlan plan = make_window_plan(p, {int32_t(sizeof(T)), 4, alignment, false}, limits);
  if (!plan.is_made_for) throw std::invalid_argument("emulator: not a call for tensor cores");
  launch_dcnv4_window_forward(p, plan, Stream(), static_cast<const T*>(value.data()),
                              OffsetNumbers<T>{packed.data(), are_float}, output.data());
  file.seekp(0, std::ios::end);
  output.write(file);
  std::cout << "[" << to_json(plan) << ", "
            << emulator::take_counts(kPhases, std::size(kPhases)) << "]\n";
}

// The backward kernels on tensor cores; scratch memory holds NaN before.
template <typename T>
void run_window_backward(const Dcnv4Params& p, const DeviceLimits& limits, int alignment,
                         bool are_float, std::fstream& file) {
  const int64_t in = p.batch * p.height * p.width * p.channels(), rows = p.batch * p.queries();
  Buffer<T> value(in, alignment, 0), grad_value(in, alignment, 0xff);
  Buffer<T> grad_output(rows * p.channels(), alignment, 0);
  const int64_t packed_bytes = rows * p.offset_mask_channels * offset_bytes<T>(are_float);
  Buffer<unsigned char> packed(packed_bytes, alignment, 0);
  Buffer<unsigned char> grad_packed(packed_bytes, alignment, 0xff);
  const int64_t lists = window_lists(p);
  Buffer<uint32_t> counts(1 + lists, 4, 0), entries(lists * window_list_room(p), 16, 0xff);
  value.read(file);
  packed.read(file);
  grad_output.read(file);
  if (!file) throw std::invalid_argument("emulator: the file is too short");
  const WindowBackwardPlan plan = make_window_backward_plan(
      p, {int32_t(sizeof(T)), 4, alignment, true}, offset_bytes<T>(are_float), limits);
  if (!plan.value.is_made_for) throw std::invalid_argument("emulator: not a call for tensor cores");
  launch_dcnv4_window_backward(p, plan, Stream(), static_cast<const T*>(grad_output.data()),
                               static_cast<const T*>(value.data()),
                               OffsetNumbers<T>{packed.data(), are_float},
                               WindowScratch{counts.data(), entries.data()},
                               grad_value.data(),
                               OffsetGradients<T>{grad_packed.data(), are_float});
  file.seekp(0, std::ios::end);
  grad_value.write(file);
  grad_packed.write(file);
  std::cout << "[" << to_json(plan.offset_mask) << ", " << to_json(plan.value) << ", "
            << emulator::take_counts(kPhases, std::size(kPhases)) << ", "
            << std::accumulate(counts.data() + 1, counts.data() + 1 + lists, uint64_t(0)) << ", "
            << counts.data()[0] << "]\n";
}

void run_call(std::istream& line, const std::string& mode) {
  std::string name;
  int schedule, alignment, dtype, offset_dtype;
  line >> name >> schedule >> alignment >> dtype >> offset_dtype;
  const DeviceLimits limits = read_device(line);
  const Dcnv4Params p = read_sizes(line);
  std::fstream file(name, std::ios::in | std::ios::out | std::ios::binary);
  emulator::set_schedule(schedule);
  const bool are_float = Dtype(offset_dtype) == Dtype::kFloat32;
  with_type(Dtype(dtype), Dtype(offset_dtype), [&](auto type) {
    using T = typename decltype(type)::type;
    if (mode == "run") return run<T>(p, limits, alignment, are_float, file);
    if (mode == "fixed") return run_fixed<T>(p, limits, are_float, file);
    if constexpr (sizeof(T) <= 4) {
      if (mode == "window") return run_window<T>(p, limits, alignment, are_float, file);
      return run_window_backward<T>(p, limits, alignment, are_float, file);
    }
    throw std::invalid_argument("emulator: tensor cores do not take float64");
  });
}

void expect(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("emulator: the plan breaks a rule: ") + what);
}

void check_limits(const Dcnv4Params& p, const LaunchPlan& plan, const LaunchRequest& request,
                  const DeviceLimits& limits) {
  const auto is_power = [](int32_t number) { return number > 0 && (number & (number - 1)) == 0; };
  expect(plan.threads >= kWarp && plan.threads <= kMaxThreads && is_power(plan.threads), "threads");
  expect(plan.team <= kWarp && is_power(plan.team), "team");
  expect(p.group_channels % plan.vec == 0, "vec divides the channels of a group");
  expect(plan.vec * request.element_bytes <= kMaxVectorBytes, "vec is at most a vector");
  expect(request.alignment % (plan.vec * request.element_bytes) == 0, "vec is aligned");
  expect(plan.shared_bytes <= limits.shared_bytes, "shared memory");
  expect(plan.images_per_launch * plan.blocks_per_image() <= limits.blocks_per_launch, "grid");
  expect(is_power(plan.groups_per_block) && is_power(plan.tile_h) && is_power(plan.tile_w), "tile");
  expect(plan.team * plan.groups_per_block * plan.tile_h * plan.tile_w == plan.threads, "block");
}

// Every thread of every block finds its row: each row must have its whole team, once.
void check_coverage(const Dcnv4Params& p, const LaunchPlan& plan) {
  const auto arguments = make_arguments<float>(p, plan);
  std::vector<uint32_t> lanes(p.batch * p.queries() * p.groups, 0);
  for_each_launch(p, plan, [&](int64_t image, int64_t blocks) {
    for (int64_t i = 0; i < blocks * plan.threads; ++i) {
      const Row row = locate(arguments, uint32_t(i / plan.threads), int32_t(i % plan.threads));
      if (!row.is_valid) continue;
      const int64_t query = row.query(arguments) + image * p.queries();
      expect(query < p.batch * p.queries(), "a query is past the last");
      uint32_t& team = lanes[query * p.groups + row.group];
      expect(!(team >> row.lane & 1u), "a row is computed twice");
      team |= 1u << row.lane;
    }
  });
  const uint32_t all = plan.team == kWarp ? ~0u : (1u << plan.team) - 1u;
  for (uint32_t team : lanes) expect(team == all, "a row is not computed");
}

// The same for the rows of the units of the tensor-core kernels' tiles.
template <typename T>
void check_window_coverage(const Dcnv4Params& p, const WindowPlan& plan,
                           const DeviceLimits& limits) {
  expect(plan.shared_bytes <= limits.most_shared_bytes, "shared memory of a tile");
  expect(plan.images_per_launch * plan.blocks_per_image() <= limits.blocks_per_launch, "grid");
  expect(plan.threads % kWarp == 0 && plan.threads <= kMaxThreads, "threads of a tile");
  expect(plan.units(p) % (plan.threads / kWarp) == 0, "warps share the units evenly");
  const WindowArguments a = make_window_arguments(p, plan);
  std::vector<int> times(p.batch * p.queries() * p.groups, 0);
  with_depth<T>(p.group_channels, [&](auto depth) {
    using Layout = DenseWindow<T, decltype(depth)::value>;
    for_each_launch(p, plan, [&](int64_t image, int64_t blocks) {
      for (int64_t i = 0; i < blocks * int64_t(a.units) * kWarp; ++i) {
        const Tile tile = Layout::locate_tile(a, uint32_t(i / kWarp / a.units));
        const Row row =
            Layout::locate_row(a, tile, uint32_t(i / kWarp % a.units), uint32_t(i % kWarp));
        if (row.is_valid) ++times[(row.query(a.call) + image * p.queries()) * p.groups + row.group];
      }
    });
  });
  for (int count : times) expect(count == 1, "a row of a tile is not computed once");
}

void cover_call(std::istream& line) {
  int alignment, dtype, backward;
  line >> alignment >> dtype >> backward;
  const DeviceLimits limits = read_device(line);
  const Dcnv4Params p = read_sizes(line);
  with_type(Dtype(dtype), Dtype(dtype), [&](auto type) {
    using T = typename decltype(type)::type;
    const LaunchRequest request{sizeof(T), sizeof(wide_t<T>), alignment, backward != 0};
    const LaunchPlan plan = make_launch_plan(p, request, limits);
    check_limits(p, plan, request, limits);
    check_coverage(p, plan);
    const WindowPlan window = make_window_plan(p, request, limits);
    if constexpr (sizeof(T) <= 4) {
      if (window.is_made_for) check_window_coverage<T>(p, window, limits);
    }
    std::cout << "[" << to_json(plan) << ", " << to_json(window) << "]\n";
  });
}

} // namespace

int main(int count, char** arguments) {
  const std::string mode = count >= 2 ? arguments[1] : "";
  const std::string option = count >= 3 ? arguments[2] : "";
  emulator::set_counting(option == "count");
  emulator::set_vector_reductions(option != "before_sm_90");
  const std::vector<std::string> modes = {"run", "fixed", "window", "window_backward", "attention",
                                          "cover"};
  if (std::find(modes.begin(), modes.end(), mode) == modes.end()) {
    std::cerr << "emulator: the argument must be one of run, fixed, window, window_backward, "
                 "attention, cover; got '" << mode << "'\n";
    return 2;
  }
  std::string text;
  while (std::getline(std::cin, text)) {
    try {
      std::istringstream line(text);
      if (mode == "cover") {
        cover_call(line);
      } else if (mode == "attention") {
        run_attention(line);
      } else {
        run_call(line, mode);
      }
    } catch (const std::exception& error) {
      std::cerr << error.what() << "\nin: " << text << "\n";
      return 1;
    }
  }
  return 0;
}
