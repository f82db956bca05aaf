// The selection of one group during a step, what it remembers for the next step, and its share of the workspace.
//
// Workspace: memories [num_groups]; counts [num_groups][kBins], zero between steps; then for every group its keys and tiles, contents free.
// Some 12 bytes times 8 * n^(2/3) for a group of n entries: half a byte per weight at 10 million, less beyond.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "bip.h"
#include "cpu/select.h"

namespace bip::cpu {

struct Selection {
  int64_t numel, kept;
  int64_t stride;    // of the sample, in blocks
  int64_t capacity;  // of `keys` and `tiles`
  uint64_t* keys;    // the sample, then the candidates; those of one tile lie together
  uint32_t* tiles;   // the tile of each
  uint32_t* counts;  // [kBins] of one digit, zero between passes; guarded by `mutex`
  Memory* memory;    // from step to step
  Counters* counters;
  Window window{};
  Window judged{};        // the window that the candidates were judged by
  bool sampled = false;   // memory had no window, so the step began with a sample
  bool sample = false;    // a sample must be taken
  bool listed = false;    // all keys inside the window are among the candidates
  bool counting = false;  // the next digit of the keys inside must be counted
  int digit_bits = kDigitBits;
  bool by_index = false;  // and this digit is index / 2^32: the window has one key
  std::mutex mutex{};
  alignas(64) std::atomic<int64_t> found{0};  // keys listed, and those without room in the list; apart from what every thread reads
  std::atomic<int64_t> above{0};              // keys judged to be >= window.hi
  std::atomic<int64_t> elsewhere{0};          // of the keys found, those that another rank counts
  std::atomic<int64_t> flips{0};              // mask entries changed

  // Lists what one tile holds.
  void list(const uint64_t* more, int count, int64_t tile) {
    const int64_t at = found.fetch_add(count, std::memory_order_relaxed);
    if (at + count > capacity) return;
    std::copy(more, more + count, keys + at);
    std::fill(tiles + at, tiles + at + count, static_cast<uint32_t>(tile));
  }

  Digit digit() const { return {window.lo, bip::digit_shift(window, digit_bits), by_index}; }

  // Too many keys inside to be listed.
  bool crowded() const { return !listed && window.inside > capacity; }
};

inline int64_t selection_bytes(int64_t num_groups, int64_t num_tiles) {
  if (num_groups == 0) return 0;
  // n^(2/3) is concave, so groups of equal size need the most room of all divisions. 16 more for rounding.
  const int64_t capacity = list_capacity(num_tiles * kTile / num_groups + 1) + 16;
  return num_groups * (static_cast<int64_t>(sizeof(Memory)) + kBins * static_cast<int64_t>(sizeof(uint32_t)) +
                       capacity * static_cast<int64_t>(sizeof(uint64_t) + sizeof(uint32_t)));
}

inline std::vector<Selection> lay_out_selections(const Step& step) {
  std::vector<Selection> selections(static_cast<size_t>(step.num_groups));
  auto* memories = static_cast<Memory*>(step.workspace);
  auto* counts = reinterpret_cast<uint32_t*>(memories + step.num_groups);
  auto* keys = reinterpret_cast<uint64_t*>(counts + step.num_groups * kBins);
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = selections[static_cast<size_t>(group)];
    selection.numel = step.groups[group].numel;
    selection.kept = step.groups[group].kept;
    selection.stride = sample_stride(selection.numel);
    selection.capacity = list_capacity(selection.numel);
    selection.keys = keys;
    selection.tiles = reinterpret_cast<uint32_t*>(keys + selection.capacity);
    selection.counts = counts + group * kBins;
    selection.memory = memories + group;
    selection.counters = step.counters + group;
    keys += selection.capacity / 2 * 3;  // capacities are even
  }
  return selections;
}

// The `rank`-th largest of the keys in the window; a rank beyond them is extrapolated by their average distance.
inline uint64_t key_of_rank(const Window& window, std::vector<uint64_t>& keys, int64_t rank) {
  const int64_t count = static_cast<int64_t>(keys.size());
  const double distance = static_cast<double>(window.hi - window.lo) / static_cast<double>(count + 1);
  if (rank < 1) return key_above(window.hi, distance * static_cast<double>(1 - rank));
  if (rank > count) return key_below(window.lo, distance * static_cast<double>(rank - count));
  std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.end(), [](uint64_t a, uint64_t b) { return a > b; });
  return keys[static_cast<size_t>(rank - 1)];
}

// Sets the window of the next step from the candidates and the threshold found among them. Its ends are whole keys of candidates, tie keys
// included, so it may begin and end among equal scores.
inline void remember(Selection& selection, uint64_t threshold) {
  const Window& judged = selection.judged;
  Memory& memory = *selection.memory;
  if (selection.found == 0) {  // no key is near the threshold, so nothing says how wide a window must be
    memory.known = 0;
    return;
  }
  std::vector<uint64_t> keys(selection.keys, selection.keys + selection.found);
  const int64_t wanted = selection.kept - selection.above;
  const int64_t rank = std::count_if(keys.begin(), keys.end(), [&](uint64_t key) { return key >= memory.threshold; });
  const int64_t error = memory.threshold ? std::abs(rank - wanted) : 0;
  widen_window(memory, error, selection.numel);
  const int64_t half = memory.half;
  memory.hi = key_of_rank(judged, keys, wanted - half);
  memory.lo = key_of_rank(judged, keys, wanted + half);
  // A threshold that moves far is better found by a sample.
  const bool seen = memory.threshold == 0 || (memory.threshold >= judged.lo && memory.threshold <= judged.hi);
  memory.known = seen && 2 * error <= half;
  memory.threshold = threshold;
}

// Counts that a piece of work collects in its current group; they are added to the group's when the group changes.
class Counter {
 public:
  explicit Counter(Selection* selections) : selections_(selections) {}
  ~Counter() { hand_over(); }
  Counter(const Counter&) = delete;
  Counter& operator=(const Counter&) = delete;

  uint32_t* of(int32_t group) {
    if (group != group_) {
      hand_over();
      std::memset(counts_, 0, sizeof counts_);
      group_ = group;
    }
    return counts_;
  }

 private:
  void hand_over() {
    if (group_ < 0) return;
    Selection& selection = selections_[group_];
    std::lock_guard<std::mutex> lock(selection.mutex);
    for (int bin = 0; bin < kBins; ++bin) selection.counts[bin] += counts_[bin];
  }

  Selection* selections_;
  int32_t group_ = -1;
  uint32_t counts_[kBins];
};

}  // namespace bip::cpu
