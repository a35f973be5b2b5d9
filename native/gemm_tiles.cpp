// The matrix kernels: packing, and the tile of registers that everything else feeds.
//
// Design (gemm.h says what is computed):
//   a. The innermost tile holds strip x vectors vectors of sums: 6 x 2 where there are 16 vector
//      registers, 8 x 3 where there are 32, 12 x 1 where the packed side fits one vector. A step of
//      the depth broadcasts `strip` numbers of the streamed side and loads `vectors` of a panel.
//   b. The streamed side is read in place where its depth is contiguous, or its other axis is and
//      there are few panels; else a block of it is packed strip by strip, once for all panels.
//   c. A panel's block (kBlock x panel) stays in the L1 cache while strips stream past it.
//   d. What both sides give the tile are entries: a number each or, in pairs (gemm_pairs.h), two of
//      bfloat16. Only the multiplication and the packing know which; a step of the depth is an
//      entry.
#include "gemm_pack.h"
#include "gemm_pairs.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

// Of the depth's entries. Shorter blocks round less (a sum's error grows as the root of kBlock),
// longer ones fetch and add the sums less often. At 128 the weights' gradient is as close as that
// of PyTorch's product; with as many pairs the sums are fetched no more often for a multiplication.
constexpr int64_t kBlock = 128;
constexpr int64_t kFewPanels = 4;

// The innermost tile's shape, of entries that hold numbers of the sums' type.
template <class Number, int strip_, int vectors_>
struct Shape {
  using T = Number;
  using V = typename Lanes<T>::V;
  using Entry = T;
  using Entries = V;
  static constexpr int L = Lanes<T>::n, kStrip = strip_, kVectors = vectors_;
  static constexpr int kDepths = 1;  // of an entry
  static constexpr int64_t kPanel = kVectors * L;
  static constexpr Dtype kInPlace = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
};
#if defined(__AVX512F__) || defined(__aarch64__)
template <class T>
using Plain = Shape<T, 8, 3>;
#else
template <class T>
using Plain = Shape<T, 6, 2>;
#endif
template <class T>
using Slim = Shape<T, 12, 1>;

#if defined(__AVX512BF16__)
// Of entries that hold two bfloat16 numbers.
template <int strip_, int vectors_>
struct PairShape : Shape<float, strip_, vectors_> {
  using Entry = Pair;
  using Entries = U32;
  static constexpr int kDepths = 2;
  static constexpr Dtype kInPlace = Dtype::kBFloat16;
};
using Pairs = PairShape<8, 3>;
using SlimPairs = PairShape<16, 1>;  // packed in squares
#else
using Pairs = Plain<float>;
using SlimPairs = Slim<float>;
#endif

// How many entries hold so many depths.
template <class S>
constexpr int64_t entries(int64_t depths) {
  return (depths + S::kDepths - 1) / S::kDepths;
}

// How the innermost tile reads a strip.
enum class Strip { kAlongDepth, kAcross };

// sums (a strip's rows of a panel, `row` numbers apart) = or += a strip times a panel over n
// entries of the depth. kAlongDepth: a strip's rows lie `step` bytes apart; kAcross: the depth's
// entries do. They need not be aligned.
template <class S, Strip strip, class T = typename S::T, class Entry = typename S::Entry>
__attribute__((noinline)) void inner_tile(int64_t n, const char* a, int64_t step,
                                          const Entry* panel, T* sums, int64_t row, bool fresh,
                                          const char* ahead, int64_t lines) {
  using V = typename S::V;
  using Entries = typename S::Entries;
  constexpr int64_t kSize = sizeof(Entry);
  constexpr int L = S::L, kStrip = S::kStrip, kVectors = S::kVectors;
  V x[kStrip][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; r++)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++) x[r][v] = V{};
  for (int r = 0; r < kStrip; r++)
    for (int64_t v = 0; v < S::kPanel; v += 64 / int64_t{sizeof(T)})
      __builtin_prefetch(sums + r * row + v, 1);
  for (int64_t k = 0; k < n; k++, ahead += lines) {
    __builtin_prefetch(ahead);
    Entries b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++)
      b[v] = *reinterpret_cast<const Entries*>(panel + (k * kVectors + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; r++) {
      Entry entry;
      __builtin_memcpy(&entry,
                       a + (strip == Strip::kAcross ? k * step + r * kSize : r * step + k * kSize),
                       sizeof entry);
      const Entries s = entry - Entries{};
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; v++) x[r][v] = multiply_add(s, b[v], x[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; r++)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++) {
      T* at = sums + r * row + v * L;
      store(at, fresh ? x[r][v] : load(at) + x[r][v]);
    }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
void pack_panel(const GemmJob& job, int64_t k0, int64_t k1, int64_t j, void* at) {
  const int64_t i = j * S::kPanel, n = smaller(S::kPanel, job.packed.n - i);
  pack_any<S::kPanel>(job.packed, i, n, k0, k1, static_cast<typename S::Entry*>(at));
}

// One task: a tile of out, worked on in `sums_`, which is out itself where that may be.
template <class S>
class Tile {
  using T = typename S::T;
  using Entry = typename S::Entry;
  static constexpr int kStrip = S::kStrip;
  static constexpr int64_t kPanel = S::kPanel, kSize = sizeof(Entry);

 public:
  Tile(const GemmJob& job, int64_t i0, int64_t i1, int64_t j0, int64_t j1)
      : job_(job),
        i0_(i0),
        i1_(i1),
        j0_(j0),
        j1_(j1),
        columns_(smaller(j1 * kPanel, job.packed.n) - j0 * kPanel),
        strips_((i1 - i0 + kStrip - 1) / kStrip) {
    const Side& side = job.streamed;
    const bool same = side.dtype == S::kInPlace;
    along_ = same && side.depth_stride * S::kDepths == kSize;
    // (The depths of a pair lie together along the depth alone.)
    across_ = same && !along_ && S::kDepths == 1 && side.stride == kSize && j1 - j0 <= kFewPanels;
    in_place_ = !job.across && columns_ == (j1 - j0) * kPanel && (i1 - i0) % kStrip == 0;
  }

  bool prepare() {
    const bool packs =
        !(along_ || across_) || (i1_ - i0_) % kStrip != 0 || !whole_entries(job_.depth);
    const int64_t strips = packs ? strips_ * kStrip * kBlock : 0;
    a_ = static_cast<Entry*>(scratch(5, strips * kSize + kBytes));
    if (in_place_) {
      sums_ = static_cast<T*>(static_cast<void*>(job_.out)) + i0_ * job_.out_stride + j0_ * kPanel;
      row_ = job_.out_stride;
    } else {
      row_ = (j1_ - j0_) * kPanel;
      sums_ = static_cast<T*>(scratch(6, strips_ * kStrip * row_ * int64_t{sizeof(T)}));
    }
    return a_ && sums_;
  }

  void run(int64_t k0, int64_t k1, const Entry* packed) {
    const bool fresh = k0 == 0 && !job_.accumulate;
    if (!in_place_ && !fresh) bring();
    for (int64_t k = k0; k < k1; k += kDepth) {
      const int64_t n = smaller(kDepth, k1 - k);
      for (int64_t s = 0; s < strips_; s++)
        if (!reads_in_place(s, n)) pack_strip(s, k, n);
      for (int64_t j = j0_; j < j1_; j++) {
        const Entry* panel = packed + (j * entries<S>(k1 - k0) + entries<S>(k - k0)) * kPanel;
        for (int64_t s = 0; s < strips_; s++)
          strip(s, k, n, panel, sums_ + s * kStrip * row_ + (j - j0_) * kPanel, fresh && k == k0);
      }
    }
    if (!in_place_ || (job_.bias && k1 == job_.depth)) take_back(k1 == job_.depth);
  }

 private:
  static constexpr int64_t kDepth = kBlock * S::kDepths;

  // Of an odd depth the last pair has one number: what follows in memory may be no one's.
  static bool whole_entries(int64_t n) { return n % S::kDepths == 0; }

  bool reads_in_place(int64_t s, int64_t n) const {
    return (along_ || across_) && i0_ + (s + 1) * kStrip <= i1_ && whole_entries(n);
  }

  void pack_strip(int64_t s, int64_t k, int64_t n) {
    const int64_t i = i0_ + s * kStrip;
    pack_any<kStrip>(job_.streamed, i, smaller(kStrip, i1_ - i), k, k + n,
                     a_ + s * kStrip * kBlock);
  }

  void strip(int64_t s, int64_t k, int64_t n, const Entry* panel, T* sums, bool fresh) {
    const Side& side = job_.streamed;
    const int64_t steps = entries<S>(n), line = ahead_ < end_ ? 64 : 0;
    const char* ahead = line ? ahead_ : reinterpret_cast<const char*>(panel);
    ahead_ += line * steps;
    if (reads_in_place(s, n)) {
      const char* a = side.data + (i0_ + s * kStrip) * side.stride + k * side.depth_stride;
      if (along_)
        return inner_tile<S, Strip::kAlongDepth>(steps, a, side.stride, panel, sums, row_, fresh,
                                                 ahead, line);
      return inner_tile<S, Strip::kAcross>(steps, a, side.depth_stride, panel, sums, row_, fresh,
                                           ahead, line);
    }
    const auto* a = reinterpret_cast<const char*>(a_ + s * kStrip * kBlock);
    inner_tile<S, Strip::kAcross>(steps, a, kStrip * kSize, panel, sums, row_, fresh, ahead, line);
  }

  // Out's entry of streamed i0 and packed column j0 * panel, and from one to the next of either.
  T* out() const {
    const int64_t column = j0_ * kPanel;
    return static_cast<T*>(static_cast<void*>(job_.out)) +
           (job_.across ? column * job_.out_stride + i0_ : i0_ * job_.out_stride + column);
  }

  void bring() {
    constexpr int L = Lanes<T>::n;
    const T* from = out();
    const int64_t rows = i1_ - i0_;
    if (!job_.across) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns_; j++) sums_[i * row_ + j] = from[i * job_.out_stride + j];
      return;
    }
    for (int64_t j = 0; j < columns_; j += L) {
      int64_t i = 0;
      if constexpr (std::is_same_v<T, float>) {
        for (; i + L <= rows && j + L <= columns_; i += L) {
          F square[L];
#pragma GCC unroll 16
          for (int r = 0; r < L; r++) square[r] = load(from + (j + r) * job_.out_stride + i);
          transpose(square);
#pragma GCC unroll 16
          for (int r = 0; r < L; r++) store(sums_ + (i + r) * row_ + j, square[r]);
        }
      }
      for (; i < rows; i++)
        for (int64_t r = j; r < smaller(j + L, columns_); r++)
          sums_[i * row_ + r] = from[r * job_.out_stride + i];
    }
  }

  void take_back(bool last) {
    constexpr int L = Lanes<T>::n;
    const T* bias = last ? static_cast<const T*>(job_.bias) : nullptr;
    T* to = out();
    if (bias) bias += job_.across ? i0_ : j0_ * kPanel;
    const int64_t rows = i1_ - i0_;
    if (!job_.across) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns_; j++)
          to[i * job_.out_stride + j] = sums_[i * row_ + j] + (bias ? bias[j] : T{0});
      return;
    }
    for (int64_t j = 0; j < columns_; j += L) {
      int64_t i = 0;
      if constexpr (std::is_same_v<T, float>) {
        for (; i + L <= rows && j + L <= columns_; i += L) {
          F square[L];
#pragma GCC unroll 16
          for (int r = 0; r < L; r++) square[r] = load(sums_ + (i + r) * row_ + j);
          transpose(square);
          const F b = bias ? load(bias + i) : F{};
#pragma GCC unroll 16
          for (int r = 0; r < L; r++) store(to + (j + r) * job_.out_stride + i, square[r] + b);
        }
      }
      for (; i < rows; i++)
        for (int64_t r = j; r < smaller(j + L, columns_); r++)
          to[r * job_.out_stride + i] = sums_[i * row_ + r] + (bias ? bias[i] : T{0});
    }
  }

  const GemmJob& job_;
  const int64_t i0_, i1_, j0_, j1_, columns_, strips_;
  bool along_, across_, in_place_;
  Entry* a_ = nullptr;  // packed strips
  T* sums_ = nullptr;
  const char *ahead_ = job_.ahead, *const end_ = job_.ahead + job_.ahead_bytes;
  int64_t row_ = 0;
};

template <class S>
void serve_tile(const GemmJob& job, int64_t k0, int64_t k1, int64_t i0, int64_t i1, int64_t j0,
                int64_t j1, const void* packed) {
  Tile<S> tile(job, i0, i1, j0, j1);
  if (!tile.prepare()) return __atomic_store_n(job.no_memory, true, __ATOMIC_RELAXED);
  tile.run(k0, k1, static_cast<const typename S::Entry*>(packed));
}

template <class S>
constexpr GemmKernels kernels_of() {
  return {S::kStrip, S::kPanel, S::kDepths, pack_panel<S>, serve_tile<S>};
}

}  // namespace

extern const GemmTable gemm;
const GemmTable gemm = {kernels_of<Plain<float>>(), kernels_of<Plain<double>>(),
                        kernels_of<Slim<float>>(),  kernels_of<Slim<double>>(),
                        kernels_of<Pairs>(),        kernels_of<SlimPairs>()};

}  // namespace CROSSENT_ISA
}  // namespace crossent
