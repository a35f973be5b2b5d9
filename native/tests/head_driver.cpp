// The fused head's native part: products and the pass for few classes, on each instruction set.
// Holds results against long double, in bounds that follow from docs/numerics.md, and their bits
// alone against those among several threads. Meant for ThreadSanitizer and for other machines: make
// tsan, make aarch64.
//
//   head_driver       on the first error or difference a line and exit status 1
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "../gemm.h"
#include "../parallel.h"
#include "../thin.h"
#include "buffer.h"
#include "race.h"
#include "verdict.h"

namespace {

using namespace crossent;

constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};
constexpr Layout kLayouts[] = {Layout::kPlain, Layout::kStrided, Layout::kInner, Layout::kReversed};

// Half the distance from 1 to the next number.
Real unit(Dtype dtype) { return dtype == Dtype::kFloat64 ? 0x1p-53L : 0x1p-24L; }
// What n roundings may add to a sum, relative to the sum of its terms' sizes.
Real gamma(int64_t n, Dtype dtype) {
  const Real nu = static_cast<Real>(n) * unit(dtype);
  return nu / (1 - nu);
}

Dtype wider(Dtype a, Dtype b) {
  return a == Dtype::kFloat64 || b == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

Matrix matrix(const Buffer& buffer, int64_t rows) {
  const View& v = buffer.view;
  return {v.data,        v.dtype, rows, v.classes, v.outer == 1 ? v.inner_stride : v.outer_stride,
          v.class_stride};
}

std::string shape(const char* what, Dtype a, Dtype b, int64_t n, int64_t d, int64_t v, int seed) {
  return current_isa() + ", " + what + " of " + kNames[static_cast<int>(a)] + " and " +
         kNames[static_cast<int>(b)] + ", " + std::to_string(n) + " x " + std::to_string(d) +
         " x " + std::to_string(v) + ", seed " + std::to_string(seed);
}

// A job of either kind.
struct Work {
  std::string name;
  std::mt19937 random;

  explicit Work(int seed) : random(static_cast<unsigned>(seed)) {}
  Work(const Work&) = delete;
  virtual ~Work() = default;
  virtual std::string serve() = 0;
  virtual void check(Verdict& verdict) = 0;  // after serve

  Layout layout() { return kLayouts[random() % 4]; }
  bool coin() { return random() % 2; }
};

// A copy, contiguous: what `out` is before each run.
std::vector<Real> numbers(const Buffer& buffer, int64_t rows) {
  std::vector<Real> all;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < buffer.view.classes; j++) all.push_back(buffer.get(i, j));
  return all;
}

struct Product : Work {
  const int64_t m, k, n;
  const Dtype dtype;
  Buffer a, b, out, bias;
  const bool accumulate, with_bias, may_round;
  std::vector<char> before;
  std::vector<Real> given;

  Product(Dtype of_a, Dtype of_b, const int64_t (&mkn)[3], int seed)
      : Work(seed),
        m(mkn[0]),
        k(mkn[1]),
        n(mkn[2]),
        dtype(wider(of_a, of_b)),
        a(of_a, m, k, layout()),
        b(of_b, k, n, layout()),
        out(dtype, m, n, Layout::kPlain),
        bias(dtype, 1, n, Layout::kPlain),
        accumulate(coin()),
        with_bias(coin()),
        may_round(coin()) {
    for (Buffer* buffer : {&a, &b, &out, &bias}) buffer->fill(random, 1);
    before = out.bytes;
    given = numbers(out, m);
    name = shape("product", of_a, of_b, m, k, n, seed);
  }

  std::string serve() override {
    out.bytes = before;
    out.view.data = out.bytes.data();
    if (multiply(matrix(a, m), matrix(b, k), out.view.data, n, accumulate,
                 with_bias ? bias.view.data : nullptr, may_round, nullptr,
                 nullptr) != Outcome::kDone)
      return "not done";
    return {out.bytes.begin(), out.bytes.end()};
  }

  // A number as it is multiplied: where float32 may become bfloat16, and there it does, the nearest
  // one, ties to even.
  Real factor(const Buffer& side, const Buffer& other, int64_t i, int64_t j) const {
    const double x = side.get(i, j);
    if (!may_round || side.view.dtype != Dtype::kFloat32 || other.view.dtype != Dtype::kBFloat16 ||
        current_isa() != "x86-64-v4-bf16")
      return x;
    int exponent;
    const double digits = std::ldexp(std::frexp(x, &exponent), 8);
    return std::ldexp(std::nearbyint(digits), exponent - 8);
  }

  void check(Verdict& verdict) override {
    // Of a large product not all: rows and columns at both ends and some between.
    const int64_t every_row = 1 + m / 40, every_column = 1 + n / 40;
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        if (i % every_row && m - i > 2) continue;
        if (j % every_column && n - j > 2) continue;
        Real sum = accumulate ? given[static_cast<size_t>(i * n + j)] : 0, size = std::fabs(sum);
        if (with_bias) sum += bias.get(0, j), size += std::fabs(Real{bias.get(0, j)});
        for (int64_t d = 0; d < k; d++) {
          const Real term = factor(a, b, i, d) * factor(b, a, d, j);
          sum += term;
          size += std::fabs(term);
        }
        verdict.see(name + ", row " + std::to_string(i), j, out.get(i, j), sum,
                    gamma(k + 2, dtype) * size);
      }
  }
};

struct Pass : Work {
  const int64_t N, D, V;
  const Dtype dtype;
  const Target kind;
  const bool hessian;  // times along_w and along_b, instead of the gradients
  Buffer x, w, bias, along_w, along_bias, desired, dx, dw, db;
  const bool with_bias, summed;
  std::vector<int64_t> target;
  std::vector<double> prob, row_weight, upstream, loss;
  double total = 0;
  std::vector<char> dw_before, db_before;
  std::vector<Real> dw_given, db_given;
  ThinJob job;

  Pass(bool hessian, Dtype of_x, Dtype of_w, Target kind, const int64_t (&nd)[2], int64_t V,
       int seed)
      : Work(seed),
        N(nd[0]),
        D(nd[1]),
        V(V),
        dtype(wider(of_x, of_w)),
        kind(kind),
        hessian(hessian),
        x(of_x, N, D, layout()),
        w(of_w, V, D, layout()),
        bias(dtype, 1, V, Layout::kPlain),
        along_w(of_w, V, D, layout()),
        along_bias(dtype, 1, V, Layout::kPlain),
        desired(kDtypes[random() % 4], N, V, layout()),
        dx(dtype, N, D, Layout::kPlain),
        dw(dtype, V, D, Layout::kPlain),
        db(dtype, 1, V, Layout::kPlain),
        with_bias(coin()),
        summed(!hessian && coin()) {
    for (Buffer* buffer : {&x, &bias, &dw, &db, &along_w, &along_bias}) buffer->fill(random, 1);
    w.fill(random, 1 / std::sqrt(static_cast<double>(D)));
    dw_before = dw.bytes;
    db_before = db.bytes;
    dw_given = numbers(dw, V);
    db_given = numbers(db, 1);
    const int64_t n_ids = kind == Target::kSparse ? 3 : 1;
    for (int64_t i = 0; i < N * n_ids; i++) {
      target.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(V)));
      prob.push_back(static_cast<double>(random() % 8) / 8);
    }
    for (int64_t i = 0; i < N; i++) {  // sums and quotients of these do not round
      row_weight.push_back(static_cast<double>(random() % 8) / 8);
      upstream.push_back(static_cast<double>(1 + random() % 8) / 8);
      for (int64_t j = 0; j < V; j++) desired.put(i, j, static_cast<double>(random() % 4) / 64);
    }
    loss.assign(static_cast<size_t>(N), 0);
    name = shape(hessian ? "Hessian pass" : "pass", of_x, of_w, N, D, V, seed);

    job.x = matrix(x, N);
    job.w = matrix(w, V);
    if (with_bias) job.bias = bias.view.data;
    job.wide = dtype == Dtype::kFloat64;
    job.accumulate = coin();
    job.dx_stride = job.dw_stride = D;
    RowJob& rows = job.rows;
    rows.kind = kind;
    rows.n_rows = N;
    rows.logits.dtype = dtype;
    rows.logits.outer = 1;
    rows.logits.inner = N;
    rows.logits.classes = V;
    rows.target = target.data();
    rows.target_prob = prob.data();
    rows.n_ids = n_ids;
    rows.distribution = desired.view;
    rows.round_target = !job.wide;
    rows.skip = kind == Target::kIndex ? target.back() : -100;
    rows.row_weight = row_weight.data();
    rows.divisor = 8;
    rows.upstream = upstream.data();
    if (!hessian) return;
    rows.task = Task::kHvp;
    if (coin()) job.along_w = matrix(along_w, V);
    if (!job.along_w.data || coin()) job.along_bias = along_bias.view.data;
  }

  std::string serve() override {
    dw.bytes = dw_before;
    db.bytes = db_before;
    std::memset(dx.bytes.data(), 0xff, dx.bytes.size());  // NaN
    dx.view.data = dx.bytes.data();
    if (!hessian) job.dx = dx.view.data;
    job.dw = dw.view.data = dw.bytes.data();
    job.db = db.view.data = db.bytes.data();
    job.rows.loss = summed || hessian ? nullptr : loss.data();
    if (run_thin(job, summed ? &total : nullptr, nullptr, nullptr) != Outcome::kDone)
      return "not done";
    std::string bits;
    for (const Buffer* buffer : {&dx, &dw, &db})
      bits.append(buffer->bytes.begin(), buffer->bytes.end());
    bits.append(reinterpret_cast<const char*>(loss.data()), loss.size() * sizeof(double));
    return bits.append(reinterpret_cast<const char*>(&total), sizeof total);
  }

  // What row i asks of class j.
  Real asked(int64_t i, int64_t j) const {
    if (kind == Target::kIndex) return target[static_cast<size_t>(i)] == j;
    if (kind == Target::kDistribution) return desired.get(i, j);
    Real sum = 0;
    for (int64_t k = i * 3; k < i * 3 + 3; k++)
      if (target[static_cast<size_t>(k)] == j) sum += prob[static_cast<size_t>(k)];
    return sum;
  }

  // A sum of terms and what it may be off by.
  struct Sum {
    Real value = 0, error = 0, size = 0;
    void add(Real g, Real off, Real factor) {
      value += g * factor;
      error += off * std::fabs(factor);
      size += (std::fabs(g) + off) * std::fabs(factor);
    }
  };

  // A row's logits may each be off by `off`; then p by a factor of exp(2 off) at most and the loss
  // by 2 Q off, and what the row kernel adds is 8 ulp of the gradient's and of the loss's parts.
  void check(Verdict& verdict) override {
    const auto columns = static_cast<size_t>(V), features = static_cast<size_t>(D);
    std::vector<Sum> weights(columns * features), biases(columns);
    Sum all;
    for (int64_t i = 0; i < N; i++) {
      const auto row = static_cast<size_t>(i);
      const std::string at = name + ", row " + std::to_string(i);
      const bool kept = row_weight[row] != 0 && !(kind == Target::kIndex && is_skipped(row));
      const Real r = kept ? row_weight[row] / 8 : 0, u = upstream[row];
      std::vector<Real> z(columns), q(columns), v(columns);
      Real off = 0, v_off = 0, v_mean = 0, v_size = 0, top = -INFINITY, sum = 0, Q = 0;
      for (int64_t j = 0; j < V; j++) {
        Sum logit;
        for (int64_t d = 0; d < D; d++) logit.add(x.get(i, d), 0, w.get(j, d));
        if (with_bias) logit.add(bias.get(0, j), 0, 1);
        z[static_cast<size_t>(j)] = logit.value;
        off = std::max(off, gamma(D + 2, dtype) * logit.size);
        top = std::max(top, logit.value);
        Sum along;
        for (int64_t d = 0; d < D && job.along_w.data; d++)
          along.add(x.get(i, d), 0, along_w.get(j, d));
        if (job.along_bias) along.add(along_bias.get(0, j), 0, 1);
        v[static_cast<size_t>(j)] = along.value;
        v_off = std::max(v_off, gamma(D + 2, dtype) * along.size);
        Q += q[static_cast<size_t>(j)] = asked(i, j);
      }
      for (const Real one : z) sum += std::exp(one - top);
      const Real lse = top + std::log(sum), ulps = 16 * unit(dtype), more = std::expm1(2 * off);
      for (size_t j = 0; j < columns; j++) {
        const Real p = std::exp(z[j] - lse);
        v_mean += p * v[j];
        v_size += p * std::fabs(v[j]);
      }
      Real exact = 0;
      std::vector<Sum> gradient(features);
      for (int64_t j = 0; j < V; j++) {
        const auto column = static_cast<size_t>(j);
        const Real p = std::exp(z[column] - lse);
        Real g = u * r * (Q * p - q[column]);
        Real g_off = u * r * (Q * p * more + ulps * (Q * p * (1 + more) + q[column]));
        if (hessian) {  // Q p (v - the mean of v)
          const Real size = std::fabs(v[column]) + v_size;
          g = u * r * Q * p * (v[column] - v_mean);
          g_off = u * r * Q * p * (1 + more) *
                  (2 * more * size + (2 + more) * v_off + ulps * (size + 2 * v_off));
        }
        exact += r * q[column] * (lse - z[column]);
        for (int64_t d = 0; d < D; d++) {
          gradient[static_cast<size_t>(d)].add(g, g_off, w.get(j, d));
          weights[column * features + static_cast<size_t>(d)].add(g, g_off, x.get(i, d));
        }
        biases[column].add(g, g_off, 1);
      }
      for (int64_t d = 0; d < D && !hessian; d++)
        see(verdict, at + " of dx", d, dx.get(i, d), gradient[static_cast<size_t>(d)], V + 1);
      const Real loss_off = 2 * r * Q * off + ulps * (exact + 2 * r * Q * off);
      if (!summed && !hessian) verdict.see(at + " of the losses", -1, loss[row], exact, loss_off);
      all.add(exact, loss_off, 1);
    }
    if (summed) verdict.see(name + ", sum of the losses", -1, total, all.value, all.error);
    // One rounding a row, a slot and each that the sum is rounded by at its end.
    for (int64_t j = 0; j < V; j++) {
      const auto column = static_cast<size_t>(j);
      if (job.accumulate) biases[column].add(db_given[column], 0, 1);
      see(verdict, name + ", row 0 of db", j, db.get(0, j), biases[column], N + 20);
      for (int64_t d = 0; d < D; d++) {
        const size_t entry = column * features + static_cast<size_t>(d);
        if (job.accumulate) weights[entry].add(dw_given[entry], 0, 1);
        see(verdict, name + ", row " + std::to_string(j) + " of dw", d, dw.get(j, d),
            weights[entry], N + 20);
      }
    }
  }

  bool is_skipped(size_t row) const { return target[row] == job.rows.skip; }

  void see(Verdict& verdict, const std::string& at, int64_t column, double got, const Sum& sum,
           int64_t roundings) const {
    verdict.see(at, column, got, sum.value, sum.error + gamma(roundings, dtype) * sum.size);
  }
};

// (m, k, n): nothing to sum, parts of tiles, tiles and more, either side the longer one, odd
// depths.
constexpr int64_t kProducts[][3] = {{8, 0, 8},     {1, 1, 1},      {5, 3, 7},
                                    {97, 300, 33}, {13, 530, 200}, {300, 129, 12},
                                    {96, 128, 48}, {64, 257, 96},  {48, 127, 16}};
// The packed side goes in slabs.
constexpr int64_t kLong[3] = {530, 800, 530};
// (N, D): rows in one block and in several, of one slot and of all.
constexpr int64_t kPasses[][2] = {{1, 1}, {7, 5}, {300, 37}, {500, 96}, {4000, 3}};
constexpr int64_t kClasses[] = {1, 2, 9, 17, 40, 64};
constexpr Target kTargets[] = {Target::kIndex, Target::kDistribution, Target::kSparse};

std::vector<Work*> all_work() {
  std::vector<Work*> works;
  int seed = 0;
  for (const Dtype a : kDtypes)
    for (const Dtype b : kDtypes)
      for (const auto& mkn : kProducts) works.push_back(new Product(a, b, mkn, seed++));
  works.push_back(new Product(Dtype::kFloat64, Dtype::kFloat64, kLong, seed++));
  for (const Dtype dtype : kDtypes)
    for (const Target kind : kTargets)
      for (const int64_t V : kClasses) {
        const Dtype of_w = seed % 4 ? dtype : kDtypes[seed / 4 % 4];
        for (const bool hessian : {false, true})
          works.push_back(new Pass(hessian, dtype, of_w, kind, kPasses[seed % 5], V, seed));
        seed++;
      }
  return works;
}

// Slabs are over before parallel_for asks whether to stop, so each must be asked after.
bool asked_after_each_slab() {
  const int64_t n = 2, depth = int64_t{1} << 20;  // at least 4 slabs
  Buffer a(Dtype::kFloat64, n, depth, Layout::kPlain), b(Dtype::kFloat64, depth, n, Layout::kInner);
  std::vector<double> out(n * n);
  int calls = 0;
  const auto go_on = [](void* calls) { return ++*static_cast<int*>(calls) > 0; };
  const auto stop = [](void*) { return false; };
  const auto product = [&](bool (*poll)(void*)) {
    return multiply(matrix(a, n), matrix(b, depth), reinterpret_cast<char*>(out.data()), n, false,
                    nullptr, false, poll, &calls);
  };
  return product(go_on) == Outcome::kDone && calls >= 3 && product(stop) == Outcome::kCancelled;
}

}  // namespace

int main() {
  if (!asked_after_each_slab()) {
    std::fprintf(stderr, "slabs do not ask whether to stop\n");
    return 1;
  }
  size_t jobs = 0;
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    const std::vector<Work*> works = all_work();
    std::vector<std::string> alone;
    Verdict verdict;
    set_num_threads(1);
    for (Work* work : works) {
      alone.push_back(work->serve());
      work->check(verdict);
    }
    std::printf("head_driver: %s: the worst error is %.3Lf of its bound\n", isa.c_str(),
                verdict.worst);
    if (race(works, alone) || !verdict.good) return 1;
    for (Work* work : works) delete work;
    jobs += works.size();
  }
  std::printf("head_driver: %zu jobs, the same bits alone and among threads\n", jobs);
}
