// N:M masks of a tile, a mask word at a time: of every M neighbours the N with the largest keys are kept.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/update.h"

namespace bip::cpu {

// The mask word of 32 entries, in which every kOf neighbours keep `keep`. Nearly always it is the old word, and one comparison per group
// shows that: no entry that is not kept beats one that is kept. Otherwise entries are ranked: in each turn one entry of every group is
// compared with all of its group.
template <int kOf>
BIP_HD uint32_t keep_largest(const float* scores, const uint32_t* index, int keep, uint32_t old) {
  int64_t keys[kBlock], worst_kept[kBlock], best_other[kBlock];
  for (uint32_t i = 0; i < kBlock; ++i) {
    // With their first bit flipped, keys compare as signed numbers do; vector units have instructions for those.
    keys[i] = static_cast<int64_t>(order_key(scores[i], index[i]) ^ 0x8000000000000000ull);
    worst_kept[i] = old & kBit[i] ? keys[i] : INT64_MAX;
    best_other[i] = old & kBit[i] ? INT64_MIN : keys[i];
  }
  for (int half = kBlock / 2; half >= kBlock / kOf; half /= 2)
    for (int i = 0; i < half; ++i) {
      worst_kept[i] = std::min(worst_kept[2 * i], worst_kept[2 * i + 1]);
      best_other[i] = std::max(best_other[2 * i], best_other[2 * i + 1]);
    }
  int wrong = 0;
  for (int group = 0; group < kBlock / kOf; ++group) wrong |= best_other[group] > worst_kept[group];
  if (!wrong && count_bits(old) == keep * (kBlock / kOf)) return old;

  int64_t larger[kBlock] = {};
  for (int group = 0; group < kBlock; group += kOf)
    for (int j = 0; j < kOf; ++j)
      for (int i = 0; i < kOf; ++i) larger[group + i] += keys[group + j] > keys[group + i];
  uint32_t word = 0;
  for (int i = 0; i < kBlock; ++i) word |= larger[i] < keep ? kBit[i] : 0u;
  return word;
}

BIP_HD uint32_t keep_largest(const float* scores, const uint32_t* index, int keep, int of, uint32_t old) {
  switch (of) {
    case 2: return keep_largest<2>(scores, index, keep, old);
    case 4: return keep_largest<4>(scores, index, keep, old);
    case 8: return keep_largest<8>(scores, index, keep, old);
    case 16: return keep_largest<16>(scores, index, keep, old);
    default: return keep_largest<32>(scores, index, keep, old);
  }
}

// Mask and z of an N:M tile.
BIP_HD void keep_tile(const Tile& tile) {
  const Tensor& t = *tile.tensor;
  for (int i = 0; i < tile.count; i += kBlock) {
    const int64_t first = tile.begin + i;
    const int count = std::min(kBlock, tile.count - i);
    float last[kBlock] = {};
    const float* scores = t.scores + first;
    if (count < kBlock) {
      std::copy_n(scores, count, last);
      scores = last;
    }
    uint32_t index[kBlock];
    for (uint32_t j = 0; j < kBlock; ++j) index[j] = static_cast<uint32_t>(t.index + first) + j;
    if (t.row_length)
      for (int j = 0; j < count; ++j) index[j] = static_cast<uint32_t>(index_of(t, first + j));
    const uint32_t exist = count < kBlock ? (1u << count) - 1 : ~0u;
    const uint32_t old = t.mask[first / kBlock], word = keep_largest(scores, index, t.keep, t.of, old) & exist;
    if (word != old) flip(t, first, word, word ^ old);
  }
}

}  // namespace bip::cpu
