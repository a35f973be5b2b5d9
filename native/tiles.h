// Rows between memory and tiles: L rows as (V, L) floats in scratch, one row a lane. Transposed in
// registers where the classes are contiguous, loaded as they lie where neighbouring rows are.
#pragma once

#include "numbers.h"
#include "rows.h"
#include "storage.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

// Up to L rows, and what is known of them (numbers.h).
struct Tile {
  int64_t begin;
  int rows;
  bool done;
  float* e;
  Looked looked;
  Found found;
  Factors factors;
};

template <class S>
class TileMemory {
  using Type = typename S::Type;
  static constexpr int L = Lanes<float>::n;

 public:
  static constexpr int kTiles = 8;

  explicit TileMemory(const RowJob& job)
      : job_(job),
        V_(job.logits.classes),
        contiguous_(job.logits.contiguous_rows() && (!job.out.data || job.out.contiguous_rows())),
        padded_(job.logits.padded && (!job.out.data || job.out.padded)),
        dense_in_(dense(job.logits)),
        dense_out_(dense(job.out)),
        fetches_(job.n_rows * V_ * int64_t{sizeof(Type)} >= kFetchBytes),
        past_(dense_out_ && job.out.data != job.logits.data &&
              job.n_rows * V_ * int64_t{sizeof(Type)} >= kStreamBytes),
        streams_(S::kStreams && contiguous_lanes(job.out) && job.out.class_stride % kStored == 0 &&
                 job.n_rows * V_ * int64_t{sizeof(Type)} >= kStreamBytes) {
    whole_ = L;
    for (int64_t beyond = L - V_ % L; beyond > 0 && whole_ > 0; beyond -= V_) whole_--;
  }

  // Gives tiles their scratch. Returns how many there are, 0: no memory.
  int prepare(Tile (&tiles)[kTiles]) {
    const int64_t fit = kTileBytes / (V_ * kBytes);
    const int n = fit < 1 ? 1 : fit < kTiles ? static_cast<int>(fit) : kTiles;
    // (The last square of a tile is read whole.)
    auto* e = static_cast<float*>(scratch(5, (n * V_ + L) * kBytes));
    rows_ = static_cast<Type*>(scratch(6, L * V_ * int64_t{sizeof(Type)} + kBytes));
    for (int t = 0; t < n; t++) tiles[t].e = e + t * V_ * L;
    return e && rows_ ? n : 0;
  }

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

  void read(const Tile* tiles, int n) const {
    const View& logits = job_.logits;
    if (!logits.contiguous_rows() && contiguous_lanes(logits)) return read_columns(tiles, n);
    for (int t = 0; t < n; t++) {
      if (!logits.contiguous_rows()) {
        read_each(tiles[t]);
      } else {
        dense_in_ ? read_rows<true>(tiles[t]) : read_rows<false>(tiles[t]);
      }
    }
  }

  // The outputs of the tiles that are done.
  void write(const Tile* tiles, int n) const {
    const View& out = job_.out;
    if (!out.contiguous_rows() && contiguous_lanes(out)) return write_columns(tiles, n);
    for (int t = 0; t < n; t++) {
      if (!tiles[t].done) continue;
      if (!out.contiguous_rows()) {
        write_each(tiles[t]);
      } else if (past_ && tiles[t].rows == L) {
        write_past(tiles[t]);
      } else {
        dense_out_ ? write_rows<true>(tiles[t]) : write_rows<false>(tiles[t]);
      }
    }
  }

  // Has memory fetch what the tile from row i on will read and write. (Inline: GCC drops calls of
  // functions that do nothing else.)
  __attribute__((always_inline)) void fetch(int64_t i) const {
    if (!fetches_ || i + L > job_.n_rows) return;
    fetch<0>(job_.logits, dense_in_, i);
    if (job_.out.data && !streams_ && !past_) fetch<1>(job_.out, dense_out_, i);
  }

 private:
  static constexpr int64_t kTileBytes = 16384, kFetchBytes = 1 << 18;
  static constexpr int kStored = L * sizeof(Type);  // bytes of a vector as it lies in memory

  template <int kWrite>
  static __attribute__((always_inline)) void fetch(const View& view, bool dense, int64_t i) {
    const char* at = view.row(i);
    const int64_t run = L * view.inner_stride;
    if (dense) {
      for (int64_t k = 0; k < run; k += 64) __builtin_prefetch(at + k, kWrite);
    } else if (contiguous_lanes(view)) {
      for (int64_t j = 0; j < view.classes; j++)
        __builtin_prefetch(at + j * view.class_stride, kWrite);
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
    if (tile.rows == L) {
      for (; j + L <= V_; j += L) read_square<true>(tile, rows, j, L, L);
    } else {
      for (; j + L <= V_; j += L) read_square<false>(tile, rows, j, L, L);
    }
    const int left = static_cast<int>(V_ - j);
    if (left == 0) return;
    // Behind a tile there are the next one's rows, which may be read as well.
    const bool more = kDense && tile.begin + 2 * L <= job_.n_rows;
    if (tile.rows == L && (more || whole<kDense>(tile, left) == L)) {
      read_square<true>(tile, rows, j, left, L);
    } else {
      read_square<false>(tile, rows, j, left, whole<kDense>(tile, left));
    }
  }

  // kFull: all L rows are there, and whole vectors of them.
  template <bool kFull, class Pointers>
  __attribute__((always_inline)) void read_square(const Tile& tile, const Pointers& rows, int64_t j,
                                                  int count, int whole) const {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      const Type* at = rows(kFull || k < tile.rows ? k : 0) + j;
      x[k] = kFull || k < whole ? S::load(at) : load_part<S>(at, count, 0.0f);
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
  void read_columns(const Tile* tiles, int n) const {
    const char* at[kTiles];
    for (int t = 0; t < n; t++) at[t] = job_.logits.row(tiles[t].begin);
    for (int64_t j = 0; j < V_; j++)
      for (int t = 0; t < n; t++) {
        const auto* row = reinterpret_cast<const Type*>(at[t] + j * job_.logits.class_stride);
        const int rows = tiles[t].rows;
        store(tiles[t].e + j * L, rows == L ? S::load(row) : load_part<S>(row, rows, 0.0f));
      }
  }

  // Rows that lie one behind the other, past the caches: put together in scratch, for a line must
  // be written whole and at once. (Not in place, where the line is in the cache already; and the
  // fused head wants its gradient there.)
  void write_past(const Tile& tile) const {
    struct {
      Type* first;
      int64_t step;
      Type* operator()(int k) const { return first + k * step; }
    } const rows = {rows_, V_};
    for (int64_t j = (V_ - 1) / L * L; j >= 0; j -= L) write_square<true>(tile, rows, j, L, L);
    Type* out = reinterpret_cast<Type*>(job_.out.row(tile.begin));
    const int64_t n = L * V_, line = 64 / sizeof(Type);
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(Type));
    int64_t k = (line - past) % line;
    __builtin_memcpy(out, rows_, k * sizeof(Type));
    for (; k + line <= n; k += line)
      for (int64_t q = 0; q < line; q += kBytes / sizeof(Type))
        stream_bytes(out + k + q, rows_ + k + q);
    __builtin_memcpy(out + k, rows_ + k, (n - k) * sizeof(Type));
  }
  static __attribute__((always_inline)) void stream_bytes(Type* to, const Type* from) {
    stream(reinterpret_cast<float*>(to), load(reinterpret_cast<const float*>(from)));
  }

  // The last classes first: what their vectors write into the next rows is then overwritten.
  template <bool kDense>
  void write_rows(const Tile& tile) const {
    const RowPointers<kDense> rows(job_.out, tile);
    const int64_t full = V_ / L * L;
    if (const int left = static_cast<int>(V_ - full))
      write_square<false>(tile, rows, full, left, whole<kDense>(tile, left));
    if (tile.rows == L) {
      for (int64_t j = 0; j < full; j += L) write_square<true>(tile, rows, j, L, L);
    } else {
      for (int64_t j = 0; j < full; j += L) write_square<false>(tile, rows, j, L, L);
    }
  }

  template <bool kFull, class Pointers>
  __attribute__((always_inline)) void write_square(const Tile& tile, const Pointers& rows,
                                                   int64_t j, int count, int whole) const {
    F x[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) x[k] = kFull || k < count ? load(tile.e + (j + k) * L) : F{};
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < L; k++) {
      if (!kFull && k >= tile.rows) break;
      Type* at = rows(k) + j;
      kFull || k < whole ? S::store(at, x[k]) : store_part<S>(at, count, x[k]);
    }
  }

  void write_columns(const Tile* tiles, int n) const {
    char* at[kTiles];
    for (int t = 0; t < n; t++) at[t] = job_.out.row(tiles[t].begin);
    for (int64_t j = 0; j < V_; j++)
      for (int t = 0; t < n; t++) {
        if (!tiles[t].done) continue;
        auto* row = reinterpret_cast<Type*>(at[t] + j * job_.out.class_stride);
        const int rows = tiles[t].rows;
        const F x = load(tiles[t].e + j * L);
        const bool aligned = reinterpret_cast<uintptr_t>(row) % kStored == 0;
        if (rows < L) {
          store_part<S>(row, rows, x);
        } else {
          streams_&& aligned ? S::stream(row, x) : S::store(row, x);
        }
      }
  }

  const RowJob& job_;
  const int64_t V_;
  const bool contiguous_, padded_, dense_in_, dense_out_, fetches_, past_, streams_;
  int whole_;             // of the rows of a full tile
  Type* rows_ = nullptr;  // a tile's rows, on their way past the caches
};

}  // namespace
}  // namespace CROSSENT_ISA
}  // namespace crossent
