// N:M masks of a tile (nm_rule.h), a mask word at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/update.h"
#include "nm_rule.h"

namespace bip::cpu {

// The mask word of 32 entries, of every kOf of which `keep` are kept. The entry at distance i ^ d takes every other place of a group.
template <int kOf>
BIP_HD uint32_t keep_largest(const float* scores, uint32_t index, int keep) {
  uint32_t ties[kBlock], word = 0;
  int larger[kBlock] = {};
  for (uint32_t i = 0; i < kBlock; ++i) ties[i] = tie_key(index + i);
  for (int d = 1; d < kOf; ++d)
    for (int i = 0; i < kBlock; ++i) larger[i] += beats(scores[i ^ d], ties[i ^ d], scores[i], ties[i]);
  for (int i = 0; i < kBlock; ++i) word |= larger[i] < keep ? kBit[i] : 0u;
  return word;
}

BIP_HD uint32_t keep_largest(const float* scores, uint32_t index, int keep, int of) {
  switch (of) {
    case 2: return keep_largest<2>(scores, index, keep);
    case 4: return keep_largest<4>(scores, index, keep);
    case 8: return keep_largest<8>(scores, index, keep);
    case 16: return keep_largest<16>(scores, index, keep);
    default: return keep_largest<32>(scores, index, keep);
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
    const uint32_t exist = count < kBlock ? (1u << count) - 1 : ~0u;
    const uint32_t old = t.mask[first / kBlock], word = keep_largest(scores, static_cast<uint32_t>(first), t.keep, t.of) & exist;
    if (word != old) flip(t, first, word, word ^ old);
  }
}

}  // namespace bip::cpu
