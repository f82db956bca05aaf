// Exact top-k of any number of groups by narrowing a window of keys: what step.cu and topk.cu share.
//
//   window      [lo, hi) holds the k-th largest key: keys >= hi are kept, keys < lo are not; of the `inside` between, the largest `wanted`.
//   histogram   2048 bins over the window, in shared memory, merged into one per group; the block that brings a group's last entry picks
//               the bin of the k-th key. A bin whose scores are all equal (an atom: 0, 1, or any other) says so, and the window
//               becomes that one score: the next digit is then of the tie key and no pass is lost on equal bits.
//   candidates  once a window holds at most `capacity` keys, the apply pass lists them and the last block selects exactly among them.
//   fallback    a window that three digits could not make small enough (several huge atoms within 2^-15 of each other) is narrowed
//               further by that last block alone, which streams the group itself: slow, but exact, and without another launch.
//
// Determinism: integer atomics only, and every quantity that leaves a block is a count, a lattice join or a choice by unique keys.
#pragma once

#include "block.cuh"
#include "order_key.h"

namespace bip::cuda {

constexpr int kBins = 2048;
constexpr int kDigitBits = 11;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr uint64_t kNoKey = ~0ull;  // above every key: no score key is all ones
constexpr int kNarrowPasses = 2;    // after the first digit; with the apply pass an upper step is four launches

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

struct GroupState {
  Window window;       // valid between a pick and the end of the step, for groups that have more entries than `capacity`
  uint32_t seen;       // entries whose effects on histogram, list or mask have been published in this launch; 0 between launches
  uint32_t collected;  // candidates in the group's list; 0 between steps
};

struct Candidate {
  uint64_t key;
  int tile;  // where the entry is: a tile, and the place in it
  uint32_t entry;
};

// One block's shared memory.
struct Room {
  Histogram histogram;  // of one group; empty whenever no group is being counted
  uint32_t entries;     // entries of the current group that this block has handled since it last published
  uint32_t warp_sums[kWarps];
  Window window;  // result of narrow()
  bool last;      // result of publish_is_last()
};

__device__ __forceinline__ void clear(Room& room) {
  for (int bin = thread_id(); bin < kBins; bin += kThreads) {
    room.histogram.counts[bin] = 0;
    room.histogram.scores[bin] = kNoScore;
  }
  if (thread_id() == 0) room.entries = 0;
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

__device__ __forceinline__ void count(Histogram& histogram, int bin, uint32_t score_key) {
  atomicAdd(&histogram.counts[bin], 1u);
  join_score(histogram.scores[bin], score_key + 1);
}

// A warp has handled a tile of the current group.
__device__ __forceinline__ void note_entries(Room& room, int entries) {
  if (lane_id() == 0) atomicAdd(&room.entries, static_cast<uint32_t>(entries));
}

// Publishes the `room.entries` entries this block has handled for a group. True, in all threads, in the one block that completes it.
// Interleaving: every other block's effects come before its own atomicAdd on `seen` (block barrier, then fence, then add), and
// the last block's add reads from them all; its fence after it then orders their effects before whatever this block reads next.
__device__ __forceinline__ bool publish_is_last(Room& room, GroupState& state, uint32_t numel) {
  __syncthreads();
  if (thread_id() == 0) {
    __threadfence();
    const uint32_t before = atomicAdd(&state.seen, room.entries);
    room.last = before + room.entries == numel;
    room.entries = 0;
    if (room.last) state.seen = 0;  // nobody else comes: all entries have been seen
    __threadfence();
  }
  __syncthreads();
  return room.last;
}

// Moves the block's histogram into the group's. In the block that completes the group the whole histogram is then in `room`, zero again in
// `total`, and the result is true; in every other block `room` is empty again.
__device__ inline bool merge(Room& room, Histogram& total, GroupState& state, uint32_t numel) {
  __syncthreads();
  Histogram& mine = room.histogram;
  for (int bin = thread_id(); bin < kBins; bin += kThreads) {
    if (mine.counts[bin] == 0) continue;
    atomicAdd(&total.counts[bin], mine.counts[bin]);
    join_score(total.scores[bin], mine.scores[bin]);
    mine.counts[bin] = 0;
    mine.scores[bin] = kNoScore;
  }
  if (!publish_is_last(room, state, numel)) return false;
  for (int bin = thread_id(); bin < kBins; bin += kThreads) {
    mine.counts[bin] = total.counts[bin];
    mine.scores[bin] = total.scores[bin];
    total.counts[bin] = 0;
    total.scores[bin] = kNoScore;
  }
  return true;
}

// Sum of `value` over the threads before this one.
__device__ __forceinline__ uint32_t sum_before(Room& room, uint32_t value) {
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

// An open window and the histogram of what is inside, with bins of 2^shift keys -> the window of the k-th key's bin. Empties the histogram.
// Whole block; each thread owns kBinsPerThread neighbouring bins, thread 0 the highest. `floor` <= window.lo: where bin 0 begins.
__device__ inline Window narrow(Room& room, const Window& window, int shift, uint64_t floor) {
  __syncthreads();
  Histogram& histogram = room.histogram;
  const int highest = kBins - 1 - thread_id() * kBinsPerThread;
  uint32_t mine = 0;
  for (int j = 0; j < kBinsPerThread; ++j) mine += histogram.counts[highest - j];
  uint32_t above = sum_before(room, mine);
  if (above < window.wanted && window.wanted - above <= mine) {  // true in exactly one thread: wanted >= 1
    int bin = highest;
    while (window.wanted - above > histogram.counts[bin]) above += histogram.counts[bin--];
    const uint64_t lo = bin == 0 ? floor : window.lo + (static_cast<uint64_t>(bin) << shift);
    const uint64_t width = static_cast<uint64_t>(bin + 1) << shift;  // from window.lo; in the topmost bin it may not fit
    Window found{lo, bin == kBins - 1 || width >= window.hi - window.lo ? window.hi : window.lo + width, window.wanted - above,
                 histogram.counts[bin]};
    if (histogram.scores[bin] != kManyScores) {  // an atom
      const uint64_t first = static_cast<uint64_t>(histogram.scores[bin] - 1) << 32, end = first + (1ull << 32);
      if (first > found.lo) found.lo = first;
      if (end < found.hi) found.hi = end;
    }
    room.window = closed_if_settled(found);
  }
  for (int j = 0; j < kBinsPerThread; ++j) {
    histogram.counts[highest - j] = 0;
    histogram.scores[highest - j] = kNoScore;
  }
  __syncthreads();
  return room.window;
}

// The same for a histogram of first digits, whose lowest bin also took what lies below it.
__device__ inline Window narrow_first(Room& room, const Group& group, FirstDigit digit) {
  Window window = whole_window(group);
  window.lo = static_cast<uint64_t>(digit.base) << 32;
  return narrow(room, window, digit.shift + 32, 0);
}

// A score against a window by its own bits alone, which decides all but the few that share their score with a key inside.
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

// One warp counts what is inside the window among the `entries` <= kTile scores of a tile, whose first has `index` in its group.
template <bool kVector>
__device__ inline void count_inside(Room& room, const Window& window, int shift, const float* scores, int entries, uint32_t index) {
  const ScoreRange range(window);
  for (int base = lane_id() * kQuad; base < entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride;
      s[ahead] = load_quad<kVector>(scores + i, entries - i);
    }
#pragma unroll
    for (int j = 0; j < kAhead * kQuad; ++j) {
      const int i = base + j / kQuad * kStride + j % kQuad;
      const uint32_t score = score_key(s[j / kQuad].x[j % kQuad]);
      if ((!kVector && i >= entries) || judge(window, range, score, index + i) != Verdict::undecided) continue;
      count(room.histogram, static_cast<int>((full_key(score, index + i) - window.lo) >> shift), score);
    }
  }
}

__device__ inline void count_inside(Room& room, const Window& window, int shift, const float* scores, int entries, uint32_t index) {
  if (entries == kTile && quad_aligned(scores))
    count_inside<true>(room, window, shift, scores, entries, index);
  else
    count_inside<false>(room, window, shift, scores, entries, index);
}

__device__ __forceinline__ void collect(GroupState& state, Candidate* list, uint64_t key, int tile, uint32_t entry) {
  list[atomicAdd(&state.collected, 1u)] = {key, tile, entry};
}

// Run by the block that publishes a group's last entry in the apply pass, with the window all blocks applied: decides what is undecided.
//   count_all(window, shift)   counts the whole group's keys inside into `room`
//   apply_all(window)          applies the window to the whole group, collecting what stays undecided
//   repair(candidate, kept)    makes mask and z of one candidate right
template <class CountAll, class ApplyAll, class Repair>
__device__ inline void settle(Room& room, GroupState& state, Candidate* list, uint32_t capacity, Window window, CountAll count_all,
                              ApplyAll apply_all, Repair repair) {
  if (window.inside > capacity) {  // the fallback; until now nobody has collected anything
    clear(room);
    while (window.inside > capacity) {
      const int shift = window_shift(window);
      count_all(window, shift);
      window = narrow(room, window, shift, window.lo);
    }
    apply_all(window);
    __syncthreads();
  }
  clear(room);
  const uint32_t candidates = window.inside;  // == state.collected
  while (window.inside != 0) {
    const int shift = window_shift(window);
    for (uint32_t i = thread_id(); i < candidates; i += kThreads) {
      const uint64_t key = list[i].key;
      if (key >= window.lo && key < window.hi)
        count(room.histogram, static_cast<int>((key - window.lo) >> shift), static_cast<uint32_t>(key >> 32));
    }
    window = narrow(room, window, shift, window.lo);
  }
  for (uint32_t i = thread_id(); i < candidates; i += kThreads) repair(list[i], list[i].key >= window.hi);
  if (thread_id() == 0) state.collected = 0;
}

}  // namespace bip::cuda
