// The window: what a selection group remembers of one step, so that the next can decide nearly all its entries in one pass.
//
// The threshold (the smallest kept key) hardly moves from step to step. A window of keys around the last one decides every entry outside
// of it at once; the few inside are listed and settled exactly. It reaches `half` ranks to either side of the threshold, four times
// as far as the threshold has been moving lately. Whether it was right costs time and never changes a mask.
#pragma once

#include <cstdint>

#include "hd.h"

namespace bip {

constexpr uint64_t kNoKey = ~0ull;  // above every key: no score key is all ones

// All zero: nothing is known yet.
struct Memory {
  uint64_t lo, hi;     // the window of the next step
  uint64_t threshold;  // of the last step: keys from here upwards were kept
  uint32_t spread;     // the most ranks that the threshold moved in a recent step; decays by an eighth in every step
  uint32_t half;       // ranks that the window was meant to reach to either side
  uint32_t known;      // 0: there is no window
  uint32_t reserved;
};

// Room for the candidates of a group: 1/128 of its entries. A group that has no more entries than this lists them all.
BIP_HD uint32_t candidate_capacity(int64_t numel) { return 1024 + static_cast<uint32_t>(numel / 128); }

// Sets how far the next window reaches. `error`: by how many ranks the last threshold was off. The window may fill half of the list at
// most.
BIP_HD void widen_window(Memory& memory, int64_t error, int64_t numel) {
  const int64_t most = (1024 + numel / 128) / 4, least = 64 + numel / 65536;
  const int64_t decayed = memory.spread - memory.spread / 8;
  const int64_t spread = memory.known ? (error > decayed ? error : decayed) : most / 4;
  memory.spread = static_cast<uint32_t>(spread < most ? spread : most);
  const int64_t half = 4 * static_cast<int64_t>(memory.spread);
  memory.half = static_cast<uint32_t>(half < least ? least : half > most ? most : half);
}

// The `position`-th largest, counted from 1, of `count` keys that lie evenly in [lo, hi).
BIP_HD uint64_t key_at(uint64_t lo, uint64_t hi, double count, double position) {
  return hi - static_cast<uint64_t>(static_cast<double>(hi - lo) * (position / (count + 1)));
}

BIP_HD uint64_t key_above(uint64_t key, double distance) {
  return distance < static_cast<double>(kNoKey - key) ? key + static_cast<uint64_t>(distance) : kNoKey;
}
BIP_HD uint64_t key_below(uint64_t key, double distance) {
  return distance < static_cast<double>(key) ? key - static_cast<uint64_t>(distance) : 0;
}

}  // namespace bip
