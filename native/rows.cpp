// The row kernel for index targets, softmax and log-softmax: one row is one pass over its logits.
//
// Design:
//   a. A row is worked off in blocks of fixed size that stay in the L1 cache: their maximum, then
//      e = exp(z - reference) * 2^K to a scratch row and their mass (the sum of e). The row's
//      gradient is then the scratch times one number a block. What a row gives depends on the row
//      alone.
//   b. A block's reference is an integer power of two near its maximum, so joining blocks is exact,
//      and the origin subtracted from z is 0 unless |maximum| >= limit, where it is the maximum
//      itself: z - origin is exact for every logit that matters (Sterbenz), and so no rounding
//      error of z - m has to be kept.
//   c. The target is left out of the mass: U = sum_{j != t} e_j. Then -U/S is the target's gradient
//      and log1p(U / e_t) its loss, with no cancellation at a confident row. A target below the
//      maximum m has the loss (m - z_t) + log(S / e_m).
//   d. K keeps every e that can show in a result a normal number; underflow happens once, in the
//      last multiplication. K follows the row's scale r, so r / S never underflows either.
//   e. float lanes are summed in double; double lanes with TwoSum. The last factor is split in two
//      (high + low), which removes its rounding.
#include "rows.h"

#include <cmath>

#include "exp.h"
#include "feed.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_general(const RowJob& job, int64_t begin, int64_t end);  // general.cpp

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

template <class S>
typename S::T block_max(const typename S::Type* z, int64_t n) {
  using T = typename S::T;
  constexpr int L = Lanes<T>::n;
  typename S::V a = splat(static_cast<T>(-kInfinity)), b = a, c = a, d = a;  // NaN passes by
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    a = max(S::load(z + j), a);
    b = max(S::load(z + j + L), b);
    c = max(S::load(z + j + 2 * L), c);
    d = max(S::load(z + j + 3 * L), d);
  }
  for (; j + L <= n; j += L) a = max(S::load(z + j), a);
  if (j < n) b = max(load_part<S>(z + j, static_cast<int>(n - j), static_cast<T>(-kInfinity)), b);
  a = max(max(a, b), max(c, d));
  T m = a[0];
  for (int k = 1; k < L; k++) m = a[k] > m ? a[k] : m;
  return m;
}

template <class S>
int64_t first_equal(const typename S::Type* z, int64_t n, typename S::T value) {
  constexpr int L = Lanes<typename S::T>::n;
  for (int64_t j = 0; j < n; j += L) {
    const int count = n - j < L ? static_cast<int>(n - j) : L;
    const auto x = load_part<S>(z + j, count, value - value);
    for (int k = 0; k < count; k++)
      if (x[k] == value) return j + k;
  }
  return -1;
}

template <class T>
void choose_reference(Block<T>& block, double scale) {
  const double top = scale * block.max;
  const bool plain = top == -kInfinity || std::fabs(top) < Limits<T>::origin;
  block.origin = plain ? T(0) : block.max;
  block.reference = plain && top != -kInfinity ? static_cast<int>(std::rint(top * kLog2E)) : 0;
}

// Reads a block of n logits: maximum, reference, mass without entry `excluded` (-1: none), and the
// scratch row e (kKeep 0: nothing, 1: e, 2: the logits themselves, for log-softmax).
template <class S, bool kScaled, bool kSmooth, int kKeep>
void read_block(const typename S::Type* z, typename S::T* e, int64_t n, int64_t excluded,
                double scale, int bias, Block<typename S::T>& block) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int L = Lanes<T>::n;
  choose_reference(block, scale);
  const Exp<T> exp(bias - block.reference);
  const V origin = splat(block.origin), tau = splat(static_cast<T>(scale));
  Mass<T> mass[2], sum;
  block.excluded_e = 0;

  const auto one = [&](V x, T* to) __attribute__((always_inline)) {
    const V d = x - origin;
    const V h = kScaled ? tau * d : d;
    const V value = exp.template operator()<kScaled>(h, kScaled ? fma(tau, d, -h) : h);
    if (kKeep) store(to, kKeep == 1 ? value : x);
    return value;
  };
  const auto whole = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    int64_t j = begin;
    for (; j + 2 * L <= end; j += 2 * L) {
      const V x = S::load(z + j), y = S::load(z + j + L);
      mass[0].add(one(x, e + j));
      mass[1].add(one(y, e + j + L));
      if (kSmooth) sum.add(x - origin), sum.add(y - origin);
    }
    for (; j < end; j += L) {
      const V x = S::load(z + j);
      mass[0].add(one(x, e + j));
      if (kSmooth) sum.add(x - origin);
    }
  };
  // A vector that ends the row or holds the excluded entry.
  const auto special = [&](int64_t j) {
    const int count = n - j < L ? static_cast<int>(n - j) : L;
    alignas(kBytes) T lanes[L], kept[L];
    const V x = load_part<S>(z + j, count, static_cast<T>(-kInfinity));
    store(lanes, one(x, kept));
    if (kKeep)
      for (int k = 0; k < count; k++) e[j + k] = kept[k];
    for (int k = count; k < L; k++) lanes[k] = 0;
    if (excluded >= j && excluded < j + count) {
      block.excluded_e = lanes[excluded - j];
      lanes[excluded - j] = 0;
    }
    mass[1].add(load(lanes));
    if (kSmooth) {
      store(lanes, x - origin);
      for (int k = count; k < L; k++) lanes[k] = 0;
      sum.add(load(lanes));
    }
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
  if (kSmooth) block.sum = sum.total().value();
}

// exp(scale (a - b) + k ln 2) for origins a and b.
double between(double a, double b, int k, double scale) {
  if (a == b) return std::ldexp(1.0, k < -4000 ? -4000 : k);
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
  double top_e = 0;  // e of the maximum, in the row's reference
  Word mass;         // U: without the excluded entry
  double excluded_e = 0;
  Word all() const {
    Word s = mass;
    s.add(excluded_e);
    const double hi = s.hi + s.lo;
    return {hi, s.hi - hi + s.lo};
  }
};

template <class T>
RowSums<T> join(Block<T>* blocks, int64_t n_blocks, double scale, int bias) {
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
  const Exp<T> exp(bias - top.reference);
  const auto d = splat(static_cast<T>(row.m)) - splat(top.origin);
  const auto tau = splat(static_cast<T>(scale)), h = tau * d;
  row.top_e = exp.template operator()<true>(h, fma(tau, d, -h))[0];
  return row;
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
    const int k = factor > 0 && factor < 0.25 ? std::ilogb(factor) : 0;
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
  bool far() const { return far1 != 1 || far2 != 1; }
};

template <class S, bool kFar, bool kSmooth>
void finish_block(const typename S::T* e, typename S::Type* out, int64_t n,
                  const Finish<typename S::T>& f, bool streaming) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int L = Lanes<T>::n;
  const V high = splat(f.high), low = splat(f.low), offset = splat(f.offset);
  const V far1 = splat(f.far1), far2 = splat(f.far2);
  const auto one = [&](V x) __attribute__((always_inline)) {
    if (kFar) x = x * far1 * far2;
    return fma(x, high, kSmooth ? fma(x, low, -offset) : x * low);
  };
  const auto special = [&](int64_t j, int count) {
    alignas(kBytes) T lanes[L] = {};
    for (int k = 0; k < count; k++) lanes[k] = e[j + k];
    V x = one(load(lanes));
    if (f.at >= j && f.at < j + count) {
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

template <class S>
void finish(const typename S::T* e, typename S::Type* out, int64_t n,
            const Finish<typename S::T>& f, bool smooth, bool streaming) {
  auto* run = f.far() ? (smooth ? finish_block<S, true, true> : finish_block<S, true, false>)
                      : (smooth ? finish_block<S, false, true> : finish_block<S, false, false>);
  run(e, out, n, f, streaming);
}

// The rows of one storage type.
template <class S>
class Rows {
  using T = typename S::T;
  using Type = typename S::Type;
  static constexpr int64_t kBlock = kBlockBytes / sizeof(T);

 public:
  explicit Rows(const RowJob& job)
      : job_(job), V_(job.logits.classes), n_blocks_((V_ + kBlock - 1) / kBlock) {}

  // False: no memory.
  bool prepare() {
    blocks_ = static_cast<Block<T>*>(scratch(0, n_blocks_ * int64_t{sizeof(Block<T>)}));
    if (job_.out.data) e_ = static_cast<T*>(scratch(1, (V_ + Lanes<T>::n) * int64_t{sizeof(T)}));
    return blocks_ && (e_ || !job_.out.data);
  }

  // May the row be served in lanes of T? Its scale must leave the bias K room.
  bool takes(int64_t i) const {
    const double r = job_.row_scale(i) * weight(i), u = r * job_.row_upstream(i);
    if (!(r - r == 0) || !(u - u == 0)) return false;
    const int top = Limits<T>::highest_scale;
    const int a = r == 0 ? 0 : std::ilogb(r), b = u == 0 ? a : std::ilogb(u);
    return a <= top && b <= top && a - b < 20;
  }

  void loss(int64_t i, const Type* z, Type* g) const {
    const double r = job_.row_scale(i), u = r * job_.row_upstream(i);
    const double w = weight(i);
    const int64_t t = job_.target[i];
    const bool smooth = job_.off != 0;
    const double scale = job_.logit_scale, z_t = first(z + t);
    const int bias = bias_for(r * w, u * w);
    read<1>(z, t, smooth, g != nullptr, bias);
    const RowSums<T> row = join(blocks_, n_blocks_, scale, bias);

    // lse - z at the maximum and at the target, and lse itself.
    const Word all = row.all();
    const double s = all.hi, e_t = row.excluded_e, u_mass = row.mass.value();
    const double below = scale * (row.m - z_t);
    const double top = z_t == row.m ? std::log1p(u_mass / e_t) : std::log(s / row.top_e);
    const double nll = below == 0 ? top : below + top;
    const double lse = scale * row.m + top, z_loss = job_.z_loss;
    const double q_t = job_.on + job_.off, q = job_.on + V_ * job_.off;
    if (job_.loss) {
      // A class of weight 0 costs nothing, at -inf either; only a NaN comes through.
      double loss = w == 0 ? lse : nll;
      if (smooth) loss = (job_.on == 0 ? 0 : job_.on * nll) + job_.off * spread(row, top);
      if (z_loss != 0) loss += q * z_loss * lse * lse;
      job_.loss[i] = r * w * loss;
    }
    if (!g) return;
    const double more = z_loss != 0 ? 2 * z_loss * lse : 0, coefficient = u * w * scale;
    const double others = smooth ? (V_ - 1) * job_.off : 0;  // the q beside the target's
    const double p_t = e_t / s;
    double at_target = -q_t * (u_mass / s);
    if (smooth || z_loss != 0) at_target += p_t * others + more * q * p_t;
    write(g, all, coefficient * (q + q * more), coefficient * job_.off, t, coefficient * at_target,
          smooth);
  }

  void softmax(const Type* z, Type* p) const {
    const int bias = bias_for(1, 1);
    read<1>(z, -1, false, true, bias);
    const RowSums<T> row = join(blocks_, n_blocks_, job_.logit_scale, bias);
    write(p, row.all(), 1, 0, -1, 0, false);
  }

  void log_softmax(const Type* z, Type* out) const {
    const int bias = bias_for(1, 1);
    read<2>(z, -1, false, true, bias);
    RowSums<T> row = join(blocks_, n_blocks_, job_.logit_scale, bias);
    // Every block left its own maximum out; all but the row's come back.
    for (int64_t b = 0; b < n_blocks_; b++)
      if (b != row.top) row.mass.add(blocks_[b].excluded_e * blocks_[b].factor);
    const double beside = std::log1p(row.mass.value() / row.top_e);
    const auto m = splat(static_cast<T>(row.m)), tau = splat(static_cast<T>(job_.logit_scale));
    const auto rest = splat(static_cast<T>(beside));
    constexpr int L = Lanes<T>::n;
    for (int64_t j = 0; j < V_; j += L) {
      const auto y = tau * (load(e_ + j) - m) - rest;
      if (j + L <= V_)
        S::store(out + j, y);
      else
        store_part<S>(out + j, static_cast<int>(V_ - j), y);
    }
  }

 private:
  double weight(int64_t i) const {
    return job_.class_weight && job_.kind == Target::kIndex ? job_.class_weight[job_.target[i]]
                                                            : 1.0;
  }

  static double first(const Type* p) { return load_part<S>(p, 1, T(0))[0]; }

  static int bias_for(double r, double u) {
    const int a = r == 0 ? 0 : std::ilogb(r), b = u == 0 ? a : std::ilogb(u);
    const int bias = (a > b ? a : b) + Limits<T>::headroom;
    return bias > Limits<T>::lowest_shift ? bias : Limits<T>::lowest_shift;
  }

  // kKeep 1: the scratch takes e; 2: the logits, and every block leaves its own maximum out.
  template <int kKeep>
  void read(const Type* z, int64_t excluded, bool smooth, bool keep, int bias) const {
    const bool scaled = job_.logit_scale != 1;
    auto* run =
        scaled
            ? (smooth ? (keep ? read_block<S, true, true, kKeep> : read_block<S, true, true, 0>)
                      : (keep ? read_block<S, true, false, kKeep> : read_block<S, true, false, 0>))
            : (smooth
                   ? (keep ? read_block<S, false, true, kKeep> : read_block<S, false, true, 0>)
                   : (keep ? read_block<S, false, false, kKeep> : read_block<S, false, false, 0>));
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t begin = b * kBlock, n = V_ - begin < kBlock ? V_ - begin : kBlock;
      Block<T>& block = blocks_[b];
      block.max = block_max<S>(z + begin, n);
      int64_t out = excluded >= begin && excluded < begin + n ? excluded - begin : -1;
      if (kKeep == 2) out = first_equal<S>(z + begin, n, block.max);
      run(z + begin, e_ ? e_ + begin : nullptr, n, out, job_.logit_scale, bias, block);
    }
  }

  // sum_j (lse - z_j)
  double spread(const RowSums<T>& row, double top) const {
    double below = 0;
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t n = b + 1 < n_blocks_ ? kBlock : V_ - b * kBlock;
      below += n * (row.m - blocks_[b].origin) - blocks_[b].sum;
    }
    return V_ * top + job_.logit_scale * below;
  }

  // out = e * coefficient / all - offset, but `value` at entry `at` (-1: none).
  void write(Type* out, Word all, double coefficient, double offset, int64_t at, double value,
             bool smooth) const {
    const bool streaming = S::kStreams && V_ * int64_t{sizeof(Type)} >= 1024 && streams_;
    for (int64_t b = 0; b < n_blocks_; b++) {
      const int64_t begin = b * kBlock, n = V_ - begin < kBlock ? V_ - begin : kBlock;
      Finish<T> f(coefficient, all, blocks_[b].factor, offset);
      if (at >= begin && at < begin + n) f.at = at - begin, f.value = value;
      finish<S>(e_ + begin, out + begin, n, f, smooth, streaming);
    }
  }

  const RowJob& job_;
  const int64_t V_, n_blocks_;
  Block<T>* blocks_ = nullptr;
  T* e_ = nullptr;

 public:
  bool streams_ = false;
};

// An output that no cache will hold is better written past it.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  using Type = typename S::Type;
  Rows<S> rows(job);
  Feed<Type> feed(job, 2);
  if (!rows.prepare() || !feed.prepare()) return report_out_of_memory(job);
  rows.streams_ = job.n_rows * job.logits.classes * size_of(job.out.dtype) >= kStreamBytes;
  const int64_t V = job.logits.classes;
  for (int64_t i = begin; i < end; i = feed.next()) {
    feed.read(i, end);
    for (int64_t k = i; k < feed.next(); k++) {
      const Type* z = feed.in(k);
      Type* out = feed.out(k);
      if (job.dropped(k)) {
        if (job.loss) job.loss[k] = 0;
        if (out) __builtin_memset(out, 0, static_cast<size_t>(V) * sizeof(Type));
      } else if (job.task == Task::kSoftmax) {
        rows.softmax(z, out);
      } else if (job.task == Task::kLogSoftmax) {
        rows.log_softmax(z, out);
      } else if (rows.takes(k)) {
        rows.loss(k, z, out);
      } else {
        feed.leave(k);  // general writes its row itself
        serve_general(job, k, k + 1);
      }
    }
    feed.write();
  }
  if (rows.streams_) stream_fence();
}

}  // namespace

void serve_rows(const RowJob& job, int64_t begin, int64_t end) {
  switch (job.logits.dtype) {
    case Dtype::kFloat16:
      return serve<Stored<Dtype::kFloat16>>(job, begin, end);
    case Dtype::kBFloat16:
      return serve<Stored<Dtype::kBFloat16>>(job, begin, end);
    case Dtype::kFloat32:
      return serve<Stored<Dtype::kFloat32>>(job, begin, end);
    case Dtype::kFloat64:
      return serve<Stored<Dtype::kFloat64>>(job, begin, end);
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
