// Between which two keys the k-th largest probably is, by a sample: what topk.cu and step.cu share.
//
// As on the CPU (cpu/select.h) the sample is runs of kWarp neighbours at pseudo-random places, and the window reaches 5 standard deviations
// and a run to either side; less where the sample is a good part of all keys, and not at all where it is all of them. Here it is found by
// two digits of the sample: the first tells which bins hold the window's edges, the second where in them the edges are. Whether it was right
// costs time and never changes a mask.
#pragma once

#include <cmath>

#include "judge.cuh"

namespace bip::cuda {

// Which keys of a sample, by rank from 1, are the edges of the window. Below 1, or above the number of keys: there is no edge.
struct EdgeRanks {
  int64_t upper, lower;

  EdgeRanks() = default;
  BIP_HD EdgeRanks(int64_t sampled, int64_t n, int64_t k) {
    const double fraction = static_cast<double>(k) / static_cast<double>(n), rank = fraction * static_cast<double>(sampled);
    const double missing = 1.0 - static_cast<double>(sampled) / static_cast<double>(n);
    const double margin = kWarp * missing + 5.0 * std::sqrt(rank * (1.0 - fraction) * missing);
    upper = static_cast<int64_t>(std::floor(rank - margin)) + 1;
    lower = static_cast<int64_t>(std::ceil(rank + margin)) + 1;
  }
};

// One in so many runs of neighbours at most: 4 n^(2/3) keys, four times as many as on the CPU, since candidates cost more here than samples.
BIP_HD double largest_stride(double n) { return std::cbrt(n) / 4.0; }

// One in so many of a group: also so many that the window probably has less than 1/160 of all keys, which is 10 deviations of the sample, where
// the list has room for 1/128.
__device__ __forceinline__ uint32_t sample_stride(int64_t numel, int64_t kept) {
  const double n = static_cast<double>(numel), fraction = static_cast<double>(kept) / n;
  const double stride = n / (20480.0 + 2560000.0 * fraction * (1.0 - fraction)), most = largest_stride(n);
  return stride < 1.0 || most < 1.0 ? 1u : static_cast<uint32_t>(stride < most ? stride : most);
}

// The sampled one of each `stride` neighbouring runs.
__device__ __forceinline__ int64_t sampled_run(int64_t turn, uint32_t stride) {
  return turn * stride + static_cast<int64_t>((static_cast<uint64_t>(turn) * 0x9e3779b97f4a7c15ull >> 32) % stride);
}

struct Edges {
  Bin upper, lower;  // bins that hold the keys at the edges
};

struct SampleRoom : JudgeRoom {
  Edges edges;
  EdgeRanks ranks;
};

constexpr int kEdgeBins = kBins / 2;  // the upper edge has the upper half of a histogram

__device__ __forceinline__ int edge_shift(const Bin& bin) {
  const int shift = window_shift({bin.lo, bin.hi, 0, 0});  // for kBins
  return (bin.hi - 1 - bin.lo) >> shift < kEdgeBins ? shift : shift + 1;
}

__device__ __forceinline__ void count_first_key(Room& room, FirstDigit digit, uint64_t key) {
  count(room.histogram, first_bin(digit, static_cast<uint32_t>(key >> 32)), static_cast<uint32_t>(key >> 32));
}

__device__ __forceinline__ void count_edge_key(Room& room, const Edges& edges, uint64_t key) {
  const auto count_in = [&](const Bin& bin, int first) {
    if (key >= bin.lo && key < bin.hi)
      count(room.histogram, first + static_cast<int>((key - bin.lo) >> edge_shift(bin)), static_cast<uint32_t>(key >> 32));
  };
  count_in(edges.upper, kEdgeBins);
  count_in(edges.lower, 0);
}

// Whole block, with the first digits of a sample of `n` keys, of which `k` are kept, in the room's histogram: the bins of the edges. An edge
// that there is not gets an empty bin at that end. The histogram stays.
__device__ inline Edges edges_of(SampleRoom& room, FirstDigit digit, int64_t n, int64_t k) {
  const Window resolved{static_cast<uint64_t>(digit.base) << 32, kNoKey, 0, 0};
  const Share share(room);
  if (thread_id() == kThreads - 1) {
    const uint32_t sampled = share.above + share.mine;
    room.ranks = EdgeRanks(sampled, n, k);
    room.edges = {{kNoKey, kNoKey, 0, 0}, {0, 0, sampled, 0}};
  }
  __syncthreads();
  const EdgeRanks ranks = room.ranks;
  if (share.holds(ranks.upper)) room.edges.upper = bin_of(room, share, static_cast<uint32_t>(ranks.upper), resolved, digit.shift + 32, 0);
  if (share.holds(ranks.lower)) room.edges.lower = bin_of(room, share, static_cast<uint32_t>(ranks.lower), resolved, digit.shift + 32, 0);
  __syncthreads();
  return room.edges;
}

// Whole block, with the second digits in the room's histogram, which stays: the lo and hi of the window.
__device__ inline Window window_of(SampleRoom& room, const Edges& edges, const EdgeRanks& ranks) {
  const Share share(room);
  if (thread_id() == 0) room.window = {edges.lower.lo, edges.upper.hi, 0, 0};
  __syncthreads();
  const int64_t upper = ranks.upper - edges.upper.above, lower = ranks.lower - edges.lower.above + edges.upper.inside;
  const auto within = [](const Bin& bin) { return Window{bin.lo, bin.hi, 0, 0}; };
  if (edges.upper.inside != 0 && share.holds(upper))
    room.window.hi =
        bin_of(room, share, static_cast<uint32_t>(upper), within(edges.upper), edge_shift(edges.upper), edges.upper.lo, kEdgeBins).hi;
  if (edges.lower.inside != 0 && share.holds(lower))
    room.window.lo = bin_of(room, share, static_cast<uint32_t>(lower), within(edges.lower), edge_shift(edges.lower), edges.lower.lo).lo;
  __syncthreads();
  return room.window;
}

}  // namespace bip::cuda
