// A row in blocks that stay in the L1 cache: reading one, joining them, and turning them into
// results. rows.cpp says why it is done so.
#pragma once

#include <cmath>

#include "exp.h"
#include "rows.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

constexpr double kInfinity = __builtin_huge_val();
constexpr int64_t kBlockBytes = 16384;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double origin = 264;  // beyond twice the span that can show
  static constexpr int headroom = 60, lowest_shift = -60, highest_scale = 58;
};
template <>
struct Limits<double> {
  static constexpr double origin = 1700;
  static constexpr int headroom = 128, lowest_shift = -600, highest_scale = 600;
};

// What is known of a block once its logits have been read.
template <class T>
struct Block {
  T origin, max;
  int reference;      // e = exp(scale (z - origin)) 2^(K - reference)
  double factor;      // from the block's reference to the row's
  double excluded_e;  // e of the entry left out of the mass
  double sum;         // of z - origin, where smoothing wants it
  Word mass;
};

// The mass of float lanes: every vector widened to double.
template <class T>
struct Mass;
template <>
struct Mass<float> {
  D even = {}, odd = {};
  __attribute__((always_inline)) void add(F x) {
    even += low(x);
    odd += high(x);
  }
  Word total() const {
    const D both = even + odd;
    Word sum;
    for (int k = 0; k < Lanes<double>::n; k++) sum.hi += both[k];
    return sum;
  }
};
template <>
struct Mass<double> : LaneSum {};

template <class T>
CROSSENT_INLINE typename Lanes<T>::V load_some(const T* p, int n, T fill) {
  return load_part<StoredPlain<T>>(p, n, fill);
}

template <class T>
T block_max(const T* z, int64_t n) {
  constexpr int L = Lanes<T>::n;
  typename Lanes<T>::V a = splat(static_cast<T>(-kInfinity)), b = a, c = a, d = a;  // NaN passes by
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    a = max(load(z + j), a);
    b = max(load(z + j + L), b);
    c = max(load(z + j + 2 * L), c);
    d = max(load(z + j + 3 * L), d);
  }
  for (; j + L <= n; j += L) a = max(load(z + j), a);
  if (j < n) b = max(load_some(z + j, static_cast<int>(n - j), static_cast<T>(-kInfinity)), b);
  a = max(max(a, b), max(c, d));
  T m = a[0];
  for (int k = 1; k < L; k++) m = a[k] > m ? a[k] : m;
  return m;
}

template <class T>
int64_t first_equal(const T* z, int64_t n, T value) {
  for (int64_t j = 0; j < n; j++)
    if (z[j] == value) return j;
  return -1;
}

// sum_j (z_j - origin), in double.
template <class T>
double block_sum(const T* z, int64_t n, T origin_) {
  constexpr int L = Lanes<T>::n;
  const auto origin = splat(origin_);
  Mass<T> sum;
  int64_t j = 0;
  for (; j + L <= n; j += L) sum.add(load(z + j) - origin);
  if (j < n) sum.add(load_some(z + j, static_cast<int>(n - j), origin_) - origin);
  return sum.total().value();
}

template <class T>
void choose_reference(Block<T>& block, double scale) {
  const double top = scale * block.max;
  const bool plain = top == -kInfinity || std::fabs(top) < Limits<T>::origin;
  block.origin = plain ? T(0) : block.max;
  block.reference = plain && top != -kInfinity ? static_cast<int>(std::rint(top * kLog2E)) : 0;
}

// Turns a block of n logits into e (to the scratch row, if kKeep) and their mass without entry
// `excluded` (-1: none). Meanwhile the same place of the block after it, at `ahead`, is fetched.
template <class T, bool kScaled, bool kKeep>
void read_block(const T* z, T* e, int64_t n, int64_t excluded, double scale, int bias,
                Block<T>& block, const char* ahead, int64_t ahead_step) {
  using V = typename Lanes<T>::V;
  constexpr int L = Lanes<T>::n;
  const Exp<T> exp(bias - block.reference);
  const V origin = splat(block.origin), tau = splat(static_cast<T>(scale));
  Mass<T> mass[2];
  block.excluded_e = 0;

  const auto one = [&](V x, T* to) __attribute__((always_inline)) {
    const V d = x - origin;
    const V h = kScaled ? tau * d : d;
    const V value = exp.template operator()<kScaled>(h, kScaled ? fma(tau, d, -h) : h);
    if (kKeep) store(to, value);
    return value;
  };
  const auto whole = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    int64_t j = begin;
    for (; j + 2 * L <= end; j += 2 * L) {
      __builtin_prefetch(ahead + j * ahead_step);
      __builtin_prefetch(ahead + (j + L) * ahead_step);
      const V x = load(z + j), y = load(z + j + L);
      mass[0].add(one(x, e + j));
      mass[1].add(one(y, e + j + L));
    }
    for (; j < end; j += L) mass[0].add(one(load(z + j), e + j));
  };
  // A vector that ends the row or holds the excluded entry.
  const auto special = [&](int64_t j) {
    const int count = n - j < L ? static_cast<int>(n - j) : L;
    alignas(kBytes) T lanes[L];
    const V x = load_some(z + j, count, static_cast<T>(-kInfinity));
    const V value = one(x, lanes);
    store(lanes, value);
    if (kKeep) store_part<StoredPlain<T>>(e + j, count, value);
    for (int k = count; k < L; k++) lanes[k] = 0;
    if (excluded >= j && excluded < j + count) {
      block.excluded_e = lanes[excluded - j];
      lanes[excluded - j] = 0;
    }
    mass[1].add(load(lanes));
  };
  const int64_t full = n / L * L, at = excluded < 0 ? full : excluded / L * L;
  whole(0, at < full ? at : full);
  if (excluded >= 0) {
    special(at);
    if (at + L < full) whole(at + L, full);
  }
  if (full < n && (excluded < 0 || at != full)) special(full);
  block.mass = mass[0].total();
  block.mass.add(mass[1].total());
}

// exp(scale (a - b) + k ln 2) for origins a and b.
double between(double a, double b, int k, double scale) {
  if (a == b) return k == 0 ? 1.0 : std::ldexp(1.0, k < -4000 ? -4000 : k);
  const double d = a - b, h = scale * d;
  if (!(h > -4000 && h < 4000)) return h > 0 ? kInfinity : 0.0 * (h != h ? h : 1.0);
  const double p = k * kLn2;
  double hi, lo;
  two_sum(h, p, hi, lo);
  lo += std::fma(scale, d, -h) + std::fma(k, kLn2, -p) + k * 0x1.abc9e3b39803fp-56;
  return std::exp(hi) * (1 + lo);
}

// A row once all its blocks are read.
template <class T>
struct RowSums {
  int64_t top = 0;  // the block that holds the maximum
  double m = -kInfinity;
  Word mass;  // U: without the excluded entry
  double excluded_e = 0;
  Word all() const {
    Word s = mass;
    s.add(excluded_e);
    const double hi = s.hi + s.lo;
    return {hi, s.hi - hi + s.lo};
  }
};

template <class T>
RowSums<T> join(Block<T>* blocks, int64_t n_blocks, double scale) {
  RowSums<T> row;
  for (int64_t b = 0; b < n_blocks; b++)
    if (blocks[b].max > row.m) row.m = blocks[b].max, row.top = b;
  const Block<T>& top = blocks[row.top];
  for (int64_t b = 0; b < n_blocks; b++) {
    Block<T>& block = blocks[b];
    // A block of -inf alone counts nothing; its floor (exp.h, c) must not count either.
    const bool empty = block.max == -kInfinity && block.mass.hi == block.mass.hi;
    block.factor =
        empty ? 0.0 : between(block.origin, top.origin, block.reference - top.reference, scale);
    row.mass.add(block.mass.scaled(block.factor));
    row.excluded_e += block.excluded_e * block.factor;
  }
  if (row.m == -kInfinity) row.mass.hi = __builtin_nan("");
  if (!(row.mass.hi - row.mass.hi == 0)) row.mass.lo = 0;
  return row;
}

// e of the block's maximum.
template <class T>
double max_e(const Block<T>& block, double scale, int bias) {
  const Exp<T> exp(bias - block.reference);
  const auto d = splat(block.max) - splat(block.origin);
  const auto tau = splat(static_cast<T>(scale)), h = tau * d;
  return exp.template operator()<true>(h, fma(tau, d, -h))[0];
}

// What a block's scratch becomes: e * (high + low) - offset, but `value` at entry `at` (-1: none).
template <class T>
struct Finish {
  T high, low, offset;
  T far1 = 1, far2 = 1;  // powers of two for a block far below the row's maximum
  int64_t at = -1;
  double value = 0;

  Finish(double coefficient, Word sum, double factor, double offset_) {
    // The factor's power of two goes to the scratch, where it cannot make the quotient subnormal.
    const int k = factor > 0 && factor < 0.25 ? exponent(factor) : 0;
    if (k < 0) {
      const int half = k / 2;
      far1 = static_cast<T>(std::ldexp(1.0, half));
      far2 = static_cast<T>(std::ldexp(1.0, k - half));
      factor = std::ldexp(factor, -k);
    }
    coefficient *= factor;
    const double quotient = coefficient / sum.hi;
    const double rest = (std::fma(-quotient, sum.hi, coefficient) - quotient * sum.lo) / sum.hi;
    high = static_cast<T>(quotient);
    low = static_cast<T>((quotient - high) + rest);
    if (!(low - low == 0)) low = 0;
    offset = static_cast<T>(offset_);
  }
};

template <class S>
void finish_block(typename S::T* e, typename S::Type* out, int64_t n,
                  const Finish<typename S::T>& f, bool streaming) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int L = Lanes<T>::n;
  if (f.far1 != 1 || f.far2 != 1)
    for (int64_t j = 0; j < n; j++) e[j] = e[j] * f.far1 * f.far2;
  const V high = splat(f.high), low = splat(f.low), minus = splat(-f.offset);
  const auto one = [&](V x)
                       __attribute__((always_inline)) { return fma(x, high, fma(x, low, minus)); };
  const auto special = [&](int64_t j, int count) {
    V x = one(load_part<StoredPlain<T>>(e + j, count, T(0)));
    if (f.at >= j && f.at < j + count) {
      alignas(kBytes) T lanes[L];
      store(lanes, x);
      lanes[f.at - j] = static_cast<T>(f.value);
      x = load(lanes);
    }
    if (count == L)
      streaming ? S::stream(out + j, x) : S::store(out + j, x);
    else
      store_part<S>(out + j, count, x);
  };
  int64_t j = 0;
  if (streaming) {
    const auto past = reinterpret_cast<uintptr_t>(out) % kBytes;
    j = past ? static_cast<int64_t>((kBytes - past) / sizeof(typename S::Type)) : 0;
    j = j < n ? j : n;
    if (j) special(0, static_cast<int>(j));
  }
  const int64_t full = j + (n - j) / L * L;
  const auto whole = [&](int64_t end) __attribute__((always_inline)) {
    if (streaming)
      for (; j < end; j += L) S::stream(out + j, one(load(e + j)));
    else
      for (; j < end; j += L) S::store(out + j, one(load(e + j)));
  };
  if (f.at >= j && f.at < full) {
    whole(j + (f.at - j) / L * L);
    special(j, L);
    j += L;
  }
  whole(full);
  if (j < n) special(j, static_cast<int>(n - j));
}

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
