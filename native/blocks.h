// A row in blocks that stay in the L1 cache: reading one, joining them, and turning them into
// results. rows.cpp says why it is done so.
#pragma once

#include <cmath>
#include <type_traits>

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

template <class S>
bool streams(const RowJob& job) {
  const int64_t row = job.logits.classes * int64_t{sizeof(typename S::Type)};
  return S::kStreams && row >= 1024 && job.n_rows * row >= kStreamBytes;
}

// What is known of a block once its logits have been read.
template <class T>
struct Block {
  T origin, max;
  int reference;      // e = exp(scale (z - origin)) 2^(K - reference)
  double factor;      // from the block's reference to the row's
  double lift;        // times this: below 1 where factor alone would underflow
  double excluded_e;  // e of the entry left out of the mass
  double sum;         // of z - origin, for smoothing; of e (max - z), for the entropy
  int64_t above;      // how many are above the target, for its rank
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

// How many vectors are worked on in turn (exp.h, d).
template <class T>
struct Vectors {
  static constexpr int n = sizeof(T) == 4 ? 4 : 2;
};

// The lines at a streamed row's ends, written the ordinary way.
template <class Type>
CROSSENT_INLINE void fetch_ends(const Type* out, int64_t n) {
  __builtin_prefetch(out, 1);
  __builtin_prefetch(out + n, 1);
}

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
  alignas(kBytes) T lanes[L];
  store(lanes, a);
  for (int w = L / 2; w > 0; w /= 2)
    for (int k = 0; k < w; k++) lanes[k] = lanes[k] > lanes[k + w] ? lanes[k] : lanes[k + w];
  return lanes[0];
}

// A block's logits in the compute type.
template <class S>
const typename S::T* widen_block(const typename S::Type* z, int64_t n, typename S::T* to) {
  constexpr int L = Lanes<typename S::T>::n;
  int64_t j = 0;
  for (; j + L <= n; j += L) store(to + j, S::load(z + j));
  if (j < n) store(to + j, load_part<S>(z + j, static_cast<int>(n - j), typename S::T(0)));
  return to;
}

template <class T>
int64_t first_equal(const T* z, int64_t n, T value) {
  constexpr int L = Lanes<T>::n;
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    const auto x = splat(value);
    const auto found = (load(z + j) == x) | (load(z + j + L) == x) | (load(z + j + 2 * L) == x) |
                       (load(z + j + 3 * L) == x);
    if (any_set(found)) break;
  }
  for (; j < n; j++)
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

// sum_j e_j (max - z_j), in double. Beyond `kFar` below what exp sees there is but its floor, which
// counts nothing, nor does it at -inf. (No two floats lie 1e40 apart.)
template <class T>
double sum_below(const T* z, const T* e, int64_t n, T max_, double scale) {
  constexpr double kFar = 512;
  const double limit = std::fmin(kFar / scale, 1e40);
  double sum = 0;
  int64_t j = 0;
  if constexpr (sizeof(T) == 4) {
    constexpr int L = Lanes<T>::n;
    const D top = splat(static_cast<double>(max_)), far = splat(limit);
    D even = {}, odd = {};
    for (; j + L <= n; j += L) {
      const F x = load(z + j), y = load(e + j);
      const D a = top - low(x), b = top - high(x);
      even = fma(low(y), select(a < far, a, far), even);
      odd = fma(high(y), select(b < far, b, far), odd);
    }
    const D both = even + odd;
    for (int k = 0; k < Lanes<double>::n; k++) sum += both[k];
  }
  for (; j < n; j++) {
    const double below = static_cast<double>(max_) - z[j];
    sum += e[j] * (below < limit ? below : limit);
  }
  return sum;
}

template <class T>
int64_t count_above(const T* z, int64_t n, T limit) {
  constexpr int L = Lanes<T>::n;
  typename Lanes<T>::Ints count = {};
  int64_t j = 0, total = 0;
  for (; j + L <= n; j += L) count -= load(z + j) > splat(limit);  // true is -1
  for (int k = 0; k < L; k++) total += count[k];
  for (; j < n; j++) total += z[j] > limit;
  return total;
}

// After block.max is known.
template <class T>
void choose_reference(Block<T>& block, double scale) {
  const double top = scale * block.max;
  const bool near = std::fabs(top) < Limits<T>::origin;
  // (The maximum, since a scale may take a finite one to an infinite top.)
  block.origin = near || block.max == -kInfinity ? T(0) : block.max;
  block.reference = near ? static_cast<int>(std::rint(top * kLog2E)) : 0;
}

inline Form form_of(double origin, double scale) {
  return scale != 1 ? Form::kScaled : origin != 0 ? Form::kShifted : Form::kPlain;
}

// Turns n vectors of a block's logits into e = exp(scale (z - origin)) 2^(bias - reference).
template <class T, Form form>
struct Reader {
  using V = typename Lanes<T>::V;
  const Exp<T> exp;
  const V origin, tau;

  Reader(const Block<T>& block, double scale, int bias)
      : exp(bias - block.reference),
        origin(splat(block.origin)),
        tau(splat(static_cast<T>(scale))) {}

  template <int n>
  __attribute__((always_inline)) void operator()(V (&x)[n]) const {
    V low[n];
    for (int k = 0; k < n; k++) {
      if (form != Form::kPlain) x[k] -= origin;
      const V h = form == Form::kScaled ? tau * x[k] : x[k];
      low[k] = form == Form::kScaled ? fma(tau, x[k], -h) : h;
      x[k] = h;
    }
    exp.template operator()<form == Form::kScaled>(x, low);
  }
};

template <class T, Form form, class Type>
void block_exponentials(const T* z, T* e, int64_t n, double scale, int bias, const Block<T>& block,
                        const Type* ahead) {
  using V = typename Lanes<T>::V;
  constexpr int L = Lanes<T>::n, kVectors = Vectors<T>::n, kStep = kVectors * L;
  const Reader<T, form> read(block, scale, bias);
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    for (int at = 0; at < kStep; at += 64 / int{sizeof(Type)}) __builtin_prefetch(ahead + j + at);
    V x[kVectors];
    for (int k = 0; k < kVectors; k++) x[k] = load(z + j + k * L);
    read(x);
    for (int k = 0; k < kVectors; k++) store(e + j + k * L, x[k]);
  }
  const auto rest = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int m = decltype(vectors)::value;
    const int last = static_cast<int>(n - j) - (m - 1) * L;
    V x[m];
    for (int k = 0; k < m - 1; k++) x[k] = load(z + j + k * L);
    x[m - 1] = load_some(z + j + (m - 1) * L, last, static_cast<T>(-kInfinity));
    read(x);
    for (int k = 0; k < m; k++) store(e + j + k * L, x[k]);
  };
  const int left = static_cast<int>((n - j + L - 1) / L);
  if (left == 1) rest(std::integral_constant<int, 1>());
  if (left == 2) rest(std::integral_constant<int, 2>());
  if constexpr (kVectors > 2) {
    if (left == 3) rest(std::integral_constant<int, 3>());
    if (left == 4) rest(std::integral_constant<int, 4>());
  }
}

// Turns a block of n logits into e. Where the last vector goes beyond them it is that of -inf:
// exp's floor, too little to show (exp.h, c). Meanwhile the same place of the block after it, at
// `ahead`, is fetched.
template <class T, class Type>
void exponentials(const T* z, T* e, int64_t n, double scale, int bias, const Block<T>& block,
                  const Type* ahead) {
  const Form form = form_of(block.origin, scale);
  const auto run = form == Form::kPlain     ? block_exponentials<T, Form::kPlain, Type>
                   : form == Form::kShifted ? block_exponentials<T, Form::kShifted, Type>
                                            : block_exponentials<T, Form::kScaled, Type>;
  run(z, e, n, scale, bias, block, ahead);
}

// Finds the mass of a block's e without entry `excluded` (-1: none), which becomes 0. A pass of its
// own, since exp leaves no registers for the sums.
template <class T>
void find_mass(T* e, int64_t n, int64_t excluded, Block<T>& block) {
  constexpr int L = Lanes<T>::n;
  block.excluded_e = 0;
  if (excluded >= 0) {
    block.excluded_e = e[excluded];
    e[excluded] = 0;
  }
  Mass<T> even, odd;
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L)
    for (int k = 0; k < 4; k += 2) {
      even.add(load(e + j + k * L));
      odd.add(load(e + j + (k + 1) * L));
    }
  if (j + L < n) {
    even.add(load(e + j));
    odd.add(load(e + j + L));
    j += 2 * L;
  }
  if (j < n) even.add(load(e + j));
  if (j + L < n) odd.add(load(e + j + L));
  block.mass = even.total();
  block.mass.add(odd.total());
}

// exp(scale (a - b) + k ln 2) for origins a and b is what this returns times lift.
inline double between(double a, double b, int k, double scale, double* lift) {
  *lift = 1;
  if (scale * (a - b) * kLog2E + k < -900) k += 900, *lift = 0x1p-900;
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
RowSums<T> join_blocks(Block<T>* blocks, int64_t n_blocks, double scale) {
  RowSums<T> row;
  for (int64_t b = 0; b < n_blocks; b++)
    if (blocks[b].max > row.m) row.m = blocks[b].max, row.top = b;
  const Block<T>& top = blocks[row.top];
  for (int64_t b = 0; b < n_blocks; b++) {
    Block<T>& block = blocks[b];
    // A block of -inf alone counts nothing; its floor (exp.h, c) must not count either.
    const bool empty = block.max == -kInfinity && block.mass.hi == block.mass.hi;
    block.factor =
        between(block.origin, top.origin, block.reference - top.reference, scale, &block.lift);
    if (empty) block.factor = 0;
    row.mass.add(block.mass.scaled(block.factor).scaled(block.lift));
    row.excluded_e += block.excluded_e * block.factor * block.lift;
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
  return exp.one(h, fma(tau, d, -h))[0];
}

// What a block's scratch becomes: e * (high + low) - offset, but `value` at entry `at` (-1: none).
template <class T>
struct Finish {
  T high = 0, low = 0, offset = 0;
  T far1 = 1, far2 = 1;  // powers of two for a block far below the row's maximum
  int64_t at = -1;
  double value = 0;

  Finish() = default;
  Finish(double coefficient, Word sum, double factor, double lift, double offset_) {
    // The factor's power of two goes to the scratch, where it cannot make the quotient subnormal.
    const int k = factor > 0 && factor < 0.25 ? exponent(factor) : 0;
    const int all = k + (lift < 1 ? exponent(lift) : 0);
    if (all < 0) {
      const int half = all / 2;
      far1 = static_cast<T>(std::ldexp(1.0, half));
      far2 = static_cast<T>(std::ldexp(1.0, all - half));
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
  const auto part = [&](int64_t j, int count) {
    store_part<S>(out + j, count, one(load_part<StoredPlain<T>>(e + j, count, T(0))));
  };
  if (!streaming) {
    int64_t j = 0;
    for (; j + 4 * L <= n; j += 4 * L)
      for (int k = 0; k < 4; k++) S::store(out + j + k * L, one(load(e + j + k * L)));
    for (; j + L <= n; j += L) S::store(out + j, one(load(e + j)));
    if (j < n) part(j, static_cast<int>(n - j));
    if (f.at >= 0) store_part<S>(out + f.at, 1, splat(static_cast<T>(f.value)));
    return;
  }
  // Whole vectors from the first aligned one on. What is streamed is never touched again, which
  // would cost a cache miss: the entry is put among the others on the way.
  // (A vector as it is stored: of a 16-bit dtype, half of kBytes. The head is less than L so.)
  constexpr int64_t kStored = L * sizeof(typename S::Type);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kStored);
  const int64_t head = past ? (kStored - past) / int64_t{sizeof(typename S::Type)} : 0;
  const int64_t begin = head < n ? head : n, end = begin + (n - begin) / L * L;
  if (begin > 0) part(0, static_cast<int>(begin));
  const auto whole = [&](int64_t j, int64_t to) __attribute__((always_inline)) {
    for (; j + 4 * L <= to; j += 4 * L)
      for (int k = 0; k < 4; k++) S::stream(out + j + k * L, one(load(e + j + k * L)));
    for (; j < to; j += L) S::stream(out + j, one(load(e + j)));
  };
  if (f.at >= begin && f.at < end) {
    const int64_t here = begin + (f.at - begin) / L * L;
    whole(begin, here);
    V x = one(load(e + here));
    x[f.at - here] = static_cast<T>(f.value);
    S::stream(out + here, x);
    whole(here + L, end);
  } else {
    whole(begin, end);
  }
  if (end < n) part(end, static_cast<int>(n - end));
  if (f.at >= 0 && (f.at < begin || f.at >= end))
    store_part<S>(out + f.at, 1, splat(static_cast<T>(f.value)));
}

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
