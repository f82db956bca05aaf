// The window: what a selection group remembers of one step, so that the next can decide nearly all its entries in one pass.
//
// The threshold (the smallest kept key) hardly moves from step to step. A window of keys around the last one decides every entry outside
// of it at once; the few inside are listed and settled exactly. It reaches `half` ranks to either side of the threshold, four times
// as far as the threshold has been moving lately. Where a step keeps more or fewer keys than the last one, the window goes along (`follow`).
// Whether it was right costs time and never changes a mask.
#pragma once

#include <cstdint>

#include "hd.h"

namespace bip {

constexpr uint64_t kNoKey = ~0ull;  // above every key: no score key is all ones

// All zero: nothing is known yet.
struct Memory {
  uint64_t lo, hi;     // the window of the next step
  uint64_t threshold;  // of the last step: keys from here upwards were kept
  int64_t kept;        // how many these were
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

// Before a step that keeps `kept` of `numel` keys: moves the window, and the threshold from which errors are measured, by as many ranks as
// there are more or fewer than in the last step, as while a sparsity grows. Keys lie as far apart as they do inside the window, or somewhat
// more or less, so the window also grows by a quarter of that way to either side. A way that is long is not guessed. Does nothing the
// second time.
BIP_HD void follow(Memory& memory, int64_t kept, int64_t numel) {
  const int64_t fewer = memory.kept - kept, ranks = fewer < 0 ? -fewer : fewer;
  memory.kept = kept;
  if (ranks == 0 || memory.half == 0 || memory.lo >= memory.hi) return;
  if (ranks > 2 * static_cast<int64_t>(candidate_capacity(numel))) {
    memory.known = 0;
    return;
  }
  const double way = static_cast<double>(memory.hi - memory.lo) / (2.0 * memory.half) * static_cast<double>(ranks);
  const double near = 0.75 * way, far = 1.25 * way;
  memory.lo = fewer > 0 ? key_above(memory.lo, near) : key_below(memory.lo, far);
  memory.hi = fewer > 0 ? key_above(memory.hi, far) : key_below(memory.hi, near);
  memory.threshold = fewer > 0 ? key_above(memory.threshold, way) : key_below(memory.threshold, way);
}

}  // namespace bip
