// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// warp_words.cpp — see warp_words.h.

#include "../../../csrc/cuda/window/tensor_core.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

namespace emulator {
namespace {

constexpr int kLanes = 32, kBanks = 32, kBankBytes = 4, kWavefrontBytes = 128;

struct Counted {
  uint32_t key; // number of the step and of the access within it
  int phase, lane;
  uintptr_t word;
  int words;
};

struct PerThread {
  uint32_t block = ~0u;
  uint32_t step = 0, access = 0;
  int phase = 0;
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool exists;
    int group;
  };
  std::vector<Copy> copies;
  int groups = 0; // committed
};

struct Count {
  int64_t instructions = 0, wavefronts = 0;
};

bool is_counting = false;
std::vector<PerThread> threads(1024);
std::map<int, std::vector<Counted>> accesses; // of each warp of the current block
uint32_t counted_block = ~0u;
std::map<int, Count> counts;

// Wavefronts of one instruction: lanes are served in groups of at most 128 bytes, and in a group a
// bank gives one word at a time, to all who want it.
int wavefronts_of(const Counted* begin, const Counted* end) {
  const int lanes_at_once = std::min(kLanes, kWavefrontBytes / (begin->words * kBankBytes));
  int total = 0;
  for (int first = 0; first < kLanes; first += lanes_at_once) {
    std::map<int, std::vector<uintptr_t>> banks;
    for (const Counted* access = begin; access != end; ++access)
      if (access->lane >= first && access->lane < first + lanes_at_once)
        for (int i = 0; i < access->words; ++i)
          banks[int((access->word + i) % kBanks)].push_back(access->word + i);
    size_t most = 0;
    for (auto& [bank, words] : banks) {
      std::sort(words.begin(), words.end());
      most = std::max(most, size_t(std::unique(words.begin(), words.end()) - words.begin()));
    }
    total += int(most);
  }
  return total;
}

void count_block() {
  for (auto& [warp, list] : accesses) {
    std::stable_sort(list.begin(), list.end(),
                     [](const Counted& a, const Counted& b) { return a.key < b.key; });
    for (size_t begin = 0, end; begin < list.size(); begin = end) {
      for (end = begin; end < list.size() && list[end].key == list[begin].key;) ++end;
      Count& count = counts[list[begin].phase];
      ++count.instructions;
      count.wavefronts += wavefronts_of(&list[begin], &list[0] + end);
    }
  }
  accesses.clear();
}

PerThread& of_thread(uint32_t index) {
  PerThread& thread = threads[index];
  if (thread.block != block_index.x) {
    if (!thread.copies.empty()) {
      std::fprintf(stderr, "emulator: a thread returned and left copies behind\n");
      std::abort();
    }
    thread = PerThread();
    thread.block = block_index.x;
  }
  return thread;
}
PerThread& own() { return of_thread(thread_index.x); }

} // namespace

void set_counting(bool on) { is_counting = on; }

void align_steps(int warp) {
  if (!is_counting) return;
  uint32_t last = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    last = std::max(last, of_thread(uint32_t(warp * kLanes + lane)).step);
  for (int lane = 0; lane < kLanes; ++lane) threads[size_t(warp * kLanes + lane)].step = last;
}

void enter_step(int phase) {
  PerThread& thread = own();
  ++thread.step;
  thread.access = 0;
  thread.phase = phase;
}

void note_access(const void* address, int bytes, Access access) {
  PerThread& thread = own();
  check_access(address, bytes, access);
  if (!is_counting) return;
  if (counted_block != block_index.x) count_block();
  counted_block = block_index.x;
  const uintptr_t at = uintptr_t(static_cast<const unsigned char*>(address) - shared_memory());
  const int words = std::max(1, bytes / kBankBytes);
  const uint32_t key = thread.step << 10 | thread.access++;
  accesses[int(thread_index.x) / kLanes].push_back(
      {key, thread.phase, int(thread_index.x) % kLanes, at / kBankBytes, words});
}

std::string take_counts(const char* const* phases, int count) {
  count_block();
  std::string text = "{";
  for (int phase = 0; phase < count; ++phase) {
    const Count& of = counts[phase];
    text += std::string(phase ? ", " : "") + "\"" + phases[phase] + "\": {\"instructions\": " +
            std::to_string(of.instructions) + ", \"wavefronts\": " +
            std::to_string(of.wavefronts) + "}";
  }
  counts.clear();
  counted_block = ~0u;
  return text + "}";
}

namespace {

void land(void* to, const void* from, int bytes, bool exists) {
  if (exists) {
    std::memcpy(to, from, size_t(bytes));
  } else {
    std::memset(to, 0, size_t(bytes));
  }
}

} // namespace

void copy_later(void* to, const void* from, int bytes, bool exists) {
  PerThread& thread = own();
  thread.copies.push_back({to, from, bytes, exists, thread.groups});
  if (copies_land_at_once()) land(to, from, bytes, exists);
}

void commit_copies() { ++own().groups; }

void wait_copies(int pending) {
  PerThread& thread = own();
  std::vector<PerThread::Copy> left;
  for (const auto& copy : thread.copies) {
    if (copy.group >= thread.groups - pending) {
      left.push_back(copy);
    } else {
      check_access(copy.to, copy.bytes, Access::kCopyLands);
      if (!copies_land_at_once()) land(copy.to, copy.from, copy.bytes, copy.exists);
    }
  }
  thread.copies.swap(left);
}

namespace {

using Elements = uint16_t[8][8];

// Calls give(element, lane) -> the lane's two elements of each matrix.
template <typename Give>
void load_four_matrices(void* const* lanes, const Give& give) {
  const auto at = [&](int lane) { return static_cast<Matrices*>(lanes[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    Elements element;
    for (int row = 0; row < 8; ++row) {
      const void* from = at(8 * matrix + row)->row;
      if (uintptr_t(from) % 16 != 0) {
        std::fprintf(stderr, "emulator: a row of a matrix is not aligned to 16 bytes\n");
        std::abort();
      }
      std::memcpy(element[row], from, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) at(lane)->received[matrix] = give(element, lane);
  }
}

} // namespace

// Lane 4i + j gets elements (i, 2j) and (i, 2j + 1) of each matrix.
void load_matrices(void* const* lanes) {
  load_four_matrices(lanes, [](const Elements& element, int lane) {
    const int row = lane / 4, column = 2 * (lane % 4);
    return element[row][column] | uint32_t(element[row][column + 1]) << 16;
  });
}

// Lane 4i + j gets elements (2j, i) and (2j + 1, i): rows and columns swapped.
void load_matrices_transposed(void* const* lanes) {
  load_four_matrices(lanes, [](const Elements& element, int lane) {
    const int row = 2 * (lane % 4), column = lane / 4;
    return element[row][column] | uint32_t(element[row + 1][column]) << 16;
  });
}

namespace {

// d + a . b, as tensor cores add: numbers are cut where the largest of them has its 24th bit, and
// so is their sum. Devices may keep a bit or two more, and add some of the products at a time (Fasi,
// Higham, Mikaitis and Pranesh, doi:10.7717/peerj-cs.330).
template <int kCount>
float add_products(float d, const float (&a)[kCount], const float (&b)[kCount]) {
  double numbers[kCount + 1] = {d};
  float plain = d;
  double largest = std::fabs(numbers[0]);
  for (int k = 0; k < kCount; ++k) {
    numbers[k + 1] = double(a[k]) * double(b[k]); // exact
    plain += a[k] * b[k];
    largest = std::max(largest, std::fabs(numbers[k + 1]));
  }
  if (!std::isfinite(plain) || largest == 0) return plain;
  const int last = std::max(std::ilogb(largest), -126) - 23; // exponent of the last bit
  const double scale = std::ldexp(1.0, -last);
  int64_t sum = 0;
  for (double number : numbers) sum += int64_t(number * scale);
  for (int bit = 24; std::abs(sum) >> bit != 0; ++bit) sum -= sum % (int64_t(1) << (bit - 23));
  return float(std::ldexp(double(sum), last));
}

} // namespace

// D[16][8] += A[16][16] B[16][8]. Of A a lane holds rows lane / 4 and lane / 4 + 8 and columns
// 2 (lane % 4) + {0, 1} and the same + 8; of B those numbers of k and column lane / 4; of D columns
// 2 (lane % 4) + {0, 1} of the two rows.
void multiply_add(void* const* lanes) {
  const auto at = [&](int lane) { return static_cast<Product*>(lanes[lane]); };
  float a[16][16], b[8][16]; // columns of B
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = *at(lane);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      const uint32_t shift = 16 * i;
      a[row][column + i] = own.widen(own.a[0] >> shift & 0xffffu);
      a[row + 8][column + i] = own.widen(own.a[1] >> shift & 0xffffu);
      a[row][column + 8 + i] = own.widen(own.a[2] >> shift & 0xffffu);
      a[row + 8][column + 8 + i] = own.widen(own.a[3] >> shift & 0xffffu);
      b[row][column + i] = own.widen(own.b0 >> shift & 0xffffu);
      b[row][column + 8 + i] = own.widen(own.b1 >> shift & 0xffffu);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      at(lane)->d[i] = add_products(at(lane)->d[i], a[row], b[column]);
    }
}

// 10 bits of the fraction are left; the rest is rounded to nearest, ties away from zero.
float round_to_tf32(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  if ((bits >> 23 & 0xffu) != 0xffu) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

namespace {

// D[16][8] += A[16][8] B[8][8]. Of A a lane holds rows lane / 4 and lane / 4 + 8 and columns
// lane % 4 and lane % 4 + 4; of B these rows and column lane / 4. Calls read(bits) -> a factor.
template <typename Read>
void multiply_add_eight(void* const* lanes, const Read& read) {
  const auto at = [&](int lane) { return static_cast<Product*>(lanes[lane]); };
  float a[16][8], b[8][8]; // columns of B
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = *at(lane);
    const int row = lane / 4, column = lane % 4;
    for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 4] = read(own.a[i]);
    b[row][column] = read(own.b0);
    b[row][column + 4] = read(own.b1);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      at(lane)->d[i] = add_products(at(lane)->d[i], a[row], b[column]);
    }
}

float as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

} // namespace

void multiply_add_tf32(void* const* lanes) {
  multiply_add_eight(lanes, [](uint32_t bits) {
    const float number = as_float(bits);
    if (number == number && round_to_tf32(number) != number) {
      std::fprintf(stderr, "emulator: a factor has more digits than TF32\n");
      std::abort();
    }
    return number;
  });
}

// A NaN may have its bits where they are cut off; then it is infinite, as on the device.
void multiply_add_tf32_cut(void* const* lanes) {
  multiply_add_eight(lanes, [](uint32_t bits) { return as_float(bits & ~0x1fffu); });
}

} // namespace emulator
