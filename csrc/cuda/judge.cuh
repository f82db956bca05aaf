// A warp judges the scores of its tiles against the window of their group: mask words are written where a bit flips, what is inside the
// window keeps its bit for now and becomes a candidate.
//
// Candidates are rare (one in a thousand entries or fewer), so they wait in shared memory until one atomicAdd makes room for many of them.
#pragma once

#include "count.cuh"
#include "tile.cuh"

namespace bip::cuda {

constexpr uint32_t kPending = 160;  // a warp's candidates in shared memory; one turn adds at most kStride

struct JudgeRoom : Room {
  Candidate pending[kWarps][kPending];
};

// One warp's view of the selection in one group, for as long as the block stays with it.
struct Judge {
  Window window;
  ScoreRange range;
  int shift;               // of the histogram's bins
  Histogram* histogram;    // candidates are counted in it; null: they are not
  Progress* progress;      // of the group
  Candidate* list;         // of the group
  uint32_t capacity;       // of the list; 0: nothing is listed
  Candidate* pending;      // of this warp
  bool active;             // false: the scores are moved but not judged yet
  uint32_t num_pending = 0;
  uint32_t above = 0;  // of this lane
  uint32_t flips = 0;  // of this lane

  __device__ __forceinline__ Judge(JudgeRoom& room, const Window& window_, Histogram* histogram_, Progress& progress_, Candidate* list_,
                                   uint32_t capacity_, bool active_ = true)
      : window(window_),
        range(window_),
        shift(window_shift(window_)),
        histogram(histogram_),
        progress(&progress_),
        list(list_),
        capacity(capacity_),
        pending(room.pending[warp_id()]),
        active(active_) {}
};

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Moves a warp's candidates to the group's list.
__device__ __forceinline__ void flush_pending(Judge& judge) {
  if (judge.num_pending == 0) return;
  __syncwarp();
  uint32_t at = 0;
  if (lane_id() == 0) at = atomicAdd(&judge.progress->collected, judge.num_pending);
  at = __shfl_sync(kAllLanes, at, 0);
  for (uint32_t i = lane_id(); i < judge.num_pending; i += kWarp) {
    const Candidate candidate = judge.pending[i];
    if (at + i < judge.capacity) judge.list[at + i] = candidate;
    if (judge.histogram)
      count(*judge.histogram, static_cast<int>((candidate.key - judge.window.lo) >> judge.shift), static_cast<uint32_t>(candidate.key >> 32));
  }
  __syncwarp();
  judge.num_pending = 0;
}

// The candidates among a warp's quads: bit j of `inside` for entry `place` + j of the tile.
__device__ __forceinline__ void collect(Judge& judge, const Tile& tile, int place, const Quad<float>& s, unsigned inside) {
  if (judge.capacity == 0) return;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const unsigned lanes = __ballot_sync(kAllLanes, inside >> j & 1u);
    if (lanes == 0) continue;
    if (inside >> j & 1u) {
      const uint64_t key = full_key(score_key(s.x[j]), tile.index() + static_cast<uint32_t>(place + j));
      judge.pending[judge.num_pending + static_cast<uint32_t>(__popc(lanes & ((1u << lane_id()) - 1u)))] = {
          key, tile.number, static_cast<uint32_t>(place + j)};
    }
    judge.num_pending += static_cast<uint32_t>(__popc(lanes));
  }
  if (judge.num_pending > kPending - kStride) flush_pending(judge);
}

// The lane's four mask bits, of all lanes' fours: the eight lanes of a word each get the word.
__device__ __forceinline__ uint32_t word_of_bits(unsigned bits) {
  uint32_t word = bits << (lane_id() % 8 * kQuad);
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return word;
}

// The lane's quad at `place` of a tile, whole warp: returns the new mask word and has written it if it differs from `old_word`.
template <bool kVector>
__device__ __forceinline__ uint32_t judge_quad(Judge& judge_, const Tile& tile, int place, const Quad<float>& s, uint32_t old_word) {
  const unsigned old_bits = old_word >> (place % kWarp) & 0xfu;
  unsigned above = 0, inside = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const Verdict verdict = judge(judge_.window, judge_.range, score_key(s.x[j]), tile.index() + static_cast<uint32_t>(place + j));
    if (!kVector && place + j >= tile.entries) continue;
    above |= verdict == Verdict::kept ? 1u << j : 0u;
    inside |= verdict == Verdict::undecided ? 1u << j : 0u;
  }
  judge_.above += static_cast<uint32_t>(__popc(above));
  const unsigned bits = above | (inside & old_bits), changed = bits ^ old_bits;
  if (__ballot_sync(kAllLanes, (changed | inside) != 0) == 0) return old_word;
  judge_.flips += static_cast<uint32_t>(__popc(changed));
  collect(judge_, tile, place, s, inside);
  const uint32_t word = word_of_bits(bits);
  if (lane_id() % 8 == 0 && word != old_word) tile.tensor.mask[(tile.first + place) / kWarp] = word;
  return word;
}

// z where a word has changed.
__device__ __forceinline__ void flip_quad(const Tile& tile, int place, uint32_t word, uint32_t old_word) {
  for (unsigned flips = (word ^ old_word) >> (place % kWarp) & 0xfu; flips; flips &= flips - 1) {
    const int j = __ffs(flips) - 1;
    flip_z(tile.tensor, tile.first + place + j, word >> (place % kWarp + j) & 1u);
  }
}

constexpr int kJudgeAhead = 2;  // quads, and their mask words, that a lane loads before it uses the first

// One warp judges the scores of a tile as they are, and writes z where the mask flips.
template <bool kVector>
__device__ void judge_tile(Judge& judge, const Tile& tile) {
  for (int base = 0; base < tile.entries; base += kJudgeAhead * kStride) {
    Quad<float> s[kJudgeAhead];
    uint32_t old_words[kJudgeAhead];
#pragma unroll
    for (int ahead = 0; ahead < kJudgeAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad;
      old_words[ahead] = tile.word(place);
      s[ahead] = load_quad<kVector>(tile.tensor.scores + tile.first + place, tile.entries - place);
    }
#pragma unroll
    for (int ahead = 0; ahead < kJudgeAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad;
      flip_quad(tile, place, judge_quad<kVector>(judge, tile, place, s[ahead], old_words[ahead]), old_words[ahead]);
    }
  }
}

__device__ inline void judge_tile(Judge& judge, const Tile& tile) {
  if (tile.entries == kTile && quad_aligned(tile.tensor.scores))
    judge_tile<true>(judge, tile);
  else
    judge_tile<false>(judge, tile);
}

// Hands over what a warp has found in a group. Before the block publishes its entries.
__device__ inline void end_judging(JudgeRoom& room, Judge& judge, Counters& counters) {
  flush_pending(judge);
  const uint32_t above = sum_of_warp(judge.above), flips = sum_of_warp(judge.flips);
  if (lane_id() != 0) return;
  if (above) atomicAdd(&room.above, above);
  if (flips) atomicAdd(reinterpret_cast<unsigned long long*>(&counters.flips), static_cast<unsigned long long>(flips));
}

}  // namespace bip::cuda
