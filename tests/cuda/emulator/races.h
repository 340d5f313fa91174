// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// races.h — who has touched which place of shared memory, and since which barrier. Two threads that
// touch one place, one of them writing, must have a barrier in between: __syncwarp() within a warp,
// __syncthreads() between warps. Shuffles, votes and matrix products make threads meet, but do not
// order memory (PTX ISA). A missing barrier is seen in whatever order the threads take turns.
//
// Seen are accesses by the words of warp_words.h, which the tensor-core kernels use alone.
#pragma once

#include <cstdint>

namespace emulator {

enum class Access { kRead, kWrite, kCopyBegins, kCopyLands };

// Aborts with a message where the current thread must not touch these bytes yet.
void check_access(const void* address, int bytes, Access access);

// For the scheduler.
void forget_accesses(int shared_bytes, int threads); // a block begins
void pass_warp_barrier(int warp);
void pass_block_barrier();

} // namespace emulator
