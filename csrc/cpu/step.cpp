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
#include "cpu/nm.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/selection.h"
#include "cpu/simd.h"
#include "cpu/units.h"
#include "cpu/update.h"

namespace bip::cpu {
namespace {

constexpr int64_t kGrain = 16;  // tiles per piece of parallel work: some 10 microseconds

struct Context {
  const Step& step;
  float scale;            // 1 / *grad_scale
  Selection* selections;  // [num_groups]
  int stream_width;       // bytes of the registers that write z past the caches; 0: through them
  std::atomic<int64_t> nonfinite{0};
};

// An upper step has Rule::none.
template <Rule kRule, bool kUpper>
BIP_HD int update_tile(const Context& context, const Tile& tile, const Gradient& gradient, const AdamwFactors& factors) {
  constexpr bool kLower = kRule != Rule::none;
  alignas(64) float buffer[kTile];
  const Tensor& t = *tile.tensor;
  const bool scored = t.scores != nullptr;
  if (!gradient.data || (!kLower && !scored)) return 0;
  const Hyper hyper = context.step.hypers[t.hyper];
  const float* g = gradients_of(gradient, tile, buffer);
  int nonfinite = 0;
  if (kUpper && scored && moves_score_momentum(t, hyper))
    nonfinite = update_entries<kRule, kUpper, kUpper>(tile, context.scale, hyper, factors, g, context.stream_width);
  else if (kUpper && scored)
    nonfinite = update_entries<kRule, kUpper, false>(tile, context.scale, hyper, factors, g, context.stream_width);
  else if (kLower)
    nonfinite = update_entries<kRule, false, false>(tile, context.scale, hyper, factors, g, context.stream_width);
  return nonfinite;
}

BIP_HD Verdict judge_block(const Tile& tile, int i, const Window& window) {
  const Tensor& t = *tile.tensor;
  const float* scores = t.scores + tile.begin + i;
  const uint32_t index = static_cast<uint32_t>(t.index + tile.begin + i);
  const int count = tile.count - i;
  return count >= kBlock ? judge(scores, kBlock, index, window) : judge(scores, count, index, window);
}

// Mask and z of a tile by its group's window. Candidates keep their old bit until they are settled. z is m*theta whatever the window; if
// the window was wrong, judging again by a better one repairs both.
BIP_HD void judge_tile(Selection& selection, const Tile& tile, int64_t index) {
  const Tensor& t = *tile.tensor;
  const Window window = selection.window;
  uint64_t found[kTile];
  int num_found = 0, above = 0, flips = 0;
  for (int i = 0; i < tile.count; i += kBlock) {
    const int64_t first = tile.begin + i;
    const Verdict verdict = judge_block(tile, i, window);
    above += count_bits(verdict.above);
    const uint32_t old = t.mask[first / kBlock];
    const uint32_t word = verdict.above | (verdict.inside & old);
    if (word != old) {
      flip(t, first, word, word ^ old);
      flips += count_bits(word ^ old);
    }
    for (uint32_t inside = verdict.inside; inside; inside &= inside - 1) {
      const int64_t entry = first + lowest_bit(inside);
      found[num_found++] = order_key(t.scores[entry], static_cast<uint32_t>(t.index + entry));
    }
  }
  selection.above.fetch_add(above, std::memory_order_relaxed);
  if (flips) selection.flips.fetch_add(flips, std::memory_order_relaxed);
  if (num_found) selection.list(found, num_found, index);
}

template <Rule kRule, bool kUpper>
BIP_HD void update_tiles_body(Context& context, int64_t begin, int64_t end) {
  int64_t nonfinite = 0;
  const Tensor* last = nullptr;  // whose factors these are
  AdamwFactors factors{};
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    if (kRule == Rule::adamw && tile.tensor != last) {
      last = tile.tensor;
      if (last->steps) factors = adamw_factors(context.step.hypers[last->hyper], *last->steps + 1);  // the rows of units have none
    }
    nonfinite += update_tile<kRule, kUpper>(context, tile, context.step.gradients[context.step.tile_tensor[index]], factors);
    if (kUpper && tile.tensor->group >= 0) judge_tile(context.selections[tile.tensor->group], tile, index);
    if (kUpper && tile.tensor->of) keep_tile(tile);
  }
  if (kRule != Rule::none) end_streaming();
  if (nonfinite) context.nonfinite.fetch_add(nonfinite);
}

// z = m*theta, as they are.
BIP_HD void lower_none_body(Context& context, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    if (!has_z(tile)) continue;
    for (int i = 0; i < tile.count; i += kBlock) write_masked(tile, i, tile.word(i / kBlock), 0);
  }
}

BIP_SIMD_VARIANTS(lower_none, (Context & context, int64_t begin, int64_t end), (context, begin, end))

#define BIP_UPDATE_TILES(name, rule, upper)                                                                                      \
  BIP_HD void name##_body(Context& context, int64_t begin, int64_t end) { update_tiles_body<rule, upper>(context, begin, end); } \
  BIP_SIMD_VARIANTS(name, (Context & context, int64_t begin, int64_t end), (context, begin, end))

BIP_UPDATE_TILES(lower_sgd, Rule::sgd, false)
BIP_UPDATE_TILES(lower_adamw, Rule::adamw, false)
BIP_UPDATE_TILES(lower_gradient, Rule::gradient, false)
BIP_UPDATE_TILES(upper, Rule::none, true)
BIP_UPDATE_TILES(joint_sgd, Rule::sgd, true)
BIP_UPDATE_TILES(joint_adamw, Rule::adamw, true)
BIP_UPDATE_TILES(joint_gradient, Rule::gradient, true)
#undef BIP_UPDATE_TILES

using Update = void (*)(Context&, int64_t, int64_t);

Update update_of(Phase phase, Rule rule) {
  constexpr Update kLower[] = {lower_none, lower_sgd, lower_adamw, lower_gradient};
  constexpr Update kJoint[] = {upper, joint_sgd, joint_adamw, joint_gradient};
  return phase == Phase::upper ? upper : (phase == Phase::lower ? kLower : kJoint)[static_cast<int>(rule)];
}

// Fallback: counts the next digit of the keys inside a crowded window.
BIP_HD void count_inside_body(Context& context, int64_t begin, int64_t end) {
  Counter counter(context.selections);
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    const Tensor& t = *tile.tensor;
    if (t.group < 0 || !context.selections[t.group].crowded()) continue;
    const Window window = context.selections[t.group].window;
    const int shift = digit_shift(window);
    uint32_t* counts = counter.of(t.group);
    for (int i = 0; i < tile.count; i += kBlock) {
      for (uint32_t inside = judge_block(tile, i, window).inside; inside; inside &= inside - 1) {
        const int64_t entry = tile.begin + i + lowest_bit(inside);
        ++counts[(order_key(t.scores[entry], static_cast<uint32_t>(t.index + entry)) - window.lo) >> shift];
      }
    }
  }
}

// Fallback: judges again, by the narrowed window.
BIP_HD void judge_again_body(Context& context, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    if (tile.tensor->group < 0) continue;
    Selection& selection = context.selections[tile.tensor->group];
    if (!selection.listed) judge_tile(selection, tile, index);
  }
}

BIP_SIMD_VARIANTS(count_inside, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(judge_again, (Context & context, int64_t begin, int64_t end), (context, begin, end))

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
    const Memory& memory = *selection.memory;
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

// Judges those groups again whose candidates are not all listed.
void judge_again(Context& context, int threads) {
  for (int64_t group = 0; group < context.step.num_groups; ++group)
    if (!context.selections[group].listed) context.selections[group].found = context.selections[group].above = 0;
  parallel_for(threads, context.step.num_scored_tiles, kGrain, [&](int64_t first, int64_t last) { judge_again(context, first, last); });
}

// Narrows the windows of the groups whose guess was wrong until there is room for what they hold, and judges these groups again.
void fall_back(Context& context, int threads) {
  const Step& step = context.step;
  Selection* const end = context.selections + step.num_groups;
  while (std::any_of(context.selections, end, [](const Selection& selection) { return selection.crowded(); })) {
    parallel_for(threads, step.num_scored_tiles, 8 * kGrain, [&](int64_t first, int64_t last) { count_inside(context, first, last); });
    for (Selection* selection = context.selections; selection != end; ++selection) {
      if (!selection->crowded()) continue;
      narrow(selection->window, selection->counts);
      std::memset(selection->counts, 0, kBins * sizeof(uint32_t));
    }
  }
  for (Selection* selection = context.selections; selection != end; ++selection)
    if (!selection->listed) selection->judged = selection->window;
  judge_again(context, threads);
}

// Gives candidates [begin, end) their final bit. Pieces are moved to tile borders, so no mask word has two writers.
void judge_candidates(const Step& step, Selection& selection, uint64_t threshold, int64_t begin, int64_t end) {
  const uint32_t* tiles = selection.tiles;
  const int64_t found = selection.found;
  const auto to_border = [&](int64_t i) {
    while (i > 0 && i < found && tiles[i] == tiles[i - 1]) ++i;
    return i;
  };
  end = to_border(end);
  for (int64_t i = to_border(begin); i < end; ++i) {
    const Tensor& t = step.tensors[step.tile_tensor[tiles[i]]];
    const uint64_t key = selection.keys[i];
    const int64_t entry = static_cast<int64_t>(index_of_tie_key(static_cast<uint32_t>(key))) - t.index;
    const uint32_t bit = 1u << (entry % kBlock);
    const uint32_t word = t.mask[entry / kBlock];
    if ((key >= threshold) == ((word & bit) != 0)) continue;
    flip(t, entry / kBlock * kBlock, word ^ bit, bit);
    selection.flips.fetch_add(1, std::memory_order_relaxed);
  }
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
  for (int64_t group = 0; group < step.num_groups; ++group) {
    const Selection& selection = selections[group];
    parallel_for(threads, selection.found, 16 * kTile, [&](int64_t begin, int64_t end) {
      judge_candidates(step, selections[group], thresholds[static_cast<size_t>(group)], begin, end);
    });
    selection.counters->flips += selection.flips;
  }
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

void count_steps(const Step& step) {
  for (int64_t i = 0; i < step.num_tensors; ++i)
    if (step.tensors[i].steps && step.gradients[i].data) ++*step.tensors[i].steps;
}

}  // namespace

int64_t step_workspace_bytes(int64_t, int64_t num_groups, int64_t num_scored_tiles) {
  return selection_bytes(num_groups, num_scored_tiles);
}

void step(const Step& args, int threads) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  std::vector<Selection> selections = lay_out_selections(args);
  Context context{args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, selections.data(), stream_width(args.num_tiles)};
  if (args.phase != Phase::lower) {
    const int64_t nonfinite = sum_units(args, context.scale, threads);
    if (args.phase == Phase::upper) context.nonfinite += nonfinite;  // in a joint step the update counts them
    score_units(args, threads);
    open_windows(context, threads);
  }
  const Update update = update_of(args.phase, args.rule);
  parallel_for(threads, args.phase == Phase::upper ? args.num_scored_tiles : args.num_tiles, kGrain,
               [&](int64_t begin, int64_t end) { update(context, begin, end); });
  if (args.phase != Phase::lower) {
    project(context, threads);
    spread_units(args, threads);
  }
  if (args.phase != Phase::upper) count_steps(args);
  if (args.num_nonfinite) *args.num_nonfinite += context.nonfinite.load();
}

}  // namespace bip::cpu
