// Who is larger: score -> ordered key, and the order of equal scores. The only place that decides.
//
// Larger score first; equal scores by (index * 2654435761) mod 2^32, lowest first. The multiplier is odd, so the map is a bijection of
// 32-bit indices: keys are unique, and there is exactly one top-k. Many scores are exactly 0 or 1; if the plain index broke their ties,
// whole layers would be emptied. In a group of 2^32 entries or more, entries of one key go by index / 2^32, lowest first.
#pragma once

#include <cstdint>

#include "bip.h"
#include "hd.h"
#include "update_rule.h"

namespace bip {

// Monotone in the score: NaN < -inf < ... < -0 = +0 < ... < inf.
BIP_HD uint32_t score_key(float score) {
  const uint32_t bits = float_bits(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t ordered = (bits & 0x80000000u) && magnitude ? ~bits : magnitude | 0x80000000u;
  return magnitude > 0x7f800000u ? 0u : ordered;
}

// The score that has this key. A key that no score has counts as that of the nearer infinity.
BIP_HD float key_score(uint32_t key) {
  key = key < 0x007fffffu ? 0x007fffffu : key > 0xff800000u ? 0xff800000u : key;
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
#endif
}

// Larger for the entry that wins a tie.
BIP_HD uint32_t tie_key(uint32_t index) { return ~(index * 2654435761u); }

// The index whose tie key this is: 244002641 is the inverse of the multiplier mod 2^32.
BIP_HD uint32_t index_of_tie_key(uint32_t key) { return ~key * 244002641u; }

// The place of an entry in the tie order.
BIP_HD int64_t index_of(const Tensor& tensor, int64_t entry) {
  return tensor.index + (tensor.row_length ? entry / tensor.row_length * tensor.row_stride + entry % tensor.row_length : entry);
}

// Unique per entry; an entry is kept when its key is at least the k-th largest.
BIP_HD uint64_t order_key(float score, uint32_t index) { return (static_cast<uint64_t>(score_key(score)) << 32) | tie_key(index); }

}  // namespace bip
