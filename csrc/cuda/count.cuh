// Histograms of the scores of a tile: one warp reads at most kTile consecutive scores, kAhead quads per lane in flight.
#pragma once

#include "select.cuh"

namespace bip::cuda {

constexpr int kMaxRounds = (64 + kDigitBits - 1) / kDigitBits;  // digits that it may take to tell all keys apart

// Calls visit(score, place) for every score of a tile, in any order.
template <bool kVector, class Visit>
__device__ __forceinline__ void for_scores(const float* scores, int entries, Visit visit) {
  for (int base = lane_id() * kQuad; base < entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride;
      s[ahead] = load_quad<kVector>(scores + i, entries - i);
    }
#pragma unroll
    for (int j = 0; j < kAhead * kQuad; ++j) {
      const int i = base + j / kQuad * kStride + j % kQuad;
      if (kVector || i < entries) visit(s[j / kQuad].x[j % kQuad], i);
    }
  }
}

template <class Visit>
__device__ __forceinline__ void for_scores(const float* scores, int entries, Visit visit) {
  if (entries == kTile && quad_aligned(scores))
    for_scores<true>(scores, entries, visit);
  else
    for_scores<false>(scores, entries, visit);
}

// First digits that one lane has counted but not yet added to shared memory. Many scores are 0 or 1, others come in runs of equal ones, and
// additions to one address are done one after the other.
struct Tally {
  uint32_t zeros = 0, ones = 0;
  uint32_t run_key = 0, run = 0;

  __device__ __forceinline__ void add(Histogram& histogram, uint32_t key) {
    zeros += key == kZero;
    ones += key == kOne;
    if (key == kZero || key == kOne) return;
    if (key != run_key) {
      put(histogram, run_key, run);
      run_key = key;
      run = 0;
    }
    ++run;
  }
  __device__ __forceinline__ void flush(Histogram& histogram) {
    put(histogram, kZero, zeros);
    put(histogram, kOne, ones);
    put(histogram, run_key, run);
    zeros = ones = run = 0;
  }

 private:
  static constexpr uint32_t kZero = 0x80000000u, kOne = 0xbf800000u;  // score_key of 0 and 1

  __device__ __forceinline__ void put(Histogram& histogram, uint32_t key, uint32_t times) const {
    if (times) count(histogram, first_bin(kScoreDigit, key), key, times);
  }
};

// One warp counts the first digits of a tile.
__device__ inline void count_first(Room& room, const float* scores, int entries) {
  Tally tally;
  for_scores(scores, entries, [&](float score, int) { tally.add(room.histogram, score_key(score)); });
  tally.flush(room.histogram);
}

// One warp counts what is inside the window in a tile. `index`: of the tile's first score in its group.
__device__ inline void count_inside(Room& room, const Window& window, int shift, const float* scores, int entries, uint32_t index) {
  const ScoreRange range(window);
  for_scores(scores, entries, [&](float x, int place) {
    const uint32_t score = score_key(x), i = index + static_cast<uint32_t>(place);
    if (judge(window, range, score, i) == Verdict::undecided)
      count(room.histogram, static_cast<int>((full_key(score, i) - window.lo) >> shift), score);
  });
}

}  // namespace bip::cuda
