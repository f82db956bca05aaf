// Exact top-k by narrowing a window of keys: what step.cpp and topk.cpp share.
//
// A Window says what is known about the k-th largest key of a selection group: every key >= hi is kept, every key < lo is not, and of the
// `inside` keys in [lo, hi) the largest `wanted` are kept. A histogram over the window narrows it to one bin; when few enough keys are left
// inside they are collected as candidates and settled by std::nth_element. Keys are unique (order_key.h), so is the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

#include "order_key.h"

namespace bip::cpu {

constexpr int kBins = 4096;
constexpr int kFirstShift = 52;       // the first histogram has the upper 12 bits of a key, all of them score bits
constexpr uint64_t kNoKey = ~0ull;    // larger than every key: no score key is all ones

struct Window {
  uint64_t lo = 0, hi = kNoKey;
  int64_t wanted = 0;
  int64_t inside = 0;
  int shift = 64;  // log2 of the width, 64: everything

  bool settled() const { return wanted == 0 || wanted == inside; }
};

inline Window whole_window(int64_t n, int64_t k) {
  Window window;
  window.wanted = k;
  window.inside = n;
  return window;
}

// All or nothing of what is inside: closes the window at the right end.
inline void close(Window& window) {
  if (window.wanted == 0) window.lo = window.hi;
  if (window.wanted == window.inside) window.hi = window.lo;
  window.wanted = window.inside = 0;
}

inline int narrower_shift(const Window& window) { return window.shift == 64 ? kFirstShift : std::max(window.shift - 12, 0); }

// Narrows to the bin of the k-th key. counts[b] is the number of keys inside with (key - lo) >> narrower_shift == b.
inline void narrow(Window& window, const uint32_t* counts) {
  const int shift = narrower_shift(window);
  int bin = kBins - 1;
  while (bin > 0 && window.wanted > counts[bin]) window.wanted -= counts[bin--];
  window.lo += static_cast<uint64_t>(bin) << shift;
  window.hi = window.lo + (1ull << shift);
  window.inside = counts[bin];
  window.shift = shift;
}

// The smallest kept key of a window whose keys are all here. Reorders them.
inline uint64_t settle(uint64_t* keys, const Window& window) {
  uint64_t* kth = keys + (window.wanted - 1);
  std::nth_element(keys, kth, keys + window.inside, [](uint64_t a, uint64_t b) { return a > b; });
  return *kth;
}

BIP_HD int lowest_bit(uint32_t word) {
#if defined(_MSC_VER)
  unsigned long bit;
  _BitScanForward(&bit, word);
  return static_cast<int>(bit);
#else
  return __builtin_ctz(word);
#endif
}

// A few counters per bin, so that runs of equal scores do not wait for their own increments.
struct Histogram {
  static constexpr int kWays = 4;
  uint32_t counts[kWays][kBins];

  void clear() { std::memset(counts, 0, sizeof counts); }

  void add_to(uint32_t* total) const {
    for (int bin = 0; bin < kBins; ++bin) total[bin] += counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
  }
};

BIP_HD void count_first_digit(const float* scores, int count, Histogram& histogram) {
  uint32_t bins[32];
  for (int i = 0; i < count; ++i) bins[i] = score_key(scores[i]) >> (kFirstShift - 32);
  for (int i = 0; i < count; ++i) ++histogram.counts[i % Histogram::kWays][bins[i]];
}

// Up to 32 scores against a window by score bits alone: `above` are kept for sure, `maybe` share their score with some key of the window.
struct Verdict {
  uint32_t above, maybe;
};

BIP_HD Verdict judge(const float* scores, int count, const Window& window) {
  const uint32_t low = static_cast<uint32_t>(window.lo >> 32);
  const uint32_t high = static_cast<uint32_t>((window.hi - 1) >> 32);
  uint32_t above = 0, at_least = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t key = score_key(scores[i]);
    above |= static_cast<uint32_t>(key > high) << i;
    at_least |= static_cast<uint32_t>(key >= low) << i;
  }
  return {above, at_least & ~above};
}

}  // namespace bip::cpu
