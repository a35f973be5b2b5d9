// The row kernel for index targets, softmax and log-softmax: one row is one pass over its logits.
//
// Design:
//   a. A row is worked off in blocks of fixed size that stay in the L1 cache: their maximum, then
//      e = exp(z - reference) * 2^K to a scratch row and their mass (the sum of e). The row's
//      gradient is then the scratch times one number a block. What a row gives depends on the row
//      alone.
//   b. A block's reference is an integer power of two near its maximum, so joining blocks is exact,
//      and the origin subtracted from z is 0 unless |maximum| >= limit, where it is the maximum
//      itself: z - origin is exact for every logit that matters (Sterbenz), and so no rounding
//      error of z - m has to be kept.
//   c. The target is left out of the mass: U = sum_{j != t} e_j. Then -U/S is the target's gradient
//      and log1p(U / e_t) its loss, with no cancellation at a confident row. A target below the
//      maximum m has the loss (m - z_t) + log(S / e_m).
//   d. K keeps every e that can show in a result a normal number; underflow happens once, in the
//      last multiplication. K follows the row's scale r, so r / S never underflows either.
//   e. float lanes are summed in double; double lanes with TwoSum. The last factor is split in two
//      (high + low), which removes its rounding.
//   f. A row too long for the cache, or one of too few for the threads, is served in parts: blocks
//      are read, joined, and read again for the output, so that nothing of its size is held. The
//      steps are the same, and so are the bits.
#include "rows.h"

#include "feed.h"
#include "row.h"

namespace crossent {
namespace CROSSENT_ISA {

void serve_general(const RowJob& job, int64_t begin, int64_t end);  // general.cpp

namespace {

template <class S>
void serve(const RowJob& job, int64_t begin, int64_t end) {
  using Type = typename S::Type;
  Row<S> row(job);
  Feed<Type> feed(job, 2);
  if (!row.prepare(true) || !feed.prepare()) return report_out_of_memory(job);
  for (int64_t i = begin; i < end; i = feed.next()) {
    feed.read(i, end);
    for (int64_t k = i; k < feed.next(); k++) {
      const Type* z = feed.in(k);
      Type* out = feed.out(k);
      typename Row<S>::State state;
      if (job.dropped(k)) {
        drop(job, k);
        if (out) __builtin_memset(out, 0, static_cast<size_t>(job.logits.classes) * sizeof(Type));
        continue;
      }
      bool done = row.start(k, z, &state);
      if (done) {
        if (out && streams<S>(job)) fetch_ends<Type>(out, job.logits.classes);
        row.read(state, z, 0, row.n_blocks());
        done = row.finish_numbers(&state, z);
      }
      if (!done) {
        feed.leave(k);  // general writes its row itself
        serve_general(job, k, k + 1);
      } else if (out) {
        row.write(state, z, out, 0, row.n_blocks(), false);
      }
    }
    feed.write();
  }
  stream_fence();
}

// A row in parts: the host's memory holds its state, then its blocks.
template <class S>
struct Part {
  using State = typename Row<S>::State;
  using Block_ = Block<typename S::T>;
  static constexpr int64_t kHead = (sizeof(State) + 63) / 64 * 64;
  static constexpr int64_t kPartBlocks = kPartBytes / kBlockBytes;

  const RowJob& job;
  Row<S> row;
  State* state;
  const typename S::Type* z;
  typename S::Type* out;
  bool memory;

  Part(const RowJob& job_, int64_t i, void* at)
      : job(job_), row(job_), state(static_cast<State*>(at)) {
    z = reinterpret_cast<const typename S::Type*>(job.logits.row(i));
    out = job.out.data ? reinterpret_cast<typename S::Type*>(job.out.row(i)) : nullptr;
    row.use(reinterpret_cast<Block_*>(static_cast<char*>(at) + kHead));
    memory = row.prepare(false);
    if (!memory) report_out_of_memory(job);
  }
  int64_t last(int64_t first) const {
    return first + kPartBlocks < row.n_blocks() ? first + kPartBlocks : row.n_blocks();
  }
};

}  // namespace

void serve_rows(const RowJob& job, int64_t begin, int64_t end) {
  with_storage(job.logits.dtype, [&](auto s) { serve<decltype(s)>(job, begin, end); });
}

int64_t part_bytes(const RowJob& job) {
  return with_storage(job.logits.dtype, [&](auto s) {
    using P = Part<decltype(s)>;
    return P::kHead + Row<decltype(s)>(job).n_blocks() * int64_t{sizeof(typename P::Block_)};
  });
}

bool part_start(const RowJob& job, int64_t i, void* at) {
  return with_storage(job.logits.dtype, [&](auto s) {
    Part<decltype(s)> part(job, i, at);
    return part.memory && part.row.start(i, part.z, part.state);
  });
}

void part_read(const RowJob& job, int64_t i, int64_t k, void* at) {
  with_storage(job.logits.dtype, [&](auto s) {
    Part<decltype(s)> part(job, i, at);
    const int64_t first = k * part.kPartBlocks;
    if (part.memory) part.row.read(*part.state, part.z, first, part.last(first));
  });
}

bool part_numbers(const RowJob& job, int64_t i, void* at) {
  return with_storage(job.logits.dtype, [&](auto s) {
    Part<decltype(s)> part(job, i, at);
    return part.memory && part.row.finish_numbers(part.state, part.z);
  });
}

void part_write(const RowJob& job, int64_t i, int64_t k, void* at) {
  with_storage(job.logits.dtype, [&](auto s) {
    Part<decltype(s)> part(job, i, at);
    const int64_t first = k * part.kPartBlocks;
    if (part.memory) part.row.write(*part.state, part.z, part.out, first, part.last(first), true);
    stream_fence();
  });
}

}  // namespace CROSSENT_ISA
}  // namespace crossent
