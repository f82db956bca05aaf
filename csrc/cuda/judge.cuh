// A warp judges the scores of its tiles against the window of their group. Mask words are written where a bit flips; an entry inside the
// window keeps its bit for now and becomes a candidate.
//
// Candidates are rare (one in a thousand entries or fewer), so they wait in shared memory until one atomicAdd makes room for many of them.
#pragma once

#include "count.cuh"
#include "tile.cuh"

namespace bip::cuda {

constexpr uint32_t kPending = 160;  // a warp's candidates in shared memory; one turn adds at most kStride

// A window as two scores, for any floats, which compare as their keys do. A score above `high` is kept and one below `low` is not; between
// them the whole key decides, and for a NaN always.
struct FloatRange {
  float low, high;

  FloatRange() = default;
  __device__ __forceinline__ explicit FloatRange(const Window& window)
      : low(key_score(static_cast<uint32_t>(window.lo >> 32))),
        high(key_score(window.hi == 0 ? 0u : static_cast<uint32_t>((window.hi - 1) >> 32))) {}
  __device__ __forceinline__ bool above(float score) const { return score > high; }
  __device__ __forceinline__ bool near(float score) const { return !(score < low || score > high); }
};

// What a block's warps need of a group for its few candidates: in shared memory, because registers are scarcer.
struct JudgeGroup {
  Window window;
  FloatRange range;
  Progress* progress;
  Candidate* list;
  uint32_t capacity;  // of the list; 0: the window is of no use, and nothing is listed
};

struct JudgeRoom : Room {
  JudgeGroup group;
  uint32_t flips;   // mask bits that this block has changed in the group
  uint32_t listed;  // where the block's last candidates go in the group's list
  Memory memory;    // of a group, while a block sets the next window
  uint32_t num_pending[kWarps];
  Candidate pending[kWarps][kPending];
};

// Whole block: from here on its warps judge by this group's window.
__device__ inline void begin_judging(JudgeRoom& room, const Window& window, Progress& progress, Candidate* list, uint32_t capacity) {
  __syncthreads();  // no thread uses the previous group any more
  if (thread_id() == 0) {
    room.group = {window, FloatRange(window), &progress, list, capacity};
    room.flips = 0;
  }
  if (lane_id() == 0) room.num_pending[warp_id()] = 0;
  __syncthreads();
}

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Copies a warp's `pending` candidates to places of the group's list, from `at`.
__device__ __forceinline__ void list_pending(JudgeRoom& room, uint32_t at, uint32_t pending) {
  const JudgeGroup& group = room.group;
  for (uint32_t i = static_cast<uint32_t>(lane_id()); i < pending; i += kWarp) {
    const Candidate candidate = room.pending[warp_id()][i];
    if (at + i < group.capacity) group.list[at + i] = candidate;
  }
}

// Moves a warp's `pending` candidates to the group's list.
__device__ __noinline__ inline void flush_pending(JudgeRoom& room, uint32_t pending) {
  __syncwarp();
  uint32_t at = 0;
  if (lane_id() == 0) at = atomicAdd(&room.group.progress->collected, pending);
  list_pending(room, __shfl_sync(kAllLanes, at, 0), pending);
  __syncwarp();
}

// Four neighbouring entries of a lane, and where they are.
struct Place {
  uint32_t index;  // of the first in its group
  int tile;
  int entry;  // of the first in its tile
};

// The candidates among a warp's quads: bit j of `inside` for the entry whose score is s.x[j], and of `kept` for its mask bit.
__device__ inline void collect(JudgeRoom& room, const Place& place, const Quad<float>& s, unsigned inside, unsigned kept) {
  if (room.group.capacity == 0) return;
  uint32_t pending = room.num_pending[warp_id()];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const unsigned lanes = __ballot_sync(kAllLanes, inside >> j & 1u);
    if (inside >> j & 1u)
      room.pending[warp_id()][pending + static_cast<uint32_t>(__popc(lanes & ((1u << lane_id()) - 1u)))] = {
          full_key(score_key(s.x[j]), place.index + static_cast<uint32_t>(j)), place.tile,
          static_cast<uint32_t>(place.entry + j) | (kept >> j & 1u ? kKeptNow : 0u)};
    pending += static_cast<uint32_t>(__popc(lanes));
  }
  if (pending > kPending - kStride) {
    flush_pending(room, pending);
    pending = 0;
  }
  __syncwarp();
  if (lane_id() == 0) room.num_pending[warp_id()] = pending;
  __syncwarp();
}

// Joins the four mask bits of every lane: each of the eight lanes of a mask word gets the whole word.
__device__ __forceinline__ uint32_t word_of_bits(unsigned bits) {
  uint32_t word = bits << bit_of_lane();
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return word;
}

struct Judged {
  uint32_t word;   // new mask word of the lane's eight
  unsigned above;  // bits of the lane's quad whose keys are above the window
};

// Whole warp: judges the entries of the `near` bits by their whole keys. Those inside the window become candidates and keep their bit.
// Writes the mask word at `address` if it changes. Not inlined, so that it takes no registers from the streaming loop.
__device__ __noinline__ inline Judged judge_near(JudgeRoom& room, Quad<float> s, unsigned above, unsigned near, uint32_t old_word,
                                                 Place place, uint32_t* address) {
  const unsigned old_bits = old_word >> bit_of_lane() & 0xfu;
  const uint64_t lo = room.group.window.lo, hi = room.group.window.hi;
  unsigned inside = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (!(near >> j & 1u)) continue;
    const uint64_t key = full_key(score_key(s.x[j]), place.index + static_cast<uint32_t>(j));
    above |= key >= hi ? 1u << j : 0u;
    inside |= key >= lo && key < hi ? 1u << j : 0u;
  }
  if (__ballot_sync(kAllLanes, inside != 0) != 0) collect(room, place, s, inside, old_word >> bit_of_lane());
  const unsigned bits = above | (inside & old_bits);
  if (bits != old_bits) atomicAdd(&room.flips, static_cast<uint32_t>(__popc(bits ^ old_bits)));
  const uint32_t word = word_of_bits(bits);
  __syncwarp();  // the other lanes have read the word
  if (lane_id() % 8 == 0 && word != old_word) *address = word;
  return {word, above};
}

// Whole warp: judges the lane's quad at `place` of a tile. Returns the new mask word, which is written if it differs from `old_word`; adds
// the number of entries above the window to `num_above`. In nearly all turns no entry of the warp is near the threshold or flips, and two
// comparisons of floats per entry are all the work.
template <bool kVector>
__device__ __forceinline__ uint32_t judge_quad(JudgeRoom& room, uint32_t& num_above, const Tile& tile, int place, const Quad<float>& s,
                                               uint32_t old_word) {
  unsigned above = 0, near = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (!kVector && place + j >= tile.entries) continue;
    above |= room.group.range.above(s.x[j]) ? 1u << j : 0u;
    near |= room.group.range.near(s.x[j]) ? 1u << j : 0u;
  }
  Judged judged{old_word, above};
  if (__ballot_sync(kAllLanes, above != (old_word >> bit_of_lane() & 0xfu) || near != 0) != 0)
    judged = judge_near(room, s, above, near, old_word, {tile.index() + static_cast<uint32_t>(place), tile.number, place},
                        tile.tensor.mask + tile.word_number(place));
  num_above += static_cast<uint32_t>(__popc(judged.above));
  return judged.word;
}

// Writes z where a word has changed. Units have no z.
__device__ __forceinline__ void flip_quad(const Tile& tile, int place, uint32_t word, uint32_t old_word) {
  if (!tile.tensor.param) return;
  for (unsigned flips = (word ^ old_word) >> bit_of_lane() & 0xfu; flips; flips &= flips - 1) {
    const int j = __ffs(static_cast<int>(flips)) - 1;
    flip_z(tile.tensor, tile.first + place + j, word >> (bit_of_lane() + static_cast<unsigned>(j)) & 1u);
  }
}

constexpr int kJudgeAhead = 2;  // quads, and their mask words, that a lane loads before it uses the first

// One warp judges the scores of a tile as they are, and writes z where the mask flips.
template <bool kVector>
__device__ void judge_tile(JudgeRoom& room, uint32_t& num_above, const Tile& tile) {
  for (int base = 0; base < tile.entries; base += kJudgeAhead * kStride) {
    Quad<float> s[kJudgeAhead];
    uint32_t old_words[kJudgeAhead];
#pragma unroll
    for (int ahead = 0; ahead < kJudgeAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad;
      old_words[ahead] = tile.word<kVector>(place);
      s[ahead] = load_quad<kVector>(tile.tensor.scores + tile.first + place, tile.entries - place);
    }
#pragma unroll
    for (int ahead = 0; ahead < kJudgeAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad;
      flip_quad(tile, place, judge_quad<kVector>(room, num_above, tile, place, s[ahead], old_words[ahead]), old_words[ahead]);
    }
  }
}

__device__ inline void judge_tile(JudgeRoom& room, uint32_t& num_above, const Tile& tile) {
  if (tile.entries == kTile && quad_aligned(tile.tensor.scores))
    judge_tile<true>(room, num_above, tile);
  else
    judge_tile<false>(room, num_above, tile);
}

// One warp judges a tile of columns of a matrix, whose indices are no stretch; returns the number of this lane's entries above the window. A
// call, so that what it needs takes no registers from the streaming loop. Candidates go to the list one by one.
__device__ __noinline__ inline uint32_t judge_columns(JudgeRoom& room, const Step& step, int number) {
  const Tile tile(step, number);
  const JudgeGroup& group = room.group;
  uint32_t num_above = 0, flips = 0;
  for (int base = 0; base < tile.entries; base += kStride) {
    const int place = base + lane_id() * kQuad;
    const uint32_t old_word = tile.word<false>(place);
    const Quad<float> s = load_quad<false>(tile.tensor.scores + tile.first + place, tile.entries - place);
    unsigned bits = 0;
    for (int j = 0; j < kQuad; ++j) {
      if (place + j >= tile.entries) continue;
      const unsigned kept = old_word >> (bit_of_lane() + static_cast<unsigned>(j)) & 1u;
      bool above = group.range.above(s.x[j]), inside = false;
      if (group.range.near(s.x[j])) {
        const uint64_t key = full_key(score_key(s.x[j]), static_cast<uint32_t>(index_of(tile.tensor, tile.first + place + j)));
        above = key >= group.window.hi;
        inside = key >= group.window.lo && !above;
        if (inside) {
          const uint32_t at = atomicAdd(&group.progress->collected, 1u);
          if (at < group.capacity) group.list[at] = {key, number, static_cast<uint32_t>(place + j) | (kept ? kKeptNow : 0u)};
        }
      }
      num_above += above;
      bits |= (inside ? kept : static_cast<unsigned>(above)) << j;
    }
    flips += static_cast<uint32_t>(__popc(bits ^ (old_word >> bit_of_lane() & 0xfu)));
    const uint32_t word = word_of_bits(bits);
    __syncwarp();  // the other lanes have read the word
    if (lane_id() % 8 == 0 && word != old_word) tile.tensor.mask[tile.word_number(place)] = word;
    flip_quad(tile, place, word, old_word);
  }
  if (flips) atomicAdd(&room.flips, flips);
  return num_above;
}

// Adds up what the block's warps have found in a group; every lane brings its `num_above`. Called before the block publishes its entries.
__device__ inline void end_judging(JudgeRoom& room, uint32_t num_above) {
  const uint32_t sum = sum_of_warp(num_above);
  if (lane_id() == 0 && sum) atomicAdd(&room.above, sum);
  __syncthreads();
  // Thousands of warps end at the same time, so a block makes room in the list once for all of its warps.
  uint32_t before = 0, pending = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < warp_id()) before += room.num_pending[warp];
    pending += room.num_pending[warp];
  }
  if (pending != 0) {
    if (thread_id() == 0) room.listed = atomicAdd(&room.group.progress->collected, pending);
    __syncthreads();
    list_pending(room, room.listed + before, room.num_pending[warp_id()]);
  }
}

}  // namespace bip::cuda
