// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// emulator.cpp — the threads of a block as fibres of one CPU thread, block after block.

#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Index3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] void fail(const char* message, int thread) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %d)\n", message, block_index.x, thread);
  std::abort();
}

struct Fibre {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  void* fake_stack = nullptr; // of AddressSanitizer
  bool is_waiting = false, is_done = false;
  bool is_at_block = false; // waits for the block, not for its warp
  Operation operation = nullptr;
  uint32_t mask = 0;
  void* brought = nullptr;
};

std::vector<Fibre> fibres;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
int current = 0;
Schedule schedule{Order::kForward, false};
const std::function<void()>* body = nullptr;
unsigned char* shared = nullptr;

void switch_to_fibre(int thread) {
  Fibre& fibre = fibres[thread];
  current = thread;
  thread_index = {unsigned(thread), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibre.stack.get(), kStackBytes);
#endif
  swapcontext(&scheduler, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Reductions of the current block: how many each thread has executed; the sectors that those of a
// warp have met, with their number; of the blocks before, how many.
bool has_vectors = true;
std::vector<int> executed;
std::set<std::pair<int64_t, uintptr_t>> met;
Reductions reductions{};

// From a fibre back to the scheduler; returns when the fibre has its next turn.
void switch_to_scheduler() {
  Fibre& fibre = fibres[current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fibre.is_done ? nullptr : &fibre.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  swapcontext(&fibre.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  fibres[current].is_done = true;
  switch_to_scheduler();
}

void start_fibre(Fibre& fibre) {
  if (!fibre.stack) fibre.stack.reset(new unsigned char[kStackBytes]);
  fibre.is_waiting = fibre.is_done = false;
  fibre.fake_stack = nullptr;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, fibre_main, 0);
}

// Lets a warp go on if all of its threads have met; returns whether it did.
bool release_warp(int first) {
  void* lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!fibres[first + lane].is_waiting) return false;
    lanes[lane] = fibres[first + lane].brought;
  }
  for (int thread = first; thread < first + kWarp; ++thread) {
    const Fibre& fibre = fibres[thread];
    if (fibre.operation != fibres[first].operation ||
        fibre.is_at_block != fibres[first].is_at_block)
      fail("a warp is at two operations at once", thread);
    if (fibre.mask != 0xffffffffu) fail("a mask of less than the warp is not emulated", thread);
  }
  if (fibres[first].is_at_block) return false;
  if (fibres[first].operation != nullptr) {
    fibres[first].operation(lanes);
  } else {
    pass_warp_barrier(first / kWarp);
  }
  align_steps(first / kWarp);
  for (int thread = first; thread < first + kWarp; ++thread) fibres[thread].is_waiting = false;
  return true;
}

// The same for a block.
bool release_block(int threads) {
  for (int thread = 0; thread < threads; ++thread)
    if (!fibres[thread].is_waiting || !fibres[thread].is_at_block) return false;
  pass_block_barrier();
  for (int thread = 0; thread < threads; ++thread) fibres[thread].is_waiting = false;
  return true;
}

// Gives each thread that can go on a turn, up to its next meeting; returns whether there was one.
bool take_turns(const int* turns, int count, int& done) {
  bool has_moved = false;
  for (int i = 0; i < count; ++i) {
    const int thread = turns[i];
    if (fibres[thread].is_waiting || fibres[thread].is_done) continue;
    switch_to_fibre(thread);
    done += fibres[thread].is_done;
    has_moved = true;
  }
  return has_moved;
}

// All warps, meeting by meeting.
bool run_in_step(const std::vector<int>& turns, int& done) {
  const int threads = int(turns.size());
  bool has_moved = take_turns(turns.data(), threads, done);
  for (int first = 0; first < threads; first += kWarp) has_moved |= release_warp(first);
  return has_moved;
}

// Warp by warp, each as far as it can go alone.
bool run_warps(const std::vector<int>& turns, int& done) {
  bool has_moved = false;
  for (size_t i = 0; i < turns.size(); i += kWarp) {
    bool goes_on = true;
    while (goes_on) {
      goes_on = take_turns(turns.data() + i, kWarp, done);
      goes_on |= release_warp(turns[i] / kWarp * kWarp);
      has_moved |= goes_on;
    }
  }
  return has_moved;
}

// Threads within a block, and blocks, one after the other.
bool runs_backward(Order order) {
  return order == Order::kBackward || order == Order::kWarpsBackward;
}

void run_block(int threads, std::mt19937& random) {
  const Order order = schedule.order;
  const bool is_by_warp = order == Order::kWarps || order == Order::kWarpsBackward;
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (runs_backward(order)) std::reverse(turns.begin(), turns.end());
  for (int thread = 0; thread < threads; ++thread) start_fibre(fibres[thread]);
  for (int done = 0; done < threads;) {
    if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool has_moved = is_by_warp ? run_warps(turns, done) : run_in_step(turns, done);
    has_moved |= release_block(threads);
    if (!has_moved) fail("threads wait for one that has returned or waits elsewhere", turns[0]);
  }
}

} // namespace

void set_schedule(int number) {
  schedule = {Order(number % kOrders), number / kOrders == 1};
  if (number < 0 || number >= 2 * kOrders) fail("there is no such schedule", number);
}

void set_vector_reductions(bool on) { has_vectors = on; }

bool has_vector_reductions() { return has_vectors; }

void note_reduction(const void* to, int numbers) {
  const int64_t turn = int64_t(current / kWarp) << 32 | executed[current]++;
  met.emplace(turn, reinterpret_cast<uintptr_t>(to) / 32);
  reductions.numbers += numbers;
}

Reductions take_reductions() { return std::exchange(reductions, {}); }

bool copies_land_at_once() { return schedule.copies_land_at_once; }

unsigned char* shared_memory() { return shared; }

int lane() { return current % kWarp; }

namespace {

void wait(bool is_at_block, Operation operation, uint32_t mask, void* brought) {
  Fibre& fibre = fibres[current];
  fibre.is_at_block = is_at_block;
  fibre.operation = operation;
  fibre.mask = mask;
  fibre.brought = brought;
  fibre.is_waiting = true;
  switch_to_scheduler();
}

} // namespace

void meet(Operation operation, uint32_t mask, void* brought) {
  wait(false, operation, mask, brought);
}

void meet_block() { wait(true, nullptr, 0xffffffffu, nullptr); }

void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % kWarp != 0 || threads > 1024) fail("an odd number of threads", threads);
  if (int(fibres.size()) < threads) fibres.resize(threads);
  std::mt19937 random(1);
  body = &kernel;
  block_size = {unsigned(threads), 1, 1};
  grid_size = {unsigned(blocks), 1, 1};
  // exactly as much as asked for, so that AddressSanitizer sees what is beyond
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, size_t(shared_bytes)) != 0) fail("no memory", 0);
  shared = static_cast<unsigned char*>(memory);
  const bool is_backward = runs_backward(schedule.order);
  for (int64_t i = 0; i < blocks; ++i) {
    std::memset(shared, 0xff, shared_bytes); // NaN: nothing is left over from the last block
    block_index = {unsigned(is_backward ? blocks - 1 - i : i), 0, 0};
    forget_accesses(shared_bytes, threads);
    executed.assign(threads, 0);
    run_block(threads, random);
    reductions.sectors += int64_t(met.size());
    met.clear();
  }
  std::free(shared);
}

} // namespace emulator
