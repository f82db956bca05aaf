// How several ranks find the k-th key of a selection group together: from the same sums, each of them concludes the same.
//
// A pass judges every entry by the window that all ranks share (window.h). The sums of its counts say whether the k-th key was inside, and how
// many of the keys inside are kept. Histograms of the keys inside, one digit after the other, then narrow the window until all or none of
// what is left in it is kept. Where entries of a group of 2^32 or more have one key, the last histogram is of their index / 2^32.
//
// `Bins` is a histogram over a window: `digit_bits`, and `of_rank(rank)`, the bin of the rank-th largest key, counted from 1; and whether the
// counts of the pass are right where lists had too little room, `kCountsCrowded`.
#pragma once

#include <cstdint>

#include "bip.h"
#include "hd.h"
#include "order_key.h"
#include "window.h"

namespace bip {

// From how many groups on digits are short: each round tells an eighth or less, and there are a few rounds more.
constexpr int64_t kManyGroups = 32;
constexpr int kShortDigitBits = 8;  // a digit of the index has as many: a group has up to 2^40 entries

// Bits of a digit, of all groups of a step: `most`, or few.
BIP_HD int digit_bits_of(int64_t num_groups, int most) { return num_groups < kManyGroups ? most : kShortDigitBits; }

// What is known about the k-th largest key of a selection group: every key >= hi is kept, every key < lo is not, and of the `inside` keys
// in [lo, hi) the largest `wanted` are kept.
struct KeyWindow {
  uint64_t lo = 0, hi = kNoKey;
  int64_t wanted = 0;
  int64_t inside = 0;

  BIP_HD bool settled() const { return wanted == 0 || wanted == inside; }
};

// For a window of whose keys all or none are kept: closes it at that end. Then lo == hi, kept keys are >= lo and all others below.
BIP_HD void close(KeyWindow& window) {
  if (window.wanted == 0) window.lo = window.hi;
  if (window.wanted == window.inside) window.hi = window.lo;
  window.wanted = window.inside = 0;
}

// A key inside goes to bin (key - lo) >> digit_shift.
BIP_HD int digit_shift(const KeyWindow& window, int digit_bits) {
  int bits = 0;
  for (uint64_t last = window.hi - 1 - window.lo; last; last >>= 1) ++bits;
  return bits > digit_bits ? bits - digit_bits : 0;
}

struct RankedBin {
  int bin;
  int64_t above, inside;  // keys in higher bins, and in this one
};

// The keys that a bin can hold, as a window.
BIP_HD KeyWindow window_of(const KeyWindow& window, const RankedBin& found, int shift) {
  const uint64_t lo = window.lo + (static_cast<uint64_t>(found.bin) << shift);
  return {lo, window.hi - lo > 1ull << shift ? lo + (1ull << shift) : window.hi, window.wanted - found.above, found.inside};
}

// Narrows an open window to the bin of the k-th key.
template <class Bins>
BIP_HD void narrow(KeyWindow& window, const Bins& bins) {
  window = window_of(window, bins.of_rank(window.wanted), digit_shift(window, bins.digit_bits));
  if (window.settled()) close(window);
}

// After all n keys were judged against a guessed window, and `above` of them were >= hi and `inside` in it: replaces the guess by what is
// now certain. Returns false when the k-th key was outside the guess; then the listed candidates are not those of the new window.
BIP_HD bool judged(KeyWindow& window, int64_t above, int64_t inside, int64_t n, int64_t k) {
  const bool too_low = k < above;
  const bool too_high = k > above + inside;
  if (too_low)
    window = {window.hi, kNoKey, k, above};
  else if (too_high)
    window = {0, window.lo, k - above - inside, n - above - inside};
  else
    window = {window.lo, window.hi, k - above, inside};
  if (window.settled()) close(window);
  return !too_low && !too_high;
}

// Which entries are kept: those of larger keys, and of its own key those whose index / 2^32 is below `end`.
struct Threshold {
  uint64_t key;
  int64_t end = INT64_MAX;

  BIP_HD bool keeps(uint64_t other, int64_t index) const { return other > key || (other == key && index >> 32 < end); }
};

// What a rank counts in the pass; the histogram of its candidates comes behind it.
struct PassSums {
  int64_t above;     // entries above the window
  int64_t inside;    // and inside
  int64_t crowded;   // ranks whose list had too little room
  int64_t reaching;  // candidates that reach the threshold of the step before
  int64_t ranks;     // that make the step
  int64_t absent;    // ranks that an error keeps from it
  int64_t windows;   // numbers that stand for the windows of the ranks, and their squares (window_number)
  int64_t squares;
};

// 24 bits that stand for what is remembered of a window; 0: none is known.
BIP_HD int64_t window_number(const Memory& memory) {
  if (!memory.known) return 0;
  uint64_t mixed = (memory.lo * 0x9e3779b97f4a7c15ull ^ memory.hi) * 0xff51afd7ed558ccdull;
  mixed = (mixed ^ mixed >> 32) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<int64_t>(mixed >> 40) + 1;
}

// What a rank says of itself.
BIP_HD void report_in(PassSums& sums, const Memory& memory) {
  sums.ranks = 1;
  sums.windows = window_number(memory);
  sums.squares = sums.windows * sums.windows;
}

// Whether all ranks remember the same window. They do, but for one that an error stopped in the middle of a step. From the sums alone, so that
// all ranks decide alike: numbers are equal exactly if the sum of their squares, times how many there are, is the square of their sum.
BIP_HD bool same_window(const PassSums& sums) {
  return static_cast<uint64_t>(sums.ranks) * static_cast<uint64_t>(sums.squares) ==
         static_cast<uint64_t>(sums.windows) * static_cast<uint64_t>(sums.windows);
}

// How far the selection of a group has come; the same on every rank, but for `found`.
struct Search {
  KeyWindow window;  // as narrow as it is by now
  uint64_t lo, hi;   // that of the next step
  int64_t found;     // candidates of this rank
  int64_t end;       // Threshold::end
  bool begun;        // the sums of the pass have been read
  bool listed;       // the window of the pass was right, so its candidates are all that is open
  bool settled;
  bool given_up;            // a rank is absent: masks stay as the pass has left them
  bool by_index;            // the next digit is index / 2^32: the window has one key
  bool bound_lo, bound_hi;  // `lo`, `hi` are set

  BIP_HD bool counting() const { return !settled && !listed; }
  BIP_HD Threshold threshold() const { return {window.lo, by_index ? end : INT64_MAX}; }
};

// Where a key inside a window is counted: by its next digit or, where the window has a single key, by its index, lowest first.
struct Digit {
  uint64_t lo;
  int shift;
  bool by_index;

  BIP_HD int64_t bin(uint64_t key, int64_t index, int bins) const {
    return by_index ? bins - 1 - (index >> 32) : static_cast<int64_t>((key - lo) >> shift);
  }
};

// At the beginning of a step.
BIP_HD Search opened(Memory& memory, const Group& group) {
  Search search{};
  follow(memory, group.kept, group.numel);
  if (group.kept > 0 && group.kept < group.numel) {
    if (memory.known) search.window = {memory.lo, memory.hi, 0, 0};
  } else {
    search.window.lo = search.window.hi = group.kept ? 0 : kNoKey;
    search.begun = search.listed = search.settled = true;
  }
  return search;
}

// The key at `rank`, counted from the largest, of those in the window.
template <class Bins>
BIP_HD uint64_t key_at_rank(const KeyWindow& window, const Bins& bins, int64_t rank) {
  const RankedBin found = bins.of_rank(rank);
  const KeyWindow bin = window_of(window, found, digit_shift(window, bins.digit_bits));
  return key_at(bin.lo, bin.hi, static_cast<double>(found.inside), static_cast<double>(rank - found.above));
}

// Sets the ends of the next window from the counts in this one: `half` ranks to either side of the k-th key. Each narrower window says it
// better, as long as that rank is in it. Beyond the first window an end is guessed by the average distance of keys.
template <class Bins>
BIP_HD void bound(Search& search, int64_t half, const KeyWindow& window, const Bins& bins) {
  const int64_t high = window.wanted - half, low = window.wanted + half;
  const double distance = static_cast<double>(window.hi - window.lo) / static_cast<double>(window.inside + 1);
  if (high >= 1)
    search.hi = key_at_rank(window, bins, high);
  else if (!search.bound_hi)
    search.hi = key_above(window.hi, distance * static_cast<double>(1 - high));
  if (low <= window.inside)
    search.lo = key_at_rank(window, bins, low);
  else if (!search.bound_lo)
    search.lo = key_below(window.lo, distance * static_cast<double>(low - window.inside));
  search.bound_hi = search.bound_lo = true;
}

// Reads the sums of the pass.
template <class Bins>
BIP_HD void read_pass(Search& search, Memory& memory, Counters& counters, const Group& group, const PassSums& sums, const Bins& bins) {
  const bool agreed = same_window(sums);
  if (!agreed) memory.known = 0;
  const bool known = memory.known != 0;
  KeyWindow window = search.window;
  window.wanted = group.kept - sums.above;
  window.inside = sums.inside;
  const bool crowded = sums.crowded != 0, counted = agreed && (!crowded || Bins::kCountsCrowded);
  if (!counted) search.window = {};
  const bool hit = counted ? judged(search.window, sums.above, sums.inside, group.numel, group.kept)
                           : judged(search.window, 0, group.numel, group.numel, group.kept);
  const int64_t error = sums.reaching > window.wanted ? sums.reaching - window.wanted : window.wanted - sums.reaching;
  if (!hit) memory.known = 0;
  widen_window(memory, known && hit && !crowded ? error : 0, group.numel);
  search.begun = true;
  search.listed = hit && !crowded && agreed;
  search.settled = search.window.lo == search.window.hi;
  if (!search.listed) {
    ++(!known ? counters.first : hit ? counters.crowded : counters.missed);
    return;
  }
  counters.candidates += sums.inside;
  bound(search, memory.half, window, bins);
}

// Reads the sums over all ranks.
template <class Bins>
BIP_HD void read_sums(Search& search, Memory& memory, Counters& counters, const Group& group, const PassSums& sums, const Bins& bins) {
  if (search.settled) return;
  if (!search.begun && sums.absent) {
    search.begun = search.listed = search.settled = search.given_up = true;
    return;
  } else if (!search.begun) {
    read_pass(search, memory, counters, group, sums, bins);
    if (!search.listed || search.settled) return;
  } else if (search.by_index) {  // a window of one key, which several entries have: down to the index that decides
    search.end = (1 << bins.digit_bits) - bins.of_rank(search.window.wanted).bin;
    search.settled = true;
    return;
  } else {
    bound(search, memory.half, search.window, bins);
  }
  narrow(search.window, bins);
  search.settled = search.window.lo == search.window.hi;
  search.by_index = !search.settled && search.window.hi - search.window.lo == 1;
}

// At the end of a step.
BIP_HD void remember(const Search& search, Memory& memory, Counters& counters) {
  if (search.given_up) {
    memory.known = 0;
    return;
  }
  counters.threshold = key_score(static_cast<uint32_t>(search.window.lo >> 32));
  memory.known = search.bound_lo && search.lo < search.hi;
  memory.lo = search.lo;
  memory.hi = search.hi;
  memory.threshold = search.window.lo;
}

}  // namespace bip
