// A thin head's products with lanes along the features: see along.h.
#include "along.h"

#include <type_traits>

#include "storage.h"
#include "transpose.h"

namespace crossent {
namespace CROSSENT_ISA {
namespace {

// The sums that registers hold beside what is multiplied, of 16 registers or of 32.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kVectors = 4;
#else
constexpr int kSums = 12, kVectors = 2;
#endif
constexpr int kClasses = 6;  // at most in one tile
// Features at a time: so many of W's rows stay in the L1 cache, and an entry's chain is short.
constexpr int64_t kFeatures = 256;

// Keeps GCC from reading x again from memory for each use.
template <class V>
CROSSENT_INLINE void in_register(V& x) {
#if defined(__AVX512VL__)
  asm("" : "+v"(x));
#elif defined(__x86_64__) && !defined(__AVX512F__)  // (emulated, it is no register)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// Calls body(first, count) for groups of the classes, count a constant of 1 ... kClasses.
template <class Body>
CROSSENT_INLINE void in_groups(int64_t n_classes, const Body& body) {
  const int64_t groups = (n_classes + kClasses - 1) / kClasses;
  for (int64_t k = 0; k < groups; k++) {
    const int64_t first = n_classes * k / groups;
    switch (n_classes * (k + 1) / groups - first) {
      case 1:
        body(first, std::integral_constant<int, 1>());
        break;
      case 2:
        body(first, std::integral_constant<int, 2>());
        break;
      case 3:
        body(first, std::integral_constant<int, 3>());
        break;
      case 4:
        body(first, std::integral_constant<int, 4>());
        break;
      case 5:
        body(first, std::integral_constant<int, 5>());
        break;
      default:
        body(first, std::integral_constant<int, 6>());
    }
  }
}

// Fetches the next lines, so that all are fetched in `calls` calls.
class Fetcher {
 public:
  Fetcher(Ahead ahead, int64_t calls)
      : at_(ahead.at), left_(ahead.lines), each_((ahead.lines + calls - 1) / (calls ? calls : 1)) {}
  __attribute__((always_inline)) void operator()() {
    const int64_t n = each_ < left_ ? each_ : left_;
    for (int64_t k = 0; k < n; k++) __builtin_prefetch(at_ + k * 64);
    at_ += n * 64;
    left_ -= n;
  }

 private:
  const char* at_;
  int64_t left_, each_;
};

template <class S>
class Along {
  using Type = typename S::Type;
  using T = typename S::T;
  using V = typename Lanes<T>::V;
  static constexpr int L = Lanes<T>::n;

 public:
  explicit Along(const AlongJob& job) : job_(job) {}

  void logits(const T* w, const T* bias, T* z, int64_t stride, T* part, Ahead ahead) const {
    const int64_t D = job_.n_features, n = job_.n;
    const int64_t groups = (job_.n_classes + kClasses - 1) / kClasses;
    Fetcher fetch(ahead, (D + kFeatures - 1) / kFeatures * groups * ((n + 1) / 2));
    for (int64_t d = 0; d < D; d += kFeatures) {
      const int64_t size = D - d < kFeatures ? D - d : kFeatures;
      in_groups(job_.n_classes, [&](int64_t v, auto count) __attribute__((always_inline)) {
        constexpr int C = decltype(count)::value, R = kSums / C < 8 ? kSums / C : 8;
        int64_t i = 0;
        for (; i + R <= n; i += R) {
          for (int k = 0; k < R; k += 2) fetch();
          dots<R, C>(i, d, size, w + v * job_.width + d, part + (i * job_.n_classes + v) * L);
        }
        for (; i < n; i++) {
          fetch();
          dots<1, C>(i, d, size, w + v * job_.width + d, part + (i * job_.n_classes + v) * L);
        }
      });
    }
    for (int64_t i = 0; i < n; i++) add_lanes(part + i * job_.n_classes * L, bias, z + i * stride);
  }

  void gradient(const T* g, int64_t stride, T* out, Ahead ahead) const {
    constexpr int64_t kStep = int64_t{kVectors} * L;
    const int64_t D = job_.n_features, groups = (job_.n_classes + kClasses - 1) / kClasses;
    Fetcher fetch(ahead, (D + kStep - 1) / kStep * groups);
    int64_t d = 0;
    for (; d + kStep <= D; d += kStep)
      in_groups(job_.n_classes, [&](int64_t v, auto count) __attribute__((always_inline)) {
        fetch();
        outer<decltype(count)::value, kVectors>(d, L, g + v, stride, out + v * job_.width + d);
      });
    for (; d < D; d += L) {
      const int last = static_cast<int>(D - d < L ? D - d : L);
      in_groups(job_.n_classes, [&](int64_t v, auto count) __attribute__((always_inline)) {
        outer<decltype(count)::value, 1>(d, last, g + v, stride, out + v * job_.width + d);
      });
    }
  }

 private:
  const Type* row(int64_t i) const {
    return reinterpret_cast<const Type*>(job_.x + i * job_.row_stride);
  }

  // Adds x's rows [i, i + R) times C rows of W, over `size` features from d on, to `part`, L lanes
  // for each class of a row; writes it where d is 0.
  template <int R, int C>
  __attribute__((noinline)) void dots(int64_t i, int64_t d, int64_t size, const T* w,
                                      T* part) const {
    V sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 6
      for (int c = 0; c < C; c++) sums[r][c] = V{};
    const Type* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = row(i + r) + d;
    const auto step = [&](int64_t j, const auto& get) __attribute__((always_inline)) {
      V number[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) number[r] = get(x[r] + j);
#pragma GCC unroll 6
      for (int c = 0; c < C; c++) {
        V weight = *reinterpret_cast<const V*>(w + c * job_.width + j);
        in_register(weight);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[r][c] = multiply_add(number[r], weight, sums[r][c]);
      }
    };
    int64_t j = 0;
    for (; j + L <= size; j += L) step(j, [](const Type* at) { return S::load(at); });
    if (const int left = static_cast<int>(size - j))
      step(j, [&](const Type* at) { return load_part<S>(at, left, T(0)); });
    T* to = part;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++, to += job_.n_classes * L)
#pragma GCC unroll 6
      for (int c = 0; c < C; c++) {
        V* at = reinterpret_cast<V*>(to + c * L);
        *at = d == 0 ? sums[r][c] : *at + sums[r][c];
      }
  }

  // A row's z from its lanes. Whole vectors are read and written: z's rows and bias are padded.
  void add_lanes(const T* part, const T* bias, T* z) const {
    for (int64_t v = 0; v < job_.n_classes; v += L) {
      const int64_t n = job_.n_classes - v < L ? job_.n_classes - v : L;
      if constexpr (std::is_same_v<T, float>) {
        F square[L];
        for (int k = 0; k < L; k++) square[k] = k < n ? load(part + (v + k) * L) : F{};
        transpose(square);
#pragma GCC unroll 16
        for (int w = L / 2; w > 0; w /= 2)
#pragma GCC unroll 16
          for (int k = 0; k < w; k++) square[k] += square[k + w];
        store(z + v, square[0] + load(bias + v));
      } else {
        for (int64_t k = 0; k < n; k++) {
          T lanes[L];
          store(lanes, load(part + (v + k) * L));
          for (int w = L / 2; w > 0; w /= 2)
            for (int q = 0; q < w; q++) lanes[q] += lanes[q + w];
          z[v + k] = lanes[0] + bias[v + k];
        }
      }
    }
  }

  // Adds C classes of g times x to U vectors of features from d on, of which the last holds `last`.
  template <int C, int U>
  __attribute__((noinline)) void outer(int64_t d, int last, const T* g, int64_t stride,
                                       T* out) const {
    V sums[C][U];
#pragma GCC unroll 6
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) sums[c][u] = V{};
    for (int64_t i = 0; i < job_.n; i++, g += stride) {
      const Type* x = row(i) + d;
      V number[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; u++)
        number[u] = U > 1 || last == L ? S::load(x + u * L) : load_part<S>(x, last, T(0));
#pragma GCC unroll 6
      for (int c = 0; c < C; c++) {
        const V factor = splat(g[c]);
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sums[c][u] = multiply_add(factor, number[u], sums[c][u]);
      }
    }
#pragma GCC unroll 6
    for (int c = 0; c < C; c++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        V* at = reinterpret_cast<V*>(out + c * job_.width + u * L);
        *at += sums[c][u];
      }
  }

  const AlongJob& job_;
};

template <class T>
int64_t width(int64_t n_features) {
  // Not a multiple of 4 KiB, where a class's rows would share cache sets.
  constexpr int64_t L = Lanes<T>::n, kLine = 64 / sizeof(T);
  const int64_t whole = (n_features + L - 1) / L * L, lines = (whole + kLine - 1) / kLine;
  return (lines | 1) * kLine;
}

template <class T>
void copy(const Matrix& w, void* at) {
  const int64_t row = width<T>(w.cols);
  const auto all = [&](auto s) {
    using S = decltype(s);
    for (int64_t v = 0; v < w.rows; v++)
      for (int64_t d = 0; d < row; d++) {
        T number = 0;
        if (d < w.cols)
          number = static_cast<T>(load_one<S>(w.data + v * w.row_stride + d * w.col_stride));
        static_cast<T*>(at)[v * row + d] = number;
      }
  };
  with_storage(w.dtype, all);
}

// Calls task(along) for x, whose numbers are computed in T.
template <class T, class Task>
void with_along(const AlongJob& job, const Task& task) {
  with_storage(job.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (std::is_same_v<typename S::T, T>) task(Along<S>(job));
  });
}

template <class T>
void logits(const AlongJob& job, const void* w, const void* bias, void* z, int64_t stride,
            void* part, Ahead ahead) {
  with_along<T>(job, [&](const auto& along) {
    along.logits(static_cast<const T*>(w), static_cast<const T*>(bias), static_cast<T*>(z), stride,
                 static_cast<T*>(part), ahead);
  });
}

template <class T>
void gradient(const AlongJob& job, const void* g, int64_t stride, void* out, Ahead ahead) {
  with_along<T>(job, [&](const auto& along) {
    along.gradient(static_cast<const T*>(g), stride, static_cast<T*>(out), ahead);
  });
}

template <class T>
constexpr AlongKernels kernels_of() {
  return {width<T>, copy<T>, logits<T>, gradient<T>};
}

}  // namespace

extern const AlongTable along;
const AlongTable along = {kernels_of<float>(), kernels_of<double>(), 12, Lanes<float>::n};

}  // namespace CROSSENT_ISA
}  // namespace crossent
