// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// buffer.h — a tensor of a call of the emulator.
#pragma once

#include <cstdint>
#include <cstring>
#include <istream>
#include <new>
#include <ostream>

#include "../../../csrc/launch_plan.h"

// A tensor that ends where its memory ends, aligned to `alignment` bytes and to no more.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, int alignment, int fill)
      : bytes_(count * sizeof(T)), skip_(alignment % mmdcnv4::kMaxVectorBytes),
        memory_(static_cast<char*>(::operator new(skip_ + bytes_, kAlignment))) {
    std::memset(memory_, fill, skip_ + bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, kAlignment); }

  T* data() { return reinterpret_cast<T*>(memory_ + skip_); }
  void read(std::istream& from) { from.read(memory_ + skip_, std::streamsize(bytes_)); }
  void write(std::ostream& to) { to.write(memory_ + skip_, std::streamsize(bytes_)); }

 private:
  static constexpr std::align_val_t kAlignment{mmdcnv4::kMaxVectorBytes};
  size_t bytes_, skip_;
  char* memory_;
};
