// The host's side of a matrix product: slabs of the depth, packed once, and tiles for threads.
#include "gemm.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace crossent {
namespace {

// The packed slab: as much of the depth as fits, in whole blocks of any kernel's depth.
constexpr int64_t kSlabBytes = int64_t{4} << 20, kSlabDepth = 256;
// A tile: so many of the streamed side and of the packed one. Its sums (up to 300 KB) stay in the
// L2 cache; more tasks than threads, so that none waits long for the others.
constexpr int64_t kTileStreamed = 96, kTilePacked = 768, kTasks = 16;

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

Side side(const Matrix& m, bool rows) {
  if (rows) return {m.data, m.dtype, m.rows, m.row_stride, m.col_stride};
  return {m.data, m.dtype, m.cols, m.col_stride, m.row_stride};
}

// Are both sides bfloat16, or may they become it?
bool in_pairs(Dtype a, Dtype b, bool may_round) {
  const auto fits = [&](Dtype dtype) {
    return dtype == Dtype::kBFloat16 || (may_round && dtype == Dtype::kFloat32);
  };
  return fits(a) && fits(b) && (a == Dtype::kBFloat16 || b == Dtype::kBFloat16);
}

class Multiply {
 public:
  Multiply(const GemmJob& job, bool in_pairs, bool (*poll)(void*), void* poll_context)
      : job_(job),
        kernels_(in_pairs ? gemm_kernels().of_pairs(job.packed.n)
                          : gemm_kernels().of(job.wide, job.packed.n)),
        poll_(poll),
        poll_context_(poll_context) {
    job_.no_memory = &no_memory_;
  }

  Outcome operator()() {
    const OwnScratch scratch;
    const int64_t size = job_.wide ? 8 : 4;
    const int64_t panels = ceiling(job_.packed.n, kernels_.panel), width = panels * kernels_.panel;
    const int64_t most = kSlabBytes / (width * size) * kernels_.depths / kSlabDepth * kSlabDepth;
    const int64_t slab = std::min(job_.depth, std::max(kSlabDepth, most));
    const Memory packed = allocate(width * kernels_.panel_depth(slab) * size);
    if (!packed) return Outcome::kOutOfMemory;
    for (int64_t k = 0; k < job_.depth; k += slab) {
      const int64_t end = std::min(job_.depth, k + slab);
      if (!pack(k, end, panels, size, packed.get()) || !tiles(k, end, panels, packed.get()))
        return Outcome::kCancelled;
      if (no_memory_) return Outcome::kOutOfMemory;
      // parallel_for asks after 50 ms, and may have been done by then each time.
      if (end < job_.depth && poll_ && !poll_(poll_context_)) return Outcome::kCancelled;
    }
    return Outcome::kDone;
  }

 private:
  bool pack(int64_t k0, int64_t k1, int64_t panels, int64_t size, char* at) {
    const int64_t bytes = kernels_.panel_depth(k1 - k0) * kernels_.panel * size;
    return each(panels, [&](int64_t j) { kernels_.pack(job_, k0, k1, j, at + j * bytes); });
  }

  bool tiles(int64_t k0, int64_t k1, int64_t panels, const void* packed) {
    const int64_t n = job_.streamed.n, strip = kernels_.strip;
    const int64_t rows = std::min(ceiling(kTileStreamed, strip),
                                  std::max<int64_t>(1, ceiling(ceiling(n, kTasks), strip))) *
                         strip;
    const int64_t wide = kTilePacked / kernels_.panel, across = ceiling(panels, wide);
    return each(ceiling(n, rows) * across, [&](int64_t task) {
      const int64_t i = task / across * rows, j = task % across * wide;
      kernels_.tile(job_, k0, k1, i, std::min(n, i + rows), j, std::min(panels, j + wide), packed);
      trim_scratch();
    });
  }

  template <class Body>
  bool each(int64_t n, const Body& body) {
    return parallel_for(n, body, poll_, poll_context_);
  }

  GemmJob job_;
  const GemmKernels& kernels_;
  bool (*const poll_)(void*);
  void* const poll_context_;
  bool no_memory_ = false;
};

// Where nothing is to be summed: 0, or what is there, and the bias.
void without_depth(const GemmJob& job) {
  const int64_t rows = job.across ? job.packed.n : job.streamed.n;
  const int64_t columns = job.across ? job.streamed.n : job.packed.n;
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    const auto* bias = static_cast<const T*>(job.bias);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) {
        T& entry = static_cast<T*>(static_cast<void*>(job.out))[i * job.out_stride + j];
        entry = (job.accumulate ? entry : zero) + (bias ? bias[j] : zero);
      }
  };
  job.wide ? fill(0.0) : fill(0.0f);
}

}  // namespace

Outcome multiply(const Matrix& a, const Matrix& b, char* out, int64_t out_stride, bool accumulate,
                 const void* bias, bool may_round, bool (*poll)(void*), void* poll_context) {
  GemmJob job;
  job.across = a.rows < b.cols;
  job.streamed = job.across ? side(b, false) : side(a, true);
  job.packed = job.across ? side(a, true) : side(b, false);
  job.depth = a.cols;
  job.out = out;
  job.out_stride = out_stride;
  job.wide = a.dtype == Dtype::kFloat64 || b.dtype == Dtype::kFloat64;
  job.bias = bias;
  job.accumulate = accumulate;
  if (job.depth == 0) {
    without_depth(job);
    return Outcome::kDone;
  }
  return Multiply(job, in_pairs(a.dtype, b.dtype, may_round), poll, poll_context)();
}

}  // namespace crossent
