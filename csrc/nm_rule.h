// N:M: of every M consecutive weights the N with the largest scores are kept, ties as everywhere by the index of the entry.
//
// Nothing has to be known about other weights, so a step decides it in the pass that moves the scores: an entry is kept when fewer than N of
// its M have a larger key.
#pragma once

#include <cstdint>

#include "hd.h"
#include "order_key.h"

namespace bip {

// Whether entry `other` beats entry `own`; scores in [0, 1] compare as their keys do. False for an entry and itself.
BIP_HD bool beats(float other, uint32_t other_tie, float own, uint32_t own_tie) {
  return static_cast<bool>(static_cast<int>(other > own) | (static_cast<int>(other == own) & static_cast<int>(other_tie > own_tie)));
}

}  // namespace bip
