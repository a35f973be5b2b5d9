// The host's side of the kernels: which instruction set serves, and a job cut into tasks for
// threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "along.h"
#include "gemm.h"
#include "rows.h"

namespace crossent {

// The instruction sets compiled in that this machine can run, the best one first.
std::vector<std::string> available_isas();
// The one in use: the best, or what set_isa chose.
std::string current_isa();
// False, and nothing changes, if `name` is not available.
bool set_isa(const std::string& name);

// Of the one in use: its matrix products, those of few classes, and what serves rows of a job.
const GemmTable& gemm_kernels();
const AlongTable& along_kernels();
using RowKernel = void (*)(const RowJob&, int64_t begin, int64_t end);
RowKernel row_kernel(const RowJob& job);

enum class Outcome { kDone, kCancelled, kOutOfMemory, kBadTarget };

// Runs the job on the pool; `total`, if given, takes the sum of the losses, which then need no
// memory of their own (job.loss may be null). The bits of the results depend neither on the number
// of threads nor on how the rows are cut. For `poll` see parallel.h.
Outcome run(RowJob job, double* total, bool (*poll)(void*), void* poll_context);

// What the index targets of n rows come to. A row is kept where its target is not `skip` and its
// weight (null: all 1) is not 0.
struct TargetScan {
  int64_t first_bad = -1;  // the first target outside [0, n_classes) that is not `skip`
  int64_t kept = 0;
  double weight_sum = 0;  // of row_weight * class_weight[target] over the kept rows
};
TargetScan scan_targets(const int64_t* target, int64_t n, int64_t n_classes, int64_t skip,
                        const double* row_weight, const double* class_weight);

}  // namespace crossent
