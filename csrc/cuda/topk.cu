// A mask of exactly k ones over n scores, on a CUDA device: the selection of select.cuh with the whole array as its one group.
//
// Launches: the workspace's head is cleared, then count (read the scores: first digits), narrow (read them again: second digits, of those
// in the bin of the k-th key), apply (read them, write the mask, list what is in its bin; the last block settles the list). 13 bytes per
// score. Where all scores fit into the list, and for k = 0 or n, apply alone.
// The mask is the top-k by unique keys: no grid size and no order of blocks changes it.
#include "count.cuh"
#include "launch.cuh"

namespace bip::cuda {
namespace {

struct alignas(16) TopkWorkspace {
  Histogram histogram;
  Progress progress;
  Window window;

  // [capacity_for(n)], behind what has to be cleared.
  __device__ __forceinline__ Candidate* candidates() { return reinterpret_cast<Candidate*>(this + 1); }
};

// Room for candidates. At least 8192: for that few scores, one launch with a block that settles all of them beats three launches.
uint32_t capacity_for(int64_t n) { return std::max(candidate_capacity(n), 8192u); }

struct TopkArgs {
  Topk topk;
  TopkWorkspace* workspace;
  uint32_t capacity;
};

struct Tile {
  int64_t first;
  int entries;
  __device__ __forceinline__ Tile(int64_t n, int number) : first(number * kTile) {
    entries = static_cast<int>(n - first < kTile ? n - first : kTile);
  }
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

__device__ __forceinline__ Group group_of(const Topk& topk) { return {topk.n, topk.k, 0}; }

__device__ __forceinline__ Window current_window(const TopkArgs& args) {
  const Window window = whole_window(group_of(args.topk));
  return window.inside > args.capacity ? args.workspace->window : window;
}

// Calls body(tile) for the tiles of this block, a warp for each.
template <class Body>
__device__ __forceinline__ void for_tiles_in(const Topk& topk, Room& room, const Range& share, Body body) {
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) {
    const Tile tile(topk.n, number);
    body(tile);
    note_entries(room, tile.entries);
  }
}

// One warp per tile of scores: their first digits.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_count_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  clear(room);
  for_tiles_in(topk, room, block_range(tiles_of(topk.n)),
               [&](const Tile& tile) { count_first(room, kAnyDigit, topk.scores + tile.first, tile.entries); });
  if (!merge(room, workspace.histogram, workspace.progress, static_cast<uint32_t>(topk.n))) return;
  const Window window = narrow_first(room, group_of(topk), kAnyDigit);
  if (thread_id() == 0) workspace.window = window;
}

// One more digit if the window still has too many keys. One warp per tile of scores.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_narrow_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  const Window window = current_window(args);  // read before this block publishes, so before the last block replaces it
  if (window.inside <= args.capacity) return;
  const int shift = window_shift(window);
  clear(room);
  for_tiles_in(topk, room, block_range(tiles_of(topk.n)), [&](const Tile& tile) {
    count_inside(room, window, shift, topk.scores + tile.first, tile.entries, static_cast<uint32_t>(tile.first));
  });
  if (!merge(room, workspace.histogram, workspace.progress, static_cast<uint32_t>(topk.n))) return;
  const Window narrowed = narrow(room, window, shift, window.lo);
  if (thread_id() == 0) workspace.window = narrowed;
}

// One warp decides one tile. An undecided entry is 0 for now and becomes a candidate, if candidates are listed.
template <bool kVector>
__device__ void apply_tile(const TopkArgs& args, const Tile& tile, const Window& window) {
  const ScoreRange range(window);
  const bool listed = window.inside <= args.capacity;
  for (int base = lane_id() * kQuad; base < tile.entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride;
      s[ahead] = load_quad<kVector>(args.topk.scores + tile.first + i, tile.entries - i);
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride, exist = tile.entries - i;
      Quad<uint8_t> kept;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const uint32_t score = score_key(s[ahead].x[j]), index = static_cast<uint32_t>(tile.first) + static_cast<uint32_t>(i + j);
        const Verdict verdict = judge(window, range, score, index);
        kept.x[j] = verdict == Verdict::kept;
        if (verdict == Verdict::undecided && listed && (kVector || j < exist))
          args.workspace->candidates()[atomicAdd(&args.workspace->progress.collected, 1u)] = {full_key(score, index), 0, index};
      }
      store_quad<kVector>(args.topk.mask + tile.first + i, kept, exist);
    }
  }
}

__device__ __forceinline__ void apply_tile(const TopkArgs& args, const Tile& tile, const Window& window) {
  if (tile.entries == kTile && quad_aligned(args.topk.scores) && quad_aligned(args.topk.mask))
    apply_tile<true>(args, tile, window);
  else
    apply_tile<false>(args, tile, window);
}

// For several huge runs of equal scores that two digits do not tell apart: one block narrows further and applies what it finds. That is
// slow, but exact, and saves all other calls a launch.
__device__ Window narrow_alone(const TopkArgs& args, Room& room, Window window) {
  const auto for_all = [&](auto body) {
    for (int number = warp_id(); number < tiles_of(args.topk.n); number += kWarps) body(Tile(args.topk.n, number));
  };
  while (window.inside > args.capacity) {
    const int shift = window_shift(window);
    for_all([&](const Tile& tile) {
      count_inside(room, window, shift, args.topk.scores + tile.first, tile.entries, static_cast<uint32_t>(tile.first));
    });
    window = narrow(room, window, shift, window.lo);
  }
  for_all([&](const Tile& tile) { apply_tile(args, tile, window); });
  __syncthreads();
  return window;
}

// One warp per tile writes the mask; the last block settles the candidates.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_apply_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  Window window = current_window(args);
  clear(room);
  for_tiles_in(topk, room, block_range(tiles_of(topk.n)), [&](const Tile& tile) { apply_tile(args, tile, window); });
  if (window.inside == 0 || !publish_is_last(room, workspace.progress, static_cast<uint32_t>(topk.n))) return;
  if (window.inside > args.capacity) window = narrow_alone(args, room, window);
  settle(room, workspace.candidates(), window.inside, window, window,
         [&](const Candidate& candidate, bool kept) { topk.mask[candidate.entry] = kept; });
}

}  // namespace

int64_t topk_workspace_bytes(int64_t n) {
  return static_cast<int64_t>(sizeof(TopkWorkspace)) + capacity_for(n) * static_cast<int64_t>(sizeof(Candidate));
}

void topk(const Topk& topk, void* stream) {
  if (topk.n == 0) return;
  const TopkArgs args{topk, static_cast<TopkWorkspace*>(topk.workspace), capacity_for(topk.n)};
  check(cudaMemsetAsync(args.workspace, 0, sizeof(TopkWorkspace), stream_of(stream)), "topk", "cudaMemsetAsync");
  const int64_t tiles = tiles_of(topk.n);
  if (topk.n > args.capacity && topk.k > 0 && topk.k < topk.n) {
    launch<topk_count_kernel>("topk", "topk_count_kernel", tiles, stream, args);
    launch<topk_narrow_kernel>("topk", "topk_narrow_kernel", tiles, stream, args);
  }
  launch<topk_apply_kernel>("topk", "topk_apply_kernel", tiles, stream, args);
}

}  // namespace bip::cuda
