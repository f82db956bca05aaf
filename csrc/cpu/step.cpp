// The lower, upper and joint step on the CPU, each in one pass over memory.
//
// Upper and joint steps use a window of keys around the threshold of the step before (window.h). Where there is none, they take it from a
// sample of the scores as this step will leave them (select.h). The pass updates the scores and judges them at once: an entry outside the
// window gets its bit, and its z where the bit flips; the few inside are listed as candidates and settled at the end. So an upper step
// reads s, theta, g and the mask and writes s, 16.3 bytes per entry. A wrong window costs a sample and a second judging pass; if the second
// window is wrong too, counting passes follow. All of these read the scores alone.
// Deterministic: integer counts only, and every entry ends up judged by its own key against one threshold.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "bip.h"
#include "cpu/parallel.h"
#include "cpu/pass.h"
#include "cpu/select.h"
#include "cpu/selection.h"
#include "cpu/stream.h"
#include "cpu/units.h"
#include "cpu/update.h"

namespace bip::cpu {
namespace {

// Calls visit(selection, block, gradient) for every sampled block of the tiles [begin, end) whose group needs a sample.
template <class Visit>
void for_sample(Context& context, int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t kBlocks = kTile / kBlock;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    if (tile.tensor->group < 0) continue;
    Selection& selection = context.selections[tile.tensor->group];
    if (!selection.sample) continue;
    for_sampled_blocks(index * kBlocks, (index + 1) * kBlocks, selection.stride, [&](int64_t number) {
      const int64_t offset = (number - index * kBlocks) * kBlock;
      const Tile block{tile.tensor, tile.begin + offset, static_cast<int>(std::min<int64_t>(kBlock, tile.count - offset))};
      if (block.count > 0) visit(selection, block, context.step.gradients[context.step.tile_tensor[index]]);
    });
  }
}

// `moved`: this step has moved the scores already.
void sample(Context& context, bool moved, int64_t begin, int64_t end) {
  // A block causes a cache miss or two in each of its arrays: prefetching lets all of them wait at the same time.
  for_sample(context, begin, end, [&](const Selection&, const Tile& block, const Gradient& gradient) {
    prefetch_block(block.tensor->scores + block.begin);
    if (moved || !gradient.data) return;
    prefetch_block(block.tensor->theta + block.begin);
    prefetch_block(static_cast<const char*>(gradient.data) + block.begin * (gradient.dtype == DType::f32 ? 4 : 2));
  });
  for_sample(context, begin, end, [&](Selection& selection, const Tile& block, const Gradient& gradient) {
    float scores[kBlock];
    uint64_t keys[kBlock];
    preview_scores(block, context.scale, context.step.hypers[block.tensor->hyper], moved ? Gradient{} : gradient, scores);
    for (int i = 0; i < block.count; ++i) keys[i] = order_key(scores[i], static_cast<uint32_t>(block.tensor->index + block.begin + i));
    selection.list(keys, block.count, 0);
  });
}

// Guesses the windows of the groups that need a sample.
void guess_windows(Context& context, bool moved, int threads) {
  const Step& step = context.step;
  parallel_for(threads, step.num_scored_tiles, 16 * kGrain, [&](int64_t begin, int64_t end) { sample(context, moved, begin, end); });
  parallel_for(threads, step.num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      Selection& selection = context.selections[group];
      if (!selection.sample) continue;
      selection.window = guess_window(selection.keys, selection.found, selection.capacity, selection.numel, selection.kept);
      selection.found = selection.above = 0;
      selection.sample = false;
    }
  });
}

// The windows of the step before, and samples where there are none.
void open_windows(Context& context, int threads) {
  bool any = false;
  for (int64_t group = 0; group < context.step.num_groups; ++group) {
    Selection& selection = context.selections[group];
    Memory& memory = *selection.memory;
    follow(memory, selection.kept, selection.numel);
    const bool open = selection.kept > 0 && selection.kept < selection.numel;
    selection.sampled = selection.sample = open && !memory.known;
    if (open)
      selection.window = {memory.lo, memory.hi, 0, 0};
    else
      selection.window.lo = selection.window.hi = selection.kept ? 0 : kNoKey;
    any = any || selection.sampled;
    ++selection.counters->steps;
  }
  if (any) guess_windows(context, false, threads);
}

// After a judging pass: finds the groups whose list has all candidates that they need; true if all have. `first`: it is the step's first.
bool check_windows(Context& context, bool first) {
  bool all = true;
  for (int64_t group = 0; group < context.step.num_groups; ++group) {
    Selection& selection = context.selections[group];
    if (selection.listed) continue;
    selection.judged = selection.window;
    const bool hit = judged(selection.window, selection.above, selection.found, selection.numel, selection.kept);
    selection.listed = hit && selection.found <= selection.capacity;
    all = all && selection.listed;
    if (!first) continue;
    Counters& counters = *selection.counters;
    counters.candidates += selection.listed ? selection.found.load() : 0;
    if (!selection.listed) ++(selection.sampled ? counters.first : hit ? counters.crowded : counters.missed);
  }
  return all;
}

// Narrows the windows of the groups whose guess was wrong until there is room for what they hold, and judges these groups again.
void fall_back(Context& context, int threads) {
  const Step& step = context.step;
  Selection* const end = context.selections + step.num_groups;
  const auto crowded = [&] {
    bool any = false;
    for (Selection* selection = context.selections; selection != end; ++selection) any |= selection->counting = selection->crowded();
    return any;
  };
  while (crowded()) {
    count_inside(context, threads);
    for (Selection* selection = context.selections; selection != end; ++selection) {
      if (!selection->counting) continue;
      narrow(selection->window, Bins<uint32_t>{selection->counts});
      std::memset(selection->counts, 0, kBins * sizeof(uint32_t));
    }
  }
  for (Selection* selection = context.selections; selection != end; ++selection)
    if (!selection->listed) selection->judged = selection->window;
  judge_again(context, threads);
}

void settle_groups(const Step& step, Selection* selections, int threads) {
  std::vector<uint64_t> thresholds(static_cast<size_t>(step.num_groups));
  parallel_for(threads, step.num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      Selection& selection = selections[group];
      const uint64_t threshold = settle(selection.keys, selection.found, selection.window, selection.counts);
      remember(selection, threshold);
      selection.counters->threshold = key_score(static_cast<uint32_t>(threshold >> 32));
      thresholds[static_cast<size_t>(group)] = threshold;
    }
  });
  for (int64_t group = 0; group < step.num_groups; ++group)
    judge_candidates(step, selections[group], {thresholds[static_cast<size_t>(group)]}, threads);
}

// After the pass: settles what windows left open and repairs what they got wrong.
void project(Context& context, int threads) {
  if (!check_windows(context, true)) {
    const Step& step = context.step;
    bool resample = false;
    for (int64_t group = 0; group < step.num_groups; ++group) {
      Selection& selection = context.selections[group];
      if (selection.listed || selection.sampled) continue;
      selection.sampled = selection.sample = resample = true;
      selection.found = 0;
    }
    if (resample) {
      guess_windows(context, true, threads);
      judge_again(context, threads);
    }
    if (!resample || !check_windows(context, false)) fall_back(context, threads);
  }
  settle_groups(context.step, context.selections, threads);
}

}  // namespace

int64_t step_workspace_bytes(int64_t, int64_t num_groups, int64_t num_scored_tiles) {
  return selection_bytes(num_groups, num_scored_tiles);
}

void step(const Step& args, int threads) {
  if (skipped(args)) return;
  std::vector<Selection> selections = lay_out_selections(args);
  Context context{args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, selections.data(), stream_width(args.num_tiles)};
  if (args.phase != Phase::lower) {
    const int64_t nonfinite = sum_units(args, context.scale, threads);
    if (args.phase == Phase::upper) context.nonfinite += nonfinite;  // in a joint step the update counts them
    score_units(args, threads);
    lift_units(args, threads);
    open_windows(context, threads);
  }
  update_and_judge(context, threads);
  if (args.phase != Phase::lower) {
    project(context, threads);
    spread_units(args, threads);
  }
  if (args.phase != Phase::upper) count_steps(args);
  if (args.num_nonfinite) *args.num_nonfinite += context.nonfinite.load();
}

}  // namespace bip::cpu
