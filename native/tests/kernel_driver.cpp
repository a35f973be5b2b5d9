// Runs jobs of every kind from several threads at once and compares their bits with the same jobs
// run alone, on each instruction set. Meant for ThreadSanitizer: make tsan.
//
//   kernel_driver [rounds]      on the first difference a line and exit status 1

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "../parallel.h"
#include "buffer.h"
#include "race.h"

namespace {

using namespace crossent;

// One job with the memory it reads and writes.
struct Work {
  std::string name;
  RowJob job;
  Buffer logits, out, vector, distribution;
  std::vector<int64_t> target, argmax, rank;
  std::vector<double> prob, class_weight, row_weight, upstream, loss, lse, logprob, entropy;

  Work(Task task, Target kind, Dtype dtype, Layout layout, int64_t rows, int64_t classes, int seed)
      : logits(dtype, rows, classes, layout),
        out(dtype, rows, classes, layout),
        vector(dtype, rows, classes, layout),
        distribution(dtype, rows, classes, layout) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto numbers = [&](int64_t n) {
      std::vector<double> x(static_cast<size_t>(n));
      for (double& v : x) v = std::uniform_real_distribution<double>(0.1, 2)(random);
      return x;
    };
    logits.fill(random, seed % 3 ? 3 : 300);
    vector.fill(random, 1);
    distribution.fill(random, 1);
    const int64_t n_ids = kind == Target::kSparse ? 3 : 1;
    for (int64_t i = 0; i < rows * n_ids; i++)
      target.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(classes)));
    prob = numbers(rows * n_ids);
    class_weight = numbers(classes);
    row_weight = numbers(rows);
    row_weight[0] = 0;
    upstream = numbers(rows);
    loss = lse = logprob = entropy = numbers(rows);
    argmax.assign(static_cast<size_t>(rows), -2);
    rank = argmax;

    name = "task " + std::to_string(static_cast<int>(task)) + ", target " +
           std::to_string(static_cast<int>(kind)) + ", dtype " +
           std::to_string(static_cast<int>(dtype)) + ", layout " +
           std::to_string(static_cast<int>(layout)) + ", " + std::to_string(rows) + " x " +
           std::to_string(classes) + ", seed " + std::to_string(seed);
    job.task = task;
    job.kind = kind;
    job.n_rows = rows;
    job.logits = logits.view;
    if (task != Task::kStats) job.out = out.view;
    job.vector = vector.view;
    job.distribution = distribution.view;
    job.target = target.data();
    job.n_ids = n_ids;
    job.target_prob = prob.data();
    job.skip = target[static_cast<size_t>(rows - 1)];
    job.divisor = 7;
    if (task == Task::kLoss || task == Task::kHvp) {
      job.row_weight = row_weight.data();
      job.upstream = upstream.data();
      job.loss = task == Task::kLoss ? loss.data() : nullptr;
      if (seed % 2) job.class_weight = class_weight.data();
      if (seed % 3 == 1) job.on = 0.9, job.off = 0.1 / static_cast<double>(classes);
      if (seed % 7 == 1) job.z_loss = 1e-3;
      if (seed % 7 == 2) job.softcap = 30;
    }
    if (task == Task::kStats) {
      job.logsumexp = lse.data();
      job.target_logprob = logprob.data();
      job.entropy = entropy.data();
      job.argmax = argmax.data();
      job.target_rank = rank.data();
    }
  }
  Work(const Work&) = delete;

  std::string serve() {
    if (run(job, nullptr, nullptr, nullptr) != Outcome::kDone) return "not done";
    std::string bits(out.bytes.begin(), out.bytes.end());
    for (const auto* x : {&loss, &lse, &logprob, &entropy})
      bits.append(reinterpret_cast<const char*>(x->data()), x->size() * sizeof(double));
    for (const auto* x : {&argmax, &rank})
      bits.append(reinterpret_cast<const char*>(x->data()), x->size() * sizeof(int64_t));
    return bits;
  }
};

struct Kind {
  Task task;
  Target target;
};
constexpr Kind kKinds[] = {
    {Task::kLoss, Target::kIndex},      {Task::kLoss, Target::kDistribution},
    {Task::kLoss, Target::kSparse},     {Task::kSoftmax, Target::kNone},
    {Task::kLogSoftmax, Target::kNone}, {Task::kStats, Target::kIndex},
    {Task::kHvp, Target::kIndex},       {Task::kHvp, Target::kDistribution},
};
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};
constexpr Layout kLayouts[] = {Layout::kPlain, Layout::kStrided, Layout::kInner, Layout::kReversed};
// Many short rows, rows of a few vectors and of a block, rows longer than a task, and rows that
// more than three threads serve in parts. As many as no option's turn and no count of layouts
// divides.
constexpr int64_t kShapes[][2] = {{9000, 7}, {300, 333}, {40, 4000}, {3, 40000}, {3, 70000}};

// Every kind of job; `turn` varies shapes and options over dtypes and layouts.
std::vector<Work*> all_work(int turn) {
  std::vector<Work*> works;
  int seed = turn;
  for (const Kind& kind : kKinds)
    for (const Dtype dtype : kDtypes)
      for (const Layout layout : kLayouts) {
        const auto& shape = kShapes[seed % 5];
        works.push_back(
            new Work(kind.task, kind.target, dtype, layout, shape[0], shape[1], seed++));
      }
  return works;
}

// Rows in parts are over before parallel_for asks whether to stop, so each must be asked after.
bool asked_after_each_row() {
  const int64_t rows = 3;
  Work work(Task::kSoftmax, Target::kNone, Dtype::kFloat32, Layout::kPlain, rows, 70000, 0);
  set_num_threads(4);
  int calls = 0;
  const auto go_on = [](void* calls) { return ++*static_cast<int*>(calls) > 0; };
  const auto stop = [](void*) { return false; };
  return run(work.job, nullptr, go_on, &calls) == Outcome::kDone && calls >= rows &&
         run(work.job, nullptr, stop, nullptr) == Outcome::kCancelled;
}

}  // namespace

int main(int argc, char** argv) {
  if (!asked_after_each_row()) {
    std::fprintf(stderr, "rows in parts do not ask whether to stop\n");
    return 1;
  }
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  size_t jobs = 0;
  for (const std::string& isa : available_isas())
    for (int turn = 0; turn < rounds; turn++) {
      set_isa(isa);
      const std::vector<Work*> works = all_work(turn);
      std::vector<std::string> alone;
      set_num_threads(1);
      for (Work* work : works) alone.push_back(work->serve());
      if (race(works, alone)) return 1;
      for (Work* work : works) delete work;
      jobs += works.size();
    }
  std::printf("kernel_driver: %zu jobs, the same bits alone and among threads\n", jobs);
}
