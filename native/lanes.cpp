// One row a lane: short rows, and a class axis that is not the last one.
//
// Design:
//   a. A tile holds L rows as (V, L) floats in scratch, one row a lane (tiles.h). Every step of
//      rows.cpp then is one vector instruction for L rows, the logarithm too, and no sum runs
//      across lanes.
//   b. Same numbers as rows.cpp: integer references, the target left out of the mass, the same K.
//      Only for float (and the 16-bit dtypes, computed in it); sums and row numbers are double.
//   c. Which rows come here depends on the number of classes and the dtype alone (lane_rows), so
//      that no layout changes a bit. Transposing costs more the more lanes there are, and one row
//      after the other less: with 16 lanes that is the faster one from some 50 classes on, with 8
//      from some 200 (which are measured up to 128, where the tiles still fit the L1 cache).
#include <cmath>
#include <type_traits>

#include "exp.h"
#include "numbers.h"
#include "rows.h"
#include "storage.h"
#include "tiles.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_rows(const RowJob& job, int64_t begin, int64_t end);     // rows.cpp
void serve_general(const RowJob& job, int64_t begin, int64_t end);  // general.cpp

namespace {

constexpr int L = Lanes<float>::n;
constexpr float kInfinity = __builtin_inff(), kOrigin = 264;  // rows.cpp, b

template <class S>
class Tiles {
  using Type = typename S::Type;

 public:
  explicit Tiles(const RowJob& job)
      : job_(job), V_(job.logits.classes), memory_(job), numbers_(job) {}

  bool prepare() {
    for (Tile& tile : tiles_) tile.looked = numbers_.any_rows();
    most_ = memory_.prepare(tiles_);
    return most_ > 0;
  }

  void serve(int64_t begin, int64_t end) {
    int n = 0;
    for (int64_t i = begin; i < end;) {
      const int rows = memory_.room(i, end);
      tiles_[n].begin = i;
      tiles_[n].rows = rows;
      i += rows;
      if (++n == most_ || i == end) run(n), n = 0;
    }
  }

 private:
  // Step by step over all tiles: the rows' numbers are long chains of few instructions.
  void run(int n) {
    for (int t = 0; t < n; t++) {
      numbers_.look_up(tiles_[t].begin, tiles_[t].rows, &tiles_[t].looked);
      tiles_[t].done = tiles_[t].looked.fits;
    }
    memory_.read(tiles_, n);
    for (int t = 0; t < n; t++)
      if (tiles_[t].done) leave_out(tiles_[t]);
    for (int t = 0; t < n; t++) {
      memory_.fetch(tiles_[t].begin + n * L);
      if (tiles_[t].done) exponentials(tiles_[t]);
    }
    for (int t = 0; t < n; t++) {
      Tile& tile = tiles_[t];
      if (job_.task == Task::kLoss && tile.done)
        tile.done = numbers_.losses(tile.looked, tile.found, tile.begin, tile.rows, &tile.factors);
    }
    if (job_.out.data) {
      for (int t = 0; t < n; t++)
        if (tiles_[t].done) finish(tiles_[t]);
      memory_.write(tiles_, n);
    }
    // Not for lanes as they are: row by row, so that no row's bits depend on its neighbours.
    for (int t = 0; t < n; t++) {
      const Tile tile = tiles_[t];
      if (tile.done) continue;
      const bool single = tile.rows == 1;
      for (int64_t i = tile.begin; i < tile.begin + tile.rows; i++)
        single ? serve_general(job_, i, i + 1) : serve_one(i);
    }
  }

  void serve_one(int64_t i) {
    tiles_[0].begin = i;
    tiles_[0].rows = 1;
    run(1);
  }

  void finish(Tile& tile) const {
    if (job_.task == Task::kLogSoftmax) return log_probabilities(tile);
    if (job_.task == Task::kSoftmax) tile.factors.quotient = all(1) / tile.found.beside;
    job_.off != 0 ? finish<true>(tile) : finish<false>(tile);
    if (job_.task == Task::kSoftmax) return;
    F value = (F)((Index)narrow(tile.factors.value) & tile.looked.kept);
    swap(tile, value);
  }

  // The maximum, and the entry left out of the mass gives way to -inf: the target, for log-softmax
  // the first maximum. A vector that is loaded at once has to wait for such stores of single
  // numbers, hence a step of its own.
  void leave_out(Tile& tile) const {
    Found& found = tile.found;
    F m[2] = {splat(-kInfinity), splat(-kInfinity)};
    if (job_.task == Task::kLogSoftmax) {
      Index first = {};
      for (int64_t j = 0; j < V_; j++) {
        const F x = load(tile.e + j * L);
        first = (Index)select(x > m[0], (F)(Index{} + static_cast<uint32_t>(j)), (F)first);
        m[0] = max(x, m[0]);
      }
      tile.looked.target = first;
    } else {
      int64_t j = 0;
      for (; j + 2 <= V_; j += 2)
        for (int k = 0; k < 2; k++) m[k] = max(load(tile.e + (j + k) * L), m[k]);
      if (j < V_) m[0] = max(load(tile.e + j * L), m[0]);
    }
    found.m = max(m[0], m[1]);
    if (job_.off != 0) {
      found.sum = all(0);
      for (int64_t j = 0; j < V_; j++) found.sum = found.sum + widen(load(tile.e + j * L));
    }
    found.z_out = splat(-kInfinity);
    if (job_.task != Task::kSoftmax) swap(tile, found.z_out);
  }

  // Swaps the entries left out with those of `others`.
  static __attribute__((always_inline)) void swap(const Tile& tile, F& others) {
    alignas(kBytes) uint32_t at[L];
    alignas(kBytes) float mine[L];
    __builtin_memcpy(at, &tile.looked.target, sizeof at);
    __builtin_memcpy(mine, &others, sizeof mine);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      float& entry = tile.e[int64_t{at[k]} * L + k];
      const float kept = entry;
      entry = mine[k];
      mine[k] = kept;
    }
    __builtin_memcpy(&others, mine, sizeof mine);
  }

  // The tile becomes e = exp(tau (z - origin)) 2^(K - reference), but for log-softmax; found are
  // the mass and e of the entry left out and of the maximum.
  void exponentials(Tile& tile) const {
    const F m = tile.found.m;
    if (job_.logit_scale != 1) return exponentials<Form::kScaled>(tile);
    const auto plain = ((m < kOrigin) & (m > -kOrigin)) | (m == -kInfinity);
    all_set(plain) ? exponentials<Form::kPlain>(tile) : exponentials<Form::kShifted>(tile);
  }

  template <Form form>
  void exponentials(Tile& tile) const {
    Found& found = tile.found;
    const F m = found.m, tau = splat(static_cast<float>(job_.logit_scale));
    const F top = form == Form::kScaled ? tau * m : m;
    const auto near = (top < kOrigin) & (top > -kOrigin);
    // (m, since top is infinite where a scale takes it beyond the largest float.)
    const F origin = select(near | (m == -kInfinity), F{}, m);
    const F rounder = splat(0x1.8p23f);
    const F reference =
        fma(select(near, top, F{}), splat(static_cast<float>(kLog2E)), rounder) - rounder;
    const Exp<float> exp(tile.looked.bias - reference);

    // n logits become their e, worked on in turn (exp.h, d).
    const auto turn = [&](auto& x) __attribute__((always_inline)) {
      constexpr int n = sizeof(x) / sizeof(F);
      F low[n];
      for (int k = 0; k < n; k++) {
        const F d = form == Form::kPlain ? x[k] : x[k] - origin;
        x[k] = form == Form::kScaled ? tau * d : d;
        low[k] = form == Form::kScaled ? fma(tau, d, -x[k]) : d;
      }
      exp.template operator()<form == Form::kScaled>(x, low);
    };
    const bool keep_z = job_.task == Task::kLogSoftmax;
    Wide mass = all(0);
    const auto some = [&](int64_t j, auto count) __attribute__((always_inline)) {
      constexpr int n = decltype(count)::value;
      F x[n];
      for (int k = 0; k < n; k++) x[k] = load(tile.e + (j + k) * L);
      turn(x);
      for (int k = 0; k < n; k++) {
        if (!keep_z) store(tile.e + (j + k) * L, x[k]);
        mass = mass + widen(x[k]);
      }
    };
    int64_t j = 0;
    for (; j + 4 <= V_; j += 4) some(j, std::integral_constant<int, 4>());
    if (j + 2 <= V_) some(j, std::integral_constant<int, 2>()), j += 2;
    if (j < V_) some(j, std::integral_constant<int, 1>());
    F single[2] = {m, found.z_out};
    turn(single);
    found.top_e = widen(single[0]);
    found.e_out = job_.task == Task::kSoftmax ? all(0) : widen(single[1]);
    found.beside = mass;
    found.spoil_empty();
    if (keep_z) swap(tile, found.z_out);
  }

  // e times coefficient / S - offset, 0 in dropped rows.
  template <bool kSmooth>
  void finish(const Tile& tile) const {
    const Factors& factors = tile.factors;
    const F high = narrow(factors.quotient);
    F low = narrow(factors.quotient - widen(high));
    low = select((low - low) == 0, low, F{});
    const F minus = narrow(factors.offset);
    const Index kept = tile.looked.kept;
    const auto one = [&](float* at) __attribute__((always_inline)) {
      const F e = load(at), g = fma(e, high, kSmooth ? fma(e, low, -minus) : e * low);
      store(at, (F)((Index)g & kept));
    };
    int64_t j = 0;
    for (; j + 4 <= V_; j += 4)
      for (int k = 0; k < 4; k++) one(tile.e + (j + k) * L);
    for (; j < V_; j++) one(tile.e + j * L);
  }

  void log_probabilities(const Tile& tile) const {
    const Found& found = tile.found;
    const F tau = splat(static_cast<float>(job_.logit_scale));
    const F rest = narrow(each(found.beside, found.top_e, [](D u, D e) { return log1p(u / e); }));
    for (int64_t j = 0; j < V_; j++)
      store(tile.e + j * L, tau * (load(tile.e + j * L) - found.m) - rest);
  }

  const RowJob& job_;
  const int64_t V_;
  TileMemory<S> memory_;
  const Numbers numbers_;
  int most_ = 0;
  Tile tiles_[TileMemory<S>::kTiles];
};

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  Tiles<S> tiles(job);
  if (!tiles.prepare()) return report_out_of_memory(job);
  tiles.serve(begin, end);
  stream_fence();
}

}  // namespace

void serve_lanes(const RowJob& job, int64_t begin, int64_t end) {
  switch (job.logits.dtype) {
    case Dtype::kFloat16:
      return serve<Stored<Dtype::kFloat16>>(job, begin, end);
    case Dtype::kBFloat16:
      return serve<Stored<Dtype::kBFloat16>>(job, begin, end);
    case Dtype::kFloat32:
      return serve<Stored<Dtype::kFloat32>>(job, begin, end);
    case Dtype::kFloat64:
      return serve_rows(job, begin, end);
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
