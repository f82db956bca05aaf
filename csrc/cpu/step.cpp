// The lower, upper and joint step on the CPU.
//
// Lower is one pass. Upper and joint are two: update the scores and count their first digit; then decide every entry outside the window that
// the count leaves (select.h), and write mask words and z where the decision flips them. The few entries inside the window are collected as
// candidates and settled at the end. When too many are inside, further counting passes over the scores (4 bytes per entry) narrow it first.
// Deterministic: integer counts only, and every entry is decided by its own key against one threshold.
#include <atomic>
#include <cstddef>
#include <mutex>
#include <vector>

#include "bip.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/simd.h"
#include "cpu/update.h"

namespace bip::cpu {
namespace {

constexpr int64_t kGrain = 16;  // tiles per piece of parallel work: some 10 microseconds

// A window is settled from candidates when it holds at most 1/32 of the group; on trained scores the first digit leaves 1 to 2 %.
constexpr int64_t candidate_capacity(int64_t numel) { return numel / 32 + kTile; }

struct Candidate {
  uint64_t key;
  int64_t entry;  // tile * kTile + offset in the tile
};

// Selection in one group, while a step lasts.
struct Selection {
  Window window;
  uint32_t* counts;         // [kBins] all threads' counts of one digit; guarded by `mutex`
  Candidate* candidates;    // [candidate_capacity]; those of one tile lie together
  uint64_t* keys;           // [candidate_capacity] scratch of settle()
  std::atomic<int64_t> found{0};
  std::mutex mutex;

  bool crowded(int64_t numel) const { return window.inside > candidate_capacity(numel); }
};

struct Context {
  const Step& step;
  float scale;              // 1 / *grad_scale
  Selection* selections;    // [num_groups]
  std::atomic<int64_t> nonfinite{0};
};

// This thread's counts of the group it is working on, handed over when the group changes.
class Counter {
 public:
  explicit Counter(Selection* selections) : selections_(selections) {}
  ~Counter() { hand_over(); }
  Counter(const Counter&) = delete;
  Counter& operator=(const Counter&) = delete;

  Histogram& of(int32_t group) {
    if (group != group_) {
      hand_over();
      histogram().clear();
      group_ = group;
    }
    return histogram();
  }

 private:
  static Histogram& histogram() {
    thread_local Histogram counts;
    return counts;
  }

  void hand_over() {
    if (group_ < 0) return;
    Selection& selection = selections_[group_];
    std::lock_guard<std::mutex> lock(selection.mutex);
    histogram().add_to(selection.counts);
  }

  Selection* selections_;
  int32_t group_ = -1;
};

template <bool kLower, bool kUpper>
BIP_HD int update_tile(const Context& context, const Tile& tile, const Gradient& gradient) {
  alignas(64) float buffer[kTile];
  const Tensor& t = *tile.tensor;
  const bool pruned = t.group >= 0;
  if (!gradient.data || (!kLower && !pruned)) return 0;
  const Hyper hyper = context.step.hypers[t.hyper];
  const float* g = gradients_of(gradient, tile, buffer);
  int nonfinite = 0;
  if (kUpper && pruned && t.score_momentum && hyper.mask_momentum > 0.0f)
    nonfinite = update_entries<kLower, kUpper, kUpper>(tile, context.scale, hyper, g);
  else if (kUpper && pruned)
    nonfinite = update_entries<kLower, kUpper, false>(tile, context.scale, hyper, g);
  else
    nonfinite = update_entries<true, false, false>(tile, context.scale, hyper, g);
  if (kLower) write_masked(tile);
  return nonfinite;
}

template <bool kLower, bool kUpper>
BIP_HD void update_tiles_body(Context& context, int64_t begin, int64_t end) {
  Counter counter(context.selections);
  int64_t nonfinite = 0;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    nonfinite += update_tile<kLower, kUpper>(context, tile, context.step.gradients[context.step.tile_tensor[index]]);
    if (!kUpper || tile.tensor->group < 0) continue;
    Histogram& histogram = counter.of(tile.tensor->group);
    const float* scores = tile.tensor->scores + tile.begin;
    int i = 0;
    for (; i + kBlock <= tile.count; i += kBlock) count_first_digit(scores + i, kBlock, histogram);
    count_first_digit(scores + i, tile.count - i, histogram);
  }
  if (nonfinite) context.nonfinite.fetch_add(nonfinite);
}

BIP_HD void update_lower_body(Context& context, int64_t begin, int64_t end) { update_tiles_body<true, false>(context, begin, end); }
BIP_HD void update_upper_body(Context& context, int64_t begin, int64_t end) { update_tiles_body<false, true>(context, begin, end); }
BIP_HD void update_joint_body(Context& context, int64_t begin, int64_t end) { update_tiles_body<true, true>(context, begin, end); }

// Fallback: counts the next digit of the keys inside a crowded window.
BIP_HD void count_inside_body(Context& context, int64_t begin, int64_t end) {
  Counter counter(context.selections);
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    const Tensor& t = *tile.tensor;
    if (t.group < 0 || !context.selections[t.group].crowded(context.step.groups[t.group].numel)) continue;
    Histogram& histogram = counter.of(t.group);
    const Window window = context.selections[t.group].window;
    const int shift = narrower_shift(window);
    for (int i = 0; i < tile.count; i += kBlock) {
      const int64_t first = tile.begin + i;
      for (uint32_t maybe = judge(t.scores + first, std::min(kBlock, tile.count - i), window).maybe; maybe; maybe &= maybe - 1) {
        const int64_t entry = first + lowest_bit(maybe);
        const uint64_t key = order_key(t.scores[entry], static_cast<uint32_t>(t.index + entry));
        if (key >= window.lo && key < window.hi) ++histogram.counts[entry % Histogram::kWays][(key - window.lo) >> shift];
      }
    }
  }
}

// Writes the mask word and z where `flips` says, to the values of `word`.
BIP_HD void flip(const Tensor& t, int64_t first, uint32_t word, uint32_t flips) {
  t.mask[first / kBlock] = word;
  for (; flips; flips &= flips - 1) {
    const int bit = lowest_bit(flips);
    write_entry(t, first + bit, (word >> bit) & 1u);
  }
}

BIP_HD void decide_body(Context& context, int64_t begin, int64_t end) {
  Candidate found[kTile];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_of(context.step, index);
    const Tensor& t = *tile.tensor;
    if (t.group < 0) continue;
    Selection& selection = context.selections[t.group];
    const Window window = selection.window;
    int num_found = 0;
    for (int i = 0; i < tile.count; i += kBlock) {
      const int64_t first = tile.begin + i;
      const int count = tile.count - i;
      const Verdict verdict = count >= kBlock ? judge(t.scores + first, kBlock, window) : judge(t.scores + first, count, window);
      const uint32_t old = t.mask[first / kBlock];
      uint32_t word = verdict.above;
      for (uint32_t maybe = verdict.maybe; maybe; maybe &= maybe - 1) {
        const int bit = lowest_bit(maybe);
        const uint64_t key = order_key(t.scores[first + bit], static_cast<uint32_t>(t.index + first + bit));
        const bool inside = key >= window.lo && key < window.hi;
        if (inside) found[num_found++] = {key, index * kTile + i + bit};
        // Candidates keep their old bit until they are settled.
        word |= (key >= window.hi ? 1u << bit : inside ? old & (1u << bit) : 0u);
      }
      if (word != old) flip(t, first, word, word ^ old);
    }
    if (num_found) std::copy(found, found + num_found, selection.candidates + selection.found.fetch_add(num_found));
  }
}

BIP_SIMD_VARIANTS(update_lower, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(update_upper, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(update_joint, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(count_inside, (Context & context, int64_t begin, int64_t end), (context, begin, end))
BIP_SIMD_VARIANTS(decide, (Context & context, int64_t begin, int64_t end), (context, begin, end))

// Candidates [begin, end) against the settled threshold. Pieces are moved to tile borders, so no mask word has two writers.
void settle_candidates(const Step& step, const Selection& selection, uint64_t threshold, int64_t begin, int64_t end) {
  const Candidate* all = selection.candidates;
  const auto tile = [all](int64_t i) { return all[i].entry / kTile; };
  const auto to_border = [&](int64_t i) {
    while (i > 0 && i < selection.window.inside && tile(i) == tile(i - 1)) ++i;
    return i;
  };
  end = to_border(end);
  for (int64_t i = to_border(begin); i < end; ++i) {
    const Tile at = tile_of(step, tile(i));
    const int64_t entry = at.begin + all[i].entry % kTile;
    const uint32_t bit = 1u << (entry % kBlock);
    const uint32_t word = at.tensor->mask[entry / kBlock];
    const bool kept = all[i].key >= threshold;
    if (kept != ((word & bit) != 0)) flip(*at.tensor, entry / kBlock * kBlock, word ^ bit, bit);
  }
}

void settle_groups(const Step& step, Selection* selections, int threads) {
  std::vector<uint64_t> thresholds(static_cast<size_t>(step.num_groups));
  parallel_for(threads, step.num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      Selection& selection = selections[group];
      for (int64_t i = 0; i < selection.window.inside; ++i) selection.keys[i] = selection.candidates[i].key;
      if (selection.window.inside) thresholds[static_cast<size_t>(group)] = settle(selection.keys, selection.window);
    }
  });
  for (int64_t group = 0; group < step.num_groups; ++group) {
    const Selection& selection = selections[group];
    parallel_for(threads, selection.window.inside, 16 * kTile, [&](int64_t begin, int64_t end) {
      settle_candidates(step, selection, thresholds[static_cast<size_t>(group)], begin, end);
    });
  }
}

// After a counting pass: narrows every window it counted for, and closes those with nothing left to choose. True while one is crowded.
bool narrow_windows(const Step& step, Selection* selections, bool first) {
  bool crowded = false;
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = selections[group];
    if (first || selection.crowded(step.groups[group].numel)) {
      if (!selection.window.settled()) narrow(selection.window, selection.counts);
      std::memset(selection.counts, 0, kBins * sizeof(uint32_t));
      if (selection.window.settled()) close(selection.window);
    }
    crowded = crowded || selection.crowded(step.groups[group].numel);
  }
  return crowded;
}

void project(Context& context, int threads) {
  const Step& step = context.step;
  for (bool first = true; narrow_windows(step, context.selections, first); first = false)
    parallel_for(threads, step.num_tiles, kGrain, [&](int64_t begin, int64_t end) { count_inside(context, begin, end); });
  parallel_for(threads, step.num_tiles, kGrain, [&](int64_t begin, int64_t end) { decide(context, begin, end); });
  settle_groups(step, context.selections, threads);
}

// Workspace: counts [num_groups][kBins], then per group its candidates and keys. Counts are left zero.
void lay_out(const Step& step, std::vector<Selection>& selections) {
  auto* counts = static_cast<uint32_t*>(step.workspace);
  auto* rest = reinterpret_cast<std::byte*>(counts + step.num_groups * kBins);
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = selections[static_cast<size_t>(group)];
    const int64_t capacity = candidate_capacity(step.groups[group].numel);
    selection.window = whole_window(step.groups[group].numel, step.groups[group].kept);
    selection.counts = counts + group * kBins;
    selection.candidates = reinterpret_cast<Candidate*>(rest);
    selection.keys = reinterpret_cast<uint64_t*>(rest + capacity * static_cast<int64_t>(sizeof(Candidate)));
    rest += capacity * static_cast<int64_t>(sizeof(Candidate) + sizeof(uint64_t));
  }
}

}  // namespace

int64_t step_workspace_bytes(int64_t, int64_t num_groups, int64_t num_tiles) {
  const int64_t counts = num_groups * kBins * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t candidates = num_tiles * kTile / 32 + num_groups * kTile;
  return counts + candidates * static_cast<int64_t>(sizeof(Candidate) + sizeof(uint64_t));
}

void step(const Step& args, int threads) {
  if (args.found_inf && *args.found_inf != 0.0f) return;
  std::vector<Selection> selections(static_cast<size_t>(args.num_groups));
  lay_out(args, selections);
  Context context{args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, selections.data()};
  parallel_for(threads, args.num_tiles, kGrain, [&](int64_t begin, int64_t end) {
    switch (args.phase) {
      case Phase::lower: return update_lower(context, begin, end);
      case Phase::upper: return update_upper(context, begin, end);
      case Phase::joint: return update_joint(context, begin, end);
    }
  });
  if (args.phase != Phase::lower) project(context, threads);
  if (args.num_nonfinite) *args.num_nonfinite += context.nonfinite.load();
}

}  // namespace bip::cpu
