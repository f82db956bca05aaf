// What blocks count of a group's keys: windows of keys, the bins over them, candidates, and how blocks put together what each has counted.
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

}  // namespace bip::cuda
