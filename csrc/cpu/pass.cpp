// What goes over all entries of a step, tile by tile, in parallel.
#include "cpu/pass.h"

#include <cstring>

#include "cpu/nm.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace bip::cpu {
namespace {

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

// A block that may reach over the ends of rows, between which there are columns of other ranks.
BIP_HD Verdict judge_rows(const Tensor& t, int64_t first, int count, const Window& window) {
  Verdict verdict{0, 0};
  for (int done = 0; done < count;) {
    const int64_t entry = first + done;
    const int run = static_cast<int>(std::min<int64_t>(count - done, t.row_length - entry % t.row_length));
    const Verdict own = judge(t.scores + entry, run, static_cast<uint32_t>(index_of(t, entry)), window);
    verdict.above |= own.above << done;
    verdict.inside |= own.inside << done;
    done += run;
  }
  return verdict;
}

BIP_HD Verdict judge_block(const Tile& tile, int i, const Window& window) {
  const Tensor& t = *tile.tensor;
  const float* scores = t.scores + tile.begin + i;
  const int count = std::min(kBlock, tile.count - i);
  if (t.row_length) return judge_rows(t, tile.begin + i, count, window);
  const uint32_t index = static_cast<uint32_t>(t.index + tile.begin + i);
  return count == kBlock ? judge(scores, kBlock, index, window) : judge(scores, count, index, window);
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
      found[num_found++] = key_of(t, entry);
    }
  }
  if (t.elsewhere)
    selection.elsewhere.fetch_add(num_found, std::memory_order_relaxed);
  else
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
    const int skipped = update_tile<kRule, kUpper>(context, tile, context.step.gradients[context.step.tile_tensor[index]], factors);
    nonfinite += tile.tensor->elsewhere ? 0 : skipped;
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

// Counts the next digit of the keys inside a window.
BIP_HD void count_inside_body(Context& context, int64_t begin, int64_t end) {
  Counter counter(context.selections);
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    const Tensor& t = *tile.tensor;
    if (t.group < 0 || t.elsewhere || !context.selections[t.group].counting) continue;
    const Selection& selection = context.selections[t.group];
    const Window window = selection.window;
    const Digit digit = selection.digit();
    uint32_t* counts = counter.of(t.group);
    for (int i = 0; i < tile.count; i += kBlock) {
      for (uint32_t inside = judge_block(tile, i, window).inside; inside; inside &= inside - 1) {
        const int64_t entry = tile.begin + i + lowest_bit(inside);
        ++counts[digit.bin(key_of(t, entry), index_of(t, entry), 1 << selection.digit_bits)];
      }
    }
  }
}

// Judges again the groups whose candidates are not all listed.
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

// The entry of a tile that has this key.
int64_t entry_of(const Tile& tile, uint64_t key) {
  const Tensor& t = *tile.tensor;
  const uint32_t index = index_of_tie_key(static_cast<uint32_t>(key));
  if (!t.row_length) return tile.begin + static_cast<uint32_t>(index - static_cast<uint32_t>(t.index + tile.begin));
  int64_t entry = tile.begin;
  while (static_cast<uint32_t>(index_of(t, entry)) != index) ++entry;
  return entry;
}

// Gives candidates [begin, end) their final bit. Pieces are moved to tile borders, so no mask word has two writers.
void judge_candidates(const Step& step, Selection& selection, const Threshold& threshold, int64_t begin, int64_t end) {
  const uint32_t* tiles = selection.tiles;
  const int64_t found = selection.found;
  const auto to_border = [&](int64_t i) {
    while (i > 0 && i < found && tiles[i] == tiles[i - 1]) ++i;
    return i;
  };
  end = to_border(end);
  for (int64_t i = to_border(begin); i < end; ++i) {
    const Tile tile = tile_of(step, tiles[i]);
    const Tensor& t = *tile.tensor;
    const int64_t entry = entry_of(tile, selection.keys[i]);
    const uint32_t bit = 1u << (entry % kBlock);
    const uint32_t word = t.mask[entry / kBlock];
    if (threshold.keeps(selection.keys[i], index_of(t, entry)) == ((word & bit) != 0)) continue;
    flip(t, entry / kBlock * kBlock, word ^ bit, bit);
    selection.flips.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace

void update_and_judge(Context& context, int threads) {
  const Step& step = context.step;
  const Update update = update_of(step.phase, step.rule);
  parallel_for(threads, step.phase == Phase::upper ? step.num_scored_tiles : step.num_tiles, kGrain,
               [&](int64_t begin, int64_t end) { update(context, begin, end); });
}

void count_inside(Context& context, int threads) {
  parallel_for(threads, context.step.num_scored_tiles, 8 * kGrain, [&](int64_t begin, int64_t end) { count_inside(context, begin, end); });
}

void judge_again(Context& context, int threads) {
  for (int64_t group = 0; group < context.step.num_groups; ++group) {
    Selection& selection = context.selections[group];
    if (!selection.listed) selection.found = selection.above = selection.elsewhere = 0;
  }
  parallel_for(threads, context.step.num_scored_tiles, kGrain, [&](int64_t begin, int64_t end) { judge_again(context, begin, end); });
}

int64_t candidate_index(const Step& step, const Selection& selection, int64_t number) {
  const Tile tile = tile_of(step, selection.tiles[number]);
  return index_of(*tile.tensor, entry_of(tile, selection.keys[number]));
}

void judge_candidates(const Step& step, Selection& selection, const Threshold& threshold, int threads) {
  parallel_for(threads, selection.found, 16 * kTile,
               [&](int64_t begin, int64_t end) { judge_candidates(step, selection, threshold, begin, end); });
  selection.counters->flips += selection.flips;
}

void count_steps(const Step& step) {
  for (int64_t i = 0; i < step.num_tensors; ++i)
    if (step.tensors[i].steps && step.gradients[i].data) ++*step.tensors[i].steps;
}

}  // namespace bip::cpu
