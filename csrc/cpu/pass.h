// What goes over all entries of a step. Who decides on the windows is the caller: on one device step.cpp, with several ranks shards.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "bip.h"
#include "cpu/selection.h"

namespace bip::cpu {

constexpr int64_t kGrain = 16;  // tiles per piece of parallel work: some 10 microseconds

struct Context {
  const Step& step;
  float scale;            // 1 / *grad_scale
  Selection* selections;  // [num_groups]
  int stream_width;       // bytes of the registers that write z past the caches; 0: through them
  std::atomic<int64_t> nonfinite{0};
};

// Whether the gradients of the step overflowed, so that it does nothing.
inline bool skipped(const Step& step) { return step.found_inf && *step.found_inf != 0.0f; }

// Moves all entries, and judges those that compete by the windows of their groups: mask and z, counts, and the list of candidates.
void update_and_judge(Context& context, int threads);

// Adds the next digit of the keys inside to `counts` of the groups that are `counting`.
void count_inside(Context& context, int threads);

// Judges those groups again that are not `listed`.
void judge_again(Context& context, int threads);

// The index of a listed candidate.
int64_t candidate_index(const Step& step, const Selection& selection, int64_t number);

// Gives the listed candidates their final bit.
void judge_candidates(const Step& step, Selection& selection, const Threshold& threshold, int threads);

// One more step for every tensor that has a gradient, where the rule counts them.
void count_steps(const Step& step);

}  // namespace bip::cpu
