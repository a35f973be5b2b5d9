// The matrix kernels: packing, and the tile of registers that everything else feeds.
//
// Design (gemm.h says what is computed):
//   a. The innermost tile holds strip x vectors vectors of sums: 6 x 2 where there are 16 vector
//      registers, 8 x 3 where there are 32, 12 x 1 where the packed side fits one vector. A step of
//      the depth broadcasts `strip` numbers of the streamed side and loads `vectors` of a panel.
//   b. The streamed side is read in place where its depth is contiguous, or its other axis is and
//      there are few panels; else a block of it is packed strip by strip, once for all panels.
//   c. A panel's block (kDepth x panel) stays in the L1 cache while strips stream past it.
#include <type_traits>

#include "gemm.h"
#include "storage.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

// Shorter blocks round less (an entry's error grows as the root of kDepth), longer ones fetch and
// add the sums less often. At 128 the weights' gradient is as close as that of PyTorch's product.
constexpr int64_t kDepth = 128;
constexpr int64_t kFewPanels = 4;

// The innermost tile's shape.
template <class Number, int strip_, int vectors_>
struct Shape {
  using T = Number;
  using V = typename Lanes<T>::V;
  static constexpr int L = Lanes<T>::n, kStrip = strip_, kVectors = vectors_;
  static constexpr int64_t kPanel = kVectors * L;
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

// How the innermost tile reads a strip.
enum class Strip { kAlongDepth, kAcross };

// sums (a strip's rows of a panel, `row` entries apart) = or += a strip times a panel over n
// depths. kAlongDepth: entry (r, k) at a[r * step + k]; kAcross: at a[k * step + r].
template <class S, Strip strip, class T = typename S::T>
__attribute__((noinline)) void inner_tile(int64_t n, const T* a, int64_t step, const T* panel,
                                          T* sums, int64_t row, bool fresh, const char* ahead,
                                          int64_t lines) {
  using V = typename S::V;
  constexpr int L = S::L, kStrip = S::kStrip, kVectors = S::kVectors;
  V x[kStrip][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kStrip; r++)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++) x[r][v] = V{};
  for (int r = 0; r < kStrip; r++) __builtin_prefetch(sums + r * row, 1);
  for (int64_t k = 0; k < n; k++, ahead += lines) {
    __builtin_prefetch(ahead);
    V b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++)
      b[v] = *reinterpret_cast<const V*>(panel + (k * kVectors + v) * L);
#pragma GCC unroll 12
    for (int r = 0; r < kStrip; r++) {
      const T number = strip == Strip::kAcross ? a[k * step + r] : a[r * step + k];
      const V s = splat(number);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; v++) x[r][v] = multiply_add(s, b[v], x[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kStrip; r++)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; v++) {
      T* at = sums + r * row + v * L;
      store(at, fresh ? x[r][v] : load(at) + x[r][v]);
    }
}

// Entries [i, i + n) x depths [k0, k1) of a side to at[(k - k0) * width + r], 0 for r >= n. A
// vector may be written beyond the end where the width is less than one.
template <class S, class T, int width>
void pack(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, T* at) {
  using Type = typename S::Type;
  constexpr int L = Lanes<typename S::T>::n;
  constexpr int64_t kSize = sizeof(Type);
  const char* from = side.data + i * side.stride + k0 * side.depth_stride;
  const int64_t depth = k1 - k0;
  constexpr bool kSame = std::is_same_v<T, typename S::T>;
  int64_t k = 0;
  if (n < width)
    for (int64_t j = 0; j < depth * width; j++) at[j] = 0;
  if constexpr (kSame) {
    if (side.stride == kSize && width < L && i + L <= side.n) {
      // The lanes beyond the width give way to the next depth's numbers.
      for (; k < depth; k++)
        store(at + k * width, S::load(reinterpret_cast<const Type*>(from + k * side.depth_stride)));
    } else if (side.stride == kSize && n == width && width % L == 0) {
      for (; k < depth; k++) {
        const auto* row = reinterpret_cast<const Type*>(from + k * side.depth_stride);
#pragma GCC unroll 3
        for (int v = 0; v < width / L; v++) store(at + k * width + v * L, S::load(row + v * L));
      }
    } else if constexpr (std::is_same_v<T, float> && width % L == 0) {
      if (side.depth_stride == kSize && n == width) {
        for (; k + L <= depth; k += L)
          for (int v = 0; v < width / L; v++) {
            F square[L];
#pragma GCC unroll 16
            for (int r = 0; r < L; r++)
              square[r] = S::load(
                  reinterpret_cast<const Type*>(from + (v * L + r) * side.stride + k * kSize));
            transpose(square);
#pragma GCC unroll 16
            for (int r = 0; r < L; r++) store(at + (k + r) * width + v * L, square[r]);
          }
      }
    }
  }
  for (; k < depth; k++)
    for (int64_t r = 0; r < n; r++)
      at[k * width + r] =
          static_cast<T>(load_one<S>(from + r * side.stride + k * side.depth_stride));
}

template <class T, int width>
void pack_any(const Side& side, int64_t i, int64_t n, int64_t k0, int64_t k1, T* at) {
  switch (side.dtype) {
    case Dtype::kFloat16:
      return pack<Stored<Dtype::kFloat16>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kBFloat16:
      return pack<Stored<Dtype::kBFloat16>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kFloat32:
      return pack<Stored<Dtype::kFloat32>, T, width>(side, i, n, k0, k1, at);
    case Dtype::kFloat64:
      return pack<Stored<Dtype::kFloat64>, T, width>(side, i, n, k0, k1, at);
  }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
void pack_panel(const GemmJob& job, int64_t k0, int64_t k1, int64_t j, void* at) {
  using T = typename S::T;
  const int64_t i = j * S::kPanel, n = smaller(S::kPanel, job.packed.n - i);
  pack_any<T, S::kPanel>(job.packed, i, n, k0, k1, static_cast<T*>(at));
}

// One task: a tile of out, worked on in `sums_`, which is out itself where that may be.
template <class S>
class Tile {
  using T = typename S::T;
  static constexpr int kStrip = S::kStrip;
  static constexpr int64_t kPanel = S::kPanel;

 public:
  Tile(const GemmJob& job, int64_t i0, int64_t i1, int64_t j0, int64_t j1)
      : job_(job),
        i0_(i0),
        i1_(i1),
        j0_(j0),
        j1_(j1),
        columns_(smaller(j1 * kPanel, job.packed.n) - j0 * kPanel),
        strips_((i1 - i0 + kStrip - 1) / kStrip) {
    constexpr auto dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    const Side& side = job.streamed;
    const bool same = side.dtype == dtype;
    along_ = same && side.depth_stride == sizeof(T);
    across_ = same && !along_ && side.stride == sizeof(T) && j1 - j0 <= kFewPanels;
    in_place_ = !job.across && columns_ == (j1 - j0) * kPanel && (i1 - i0) % kStrip == 0;
  }

  bool prepare() {
    const bool packs = !(along_ || across_) || (i1_ - i0_) % kStrip != 0;
    const int64_t strips = packs ? strips_ * kStrip * kDepth : 0;
    a_ = static_cast<T*>(scratch(5, strips * int64_t{sizeof(T)} + kBytes));
    if (in_place_) {
      sums_ = static_cast<T*>(static_cast<void*>(job_.out)) + i0_ * job_.out_stride + j0_ * kPanel;
      row_ = job_.out_stride;
    } else {
      row_ = (j1_ - j0_) * kPanel;
      sums_ = static_cast<T*>(scratch(6, strips_ * kStrip * row_ * int64_t{sizeof(T)}));
    }
    return a_ && sums_;
  }

  void run(int64_t k0, int64_t k1, const T* packed) {
    const bool fresh = k0 == 0 && !job_.accumulate;
    if (!in_place_ && !fresh) bring();
    for (int64_t k = k0; k < k1; k += kDepth) {
      const int64_t n = smaller(kDepth, k1 - k);
      const int whole = (i1_ - i0_) % kStrip ? 1 : 0;
      for (int64_t s = 0; s < strips_; s++)
        if (!(along_ || across_) || (whole && s == strips_ - 1)) pack_strip(s, k, n);
      for (int64_t j = j0_; j < j1_; j++) {
        const T* panel = packed + j * kPanel * (k1 - k0) + (k - k0) * kPanel;
        for (int64_t s = 0; s < strips_; s++)
          strip(s, k, n, panel, sums_ + s * kStrip * row_ + (j - j0_) * kPanel, fresh && k == k0);
      }
    }
    if (!in_place_ || (job_.bias && k1 == job_.depth)) take_back(k1 == job_.depth);
  }

 private:
  void pack_strip(int64_t s, int64_t k, int64_t n) {
    const int64_t i = i0_ + s * kStrip;
    pack_any<T, kStrip>(job_.streamed, i, smaller(kStrip, i1_ - i), k, k + n,
                        a_ + s * kStrip * kDepth);
  }

  void strip(int64_t s, int64_t k, int64_t n, const T* panel, T* sums, bool fresh) {
    const Side& side = job_.streamed;
    const int64_t i = i0_ + s * kStrip, line = ahead_ < end_ ? 64 : 0;
    const char* ahead = line ? ahead_ : reinterpret_cast<const char*>(panel);
    ahead_ += line * n;
    constexpr int64_t kSize = sizeof(T);
    if ((along_ || across_) && i + kStrip <= i1_) {
      const T* a = reinterpret_cast<const T*>(side.data + i * side.stride + k * side.depth_stride);
      if (along_)
        return inner_tile<S, Strip::kAlongDepth>(n, a, side.stride / kSize, panel, sums, row_,
                                                 fresh, ahead, line);
      return inner_tile<S, Strip::kAcross>(n, a, side.depth_stride / kSize, panel, sums, row_,
                                           fresh, ahead, line);
    }
    inner_tile<S, Strip::kAcross>(n, a_ + s * kStrip * kDepth, kStrip, panel, sums, row_, fresh,
                                  ahead, line);
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
  T *a_ = nullptr, *sums_ = nullptr;
  const char *ahead_ = job_.ahead, *const end_ = job_.ahead + job_.ahead_bytes;
  int64_t row_ = 0;
};

template <class S>
void serve_tile(const GemmJob& job, int64_t k0, int64_t k1, int64_t i0, int64_t i1, int64_t j0,
                int64_t j1, const void* packed) {
  Tile<S> tile(job, i0, i1, j0, j1);
  if (!tile.prepare()) return __atomic_store_n(job.no_memory, true, __ATOMIC_RELAXED);
  tile.run(k0, k1, static_cast<const typename S::T*>(packed));
}

template <class S>
constexpr GemmKernels kernels_of() {
  return {S::kStrip, S::kPanel, pack_panel<S>, serve_tile<S>};
}

}  // namespace

extern const GemmTable gemm;
const GemmTable gemm = {kernels_of<Plain<float>>(), kernels_of<Plain<double>>(),
                        kernels_of<Slim<float>>(), kernels_of<Slim<double>>()};

}  // namespace CROSSENT_ISA
}  // namespace crossent
