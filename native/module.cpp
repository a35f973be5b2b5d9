// The Python binding: take arrays apart, call dispatch.h, nothing else. The Python side
// (src/crossent/numpy.py) has checked shapes and dtypes; what would touch foreign memory is checked
// here again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <type_traits>
#include <utility>

#include "copy.h"
#include "dispatch.h"
#include "gemm.h"
#include "parallel.h"
#include "thin.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crossent {
namespace {

using Array = nb::ndarray<nb::device::cpu>;
using ReadOnly = nb::ndarray<nb::ro, nb::device::cpu>;
template <class T>
using Numbers = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* what) {
  if (!condition) throw nb::value_error(what);
}

// bfloat16 comes as uint16: NumPy exports no such dtype.
Dtype dtype_of(const nb::dlpack::dtype& d) {
  require(d.lanes == 1, "expected a plain dtype");
  if (d == nb::dtype<float>()) return Dtype::kFloat32;
  if (d == nb::dtype<double>()) return Dtype::kFloat64;
  if (d == nb::dtype<uint16_t>()) return Dtype::kBFloat16;
  require(d.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && d.bits == 16,
          "expected float64, float32, float16 or bfloat16 (as uint16)");
  return Dtype::kFloat16;
}

template <class A>
View view_of(const A& array) {
  require(array.ndim() == 2 || array.ndim() == 3,
          "expected an array (outer, classes, inner) or (rows, classes)");
  View view;
  view.dtype = dtype_of(array.dtype());
  const int64_t size = size_of(view.dtype);
  view.data = const_cast<char*>(static_cast<const char*>(array.data()));
  view.outer = static_cast<int64_t>(array.shape(0));
  view.classes = static_cast<int64_t>(array.shape(1));
  view.inner = array.ndim() == 3 ? static_cast<int64_t>(array.shape(2)) : 1;
  view.outer_stride = array.stride(0) * size;
  view.class_stride = array.stride(1) * size;
  view.inner_stride = array.ndim() == 3 ? array.stride(2) * size : 0;
  if (view.inner == 1) {  // one axis of rows is the inner one, also where it came first
    std::swap(view.outer, view.inner);
    std::swap(view.outer_stride, view.inner_stride);
  }
  return view;
}

template <class A>
View view_like(const A& array, const View& logits, const char* what) {
  const View view = view_of(array);
  require(
      view.outer == logits.outer && view.classes == logits.classes && view.inner == logits.inner,
      what);
  return view;
}

template <class T>
const T* rows_of(const std::optional<Numbers<T>>& array, int64_t n, const char* what) {
  if (!array) return nullptr;
  require(static_cast<int64_t>(array->size()) == n, what);
  return array->data();
}

nb::handle numpy_empty;  // never released: it is used until the interpreter ends

// NumPy's own array, found in half the time (0.4 µs) that it takes to hand one of ours to NumPy.
template <class T>
nb::object new_array(int64_t n, T** data) {
  nb::object array = std::is_same_v<T, double> ? numpy_empty(n) : numpy_empty(n, "int64");
  *data = nb::cast<nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(array).data();
  return array;
}

// Lets Python's signal handlers run; false when one has raised (Ctrl-C).
bool poll_signals(void*) {
  nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() == 0;
}

void raise_unless_done(Outcome outcome) {
  if (outcome == Outcome::kCancelled) {
    // A signal handler that forked leaves the child without the other threads' share (parallel.h).
    if (!PyErr_Occurred()) throw std::runtime_error("the call was cut short by a fork");
    throw nb::python_error();
  }
  if (outcome == Outcome::kOutOfMemory) throw std::bad_alloc();
  require(outcome != Outcome::kBadTarget, "target out of range");
}

void run_released(const RowJob& job, double* total = nullptr) {
  if (job.n_rows == 0) return;
  Outcome outcome;
  {
    nb::gil_scoped_release release;
    outcome = run(job, total, poll_signals, nullptr);
  }
  raise_unless_done(outcome);
}

RowJob job_for(const ReadOnly& logits) {
  RowJob job;
  job.logits = view_of(logits);
  job.n_rows = job.logits.outer * job.logits.inner;
  require(job.logits.classes >= 1, "expected at least one class");
  return job;
}

// The plan of rows.py, as backends.py lists it; it keeps the arrays alive during the call.
struct Plan {
  std::optional<Numbers<int64_t>> target;
  std::optional<Numbers<double>> target_prob, class_weight, row_weight, upstream;
  std::optional<ReadOnly> distribution;

  Plan(RowJob& job, const nb::tuple& list) {
    require(list.size() == 14, "expected a plan of 14 entries");
    take(list[0], target);
    take(list[1], target_prob);
    take(list[2], distribution);
    take(list[3], class_weight);
    take(list[4], row_weight);
    job.skip = nb::cast<int64_t>(list[5]);
    job.on = nb::cast<double>(list[6]);
    job.off = nb::cast<double>(list[7]);
    job.divisor = nb::cast<double>(list[8]);
    job.z_loss = nb::cast<double>(list[9]);
    job.logit_scale = nb::cast<double>(list[10]);
    job.softcap = nb::cast<double>(list[11]);
    job.upstream_all = nb::cast<double>(list[12]);
    take(list[13], upstream);
    set_rows(job);
    set_target(job);
  }

 private:
  template <class A>
  static void take(nb::handle entry, std::optional<A>& array) {
    if (!entry.is_none()) array = nb::cast<A>(entry, false);
  }

  void set_rows(RowJob& job) const {
    job.class_weight =
        rows_of(class_weight, job.logits.classes, "expected one weight for each class");
    job.row_weight = rows_of(row_weight, job.n_rows, "expected one weight for each row");
    job.upstream = rows_of(upstream, job.n_rows, "expected one upstream gradient for each row");
  }

  void set_target(RowJob& job) const {
    const int64_t n = job.n_rows, V = job.logits.classes;
    if (distribution) {
      job.kind = Target::kDistribution;
      job.distribution = view_like(*distribution, job.logits, "expected the logits' shape");
      job.round_target = job.logits.dtype != Dtype::kFloat64;
    } else if (target_prob) {
      job.kind = Target::kSparse;
      require(target && target->size() == target_prob->size(), "expected one id a probability");
      job.n_ids = n ? static_cast<int64_t>(target->size()) / n : 0;
      require(job.n_ids * n == static_cast<int64_t>(target->size()), "expected K ids a row");
      job.target = target->data();
      job.target_prob = target_prob->data();
      for (int64_t k = 0; k < job.n_ids * n; k++)
        require(job.target[k] >= -1 && job.target[k] < V, "class id out of range");
    } else {
      job.kind = Target::kIndex;
      job.target = rows_of(target, n, "expected one target for each row");
      require(job.target != nullptr, "expected a target");
    }
  }
};

// The rows' losses where `each` is asked for, else their sum.
nb::object cross_entropy(const ReadOnly& logits, const nb::tuple& list,
                         const std::optional<Array>& out, bool each) {
  RowJob job = job_for(logits);
  const Plan plan(job, list);
  if (out) job.out = view_like(*out, job.logits, "expected out of the logits' shape");
  if (out) require(job.out.dtype == job.logits.dtype, "expected out of the logits' dtype");
  if (each) {
    nb::object losses = new_array<double>(job.n_rows, &job.loss);
    run_released(job);
    return losses;
  }
  double total = 0;
  run_released(job, &total);
  return nb::float_(total);
}

void hvp(const ReadOnly& logits, const nb::tuple& list, const ReadOnly& vector, const Array& out) {
  RowJob job = job_for(logits);
  const Plan plan(job, list);
  job.task = Task::kHvp;
  job.vector = view_like(vector, job.logits, "expected a vector of the logits' shape");
  job.out = view_like(out, job.logits, "expected out of the logits' shape");
  run_released(job);
}

void softmax(const ReadOnly& logits, const Array& out, bool log, double logit_scale) {
  RowJob job = job_for(logits);
  job.task = log ? Task::kLogSoftmax : Task::kSoftmax;
  job.logit_scale = logit_scale;
  job.out = view_like(out, job.logits, "expected out of the logits' shape");
  require(job.out.dtype == job.logits.dtype, "expected out of the logits' dtype");
  run_released(job);
}

nb::tuple stats(const ReadOnly& logits, const std::optional<Numbers<int64_t>>& target,
                const std::optional<Numbers<double>>& row_weight, int64_t skip, double logit_scale,
                double softcap) {
  RowJob job = job_for(logits);
  job.task = Task::kStats;
  const int64_t n = job.n_rows;
  if (target) {
    job.kind = Target::kIndex;
    job.target = rows_of(target, n, "expected one target for each row");
  }
  job.row_weight = rows_of(row_weight, n, "expected one weight for each row");
  job.skip = skip;
  job.logit_scale = logit_scale;
  job.softcap = softcap;
  nb::object lse = new_array<double>(n, &job.logsumexp);
  nb::object logprob = new_array<double>(n, &job.target_logprob);
  nb::object entropy = new_array<double>(n, &job.entropy);
  nb::object argmax = new_array<int64_t>(n, &job.argmax);
  nb::object rank = new_array<int64_t>(n, &job.target_rank);
  run_released(job);
  return nb::make_tuple(lse, logprob, entropy, argmax, rank);
}

nb::tuple scan(const Numbers<int64_t>& target, int64_t n_classes, int64_t skip,
               const std::optional<Numbers<double>>& row_weight,
               const std::optional<Numbers<double>>& class_weight) {
  const auto n = static_cast<int64_t>(target.size());
  const TargetScan found = scan_targets(
      target.data(), n, n_classes, skip, rows_of(row_weight, n, "expected one weight for each row"),
      rows_of(class_weight, n_classes, "expected one weight for each class"));
  return nb::make_tuple(found.first_bad, found.kept, found.weight_sum);
}

template <class A>
Matrix matrix_of(const A& array) {
  require(array.ndim() == 2, "expected a matrix");
  Matrix m;
  m.dtype = dtype_of(array.dtype());
  const int64_t size = size_of(m.dtype);
  m.data = static_cast<const char*>(array.data());
  m.rows = static_cast<int64_t>(array.shape(0));
  m.cols = static_cast<int64_t>(array.shape(1));
  m.row_stride = array.stride(0) * size;
  m.col_stride = array.stride(1) * size;
  return m;
}

// out = or += a b, and the bias.
void matmul(const ReadOnly& a, const ReadOnly& b, const Array& out, bool accumulate,
            const std::optional<ReadOnly>& bias, bool may_round) {
  const Matrix left = matrix_of(a), right = matrix_of(b), to = matrix_of(out);
  require(left.cols == right.rows, "expected as many columns of a as rows of b");
  require(to.rows == left.rows && to.cols == right.cols, "expected out of the product's shape");
  const bool wide = left.dtype == Dtype::kFloat64 || right.dtype == Dtype::kFloat64;
  const Dtype dtype = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  const int64_t size = size_of(dtype);
  require(to.dtype == dtype, "expected out in float32, or float64 where a or b is");
  if (to.rows == 0 || to.cols == 0) return;
  require(
      (to.col_stride == size || to.cols == 1) && (to.row_stride >= to.cols * size || to.rows == 1),
      "expected out with contiguous rows");
  if (bias) {
    require(bias->ndim() == 1 && static_cast<int64_t>(bias->shape(0)) == to.cols,
            "expected one bias a column");
    require(dtype_of(bias->dtype()) == dtype && (bias->stride(0) == 1 || to.cols == 1),
            "expected a contiguous bias of out's dtype");
  }
  Outcome outcome;
  {
    nb::gil_scoped_release release;
    outcome = multiply(left, right, static_cast<char*>(out.data()), to.row_stride / size,
                       accumulate, bias ? bias->data() : nullptr, may_round, poll_signals, nullptr);
  }
  raise_unless_done(outcome);
}

Dtype output_dtype(const ThinJob& job) { return job.wide ? Dtype::kFloat64 : Dtype::kFloat32; }

// An output of a thin head, (rows, cols) with contiguous rows.
char* output_of(const ThinJob& job, const Array& array, int64_t rows, int64_t cols,
                int64_t* stride) {
  const Matrix m = matrix_of(array);
  const int64_t size = size_of(output_dtype(job));
  require(m.dtype == output_dtype(job), "expected an output of the pass's dtype");
  require(m.rows == rows && m.cols == cols, "expected an output of its argument's shape");
  const bool empty = rows == 0 || cols == 0;
  require(
      empty || ((m.col_stride == size || cols == 1) && (m.row_stride >= cols * size || rows == 1)),
      "expected an output with contiguous rows");
  *stride = m.row_stride / size;
  return static_cast<char*>(array.data());
}

// One number a class, for a thin head.
const void* classes_of(const ThinJob& job, const ReadOnly& array) {
  const int64_t V = job.w.rows;
  require(array.ndim() == 1 && static_cast<int64_t>(array.shape(0)) == V &&
              (array.stride(0) == 1 || V == 1),
          "expected one bias a class");
  require(dtype_of(array.dtype()) == output_dtype(job), "expected a bias of the pass's dtype");
  return array.data();
}

// Of the layer x wᵀ + bias; the gradients in its weights go to dw and db, (1, V).
ThinJob thin_job(const ReadOnly& x, const ReadOnly& w, const std::optional<ReadOnly>& bias,
                 const std::optional<Array>& dw, const std::optional<Array>& db, bool accumulate) {
  ThinJob job;
  job.x = matrix_of(x);
  job.w = matrix_of(w);
  const int64_t n = job.x.rows, D = job.x.cols, V = job.w.rows;
  require(job.w.cols == D && V >= 1, "expected weights of at least one class and x's features");
  job.wide = job.x.dtype == Dtype::kFloat64 || job.w.dtype == Dtype::kFloat64;
  require(thin(V, D, job.wide), "expected fewer classes or features");
  if (bias) job.bias = classes_of(job, *bias);
  int64_t unused = 0;
  if (dw) job.dw = output_of(job, *dw, V, D, &job.dw_stride);
  if (db) job.db = output_of(job, *db, 1, V, &unused);
  job.accumulate = accumulate;
  RowJob& rows = job.rows;
  rows.logits.dtype = output_dtype(job);
  rows.logits.outer = 1;
  rows.logits.classes = V;
  rows.logits.inner = rows.n_rows = n;
  return job;
}

void run_released(const ThinJob& job, double* total) {
  if (job.x.rows == 0) return;
  Outcome outcome;
  {
    nb::gil_scoped_release release;
    outcome = run_thin(job, total, poll_signals, nullptr);
  }
  raise_unless_done(outcome);
}

// The losses or their sum, as of cross_entropy, and the gradients, that in x to dx.
nb::object thin_head(const ReadOnly& x, const ReadOnly& w, const std::optional<ReadOnly>& bias,
                     const nb::tuple& list, bool each, const std::optional<Array>& dx,
                     const std::optional<Array>& dw, const std::optional<Array>& db,
                     bool accumulate) {
  ThinJob job = thin_job(x, w, bias, dw, db, accumulate);
  if (dx) job.dx = output_of(job, *dx, job.x.rows, job.x.cols, &job.dx_stride);
  const Plan plan(job.rows, list);
  double total = 0;
  nb::object losses;
  if (each) losses = new_array<double>(job.x.rows, &job.rows.loss);
  run_released(job, each ? nullptr : &total);
  return each ? losses : nb::float_(total);
}

// The Hessian times directions in w and bias, x held fixed.
void thin_hvp(const ReadOnly& x, const ReadOnly& w, const std::optional<ReadOnly>& bias,
              const nb::tuple& list, const std::optional<ReadOnly>& along_w,
              const std::optional<ReadOnly>& along_bias, const std::optional<Array>& dw,
              const std::optional<Array>& db, bool accumulate) {
  ThinJob job = thin_job(x, w, bias, dw, db, accumulate);
  require(along_w || along_bias, "expected a direction");
  if (along_w) {
    job.along_w = matrix_of(*along_w);
    require(job.along_w.rows == job.w.rows && job.along_w.cols == job.w.cols,
            "expected a direction of the weights' shape");
    require(job.wide || job.along_w.dtype != Dtype::kFloat64,
            "expected a direction of the pass's dtype");
  }
  if (along_bias) job.along_bias = classes_of(job, *along_bias);
  const Plan plan(job.rows, list);
  job.rows.task = Task::kHvp;
  run_released(job, nullptr);
}

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void copy(const Bytes& out, const Numbers<uint8_t>& source, bool streaming) {
  const auto n = static_cast<int64_t>(out.size());
  const uint8_t *to = out.data(), *from = source.data();
  require(static_cast<int64_t>(source.size()) == n, "expected as many bytes as out has");
  require(to + n <= from || from + n <= to, "expected two places apart");
  nb::gil_scoped_release release;
  copy_bytes(out.data(), from, n, streaming);
}

}  // namespace
}  // namespace crossent

NB_MODULE(_native, m) {
  using namespace crossent;
  numpy_empty = nb::object(nb::module_::import_("numpy").attr("empty")).release();
  m.def("cross_entropy", cross_entropy, "logits"_a.noconvert(), "plan"_a,
        "out"_a.noconvert().none(), "each"_a);
  m.def("hvp", hvp, "logits"_a.noconvert(), "plan"_a, "vector"_a.noconvert(), "out"_a.noconvert());
  m.def("softmax", softmax, "logits"_a.noconvert(), "out"_a.noconvert(), "log"_a, "logit_scale"_a);
  m.def("stats", stats, "logits"_a.noconvert(), "target"_a.noconvert().none(),
        "row_weight"_a.noconvert().none(), "skip"_a, "logit_scale"_a, "softcap"_a);
  m.def("scan_targets", scan, "target"_a.noconvert(), "n_classes"_a, "skip"_a,
        "row_weight"_a.noconvert().none(), "class_weight"_a.noconvert().none());
  m.def("matmul", matmul, "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert(), "accumulate"_a,
        "bias"_a.noconvert().none(), "may_round"_a = false);
  m.def("thin_head", thin_head, "x"_a.noconvert(), "w"_a.noconvert(), "bias"_a.noconvert().none(),
        "plan"_a, "each"_a, "dx"_a.noconvert().none(), "dw"_a.noconvert().none(),
        "db"_a.noconvert().none(), "accumulate"_a);
  m.def("thin_hvp", thin_hvp, "x"_a.noconvert(), "w"_a.noconvert(), "bias"_a.noconvert().none(),
        "plan"_a, "along_w"_a.noconvert().none(), "along_bias"_a.noconvert().none(),
        "dw"_a.noconvert().none(), "db"_a.noconvert().none(), "accumulate"_a);
  m.def("thin", thin, "n_classes"_a, "n_features"_a, "wide"_a);
  m.def("copy_bytes", copy, "out"_a.noconvert(), "source"_a.noconvert(), "streaming"_a);
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, "n"_a);
  m.def("available_cpus", available_cpus);
  m.def("isa", current_isa);
  m.def("available_isas", available_isas);
  m.def("set_isa", set_isa, "name"_a);
}
