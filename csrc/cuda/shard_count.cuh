// Sharded steps: how a block counts the next digit of a group's keys, of its candidates or of all its scores, for the sums over the ranks.
#pragma once

#include "conclude.cuh"
#include "pass.cuh"
#include "runs.cuh"

namespace bip::cuda {

constexpr int64_t kFirstCount = sizeof(PassSums) / sizeof(int64_t);

// A group's row of what the ranks add up: PassSums, and the bins of a digit.
struct ShardSums {
  PassSums& pass;
  int64_t* counts;
};

__device__ __forceinline__ int digit_bits(const Args& args) { return digit_bits_of(args.step.num_groups, kDigitBits); }

__device__ __forceinline__ ShardSums row_of(const Args& args, int64_t* sums, int group) {
  int64_t* first = sums + group * (kFirstCount + (1ll << digit_bits(args)));
  return {*reinterpret_cast<PassSums*>(first), first + kFirstCount};
}

// A share of the candidates of a group. Each block has whole groups, or where these are few, parts of them.
template <class Body>
__device__ __forceinline__ void for_shares(const Args& args, Body body) {
  const int groups = static_cast<int>(args.step.num_groups), blocks = static_cast<int>(gridDim.x);
  const int parts = groups < blocks ? blocks / groups : 1;
  for (int item = static_cast<int>(blockIdx.x); item < groups * parts; item += blocks) {
    const int group = item / parts, part = item % parts;
    const int64_t collected = state_of(args, group).progress.collected, capacity = capacity_of(args, group);
    const int64_t listed = collected < capacity ? collected : capacity;
    body(group, part, Range{static_cast<int>(listed * part / parts), static_cast<int>(listed * (part + 1) / parts)});
  }
}

struct CountRoom {
  int bins;
  uint64_t lo, hi;  // of the window
  Digit digit;
  uint32_t inside, reaching;
  uint32_t counts[kBins];
};

// Whole block: from here on it counts for this group, whose window is open.
__device__ __forceinline__ void begin_counting(CountRoom& room, const Search& search, int bits) {
  __syncthreads();
  for (int bin = thread_id(); bin < 1 << bits; bin += kThreads) room.counts[bin] = 0;
  if (thread_id() == 0) {
    room.bins = 1 << bits;
    room.lo = search.window.lo;
    room.hi = search.window.hi;
    room.digit = {room.lo, digit_shift(search.window, bits), search.by_index};
    room.inside = room.reaching = 0;
  }
  __syncthreads();
}

// Whole block: adds what it has counted to the sums of this rank.
__device__ __forceinline__ void end_counting(CountRoom& room, const ShardSums& sums) {
  __syncthreads();
  for (int bin = thread_id(); bin < room.bins; bin += kThreads)
    if (room.counts[bin]) add(sums.counts[bin], room.counts[bin]);
  if (thread_id() == 0 && room.inside) add(sums.pass.inside, room.inside);
  if (thread_id() == 0 && room.reaching) add(sums.pass.reaching, room.reaching);
}

__device__ __forceinline__ const Tensor& tensor_of(const Args& args, const Candidate& candidate) {
  return args.step.tensors[args.step.tile_tensor[candidate.tile]];
}

__device__ __forceinline__ int64_t index_of(const Tensor& tensor, const Candidate& candidate) {
  return bip::index_of(tensor, (candidate.tile - tensor.first_tile) * kTile + (candidate.entry & ~kKeptNow));
}

// Counts the next digit of a share of the candidates; in the pass also what a rank says of it all.
__device__ __forceinline__ void count_listed(const Args& args, CountRoom& room, int group, const Range& share, bool pass) {
  const Candidate* list = candidates_of(args, group);
  const uint64_t threshold = state_of(args, group).memory.threshold;
  const uint64_t lo = room.lo, hi = room.hi;
  uint32_t inside = 0, reaching = 0;
  for (int i = share.begin + thread_id(); i < share.end; i += kThreads) {
    const Candidate candidate = list[i];
    const Tensor& tensor = tensor_of(args, candidate);
    if (candidate.key < lo || candidate.key >= hi || tensor.elsewhere) continue;
    ++inside;
    reaching += candidate.key >= threshold;
    const int64_t index = room.digit.by_index ? index_of(tensor, candidate) : 0;
    atomicAdd(&room.counts[room.digit.bin(candidate.key, index, room.bins)], 1u);
  }
  if (pass && inside) atomicAdd(&room.inside, inside);
  if (pass && reaching) atomicAdd(&room.reaching, reaching);
}

// Equal bins in a row, which one lane adds up before it adds them to shared memory: additions to one address are done one after the other.
struct BinTally {
  int bin = 0;
  uint32_t times = 0;

  __device__ __forceinline__ void add(CountRoom& room, int next) {
    if (next != bin) flush(room);
    bin = next;
    ++times;
  }
  __device__ __forceinline__ void flush(CountRoom& room) {
    if (times) atomicAdd(&room.counts[bin], times);
    times = 0;
  }
};

// One warp counts the next digit of what is inside the window in a tile.
__device__ __forceinline__ void count_tile(CountRoom& room, const Tile& tile) {
  const uint64_t lo = room.lo, hi = room.hi;
  const uint32_t low = static_cast<uint32_t>(lo >> 32), high = static_cast<uint32_t>((hi - 1) >> 32);
  BinTally tally;
  for_scores(tile.tensor.scores + tile.first, tile.entries, [&](float score, int place) {
    const uint32_t own = score_key(score);
    if (own < low || own > high) return;
    const int64_t index = bip::index_of(tile.tensor, tile.first + place);
    const uint64_t key = full_key(own, static_cast<uint32_t>(index));
    if (key >= lo && key < hi) tally.add(room, static_cast<int>(room.digit.bin(key, index, room.bins)));
  });
  tally.flush(room);
}

}  // namespace bip::cuda
