// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// races.cpp — see races.h.

#include "races.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr int kPlaceBytes = 2;
constexpr int kNobody = -1, kSeveral = -2;

// By a thread, by several of a warp, or of several warps.
struct Touch {
  int thread = kNobody, warp = kNobody;
  uint32_t warp_barriers = 0, block_barriers = 0; // that had been passed
};

struct Place {
  Touch written, read;
  bool is_awaited = false; // a copy to it is on its way
};

std::vector<Place> places;
std::vector<uint32_t> warp_barriers; // passed by each warp, those of the block included
uint32_t block_barriers = 0;

// Whether a barrier lies between a touch and what thread `thread` does now.
bool is_before(const Touch& touch, int thread) {
  if (touch.thread == kNobody || touch.thread == thread) return true;
  const int warp = thread / kWarp;
  return touch.warp == warp ? touch.warp_barriers < warp_barriers[warp]
                            : touch.block_barriers < block_barriers;
}

[[noreturn]] void fail(const char* what, const Touch& other, int thread, size_t place) {
  std::fprintf(stderr, "emulator: a race in shared memory: thread %d %s", thread, what);
  if (other.thread >= 0) std::fprintf(stderr, " thread %d", other.thread);
  if (other.thread == kSeveral) std::fprintf(stderr, " several threads");
  std::fprintf(stderr, ", with no barrier in between (block %u, byte %zu)\n", block_index.x,
               place * kPlaceBytes);
  std::abort();
}

void touch_place(size_t index, int thread, Access access) {
  Place& place = places[index];
  if (place.is_awaited && access != Access::kCopyLands)
    fail("touches where a copy has not landed yet, that of", place.written, thread, index);
  if (!is_before(place.written, thread))
    fail(access == Access::kRead ? "reads what is written by" : "writes what is written by",
         place.written, thread, index);
  Touch now{thread, thread / kWarp, warp_barriers[thread / kWarp], block_barriers};
  if (access == Access::kRead) {
    if (!is_before(place.read, thread)) {
      now.thread = kSeveral;
      if (place.read.warp != now.warp) now.warp = kSeveral;
    }
    place.read = now;
    return;
  }
  if (!is_before(place.read, thread)) fail("writes what is read by", place.read, thread, index);
  place.read = Touch();
  place.written = now;
  place.is_awaited = access == Access::kCopyBegins;
}

} // namespace

void check_access(const void* address, int bytes, Access access) {
  const size_t at = size_t(static_cast<const unsigned char*>(address) - shared_memory());
  // what lies outside is the business of AddressSanitizer
  if (at + size_t(bytes) > places.size() * kPlaceBytes) return;
  for (int byte = 0; byte < bytes; byte += kPlaceBytes)
    touch_place((at + size_t(byte)) / kPlaceBytes, int(thread_index.x), access);
}

void forget_accesses(int shared_bytes, int threads) {
  places.assign(size_t(shared_bytes) / kPlaceBytes, Place());
  warp_barriers.assign(size_t(threads) / kWarp, 0);
  block_barriers = 0;
}

void pass_warp_barrier(int warp) { ++warp_barriers[warp]; }

void pass_block_barrier() {
  ++block_barriers;
  for (uint32_t& count : warp_barriers) ++count;
}

} // namespace emulator
