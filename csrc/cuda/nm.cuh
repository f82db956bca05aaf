// N:M masks while streaming: an entry is kept when fewer than N entries of its group of M have a larger key. A lane has four neighbours of
// a warp's 128. One lane decides groups of up to four entries; 2, 4 or 8 lanes exchange their keys to decide larger ones.
#pragma once

#include "judge.cuh"

namespace bip::cuda {

// Whether one entry beats another, by the two halves of their keys.
__device__ __forceinline__ bool beats(uint32_t other, uint32_t other_tie, uint32_t own, uint32_t own_tie) {
  return other > own || (other == own && other_tie > own_tie);
}

__device__ __forceinline__ Quad<uint32_t> score_keys(const Quad<float>& s) {
  Quad<uint32_t> keys;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) keys.x[j] = score_key(s.x[j]);
  return keys;
}

// kColumns: of some columns of a matrix. A quad may reach over the end of a row of them; groups never do.
template <bool kColumns>
__device__ __forceinline__ uint32_t index_in_matrix(const Tile& tile, int place) {
  if constexpr (kColumns)
    return static_cast<uint32_t>(index_of(tile.tensor, tile.first + place));
  else
    return tile.index() + static_cast<uint32_t>(place);
}

// Bit j: fewer than `keep` entries of its group beat entry j of the lane's quad.
template <int kOf>
__device__ __forceinline__ unsigned keep_in_lane(const Quad<uint32_t>& keys, const Quad<uint32_t>& ties, int keep) {
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    int larger = 0;
#pragma unroll
    for (int d = 1; d < kOf; ++d) larger += beats(keys.x[j ^ d], ties.x[j ^ d], keys.x[j], ties.x[j]);
    kept |= larger < keep ? 1u << j : 0u;
  }
  return kept;
}

// The same for groups of several lanes. Whole warp. Not inlined, because it is rare and needs registers.
__device__ __noinline__ inline unsigned keep_across_lanes(Quad<uint32_t> keys, uint32_t index, int keep, int of) {
  int larger[kQuad] = {};
  for (int lanes = 0; lanes < of / kQuad; ++lanes) {
    const uint32_t first = (index ^ static_cast<uint32_t>(lanes * kQuad));  // an index in its tensor, where groups begin at their multiples
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, keys.x[i], lanes);
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        larger[j] += beats(other, tie_key(first + static_cast<uint32_t>(i)), keys.x[j], tie_key(index + static_cast<uint32_t>(j)));
    }
  }
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) kept |= larger[j] < keep ? 1u << j : 0u;
  return kept;
}

// Whole warp: decides the lane's quad at `place` of an N:M tile. Returns the new mask word, which is written if it differs from `old_word`.
template <bool kVector, bool kColumns = false>
__device__ __forceinline__ uint32_t keep_quad(const Tile& tile, int place, const Quad<float>& s, uint32_t old_word) {
  const int keep = tile.tensor.keep, of = tile.tensor.of;
  const uint32_t index = index_in_matrix<kColumns>(tile, place);
  const Quad<uint32_t> keys = score_keys(s);
  Quad<uint32_t> ties;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) ties.x[j] = tie_key(index_in_matrix<kColumns>(tile, place + j));
  unsigned kept = of == 4   ? keep_in_lane<4>(keys, ties, keep)
                  : of == 2 ? keep_in_lane<2>(keys, ties, keep)
                            : keep_across_lanes(keys, index, keep, of);
  if (!kVector) {
    const int exist = tile.entries - place;
    kept &= exist >= kQuad ? 0xfu : exist > 0 ? (1u << exist) - 1u : 0u;
  }
  if (__ballot_sync(kAllLanes, kept != (old_word >> bit_of_lane() & 0xfu)) == 0) return old_word;
  const uint32_t word = word_of_bits(kept);
  __syncwarp();  // the other lanes have read the word
  if (lane_id() % 8 == 0 && word != old_word) tile.tensor.mask[tile.word_number(place)] = word;
  return word;
}

// One warp decides a tile by its scores as they are, and writes z where the mask flips.
template <bool kColumns>
__device__ __forceinline__ void keep_tile(const Tile& tile) {
  for (int base = 0; base < tile.entries; base += kStride) {
    const int place = base + lane_id() * kQuad;
    const uint32_t old_word = tile.word<false>(place);
    const Quad<float> s = load_quad<false>(tile.tensor.scores + tile.first + place, tile.entries - place);
    flip_quad(tile, place, keep_quad<false, kColumns>(tile, place, s, old_word), old_word);
  }
}

// The same for a tile of columns, whose scores have moved. A call, so that what it needs takes no registers from the streaming loop.
__device__ __noinline__ inline void keep_columns(const Step& step, int number) { keep_tile<true>(Tile(step, number)); }

}  // namespace bip::cuda
