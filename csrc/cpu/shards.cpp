// Upper and joint steps whose selection groups have entries on several ranks.
//
//   score    every rank scores its units; of those that a set must keep whatever the scores of others, all ranks offer their best, and the
//            one that is best of all is lifted;
//   begin    the pass of step.cpp: every rank moves its entries, judges them by the window that all ranks share, and lists its candidates;
//   narrow   with the sums over all ranks, each finds the same bin of the k-th key, and counts the next digit of its candidates inside;
//   end      each gives its candidates their bits.
// A window that was wrong is replaced by what the sums make certain, digits are then counted over all scores, and all are judged again.
// What the ranks add up is a few counts and one histogram a group, however many entries there are. Whatever a window decides about the
// time, the mask depends on the keys alone, so the number of ranks and the way in which they share the entries change no bit of it.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "bip.h"
#include "cpu/pass.h"
#include "cpu/select.h"
#include "cpu/selection.h"
#include "cpu/stream.h"
#include "cpu/units.h"

namespace bip::cpu {
namespace {

constexpr uint64_t kSign = 1ull << 63;  // keys without it are compared as signed numbers

// A group's row of `sums`.
struct Sums {
  PassSums& pass;
  int64_t* counts;
};
constexpr int64_t kFirstCount = sizeof(PassSums) / sizeof(int64_t);
static_assert(offsetof(PassSums, absent) == kShardAbsent * sizeof(int64_t), "the caller writes it");

int digit_bits(const Step& step) { return digit_bits_of(step.num_groups, kDigitBits); }
size_t bytes_of_sums(const Step& step) { return static_cast<size_t>(step.num_groups * shard_sums(step.num_groups)) * sizeof(int64_t); }

struct Layout {
  Memory* memories;
  Search* searches;
  uint32_t* counts;
  std::vector<Selection> selections;
};

// Room for as many candidates as a group of this rank's own entries has on one device.
int64_t shard_capacity(int64_t entries) { return (candidate_capacity(entries) + 1) / 2 * 2; }

Layout lay_out(const Step& step) {
  Layout layout;
  layout.memories = static_cast<Memory*>(step.workspace);
  layout.searches = reinterpret_cast<Search*>(layout.memories + step.num_groups);
  layout.counts = reinterpret_cast<uint32_t*>(layout.searches + step.num_groups);
  auto* keys = reinterpret_cast<uint64_t*>(layout.counts + step.num_groups * kBins);
  layout.selections = std::vector<Selection>(static_cast<size_t>(step.num_groups));
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    const Search& search = layout.searches[group];
    selection.numel = step.groups[group].numel;
    selection.kept = step.groups[group].kept;
    selection.capacity = shard_capacity(step.groups[group].entries);
    selection.keys = keys;
    selection.tiles = reinterpret_cast<uint32_t*>(keys + selection.capacity);
    selection.counts = layout.counts + group * kBins;
    selection.digit_bits = digit_bits(step);
    selection.memory = layout.memories + group;
    selection.counters = step.counters + group;
    selection.window = search.window;
    selection.found = search.found;
    selection.listed = search.listed;
    selection.by_index = search.by_index;
    selection.counting = search.counting();
    keys += selection.capacity / 2 * 3;
  }
  return layout;
}

Sums row(const Step& step, int64_t* sums, int64_t group) {
  int64_t* first = sums + group * shard_sums(step.num_groups);
  return {*reinterpret_cast<PassSums*>(first), first + kFirstCount};
}

// Counts the next digit of the listed candidates.
void count_candidates(const Step& step, const Selection& selection, const Sums& sums) {
  const Window window = selection.window;
  const Digit digit = selection.digit();
  for (int64_t i = 0; i < selection.found; ++i) {
    const uint64_t key = selection.keys[i];
    if (key < window.lo || key >= window.hi || step.tensors[step.tile_tensor[selection.tiles[i]]].elsewhere) continue;
    ++sums.counts[digit.bin(key, candidate_index(step, selection, i), 1 << selection.digit_bits)];
  }
}

// What this rank has counted in the pass.
void count_pass(const Step& step, const Selection& selection, Search& search, const Sums& sums) {
  search.found = selection.found;
  report_in(sums.pass, *selection.memory);
  sums.pass.above = selection.above;
  sums.pass.inside = selection.found - selection.elsewhere;
  sums.pass.crowded = selection.found > selection.capacity;
  if (sums.pass.crowded) return;
  for (int64_t i = 0; i < selection.found; ++i)
    sums.pass.reaching += selection.keys[i] >= selection.memory->threshold && !step.tensors[step.tile_tensor[selection.tiles[i]]].elsewhere;
  count_candidates(step, selection, sums);
}

}  // namespace

int64_t shard_sums(int64_t num_groups) { return kFirstCount + (1ll << digit_bits_of(num_groups, kDigitBits)); }

int64_t shards_workspace_bytes(int64_t num_groups, int64_t num_scored_tiles) {
  const int64_t capacity = num_groups * 1026 + num_scored_tiles * kTile / 128;
  return num_groups * static_cast<int64_t>(sizeof(Memory) + sizeof(Search) + kBins * sizeof(uint32_t)) +
         capacity * static_cast<int64_t>(sizeof(uint64_t) + sizeof(uint32_t));
}

void shards_score(const Step& args, int threads) {
  if (skipped(args)) return;
  const int64_t nonfinite = sum_units(args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, threads);
  if (args.phase == Phase::upper && args.num_nonfinite) *args.num_nonfinite += nonfinite;  // in a joint step the update counts them
  score_units(args, threads);
}

void shards_offer(const Step& args, int64_t* keys, int32_t lifted) {
  if (skipped(args)) return;
  for (int64_t i = 0; i < args.num_unit_sets; ++i) {
    const UnitSet& set = args.unit_sets[i];
    keys[i] = static_cast<int64_t>((lifted < set.min_kept ? best_unit(args, set) : 0) ^ kSign);
  }
}

void shards_lift(const Step& args, const int64_t* keys) {
  if (skipped(args)) return;
  for (int64_t i = 0; i < args.num_unit_sets; ++i) lift_unit(args, args.unit_sets[i], static_cast<uint64_t>(keys[i]) ^ kSign);
}

void shards_begin(const Step& args, int64_t* sums, int threads) {
  std::memset(sums, 0, bytes_of_sums(args));
  if (skipped(args)) return;
  Layout layout = lay_out(args);
  Context context{args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, layout.selections.data(), stream_width(args.num_tiles)};
  for (int64_t group = 0; group < args.num_groups; ++group) {
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    layout.searches[group] = opened(*selection.memory, args.groups[group]);
    selection.window = layout.searches[group].window;
    selection.found = 0;
    selection.by_index = false;
    ++selection.counters->steps;
  }
  update_and_judge(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Selection& selection = layout.selections[static_cast<size_t>(group)];
    selection.counters->flips += selection.flips;
    if (!layout.searches[group].settled) count_pass(args, selection, layout.searches[group], row(args, sums, group));
  }
  if (args.num_nonfinite) *args.num_nonfinite += context.nonfinite.load();
}

bool shards_narrow(const Step& args, int64_t* sums, int threads) {
  if (skipped(args)) return false;
  {
    Layout before = lay_out(args);
    for (int64_t group = 0; group < args.num_groups; ++group) {
      const Sums own = row(args, sums, group);
      read_sums(before.searches[group], before.memories[group], args.counters[group], args.groups[group], own.pass,
                Bins<int64_t>{own.counts, digit_bits(args)});
    }
  }
  std::memset(sums, 0, bytes_of_sums(args));
  Layout layout = lay_out(args);
  bool open = false, counting = false;
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Search& search = layout.searches[group];
    open = open || !search.settled;
    counting = counting || layout.selections[static_cast<size_t>(group)].counting;
    if (search.listed && !search.settled) count_candidates(args, layout.selections[static_cast<size_t>(group)], row(args, sums, group));
  }
  if (!counting) return open;
  Context context{args, 1.0f, layout.selections.data(), 0};
  std::memset(layout.counts, 0, static_cast<size_t>(args.num_groups * kBins) * sizeof(uint32_t));
  count_inside(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group)
    if (layout.selections[static_cast<size_t>(group)].counting)
      std::copy_n(layout.counts + group * kBins, 1 << digit_bits(args), row(args, sums, group).counts);
  return open;
}

void shards_end(const Step& args, int threads) {
  if (skipped(args)) return;
  Layout layout = lay_out(args);
  Context context{args, 1.0f, layout.selections.data(), 0};
  if (!std::all_of(layout.searches, layout.searches + args.num_groups, [](const Search& search) { return search.listed; }))
    judge_again(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Search& search = layout.searches[group];
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    if (!search.given_up) judge_candidates(args, selection, search.threshold(), threads);
    remember(search, layout.memories[group], args.counters[group]);
  }
  spread_units(args, threads);
  if (args.phase != Phase::upper) count_steps(args);
}

}  // namespace bip::cpu
