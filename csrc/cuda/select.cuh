// Exact top-k of any number of groups by windows of keys: what step.cu and topk.cu share.
//
//   window      [lo, hi) holds the k-th largest key: keys >= hi are kept, keys < lo are not; of the `inside` between, the largest `wanted`.
//   histogram   2048 bins over a window, in shared memory, merged into one per group; the block that brings a group's last entry picks
//               the bin of the k-th key. A bin whose scores are all equal (an atom: 0, 1, or any other) says so, and the window
//               becomes that one score: the next digit is then of the tie key and no pass is lost on equal bits.
//   candidates  keys inside a window that holds at most `capacity` are listed, and one block selects exactly among them.
//
// Determinism: integer atomics only, and every quantity that leaves a block is a count, a lattice join or a choice by unique keys.
#pragma once

#include "block.cuh"
#include "order_key.h"
#include "window.h"

namespace bip::cuda {

constexpr int kBins = 2048;
constexpr int kDigitBits = 11;
constexpr int kBinsPerThread = kBins / kThreads;

struct Window {
  uint64_t lo, hi;
  uint32_t wanted;  // 1 <= wanted < inside while the window is open
  uint32_t inside;  // keys in [lo, hi); 0: closed, lo == hi, and a key is kept when it is >= hi
};

// All or none of what is inside is kept: nothing is left to decide.
__device__ __forceinline__ Window closed_if_settled(Window window) {
  if (window.wanted != 0 && window.wanted != window.inside) return window;
  const uint64_t threshold = window.wanted == 0 ? window.hi : window.lo;
  return {threshold, threshold, 0, 0};
}

__device__ __forceinline__ Window whole_window(const Group& group) {
  return closed_if_settled({0, kNoKey, static_cast<uint32_t>(group.kept), static_cast<uint32_t>(group.numel)});
}

// The part of all `n` keys that holds the k-th, when `above` are at least `judged.hi` and `inside` are between its ends. All of it may be
// wanted: `narrow` closes such a window.
__device__ __forceinline__ Window window_of_kth(const Window& judged, int64_t n, int64_t k, int64_t above, int64_t inside) {
  const auto window = [](uint64_t lo, uint64_t hi, int64_t wanted, int64_t keys) {
    return Window{lo, hi, static_cast<uint32_t>(wanted), static_cast<uint32_t>(keys)};
  };
  if (k <= above) return window(judged.hi, kNoKey, k, above);
  if (k <= above + inside) return window(judged.lo, judged.hi, k - above, inside);
  return window(0, judged.lo, k - above - inside, n - above - inside);
}

// A key inside goes to bin (key - lo) >> window_shift.
__device__ __forceinline__ int window_shift(const Window& window) {
  const int bits = 64 - __clzll(static_cast<long long>(window.hi - 1 - window.lo));
  return bits > kDigitBits ? bits - kDigitBits : 0;
}

// The first digit, of scores that need not lie in the range it resolves: what is outside goes to the outermost bins.
struct FirstDigit {
  uint32_t base;  // score key of the lower end of bin 0
  int shift;      // of score keys
};
constexpr FirstDigit kScoreDigit{0x80000000u, 19};  // of scores in [0, 1]: bin 0 starts at the key of 0, that of 1 is in bin 2032
constexpr FirstDigit kAnyDigit{0, 32 - kDigitBits};

__device__ __forceinline__ int first_bin(FirstDigit digit, uint32_t key) {
  const uint32_t bin = (key > digit.base ? key - digit.base : 0u) >> digit.shift;
  return static_cast<int>(bin < kBins ? bin : kBins - 1);
}

// Which score a bin holds: nothing yet, one score (its key + 1), or several. It only ever moves up in that order, so any interleaving of
// joins, in any grouping into blocks, ends at the same value.
constexpr uint32_t kNoScore = 0;
constexpr uint32_t kManyScores = ~0u;  // score keys are at most that of inf, so key + 1 is below this

struct Histogram {
  uint32_t counts[kBins];  // keys seen in the bin; in global memory 0 between steps
  uint32_t scores[kBins];  // kNoScore exactly where counts is 0
};

struct Candidate {
  uint64_t key;
  int tile;        // where the entry is: a tile, and the place in it
  uint32_t entry;  // of a step: with kKeptNow where its mask bit is 1 until the candidates are settled
};
constexpr uint32_t kKeptNow = 1u << 31;

// Lists and histograms lie one after the other in the caller's memory, at multiples of 16 bytes. Their parts are moved by accesses of at most
// 8, and added to by atomics of 4.
static_assert(sizeof(Candidate) == 16 && alignof(Candidate) == 8 && sizeof(Histogram) % 16 == 0 && alignof(Histogram) == 4);
static_assert(alignof(Window) == 8 && alignof(Memory) == 8);

// What blocks add up about a group in one launch. All 0 between launches.
struct Progress {
  uint32_t seen;       // entries whose effects on histogram, list or mask have been published
  uint32_t above;      // of these, keys >= the window's hi
  uint32_t collected;  // candidates found; those beyond the list's capacity are not in it
};

constexpr uint32_t kFewKeys = kThreads;  // so many keys are ranked by comparing all with all, a thread for each

// One block's shared memory.
struct Room {
  Histogram histogram;  // of one group; empty whenever no group is being counted, but only from clear() on
  uint32_t entries;     // entries of the current group that this block has handled since it last published
  uint32_t above;       // of these, the ones above the window
  uint32_t warp_sums[kWarps];
  Window window;       // result of narrow()
  uint32_t rank;       // result of rank_of()
  uint32_t collected;  // candidates, while one block works alone
  bool last;           // result of publish_is_last()
  uint32_t num_few;    // keys in `few`
  uint64_t few[kFewKeys];
};

// Whole block. Before anything is counted.
__device__ inline void clear(Room& room) {
  for (int bin = thread_id(); bin < kBins; bin += kThreads) {
    room.histogram.counts[bin] = 0;
    room.histogram.scores[bin] = kNoScore;
  }
  if (thread_id() == 0) room.entries = room.above = 0;
  __syncthreads();
}

// A stale read is harmless: values only move up, and the compare-and-swap then fails and tells the newer value.
__device__ __forceinline__ void join_score(uint32_t& slot, uint32_t score) {
  uint32_t seen = *const_cast<volatile uint32_t*>(&slot);
  while (seen != score && seen != kManyScores) {
    const uint32_t was = atomicCAS(&slot, seen, seen == kNoScore ? score : kManyScores);
    if (was == seen) return;
    seen = was;
  }
}

__device__ __forceinline__ void count(Histogram& histogram, int bin, uint32_t score_key, uint32_t times = 1) {
  atomicAdd(&histogram.counts[bin], times);
  join_score(histogram.scores[bin], score_key + 1);
}

// A warp has handled a tile of the current group.
__device__ __forceinline__ void note_entries(Room& room, int entries) {
  if (lane_id() == 0) atomicAdd(&room.entries, static_cast<uint32_t>(entries));
}

// Whole block: adds up what it has counted, for a later launch.
__device__ inline void publish(Room& room, Progress& progress) {
  __syncthreads();
  if (thread_id() != 0) return;
  if (room.above) atomicAdd(&progress.above, room.above);
  room.entries = room.above = 0;
}

// Publishes the `room.entries` entries this block has handled, of `total`. True, in all threads, in the one block that completes them.
// Interleaving: every other block's effects come before its own atomicAdd on `seen` (block barrier, then fence, then add), and
// the last block's add reads from them all; its fence after it then orders their effects before whatever this block reads next.
// tests/kernels/test_memory_model.py reads the statements below, one a line, and runs them in every order that CUDA allows.
__device__ inline bool publish_is_last(Room& room, Progress& progress, uint32_t total) {
  __syncthreads();
  if (thread_id() == 0) {
    if (room.above) atomicAdd(&progress.above, room.above);
    fence();
    // A block without entries is not the last, not even where all are complete.
    room.last = room.entries != 0 && atomicAdd(&progress.seen, room.entries) + room.entries == total;
    room.entries = room.above = 0;
    if (room.last) {
      progress.seen = 0;  // no other block follows: all entries have been seen
      fence();
    }
  }
  __syncthreads();
  return room.last;
}

// Whole block: adds the block's histogram to the group's and empties it. A round trip to the group's takes a microsecond, so those of several
// bins of a thread are under way at once.
__device__ __forceinline__ void add_histogram(Room& room, Histogram& total) {
  constexpr int kTogether = 4;
  Histogram& mine = room.histogram;
  __syncthreads();
  for (int base = thread_id(); base < kBins; base += kTogether * kThreads) {
    uint32_t seen[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int bin = base + j * kThreads;
      if (mine.counts[bin] == 0) continue;
      atomicAdd(&total.counts[bin], mine.counts[bin]);
      seen[j] = atomicCAS(&total.scores[bin], kNoScore, mine.scores[bin]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int bin = base + j * kThreads;
      if (mine.counts[bin] == 0) continue;
      if (seen[j] != kNoScore && seen[j] != mine.scores[bin]) total.scores[bin] = kManyScores;  // the top of the order: it stays
      mine.counts[bin] = 0;
      mine.scores[bin] = kNoScore;
    }
  }
}

// Whole block, in an empty room: the group's histogram, which all blocks have added to.
__device__ __forceinline__ void load_histogram(Room& room, const Histogram& total) {
  uint32_t counts[kBinsPerThread];
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) counts[j] = total.counts[thread_id() + j * kThreads];
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    const int bin = thread_id() + j * kThreads;
    room.histogram.counts[bin] = counts[j];
    if (counts[j] != 0) counts[j] = total.scores[bin];
  }
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) room.histogram.scores[thread_id() + j * kThreads] = counts[j];  // kNoScore where there is none
  __syncthreads();
}

// Moves the block's histogram into the group's. In the block that completes the group the whole histogram is then in `room`, zero again in
// `total`, and the result is true; in every other block `room` is empty again.
__device__ __noinline__ inline bool merge(Room& room, Histogram& total, Progress& progress, uint32_t numel) {
  add_histogram(room, total);
  if (!publish_is_last(room, progress, numel)) return false;
  load_histogram(room, total);
  for (int bin = thread_id(); bin < kBins; bin += kThreads) {
    if (room.histogram.counts[bin] == 0) continue;
    total.counts[bin] = 0;
    total.scores[bin] = kNoScore;
  }
  return true;
}

// Sum of `value` over the threads before this one.
__device__ inline uint32_t sum_before(Room& room, uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane_id() >= distance) sum += other;
  }
  if (lane_id() == kWarp - 1) room.warp_sums[warp_id()] = sum;
  __syncthreads();
  for (int warp = 0; warp < warp_id(); ++warp) sum += room.warp_sums[warp];
  return sum - value;
}

// Each thread owns kBinsPerThread neighbouring bins of a histogram, thread 0 the highest: their sum, and that of all bins above.
struct Share {
  int highest;
  uint32_t above, mine;

  __device__ explicit Share(Room& room) : highest(kBins - 1 - thread_id() * kBinsPerThread), mine(0) {
    __syncthreads();
    for (int j = 0; j < kBinsPerThread; ++j) mine += room.histogram.counts[highest - j];
    above = sum_before(room, mine);
  }
  // Whether this thread owns the bin of the `rank`-th largest key, counted from 1.
  __device__ bool holds(int64_t rank) const { return rank > above && rank <= static_cast<int64_t>(above) + mine; }
};

// A bin, as the keys that it can hold.
struct Bin {
  uint64_t lo, hi;
  uint32_t above, inside;  // keys in higher bins, and in this one
};

// The bin of the `rank`-th key among those of a thread that holds it. `floor` <= window.lo: where bin 0 begins. `first`: where in the
// histogram bin 0 is, if it has several windows.
__device__ inline Bin bin_of(const Room& room, const Share& share, uint32_t rank, const Window& window, int shift, uint64_t floor,
                             int first = 0) {
  int place = share.highest;
  uint32_t above = share.above;
  while (rank - above > room.histogram.counts[place]) above += room.histogram.counts[place--];
  const int bin = place - first;
  const uint64_t width = static_cast<uint64_t>(bin + 1) << shift;  // from window.lo; in the topmost bin it may not fit
  Bin found{bin == 0 ? floor : window.lo + (static_cast<uint64_t>(bin) << shift),
            bin == kBins - 1 || width >= window.hi - window.lo ? window.hi : window.lo + width, above, room.histogram.counts[place]};
  if (room.histogram.scores[place] != kManyScores) {  // an atom
    const uint64_t begin = static_cast<uint64_t>(room.histogram.scores[place] - 1) << 32, end = begin + (1ull << 32);
    if (begin > found.lo) found.lo = begin;
    if (end < found.hi) found.hi = end;
  }
  return found;
}

// How far apart neighbouring keys inside a window are, on average.
__device__ __forceinline__ double distance_in(const Window& window) {
  return static_cast<double>(window.hi - window.lo) / (static_cast<double>(window.inside) + 1);
}

// Whole block: from an open window and the histogram of its keys, in bins of 2^shift, to the window of the k-th key's bin. Empties the
// histogram. With `memory` it also sets the ends of the next step's window, as far as this histogram shows the ranks they should have. For
// ranks beyond it, `distance` between neighbouring keys tells; where it is 0, the ends of an earlier, wider histogram stay.
__device__ inline Window narrow(Room& room, const Window& window, int shift, uint64_t floor, Memory* memory = nullptr,
                                double distance = 0) {
  const Share share(room);
  if (share.holds(window.wanted)) {  // true in exactly one thread: 1 <= wanted <= inside
    const Bin bin = bin_of(room, share, window.wanted, window, shift, floor);
    room.window = closed_if_settled({bin.lo, bin.hi, window.wanted - bin.above, bin.inside});
  }
  if (memory) {
    const int64_t upper = static_cast<int64_t>(window.wanted) - memory->half, lower = static_cast<int64_t>(window.wanted) + memory->half;
    if (share.holds(upper)) {
      const Bin bin = bin_of(room, share, static_cast<uint32_t>(upper), window, shift, floor);
      memory->hi = key_at(bin.lo, bin.hi, bin.inside, static_cast<uint32_t>(upper) - bin.above);
    }
    if (share.holds(lower)) {
      const Bin bin = bin_of(room, share, static_cast<uint32_t>(lower), window, shift, floor);
      memory->lo = key_at(bin.lo, bin.hi, bin.inside, static_cast<uint32_t>(lower) - bin.above);
    }
    if (distance > 0 && thread_id() == 0) {
      if (upper < 1) memory->hi = key_above(window.hi, distance * static_cast<double>(1 - upper));
      if (lower > window.inside) memory->lo = key_below(window.lo, distance * static_cast<double>(lower - window.inside));
    }
  }
  __syncthreads();
  for (int j = 0; j < kBinsPerThread; ++j) {
    room.histogram.counts[share.highest - j] = 0;
    room.histogram.scores[share.highest - j] = kNoScore;
  }
  __syncthreads();
  return room.window;
}

// The same for a histogram of first digits of scores, whose lowest bin also took what lies below it.
__device__ inline Window narrow_first(Room& room, const Group& group, Memory& memory) {
  Window window = whole_window(group);
  window.lo = static_cast<uint64_t>(kScoreDigit.base) << 32;
  return narrow(room, window, kScoreDigit.shift + 32, 0, &memory, distance_in(window));
}

// About how many of the keys that a histogram holds are at least `key`: exact but for the half of one bin.
__device__ inline uint32_t rank_of(Room& room, const Window& window, int shift, uint64_t key) {
  const Share share(room);
  if (thread_id() == 0) room.rank = key >= window.hi ? 0 : window.inside;
  __syncthreads();
  const int bin = key >= window.lo && key < window.hi ? static_cast<int>((key - window.lo) >> shift) : -1;
  if (bin >= 0 && bin <= share.highest && bin > share.highest - kBinsPerThread) {
    uint32_t above = share.above;
    for (int higher = share.highest; higher > bin; --higher) above += room.histogram.counts[higher];
    room.rank = above + room.histogram.counts[bin] / 2;
  }
  __syncthreads();
  return room.rank;
}

// Judges a score by its own bits, without the tie key. That decides all but the few whose score a key inside the window has too.
struct ScoreRange {
  uint32_t low, high;
  __device__ __forceinline__ explicit ScoreRange(const Window& window)
      : low(static_cast<uint32_t>(window.lo >> 32)), high(static_cast<uint32_t>((window.hi - 1) >> 32)) {}
};

__device__ __forceinline__ uint64_t full_key(uint32_t score_key, uint32_t index) {
  return (static_cast<uint64_t>(score_key) << 32) | tie_key(index);
}

enum class Verdict { dropped, kept, undecided };

__device__ __forceinline__ Verdict judge(const Window& window, const ScoreRange& range, uint32_t score_key, uint32_t index) {
  if (score_key > range.high) return Verdict::kept;
  if (score_key < range.low) return Verdict::dropped;
  const uint64_t key = full_key(score_key, index);
  return key >= window.hi ? Verdict::kept : key < window.lo ? Verdict::dropped : Verdict::undecided;
}

// Calls visit(key, number) for every candidate of a list, a thread for each; several loads are under way at once.
template <class Visit>
__device__ __forceinline__ void for_keys(const Candidate* list, uint32_t candidates, Visit visit) {
  constexpr int kTogether = 4;
  for (uint32_t base = thread_id(); base < candidates; base += kTogether * kThreads) {
    uint64_t keys[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) keys[j] = list[base + j * kThreads < candidates ? base + j * kThreads : base].key;
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (base + j * kThreads < candidates) visit(keys[j], base + j * kThreads);
  }
}

// Whole block: counts the keys of a list that are inside the window, in bins of 2^shift.
__device__ __forceinline__ void count_keys(Room& room, const Candidate* list, uint32_t candidates, const Window& window, int shift) {
  for_keys(list, candidates, [&](uint64_t key, uint32_t) {
    if (key >= window.lo && key < window.hi)
      count(room.histogram, static_cast<int>((key - window.lo) >> shift), static_cast<uint32_t>(key >> 32));
  });
}

// Whole block, an open window with at most kFewKeys keys inside, all of them in the list: the closed window at the k-th key.
__device__ inline Window close_over_few(Room& room, const Candidate* list, uint32_t candidates, const Window& window) {
  if (thread_id() == 0) room.num_few = 0;
  __syncthreads();
  for_keys(list, candidates, [&](uint64_t key, uint32_t) {
    if (key < window.lo || key >= window.hi) return;
    const uint32_t at = atomicAdd(&room.num_few, 1u);
    if (at < kFewKeys) room.few[at] = key;
  });
  __syncthreads();
  if (thread_id() < static_cast<int>(window.inside)) {
    const uint64_t mine = room.few[thread_id()];
    uint32_t larger = 0;
    for (uint32_t i = 0; i < window.inside; ++i) larger += room.few[i] > mine;
    if (larger == window.wanted - 1) room.window = {mine, mine, 0, 0};  // one thread: keys are unique
  }
  __syncthreads();
  return room.window;
}

// Whole block, over a list that has all keys inside an open window and may have others: finds the threshold, then calls repair(candidate,
// kept) for those of the list inside `unsettled`; the others have their final bit. Returns the closed window, whose hi is the threshold.
// The histogram is empty before and after.
template <class Repair>
__device__ inline Window settle(Room& room, const Candidate* list, uint32_t candidates, Window window, const Window& unsettled,
                                Repair repair) {
  while (window.inside > kFewKeys) {
    const int shift = window_shift(window);
    count_keys(room, list, candidates, window, shift);
    window = narrow(room, window, shift, window.lo);
  }
  if (window.inside != 0) window = close_over_few(room, list, candidates, window);
  for_keys(list, candidates, [&](uint64_t key, uint32_t number) {
    if (key >= unsettled.lo && key < unsettled.hi) repair(list[number], key >= window.hi);
  });
  return window;
}

}  // namespace bip::cuda
