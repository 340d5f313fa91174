// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// vec.h — a row of kLanes numbers. With GCC and Clang it is a vector register (or a few), by
// means of their vector extensions, so that one kernel source serves SSE, AVX, AVX-512 and NEON;
// with other compilers it is an array, left to the optimiser.
//
// To be included inside the namespace of an instruction set only (see dcnv4_kernels.inl): a
// template compiled for AVX-512 must never be the one that the linker keeps for all.

template <typename T, int kLanes>
struct Vec {
#if defined(__GNUC__)
  typedef T Register
      __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
  Register r;

  static MMDCNV4_HD Vec load(const T* from) { return {*reinterpret_cast<const Register*>(from)}; }
  MMDCNV4_HD void store(T* to) const { *reinterpret_cast<Register*>(to) = r; }
  MMDCNV4_HD Vec operator+(Vec other) const { return {r + other.r}; }
  MMDCNV4_HD Vec operator*(Vec other) const { return {r * other.r}; }
  MMDCNV4_HD void add_product(T scale, Vec other) { r += scale * other.r; }
#else
  T r[kLanes];

  static MMDCNV4_HD Vec load(const T* from) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.r[i] = from[i];
    return v;
  }
  MMDCNV4_HD void store(T* to) const {
    for (int i = 0; i < kLanes; ++i) to[i] = r[i];
  }
  MMDCNV4_HD Vec operator+(Vec other) const {
    for (int i = 0; i < kLanes; ++i) other.r[i] += r[i];
    return other;
  }
  MMDCNV4_HD Vec operator*(Vec other) const {
    for (int i = 0; i < kLanes; ++i) other.r[i] *= r[i];
    return other;
  }
  MMDCNV4_HD void add_product(T scale, Vec other) {
    for (int i = 0; i < kLanes; ++i) r[i] += scale * other.r[i];
  }
#endif
  // Sum of the lanes, by halves.
  MMDCNV4_HD T sum() const {
    if constexpr (kLanes == 1) {
      return r[0];
    } else {
      T lanes[kLanes];
      store(lanes);
      return (Vec<T, kLanes / 2>::load(lanes) + Vec<T, kLanes / 2>::load(lanes + kLanes / 2)).sum();
    }
  }
};
