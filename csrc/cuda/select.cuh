// Exact top-k of any number of groups by windows of keys: what step.cu and topk.cu share.
//
//   window      [lo, hi) holds the k-th largest key: keys >= hi are kept, keys < lo are not; of the `inside` between, the largest `wanted`.
//   histogram   2048 bins over a window, in shared memory, merged into one per group; the block that brings a group's last entry picks
//               the bin of the k-th key. A bin whose scores are all equal (an atom: 0, 1, or any other) says so, and the window
//               becomes that one score: the next digit is then of the tie key and no pass is lost on equal bits.
//   candidates  keys inside a window that holds at most `capacity` are listed, and one block selects exactly among them.
#pragma once

#include "histogram.cuh"

namespace bip::cuda {

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
