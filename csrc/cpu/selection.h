// Selection in one group while a step lasts, and its share of the workspace.
//
// Workspace: counts [num_groups][kBins], zero between steps; then for every group its keys and tiles, contents free. Some 12 bytes times
// 8 * n^(2/3) for a group of n entries: half a byte per weight at 10 million, less beyond.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
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
  Window window{};
  bool listed = false;  // all keys inside the window are among the candidates
  std::mutex mutex{};
  alignas(64) std::atomic<int64_t> found{0};  // keys listed, or that there was no room for; away from what every thread reads
  std::atomic<int64_t> above{0};              // keys judged to be >= window.hi

  // Lists what one tile holds.
  void list(const uint64_t* more, int count, int64_t tile) {
    const int64_t at = found.fetch_add(count, std::memory_order_relaxed);
    if (at + count > capacity) return;
    std::copy(more, more + count, keys + at);
    std::fill(tiles + at, tiles + at + count, static_cast<uint32_t>(tile));
  }

  // Too many keys inside to be listed.
  bool crowded() const { return !listed && window.inside > capacity; }
};

inline int64_t selection_bytes(int64_t num_groups, int64_t num_tiles) {
  if (num_groups == 0) return 0;
  // n^(2/3) is concave: no division of the entries into groups needs more room than the even one. 16 for what is rounded.
  const int64_t capacity = candidate_capacity(num_tiles * kTile / num_groups + 1) + 16;
  return num_groups *
         (kBins * static_cast<int64_t>(sizeof(uint32_t)) + capacity * static_cast<int64_t>(sizeof(uint64_t) + sizeof(uint32_t)));
}

inline std::vector<Selection> lay_out_selections(const Step& step) {
  std::vector<Selection> selections(static_cast<size_t>(step.num_groups));
  auto* counts = static_cast<uint32_t*>(step.workspace);
  auto* keys = reinterpret_cast<uint64_t*>(counts + step.num_groups * kBins);
  for (int64_t group = 0; group < step.num_groups; ++group) {
    Selection& selection = selections[static_cast<size_t>(group)];
    selection.numel = step.groups[group].numel;
    selection.kept = step.groups[group].kept;
    selection.stride = sample_stride(selection.numel);
    selection.capacity = candidate_capacity(selection.numel);
    selection.keys = keys;
    selection.tiles = reinterpret_cast<uint32_t*>(keys + selection.capacity);
    selection.counts = counts + group * kBins;
    keys += selection.capacity / 2 * 3;  // capacities are even
  }
  return selections;
}

// Counts of the group that a piece of work is in, handed over when the group changes.
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
