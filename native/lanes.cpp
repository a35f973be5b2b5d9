// One row a lane: short rows, and a class axis that is not the last one.
//
// Design:
//   a. A tile holds L rows as (V, L) floats in scratch: transposed in registers where the classes
//      are contiguous, loaded as they lie where neighbouring rows are. Every step of rows.cpp then
//      is one vector instruction for L rows, the logarithm too, and no sum runs across lanes.
//   b. Same numbers as rows.cpp: integer references, the target left out of the mass, the same K.
//      Only for float (and the 16-bit dtypes, computed in it); sums and row numbers are double.
//   c. Which rows come here depends on the number of classes and the dtype alone (lane_rows), so
//      that no layout changes a bit.
#include <cmath>
#include <type_traits>

#include "exp.h"
#include "numbers.h"
#include "rows.h"
#include "storage.h"
#include "transpose.h"

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
      : job_(job),
        V_(job.logits.classes),
        contiguous_(job.logits.contiguous_rows() && (!job.out.data || job.out.contiguous_rows())),
        padded_(job.logits.padded && (!job.out.data || job.out.padded)),
        dense_in_(dense(job.logits)),
        dense_out_(dense(job.out)),
        streams_(S::kStreams && contiguous_lanes(job.out) && job.out.class_stride % kStored == 0 &&
                 job.n_rows * V_ * int64_t{sizeof(Type)} >= kStreamBytes),
        numbers_(job) {
    whole_ = L;
    for (int64_t beyond = L - V_ % L; beyond > 0 && whole_ > 0; beyond -= V_) whole_--;
  }

  bool prepare() {
    const int64_t fit = kTileBytes / (V_ * kBytes);
    most_ = fit < 1 ? 1 : fit < kTiles ? static_cast<int>(fit) : kTiles;
    e_ = static_cast<float*>(scratch(5, most_ * V_ * kBytes));
    return e_ != nullptr;
  }

  void serve(int64_t begin, int64_t end) {
    int n = 0;
    for (int64_t i = begin; i < end;) {
      const int rows = room(i, end);
      tiles_[n].begin = i;
      tiles_[n].rows = rows;
      tiles_[n].e = e_ + n * V_ * L;
      i += rows;
      if (++n == most_ || i == end) run(n), n = 0;
    }
  }

 private:
  static constexpr int kTiles = 8;
  static constexpr int64_t kTileBytes = 16384;
  static constexpr int kStored = L * sizeof(Type);  // bytes of a vector as it lies in memory

  struct Tile {
    int64_t begin;
    int rows;
    bool done;
    float* e;
    Looked looked;
    Found found;
    Factors factors;
  };

  // How many rows from i on one tile takes: those of one outer index where lanes are contiguous.
  int room(int64_t i, int64_t end) const {
    int64_t most = end - i;
    if (!contiguous_) {
      const int64_t left = job_.logits.inner - i % job_.logits.inner;
      most = left < most ? left : most;
      // Vectors written past the caches must be aligned: the first tile ends where one is.
      const auto past = reinterpret_cast<uintptr_t>(streams_ ? job_.out.row(i) : nullptr) % kStored;
      const int64_t whole = static_cast<int64_t>((kStored - past) / sizeof(Type));
      most = past && whole < most ? whole : most;
    }
    return most < L ? static_cast<int>(most) : L;
  }

  // Step by step over all tiles: the rows' numbers are long chains of few instructions.
  void run(int n) {
    for (int t = 0; t < n; t++) {
      numbers_.look_up(tiles_[t].begin, tiles_[t].rows, &tiles_[t].looked);
      tiles_[t].done = tiles_[t].looked.fits;
    }
    read(n);
    for (int t = 0; t < n; t++)
      if (tiles_[t].done) leave_out(tiles_[t]);
    for (int t = 0; t < n; t++)
      if (tiles_[t].done) exponentials(tiles_[t]);
    for (int t = 0; t < n; t++) {
      Tile& tile = tiles_[t];
      if (job_.task == Task::kLoss && tile.done)
        tile.done = numbers_.losses(tile.looked, tile.found, tile.begin, tile.rows, &tile.factors);
    }
    if (job_.out.data) {
      for (int t = 0; t < n; t++)
        if (tiles_[t].done) finish(tiles_[t]);
      write(n);
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
    tiles_[0].e = e_;
    run(1);
  }

  void read(int n) const {
    const View& logits = job_.logits;
    if (!logits.contiguous_rows() && contiguous_lanes(logits)) return read_columns(n);
    for (int t = 0; t < n; t++) {
      if (!logits.contiguous_rows()) {
        read_each(tiles_[t]);
      } else {
        dense_in_ ? read_rows<true>(tiles_[t]) : read_rows<false>(tiles_[t]);
      }
    }
  }

  void finish(Tile& tile) const {
    if (job_.task == Task::kLogSoftmax) return log_probabilities(tile);
    if (job_.task == Task::kSoftmax) tile.factors.quotient = all(1) / tile.found.beside;
    job_.off != 0 ? finish<true>(tile) : finish<false>(tile);
    if (job_.task == Task::kSoftmax) return;
    F value = (F)((Index)narrow(tile.factors.value) & tile.looked.kept);
    swap(tile, value);
  }

  void write(int n) const {
    const View& out = job_.out;
    if (!out.contiguous_rows() && contiguous_lanes(out)) return write_columns(n);
    for (int t = 0; t < n; t++) {
      if (!tiles_[t].done) continue;
      if (!out.contiguous_rows()) {
        write_each(tiles_[t]);
      } else {
        dense_out_ ? write_rows<true>(tiles_[t]) : write_rows<false>(tiles_[t]);
      }
    }
  }

  // Where the tile's rows start. Where they lie one behind the other (dense), a vector that ends
  // beyond its row may be read and written whole, as long as it ends within the tile.
  template <bool kDense>
  struct RowPointers {
    char *first, *at[kDense ? 1 : L];
    int64_t step;

    RowPointers(const View& view, const Tile& tile) : first(view.row(tile.begin)) {
      step = view.classes * int64_t{sizeof(Type)};
      for (int k = 0; !kDense && k < L; k++) at[k] = view.row(tile.begin + (k < tile.rows ? k : 0));
    }
    Type* operator()(int k) const {
      return reinterpret_cast<Type*>(kDense ? first + k * step : at[k]);
    }
  };

  // Of how many rows the vector from class j on, with `count` classes, ends within the tile, or
  // within what is behind its row.
  template <bool kDense>
  int whole(const Tile& tile, int count) const {
    if (!kDense) return padded_ ? tile.rows : 0;
    if (tile.rows == L) return whole_;
    int rows = tile.rows;
    for (int64_t beyond = L - count; beyond > 0 && rows > 0; beyond -= V_) rows--;
    return rows;
  }

  static bool dense(const View& view) {
    const int64_t row = view.classes * int64_t{sizeof(Type)};
    return view.contiguous_rows() && view.inner_stride == row &&
           (view.outer == 1 || view.outer_stride == view.inner * row);
  }

  template <bool kDense>
  void read_rows(const Tile& tile) const {
    const RowPointers<kDense> rows(job_.logits, tile);
    int64_t j = 0;
    for (; j + L <= V_; j += L) read_square(tile, rows, j, L, L);
    if (const int left = static_cast<int>(V_ - j))
      read_square(tile, rows, j, left, whole<kDense>(tile, left));
  }

  template <class Pointers>
  __attribute__((always_inline)) void read_square(const Tile& tile, const Pointers& rows, int64_t j,
                                                  int count, int whole) const {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      const Type* at = rows(k < tile.rows ? k : 0) + j;
      x[k] = k < whole ? S::load(at) : load_part<S>(at, count, 0.0f);
    }
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++)
      if (k < count) store(tile.e + (j + k) * L, x[k]);
  }

  static bool contiguous_lanes(const View& view) {
    return view.inner_stride == int64_t{sizeof(Type)};
  }

  void read_each(const Tile& tile) const {
    const int64_t i = tile.begin;
    const int n = tile.rows;
    alignas(kBytes) Type part[L] = {};
    const char* rows[L];
    for (int k = 0; k < n; k++) rows[k] = job_.logits.row(i + k);
    for (int64_t j = 0; j < V_; j++) {
      for (int k = 0; k < n; k++)
        part[k] = *reinterpret_cast<const Type*>(rows[k] + j * job_.logits.class_stride);
      store(tile.e + j * L, S::load(part));
    }
  }

  void write_each(const Tile& tile) const {
    const int64_t i = tile.begin;
    const int n = tile.rows;
    alignas(kBytes) Type part[L];
    char* rows[L];
    for (int k = 0; k < n; k++) rows[k] = job_.out.row(i + k);
    for (int64_t j = 0; j < V_; j++) {
      S::store(part, load(tile.e + j * L));
      for (int k = 0; k < n; k++)
        *reinterpret_cast<Type*>(rows[k] + j * job_.out.class_stride) = part[k];
    }
  }

  // Class by class over all tiles: planes often lie a multiple of 4 KiB apart, and a cache then
  // holds a few lines of them at a time, so each is used up at once.
  void read_columns(int n) const {
    const char* at[kTiles];
    for (int t = 0; t < n; t++) at[t] = job_.logits.row(tiles_[t].begin);
    for (int64_t j = 0; j < V_; j++)
      for (int t = 0; t < n; t++) {
        const auto* row = reinterpret_cast<const Type*>(at[t] + j * job_.logits.class_stride);
        const int rows = tiles_[t].rows;
        store(tiles_[t].e + j * L, rows == L ? S::load(row) : load_part<S>(row, rows, 0.0f));
      }
  }

  // The last classes first: what their vectors write into the next rows is then overwritten.
  template <bool kDense>
  void write_rows(const Tile& tile) const {
    const RowPointers<kDense> rows(job_.out, tile);
    const int64_t full = V_ / L * L;
    if (const int left = static_cast<int>(V_ - full))
      write_square(tile, rows, full, left, whole<kDense>(tile, left));
    for (int64_t j = 0; j < full; j += L) write_square(tile, rows, j, L, L);
  }

  template <class Pointers>
  __attribute__((always_inline)) void write_square(const Tile& tile, const Pointers& rows,
                                                   int64_t j, int count, int whole) const {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) x[k] = k < count ? load(tile.e + (j + k) * L) : F{};
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      if (k >= tile.rows) break;
      Type* at = rows(k) + j;
      k < whole ? S::store(at, x[k]) : store_part<S>(at, count, x[k]);
    }
  }

  void write_columns(int n) const {
    char* at[kTiles];
    for (int t = 0; t < n; t++) at[t] = job_.out.row(tiles_[t].begin);
    for (int64_t j = 0; j < V_; j++)
      for (int t = 0; t < n; t++) {
        if (!tiles_[t].done) continue;
        auto* row = reinterpret_cast<Type*>(at[t] + j * job_.out.class_stride);
        const int rows = tiles_[t].rows;
        const F x = load(tiles_[t].e + j * L);
        const bool aligned = reinterpret_cast<uintptr_t>(row) % kStored == 0;
        if (rows < L) {
          store_part<S>(row, rows, x);
        } else {
          streams_&& aligned ? S::stream(row, x) : S::store(row, x);
        }
      }
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
      for (int64_t j = 0; j < V_; j++) m[j & 1] = max(load(tile.e + j * L), m[j & 1]);
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
    for (int64_t j = 0; j < V_; j++) {
      const F e = load(tile.e + j * L);
      const F g = fma(e, high, kSmooth ? fma(e, low, -minus) : e * low);
      store(tile.e + j * L, (F)((Index)g & kept));
    }
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
  const bool contiguous_, padded_, dense_in_, dense_out_, streams_;
  const Numbers numbers_;
  int whole_, most_ = 1;  // whole_: of the rows of a full tile
  float* e_ = nullptr;
  Tile tiles_[kTiles];
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

void count_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                   int64_t* outside, int64_t* skipped) {
  const auto limit = static_cast<uint64_t>(n_classes);
  int64_t bad = 0, none = 0;
  for (int64_t i = 0; i < n; i++) {
    none += target[i] == skip;
    bad += (static_cast<uint64_t>(target[i]) >= limit) & (target[i] != skip);
  }
  *outside = bad;
  *skipped = none;
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
