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
#include <cmath>
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
  int64_t above;     // entries above the window
  int64_t inside;    // and inside
  int64_t crowded;   // ranks whose list had too little room
  int64_t reaching;  // candidates that reach the threshold of the step before
  int64_t counts[kBins];
};
static_assert(sizeof(Sums) == kShardSums * sizeof(int64_t), "the caller makes the rows");

// How far the selection of a group has come; the same on every rank, but for `found`.
struct Search {
  Window window;    // as narrow as it is by now
  uint64_t lo, hi;  // that of the next step
  int64_t found;    // candidates of this rank
  int64_t end;      // Threshold::end
  bool begun;       // the sums of the pass have been read
  bool listed;      // the window of the pass was right, so its candidates are all that is open
  bool settled;
  bool by_index;            // Selection
  bool bound_lo, bound_hi;  // `lo`, `hi` are set
};

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
  std::vector<int64_t> entries(static_cast<size_t>(step.num_groups));
  for (int64_t i = 0; i < step.num_tensors; ++i)
    if (step.tensors[i].group >= 0) entries[static_cast<size_t>(step.tensors[i].group)] += step.tensors[i].numel;
  layout.selections = std::vector<Selection>(static_cast<size_t>(step.num_groups));
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    const Search& search = layout.searches[group];
    selection.numel = step.groups[group].numel;
    selection.kept = step.groups[group].kept;
    selection.capacity = shard_capacity(entries[static_cast<size_t>(group)]);
    selection.keys = keys;
    selection.tiles = reinterpret_cast<uint32_t*>(keys + selection.capacity);
    selection.counts = layout.counts + group * kBins;
    selection.memory = layout.memories + group;
    selection.counters = step.counters + group;
    selection.window = search.window;
    selection.found = search.found;
    selection.listed = search.listed;
    selection.by_index = search.by_index;
    selection.counting = !search.settled && !search.listed;
    keys += selection.capacity / 2 * 3;
  }
  return layout;
}

Sums* row(int64_t* sums, int64_t group) { return reinterpret_cast<Sums*>(sums + group * kShardSums); }

// Counts the next digit of the listed candidates.
void count_candidates(const Step& step, const Selection& selection, Sums& sums) {
  const Window window = selection.window;
  const int shift = digit_shift(window);
  for (int64_t i = 0; i < selection.found; ++i) {
    const uint64_t key = selection.keys[i];
    if (key < window.lo || key >= window.hi || step.tensors[step.tile_tensor[selection.tiles[i]]].elsewhere) continue;
    ++sums.counts[selection.bin(key, candidate_index(step, selection, i), shift)];
  }
}

// The key at `rank`, counted from the largest, of those in the window, whose bins have these counts.
uint64_t key_at_rank(const Window& window, const int64_t* counts, int64_t rank) {
  const int shift = digit_shift(window);
  int bin = kBins - 1;
  while (bin > 0 && rank > counts[bin]) rank -= counts[bin--];
  const uint64_t lo = window.lo + (static_cast<uint64_t>(bin) << shift);
  const uint64_t hi = window.hi - lo > 1ull << shift ? lo + (1ull << shift) : window.hi;
  return key_at(lo, hi, static_cast<double>(counts[bin]), static_cast<double>(rank));
}

// Sets the ends of the next window from the counts in this one: `half` ranks to either side of the k-th key. Each narrower window says it
// better, as long as that rank is in it. Beyond the first window an end is guessed by the average distance of keys.
void bound(Search& search, int64_t half, const Window& window, const int64_t* counts) {
  const int64_t high = window.wanted - half, low = window.wanted + half;
  const double distance = static_cast<double>(window.hi - window.lo) / static_cast<double>(window.inside + 1);
  if (high >= 1)
    search.hi = key_at_rank(window, counts, high);
  else if (!search.bound_hi)
    search.hi = key_above(window.hi, distance * static_cast<double>(1 - high));
  if (low <= window.inside)
    search.lo = key_at_rank(window, counts, low);
  else if (!search.bound_lo)
    search.lo = key_below(window.lo, distance * static_cast<double>(low - window.inside));
  search.bound_hi = search.bound_lo = true;
}

// Narrows a window of one key, which several entries have, to the index that decides.
void narrow_by_index(Search& search, const int64_t* counts) {
  int bin = kBins - 1;
  while (bin > 0 && search.window.wanted > counts[bin]) search.window.wanted -= counts[bin--];
  search.end = kBins - bin;
  search.settled = true;
}

// Reads the sums of the pass.
void read_pass(Search& search, Memory& memory, const Selection& selection, const Sums& sums) {
  Counters& counters = *selection.counters;
  const bool known = memory.known != 0;
  Window window = search.window;
  window.wanted = selection.kept - sums.above;
  window.inside = sums.inside;
  const bool hit = judged(search.window, sums.above, sums.inside, selection.numel, selection.kept);
  const int64_t error = std::abs(sums.reaching - window.wanted);
  if (!hit) memory.known = 0;
  widen_window(memory, known && hit ? error : 0, selection.numel);
  search.begun = true;
  search.listed = hit && sums.crowded == 0;
  search.settled = search.window.lo == search.window.hi;
  if (!search.listed) {
    ++(!known ? counters.first : hit ? counters.crowded : counters.missed);
    return;
  }
  counters.candidates += sums.inside;
  bound(search, memory.half, window, sums.counts);
}

// Reads the sums over all ranks; the same on every rank.
void read(Search& search, Memory& memory, const Selection& selection, const Sums& sums) {
  if (search.settled) return;
  if (!search.begun) {
    read_pass(search, memory, selection, sums);
    if (!search.listed || search.settled) return;
  } else if (search.by_index) {
    narrow_by_index(search, sums.counts);
    return;
  } else {
    bound(search, memory.half, search.window, sums.counts);
  }
  narrow(search.window, sums.counts);
  search.settled = search.window.lo == search.window.hi;
  search.by_index = !search.settled && search.window.hi - search.window.lo == 1;
}

// What this rank has counted in the pass.
void count_pass(const Step& step, const Selection& selection, Search& search, Sums& sums) {
  search.found = selection.found;
  sums.above = selection.above;
  sums.inside = selection.found - selection.elsewhere;
  sums.crowded = selection.found > selection.capacity;
  if (sums.crowded) return;
  for (int64_t i = 0; i < selection.found; ++i)
    sums.reaching += selection.keys[i] >= selection.memory->threshold && !step.tensors[step.tile_tensor[selection.tiles[i]]].elsewhere;
  count_candidates(step, selection, sums);
}

Search opened(const Selection& selection) {
  const Memory& memory = *selection.memory;
  Search search{};
  if (selection.kept > 0 && selection.kept < selection.numel) {
    if (memory.known) search.window = {memory.lo, memory.hi, 0, 0};
  } else {
    search.window.lo = search.window.hi = selection.kept ? 0 : kNoKey;
    search.begun = search.listed = search.settled = true;
  }
  return search;
}

}  // namespace

int64_t shards_workspace_bytes(int64_t num_groups, int64_t num_scored_tiles) {
  const int64_t capacity = num_groups * 1026 + num_scored_tiles * kTile / 128;
  return num_groups * static_cast<int64_t>(sizeof(Memory) + sizeof(Search) + kBins * sizeof(uint32_t)) +
         capacity * static_cast<int64_t>(sizeof(uint64_t) + sizeof(uint32_t));
}

void shards_score(const Step& args, int threads) {
  const int64_t nonfinite = sum_units(args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, threads);
  if (args.phase == Phase::upper && args.num_nonfinite) *args.num_nonfinite += nonfinite;  // in a joint step the update counts them
  score_units(args, threads);
}

void shards_offer(const Step& args, int64_t* keys, int32_t lifted) {
  for (int64_t i = 0; i < args.num_unit_sets; ++i) {
    const UnitSet& set = args.unit_sets[i];
    keys[i] = static_cast<int64_t>((lifted < set.min_kept ? best_unit(args, set) : 0) ^ kSign);
  }
}

void shards_lift(const Step& args, const int64_t* keys) {
  for (int64_t i = 0; i < args.num_unit_sets; ++i) lift_unit(args, args.unit_sets[i], static_cast<uint64_t>(keys[i]) ^ kSign);
}

void shards_begin(const Step& args, int64_t* sums, int threads) {
  std::memset(sums, 0, static_cast<size_t>(args.num_groups * kShardSums) * sizeof(int64_t));
  Layout layout = lay_out(args);
  Context context{args, args.grad_scale ? 1.0f / *args.grad_scale : 1.0f, layout.selections.data(), stream_width(args.num_tiles)};
  for (int64_t group = 0; group < args.num_groups; ++group) {
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    layout.searches[group] = opened(selection);
    selection.window = layout.searches[group].window;
    selection.found = 0;
    selection.by_index = false;
    ++selection.counters->steps;
  }
  update_and_judge(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Selection& selection = layout.selections[static_cast<size_t>(group)];
    selection.counters->flips += selection.flips;
    if (!layout.searches[group].settled) count_pass(args, selection, layout.searches[group], *row(sums, group));
  }
  if (args.num_nonfinite) *args.num_nonfinite += context.nonfinite.load();
}

bool shards_narrow(const Step& args, int64_t* sums, int threads) {
  {
    Layout before = lay_out(args);
    for (int64_t group = 0; group < args.num_groups; ++group)
      read(before.searches[group], before.memories[group], before.selections[static_cast<size_t>(group)], *row(sums, group));
  }
  std::memset(sums, 0, static_cast<size_t>(args.num_groups * kShardSums) * sizeof(int64_t));
  Layout layout = lay_out(args);
  bool open = false, counting = false;
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Search& search = layout.searches[group];
    open = open || !search.settled;
    counting = counting || layout.selections[static_cast<size_t>(group)].counting;
    if (search.listed && !search.settled) count_candidates(args, layout.selections[static_cast<size_t>(group)], *row(sums, group));
  }
  if (!counting) return open;
  Context context{args, 1.0f, layout.selections.data(), 0};
  std::memset(layout.counts, 0, static_cast<size_t>(args.num_groups * kBins) * sizeof(uint32_t));
  count_inside(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group)
    if (layout.selections[static_cast<size_t>(group)].counting) std::copy_n(layout.counts + group * kBins, kBins, row(sums, group)->counts);
  return open;
}

void shards_end(const Step& args, int threads) {
  Layout layout = lay_out(args);
  Context context{args, 1.0f, layout.selections.data(), 0};
  if (!std::all_of(layout.searches, layout.searches + args.num_groups, [](const Search& search) { return search.listed; }))
    judge_again(context, threads);
  for (int64_t group = 0; group < args.num_groups; ++group) {
    const Search& search = layout.searches[group];
    Selection& selection = layout.selections[static_cast<size_t>(group)];
    judge_candidates(args, selection, {search.window.lo, search.by_index ? search.end : INT64_MAX}, threads);
    selection.counters->threshold = key_score(static_cast<uint32_t>(search.window.lo >> 32));
    Memory& memory = layout.memories[group];
    memory.known = search.bound_lo && search.lo < search.hi;
    memory.lo = search.lo;
    memory.hi = search.hi;
    memory.threshold = search.window.lo;
  }
  spread_units(args, threads);
  if (args.phase != Phase::upper) count_steps(args);
}

}  // namespace bip::cpu
