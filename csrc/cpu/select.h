// Exact top-k in one pass over the keys, as a rule: what step.cpp and topk.cpp share.
//
//   guess     a sample of n^(2/3) keys, taken as blocks of 32 neighbours at even distances, says between which keys the k-th largest lies.
//   pass      every entry is judged against that window: keys >= hi are kept, keys < lo are not, the few inside are listed as candidates.
//   settle    a histogram over the candidates finds the k-th key; they alone are judged again.
//   fallback  when the k-th key is not in the guessed window, or too many are, histograms over all keys narrow the window and the pass is
//             repeated.
//
// Keys are whole order keys, tie key included: a sample of them splits a million equal scores as well as a million different ones.
// Keys are unique (order_key.h), so the mask depends neither on the sample nor on the path nor on the order in which candidates were
// listed. A sample knows the scores, however far they moved; steps take one where they have no window from the step before (step.cpp).
#pragma once

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

#include "order_key.h"
#include "search.h"
#include "window.h"

namespace bip::cpu {

constexpr int kBlock = 32;      // entries judged at a time, one mask word
constexpr int kDigitBits = 12;  // of one histogram
constexpr int kBins = 1 << kDigitBits;

using Window = KeyWindow;

inline int digit_shift(const Window& window) { return bip::digit_shift(window, kDigitBits); }

// The counts of one digit of the keys in a window.
template <class Count>
struct Bins {
  static constexpr bool kCountsCrowded = true;
  const Count* counts;
  int digit_bits = kDigitBits;

  RankedBin of_rank(int64_t rank) const {
    int bin = (1 << digit_bits) - 1;
    int64_t above = 0;
    while (bin > 0 && rank - above > static_cast<int64_t>(counts[bin])) above += static_cast<int64_t>(counts[bin--]);
    return {bin, above, static_cast<int64_t>(counts[bin])};
  }
};

// Sampling every n^(1/3)-th block leaves n^(2/3) keys, which is where (Floyd and Rivest) reading the sample and sorting out the candidates
// cost about the same, and both cost little beside the pass.
inline int64_t sample_stride(int64_t n) { return std::max<int64_t>(1, static_cast<int64_t>(std::cbrt(static_cast<double>(n)))); }

// Room for the sample, then for the candidates: guess_window expects at most 5 * n^(2/3) + 64 * n^(1/3) of them.
inline int64_t list_capacity(int64_t n) {
  const double root = std::cbrt(static_cast<double>(n));
  return 8 * static_cast<int64_t>(root * root) + 1024;
}

// Calls visit(block) for the sampled ones of the blocks [begin, end): one in every `stride`, at a pseudo-random place in it, because a
// fixed distance could always meet the same columns of a matrix.
template <class Visit>
BIP_HD void for_sampled_blocks(int64_t begin, int64_t end, int64_t stride, const Visit& visit) {
  for (int64_t turn = begin / stride; turn * stride < end; ++turn) {
    const uint64_t place = (static_cast<uint64_t>(turn) * 0x9e3779b97f4a7c15ull >> 32) % static_cast<uint64_t>(stride);
    const int64_t block = turn * stride + static_cast<int64_t>(place);
    if (block >= begin && block < end) visit(block);
  }
}

// The window that probably holds the k-th of n keys, by a sample of `count` keys, which it reorders. A `count` above `capacity` means that
// the sample was not stored, and the window is then everything.
// The margin is 5 standard deviations of an independent sample, and one block. Neighbours are not independent, so a block tells less
// than 32 keys: 3 deviations would do for independent ones (right 997 times in 1000), the other 2 are for them.
inline Window guess_window(uint64_t* sample, int64_t count, int64_t capacity, int64_t n, int64_t k) {
  if (count > capacity) count = 0;
  Window window;
  window.wanted = k;
  window.inside = n;
  if (window.settled()) {
    close(window);
    return window;
  }
  const double fraction = static_cast<double>(k) / static_cast<double>(n);
  const double rank = fraction * static_cast<double>(count);
  const double margin = kBlock + 5.0 * std::sqrt(rank * (1.0 - fraction));
  const int64_t first = static_cast<int64_t>(std::floor(rank - margin)), last = static_cast<int64_t>(std::ceil(rank + margin));
  const auto larger = [](uint64_t a, uint64_t b) { return a > b; };
  uint64_t* rest = sample;
  if (first >= 0 && first < count) {
    std::nth_element(sample, sample + first, sample + count, larger);
    window.hi = sample[first];
    rest = sample + first + 1;
  }
  if (last < count) {
    std::nth_element(rest, sample + last, sample + count, larger);
    window.lo = sample[last];
  }
  return window;
}

// The threshold: the smallest kept key of an open window, `lo` of a closed one. keys[0, count) has all keys inside; `counts` is zero before
// and after.
inline uint64_t settle(const uint64_t* keys, int64_t count, Window window, uint32_t* counts) {
  constexpr int64_t kFew = 256;
  uint64_t few[kFew];
  while (window.inside > kFew) {
    const int shift = digit_shift(window);
    for (int64_t i = 0; i < count; ++i)
      if (keys[i] >= window.lo && keys[i] < window.hi) ++counts[(keys[i] - window.lo) >> shift];
    narrow(window, Bins<uint32_t>{counts});
    std::memset(counts, 0, kBins * sizeof(uint32_t));
  }
  if (window.inside == 0) return window.lo;
  uint64_t* end = std::copy_if(keys, keys + count, few, [&](uint64_t key) { return key >= window.lo && key < window.hi; });
  std::nth_element(few, few + (window.wanted - 1), end, [](uint64_t a, uint64_t b) { return a > b; });
  return few[window.wanted - 1];
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

BIP_HD int count_bits(uint32_t word) { return static_cast<int>(std::bitset<32>(word).count()); }

// The score of a key that is not negative.
BIP_HD float key_float(uint32_t key) {
  const uint32_t bits = key & 0x7fffffffu;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// Prefetches the two cache lines that 32 floats fill.
BIP_HD void prefetch_block(const void* data) {
#if defined(__GNUC__)
  __builtin_prefetch(data);
  __builtin_prefetch(static_cast<const char*>(data) + 64);
#else
  static_cast<void>(data);
#endif
}

// Up to 32 entries against a window, one bit each: key >= hi, and lo <= key < hi.
struct Verdict {
  uint32_t above, inside;
};

// Bit i of a mask word, as a table: shifts by a variable number are slow where vector units lack them.
inline constexpr uint32_t kBit[kBlock] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                                          1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
                                          1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
                                          1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

// order_key >= bound, in two halves and without branches, so that 32-bit lanes can do it. Score: float or score_key.
template <class Score>
BIP_HD uint32_t reaches(Score score, uint32_t tie, Score bound_score, uint32_t bound_tie) {
  return static_cast<uint32_t>(score > bound_score) |
         (static_cast<uint32_t>(score == bound_score) & static_cast<uint32_t>(tie >= bound_tie));
}

template <class Score>
BIP_HD Verdict judge_scores(const Score* scores, int count, uint32_t first_index, Score low, uint32_t low_tie, Score high,
                            uint32_t high_tie) {
  uint32_t above = 0, at_least = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t tie = tie_key(first_index + static_cast<uint32_t>(i));
    at_least |= reaches(scores[i], tie, low, low_tie) ? kBit[i] : 0u;
    above |= reaches(scores[i], tie, high, high_tie) ? kBit[i] : 0u;
  }
  return {above, at_least & ~above};
}

// A constant `count` becomes straight vector code.
BIP_HD Verdict judge(const float* scores, int count, uint32_t first_index, const Window& window) {
  const uint32_t low = static_cast<uint32_t>(window.lo >> 32), low_tie = static_cast<uint32_t>(window.lo);
  const uint32_t high = static_cast<uint32_t>(window.hi >> 32), high_tie = static_cast<uint32_t>(window.hi);
  // Bounds from 0 upwards are floats with their sign bit set, and floats compare as their keys do: -0 equals 0, a NaN is below every
  // bound, and a bound above infinity is a NaN, which nothing reaches.
  if (low >= score_key(0.0f)) return judge_scores(scores, count, first_index, key_float(low), low_tie, key_float(high), high_tie);
  uint32_t keys[kBlock];
  for (int i = 0; i < count; ++i) keys[i] = score_key(scores[i]);
  return judge_scores<uint32_t>(keys, count, first_index, low, low_tie, high, high_tie);
}

}  // namespace bip::cpu
