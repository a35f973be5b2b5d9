// Rows of one block: too long for a lane each, too short to carry a row's numbers (a logarithm, two
// divisions) one after the other.
//
// Design:
//   a. L rows are read one by one as in rows.cpp, their e in scratch rows; then the numbers of all
//   L
//      come from one pass in lanes (numbers.h), and the rows are finished one by one.
//   b. Which rows come here depends on the number of classes and the dtype alone.
#include "blocks.h"
#include "exp.h"
#include "feed.h"
#include "numbers.h"
#include "rows.h"
#include "storage.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_general(const RowJob& job, int64_t begin, int64_t end);  // general.cpp

namespace {

template <class S>
class ShortRows {
  using Type = typename S::Type;
  static constexpr int L = Lanes<float>::n;
  static constexpr bool kPlain = sizeof(Type) == sizeof(float);

 public:
  explicit ShortRows(const RowJob& job)
      : job_(job),
        V_(job.logits.classes),
        stride_((V_ + 15) / 16 * 16 + 16),  // rows 4 KiB apart would share a cache set
        streams_(streams<S>(job)),
        numbers_(job),
        looked_(numbers_.any_rows()) {}

  bool prepare() {
    e_ = static_cast<float*>(scratch(1, L * stride_ * int64_t{sizeof(float)}));
    return e_ != nullptr;
  }

  // Rows [i, i + n), n <= L.
  void run(Feed<Type>& feed, int64_t i, int n) {
    numbers_.look_up(i, n, &looked_);
    const Looked& looked = looked_;
    Factors factors;
    if (looked.fits) {
      read(feed, i, n, looked);
      if (job_.task != Task::kLoss || numbers_.losses(looked, found_, i, n, &factors))
        return job_.out.data ? write(feed, i, n, looked, factors) : void();
    }
    if (n > 1) {  // no row's bits may depend on its neighbours
      for (int k = 0; k < n; k++) run(feed, i + k, 1);
    } else {
      feed.leave(i);  // general writes its row itself
      serve_general(job_, i, i + 1);
    }
  }

 private:
  void read(const Feed<Type>& feed, int64_t i, int n, const Looked& looked) {
    alignas(kBytes) float origin[L] = {}, reference[L] = {}, m[L] = {}, z_out[L] = {};
    alignas(kBytes) double beside[L], e_out[L], sum[L] = {};
    for (int k = 0; k < L; k++) beside[k] = e_out[k] = 1;  // harmless, where there is no row
    const double scale = job_.logit_scale;
    // All maxima first: the next row's need not wait for this row's exponentials.
    Block<float> blocks[L];
    const float* from[L];
    for (int k = 0; k < n; k++) {
      if (!looked.kept[k]) continue;
      from[k] = widened(feed.in(i + k), k);
      blocks[k].max = block_max(from[k], V_);
      choose_reference(blocks[k], scale);
    }
    for (int k = 0; k < n; k++) {
      if (!looked.kept[k]) continue;
      Block<float>& block = blocks[k];
      const int64_t out = job_.task == Task::kLoss         ? int64_t{looked.target[k]}
                          : job_.task == Task::kLogSoftmax ? first_equal(from[k], V_, block.max)
                                                           : -1;
      z_out[k] = out < 0 ? 0 : from[k][out];
      if (job_.off != 0) sum[k] = block_sum(from[k], V_, 0.0f);
      const Type* ahead = feed.ahead(i + k, L);  // whose maximum comes before its exponentials
      if (streams_) fetch_ends<Type>(feed.out(i + k), V_);
      float* e = e_ + k * stride_;
      const int bias = static_cast<int>(looked.bias[k]);
      exponentials(from[k], e, V_, scale, bias, block, ahead);
      find_mass(e, V_, out, block);
      m[k] = block.max;
      origin[k] = block.origin;
      reference[k] = static_cast<float>(block.reference);
      beside[k] = block.mass.value();
      e_out[k] = block.excluded_e;
    }
    const F tau = splat(static_cast<float>(scale)), d = load(m) - load(origin), h = tau * d;
    const F top = Exp<float>(looked.bias - load(reference)).one(h, fma(tau, d, -h));
    found_ = {load(m),          load(z_out), load_wide(beside),
              load_wide(e_out), widen(top),  load_wide(sum)};
    found_.spoil_empty();
  }

  // In the compute type: as it lies, or in the scratch row where its e will be.
  const float* widened(const Type* z, int k) const {
    if constexpr (kPlain) {
      return z;
    } else {
      return widen_block<S>(z, V_, e_ + k * stride_);
    }
  }

  void write(const Feed<Type>& feed, int64_t i, int n, const Looked& looked,
             const Factors& factors) const {
    if (job_.task == Task::kLogSoftmax) return write_logs(feed, i, n);
    const bool loss = job_.task == Task::kLoss;
    const Wide quotient = loss ? factors.quotient : all(1) / found_.beside;
    const F high = narrow(quotient);
    F low = narrow(quotient - widen(high));
    low = select((low - low) == 0, low, F{});
    const F offset = loss ? narrow(factors.offset) : F{}, value = narrow(factors.value);
    for (int k = 0; k < n; k++) {
      Type* out = feed.out(i + k);
      if (!looked.kept[k]) {
        __builtin_memset(out, 0, static_cast<size_t>(V_) * sizeof(Type));
        continue;
      }
      Finish<float> f;
      f.high = high[k], f.low = low[k], f.offset = offset[k];
      if (loss) f.at = looked.target[k], f.value = value[k];
      finish_block<S>(e_ + k * stride_, out, V_, f, streams_);
    }
  }

  void write_logs(const Feed<Type>& feed, int64_t i, int n) const {
    const F tau = splat(static_cast<float>(job_.logit_scale));
    const F rest = narrow(each(found_.beside, found_.top_e, [](D u, D e) { return log1p(u / e); }));
    for (int k = 0; k < n; k++) {
      const Type* z = feed.in(i + k);
      Type* out = feed.out(i + k);
      const F m = splat(found_.m[k]), below = splat(rest[k]);
      int64_t j = 0;
      for (; j + L <= V_; j += L) S::store(out + j, tau * (S::load(z + j) - m) - below);
      const int left = static_cast<int>(V_ - j);
      if (left) store_part<S>(out + j, left, tau * (load_part<S>(z + j, left, 0.0f) - m) - below);
    }
  }

  const RowJob& job_;
  const int64_t V_, stride_;
  const bool streams_;
  const Numbers numbers_;
  Looked looked_;
  Found found_;
  float* e_ = nullptr;
};

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  using Type = typename S::Type;
  constexpr int L = Lanes<float>::n;
  ShortRows<S> rows(job);
  Feed<Type> feed(job, 2);
  if (!rows.prepare() || !feed.prepare()) return report_out_of_memory(job);
  for (int64_t i = begin; i < end; i = feed.next()) {
    feed.read(i, end);
    for (int64_t k = i; k < feed.next(); k += L)
      rows.run(feed, k, static_cast<int>(feed.next() - k < L ? feed.next() - k : L));
    feed.write();
  }
  stream_fence();
}

}  // namespace

void serve_short(const RowJob& job, int64_t begin, int64_t end) {
  switch (job.logits.dtype) {
    case Dtype::kFloat16:
      return serve<Stored<Dtype::kFloat16>>(job, begin, end);
    case Dtype::kBFloat16:
      return serve<Stored<Dtype::kBFloat16>>(job, begin, end);
    case Dtype::kFloat32:
      return serve<Stored<Dtype::kFloat32>>(job, begin, end);
    case Dtype::kFloat64:
      return;  // never: see short_rows
  }
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
