// A mask of exactly k ones over n scores, on a CUDA device: the selection of select.cuh with the whole array as its one group.
//
//   few scores   1 launch: they are listed, and the last block settles them
//   many         1 launch, all blocks resident, with barriers over the grid between its stages:
//     sample     4 n^(2/3) keys say between which two the k-th largest probably is; one digit, then another
//     judge      every score against that window: 4 bytes read, 1 written; the few inside are listed
//     finish     the candidates outside of the bin of the k-th key get their byte, one block settles the others
//     When the sample was wrong, or too many are inside: counting passes, 4 bytes each, narrow the window, and all are judged again.
//
// Every block reads the same counts after a barrier and so decides the same. Every stage has counts of its own, zero before the launch.
// The mask is the top-k by unique keys: no sample, no grid size and no order of blocks changes it.
#include <cmath>

#include "count.cuh"
#include "judge.cuh"
#include "launch.cuh"
#include "sample.cuh"

namespace bip::cuda {
namespace {

constexpr uint32_t kFewCandidates = 4096;  // room for those in the bin of the k-th key
constexpr uint32_t kAloneUpTo = 2048;      // candidates that one block settles from the list

struct alignas(16) TopkWorkspace {
  uint32_t fell_back;                // 1: the sample did not serve; for tests
  Histogram sampled, sampled_edges;  // first digits; second ones in the bins of both edges
  Histogram digits[kMaxRounds];
  Histogram listed;
  Progress guessed, certain, small;  // of the first judging, of one after a fallback, and of few scores
  uint32_t num_few;
  Candidate few[kFewCandidates];

  // [capacity_for(n)], behind what has to be cleared.
  __device__ __forceinline__ Candidate* candidates() { return reinterpret_cast<Candidate*>(this + 1); }
};

// Room for candidates: what a sample's window holds is expected to be at most 5 n^(2/3) + 64 n^(1/3) of them. At least 8192: that few scores
// are listed at once.
uint32_t capacity_for(int64_t n) {
  const double root = std::cbrt(static_cast<double>(n));
  return std::max(static_cast<uint32_t>(8 * root * root) + 1024, 8192u);
}

// Which keys are sampled.
struct Sample {
  int64_t runs;  // of a warp's width
  uint32_t stride;

  explicit Sample(int64_t n)
      : runs(0), stride(static_cast<uint32_t>(std::max<int64_t>(1, static_cast<int64_t>(largest_stride(static_cast<double>(n)))))) {
    runs = n / kWarp / stride;
  }
};

struct TopkArgs {
  Topk topk;
  TopkWorkspace* workspace;
  uint32_t capacity;
  Sample sample;
};

struct Tile {
  int64_t first;
  int entries;
  int number;
  __device__ __forceinline__ Tile(int64_t n, int tile) : first(static_cast<int64_t>(tile) * kTile), number(tile) {
    entries = static_cast<int>(n - first < kTile ? n - first : kTile);
  }
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

__device__ __forceinline__ Group group_of(const Topk& topk) { return {topk.n, topk.k, topk.n, 0, 0, 0}; }

// Calls body(tile) for the tiles of this block, a warp for each.
template <class Body>
__device__ __forceinline__ void for_tiles(const Topk& topk, Body body) {
  const Range share = block_range(tiles_of(topk.n));
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) body(Tile(topk.n, number));
}

// ---- sample ----

// Calls visit(key) for the keys of the sample that are this lane's.
template <class Visit>
__device__ __forceinline__ void for_sampled(const TopkArgs& args, Visit visit) {
  const Sample& sample = args.sample;
  for (int64_t run = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); run < sample.runs;
       run += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t i = sampled_run(run, sample.stride) * kWarp + lane_id();
    visit(full_key(score_key(args.topk.scores[i]), static_cast<uint32_t>(i)));
  }
}

// Whole block: the window that the sample suggests.
__device__ __noinline__ Window guess(const TopkArgs& args, SampleRoom& room) {
  clear(room);
  for_sampled(args, [&](uint64_t key) { count_first_key(room, kAnyDigit, key); });
  add_histogram(room, args.workspace->sampled);
  wait_for_all();
  load_histogram(room, args.workspace->sampled);
  const Edges edges = edges_of(room, kAnyDigit, args.topk.n, args.topk.k);
  clear(room);
  for_sampled(args, [&](uint64_t key) { count_edge_key(room, edges, key); });
  add_histogram(room, args.workspace->sampled_edges);
  wait_for_all();
  load_histogram(room, args.workspace->sampled_edges);
  return window_of(room, edges, room.ranks);
}

// ---- judge ----

// One lane: of the entries of the `near` bits, those whose whole keys are above the window. Those inside become candidates: one in a hundred, so
// in most turns some lane of a warp has one, and each lane makes room for its own.
__device__ __forceinline__ unsigned above_of(JudgeRoom& room, const Quad<float>& s, unsigned near, const Place& place) {
  unsigned above = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (!(near >> j & 1u)) continue;
    const uint64_t key = full_key(score_key(s.x[j]), place.index + static_cast<uint32_t>(j));
    if (key >= room.group.window.hi)
      above |= 1u << j;
    else if (key >= room.group.window.lo && room.group.capacity != 0)
      room.pending[warp_id()][atomicAdd(&room.num_pending[warp_id()], 1u)] = {key, place.tile, static_cast<uint32_t>(place.entry + j)};
  }
  return above;
}

// Whole warp: after each turn, so that the next has room.
__device__ __forceinline__ void flush_if_full(JudgeRoom& room) {
  __syncwarp();
  const uint32_t pending = room.num_pending[warp_id()];
  __syncwarp();  // before a faster lane adds to it
  if (pending <= kPending - kStride) return;
  flush_pending(room, pending);
  if (lane_id() == 0) room.num_pending[warp_id()] = 0;
  __syncwarp();
}

// One warp decides one tile. An undecided entry is 0 for now and becomes a candidate, if candidates are listed.
template <bool kVector>
__device__ __forceinline__ void judge_scores(const TopkArgs& args, JudgeRoom& room, uint32_t& num_above, const Tile& tile) {
  for (int base = 0; base < tile.entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride + lane_id() * kQuad;
      s[ahead] = load_quad<kVector>(args.topk.scores + tile.first + i, tile.entries - i);
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride + lane_id() * kQuad, exist = tile.entries - i;
      unsigned above = 0, near = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (!kVector && j >= exist) continue;
        above |= room.group.range.above(s[ahead].x[j]) ? 1u << j : 0u;
        near |= room.group.range.near(s[ahead].x[j]) ? 1u << j : 0u;
      }
      const uint32_t index = static_cast<uint32_t>(tile.first) + static_cast<uint32_t>(i);
      if (__ballot_sync(kAllLanes, near != 0) != 0) {
        if (near != 0) above |= above_of(room, s[ahead], near, {index, tile.number, i});
        flush_if_full(room);
      }
      num_above += static_cast<uint32_t>(__popc(above));
      Quad<uint8_t> kept;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) kept.x[j] = above >> j & 1u;
      store_quad<kVector>(args.topk.mask + tile.first + i, kept, exist);
    }
  }
}

// Whole grid: judges all scores by a window. Then `progress` has the numbers of keys above and inside, and the list those inside.
__device__ __noinline__ void judge_all(const TopkArgs& args, JudgeRoom& room, const Window& window, Progress& progress) {
  begin_judging(room, window, progress, args.workspace->candidates(), args.capacity);
  uint32_t num_above = 0;
  for_tiles(args.topk, [&](const Tile& tile) {
    if (tile.entries == kTile && quad_aligned(args.topk.scores) && quad_aligned(args.topk.mask))
      judge_scores<true>(args, room, num_above, tile);
    else
      judge_scores<false>(args, room, num_above, tile);
  });
  end_judging(room, num_above);
  if (thread_id() == 0 && room.above) atomicAdd(&progress.above, room.above);
  if (thread_id() == 0) room.above = 0;
}

// Whole grid: narrows a window that holds the k-th key, by digits of all scores, until the keys inside can be listed.
__device__ __noinline__ Window narrow_all(const TopkArgs& args, JudgeRoom& room, Window window) {
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  clear(room);
  for (int round = 0; round < kMaxRounds && window.inside > args.capacity; ++round) {
    const int shift = window_shift(window);
    for_tiles(topk, [&](const Tile& tile) {
      count_inside(room, window, shift, topk.scores + tile.first, tile.entries, static_cast<uint32_t>(tile.first));
    });
    add_histogram(room, workspace.digits[round]);
    wait_for_all();
    load_histogram(room, workspace.digits[round]);
    window = narrow(room, window, shift, window.lo);
  }
  return window;
}

// ---- finish ----

__device__ __forceinline__ void keep(const TopkArgs& args, const Candidate& candidate) {
  args.topk.mask[static_cast<int64_t>(candidate.tile) * kTile + candidate.entry] = 1;
}

// Whole block: settles a list that has all keys inside the window.
__device__ __noinline__ void settle_alone(const TopkArgs& args, Room& room, const Candidate* list, uint32_t candidates,
                                          const Window& window) {
  clear(room);
  settle(room, list, candidates, window, window, [&](const Candidate& candidate, bool kept) {
    if (kept) keep(args, candidate);
  });
}

// Whole grid: gives the `listed` candidates their bytes.
__device__ __noinline__ void finish(const TopkArgs& args, JudgeRoom& room, Window window, uint32_t listed) {
  TopkWorkspace& workspace = *args.workspace;
  const Candidate* list = workspace.candidates();
  if (window.inside != 0 && listed <= kAloneUpTo) {
    if (blockIdx.x == 0) settle_alone(args, room, list, listed, window);
    return;
  }
  const Range share = block_range(listed);
  if (window.inside != 0) {
    const int shift = window_shift(window);
    clear(room);
    count_keys(room, list + share.begin, static_cast<uint32_t>(share.end - share.begin), window, shift);
    add_histogram(room, workspace.listed);
    wait_for_all();
    load_histogram(room, workspace.listed);
    window = narrow(room, window, shift, window.lo);
  }
  const bool fits = window.inside <= kFewCandidates;
  for (int i = share.begin + thread_id(); i < share.end; i += kThreads) {
    if (list[i].key >= window.hi)
      keep(args, list[i]);
    else if (list[i].key >= window.lo && fits)
      workspace.few[atomicAdd(&workspace.num_few, 1u)] = list[i];
  }
  if (window.inside == 0) return;
  wait_for_all();
  if (blockIdx.x == 0) settle_alone(args, room, fits ? workspace.few : list, fits ? window.inside : listed, window);
}

// All blocks are resident and meet at the same barriers: after each they read the same counts.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_mask_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ SampleRoom room;
  TopkWorkspace& workspace = *args.workspace;
  if (thread_id() == 0) room.entries = room.above = 0;
  Window window = guess(args, room);
  judge_all(args, room, window, workspace.guessed);
  wait_for_all();
  const int64_t above = workspace.guessed.above, inside = workspace.guessed.collected, k = args.topk.k;
  if (above <= k && k <= above + inside && inside <= args.capacity) {
    window = closed_if_settled({window.lo, window.hi, static_cast<uint32_t>(k - above), static_cast<uint32_t>(inside)});
    return finish(args, room, window, static_cast<uint32_t>(inside));
  }
  if (blockIdx.x == 0 && thread_id() == 0) workspace.fell_back = 1;
  window = narrow_all(args, room, window_of_kth(window, args.topk.n, k, above, inside));
  judge_all(args, room, window, workspace.certain);
  wait_for_all();
  finish(args, room, window, window.inside);
}

// One warp per tile of so few scores that all of them are listed; the last block settles them.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_few_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ JudgeRoom room;
  const Window window = whole_window(group_of(args.topk));
  Progress& progress = args.workspace->small;
  if (thread_id() == 0) {
    const Range share = block_range(tiles_of(args.topk.n));
    const int64_t end = share.end * static_cast<int64_t>(kTile);
    room.entries = static_cast<uint32_t>((end < args.topk.n ? end : args.topk.n) - share.begin * static_cast<int64_t>(kTile));
    room.above = 0;
  }
  judge_all(args, room, window, progress);
  if (window.inside == 0 || !publish_is_last(room, progress, static_cast<uint32_t>(args.topk.n))) return;
  settle_alone(args, room, args.workspace->candidates(), window.inside, window);
}

}  // namespace

int64_t topk_workspace_bytes(int64_t n) {
  return static_cast<int64_t>(sizeof(TopkWorkspace)) + capacity_for(n) * static_cast<int64_t>(sizeof(Candidate));
}

void topk(const Topk& topk, void* stream) {
  if (topk.n == 0) return;
  const TopkArgs args{topk, static_cast<TopkWorkspace*>(topk.workspace), capacity_for(topk.n), Sample(topk.n)};
  check(cudaMemsetAsync(args.workspace, 0, sizeof(TopkWorkspace), stream_of(stream)), "topk", "cudaMemsetAsync");
  const int64_t tiles = tiles_of(topk.n);
  if (topk.n > args.capacity && topk.k > 0 && topk.k < topk.n)
    launch_together<topk_mask_kernel>("topk", "topk_mask_kernel", tiles, stream, args);
  else
    launch<topk_few_kernel>("topk", "topk_few_kernel", tiles, stream, args);
}

}  // namespace bip::cuda
