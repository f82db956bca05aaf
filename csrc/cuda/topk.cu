// A mask of exactly k ones over n scores, on a CUDA device: the selection of select.cuh with the whole array as its one group.
//
// Launches: the workspace's histogram is cleared, then count (read the scores), narrow (twice; returns at once where the window is small
// already), apply (read the scores, write the mask). 9 to 17 bytes per score. Up to kCapacity scores, and k = 0 or n, need apply only.
// The mask is the top-k by unique keys: no grid size and no order of blocks changes it.
#include "launch.cuh"
#include "select.cuh"

namespace bip::cuda {
namespace {

constexpr uint32_t kCapacity = 8192;  // see candidate_capacity in step.cu
constexpr FirstDigit kAnyDigit{0, 32 - kDigitBits};

struct TopkWorkspace {
  Histogram histogram;
  GroupState state;
  Candidate candidates[kCapacity];  // does not need to be cleared
};

struct TopkArgs {
  Topk topk;
  TopkWorkspace* workspace;
};

struct Tile {
  int64_t first;
  int entries;
  __device__ __forceinline__ Tile(int64_t n, int number) : first(number * kTile) {
    entries = static_cast<int>(n - first < kTile ? n - first : kTile);
  }
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

__device__ __forceinline__ Group group_of(const Topk& topk) { return {topk.n, topk.k}; }

__device__ __forceinline__ Window current_window(const TopkArgs& args) {
  const Window window = whole_window(group_of(args.topk));
  return window.inside > kCapacity ? args.workspace->state.window : window;
}

// The quads of kAhead strides from `base` on.
template <bool kVector>
__device__ __forceinline__ void load_ahead(Quad<float> (&s)[kAhead], const float* scores, int base, int entries) {
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    const int i = base + ahead * kStride;
    s[ahead] = load_quad<kVector>(scores + i, entries - i);
  }
}

template <bool kVector>
__device__ void count_first(Room& room, const float* scores, int entries) {
  for (int base = lane_id() * kQuad; base < entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
    load_ahead<kVector>(s, scores, base, entries);
#pragma unroll
    for (int j = 0; j < kAhead * kQuad; ++j) {
      const uint32_t key = score_key(s[j / kQuad].x[j % kQuad]);
      if (kVector || base + j / kQuad * kStride + j % kQuad < entries) count(room.histogram, first_bin(kAnyDigit, key), key);
    }
  }
}

// One warp per tile of scores: their first digits.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_count_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  const Range share = block_range(tiles_of(topk.n));
  clear(room);
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) {
    const Tile tile(topk.n, number);
    const float* scores = topk.scores + tile.first;
    if (tile.entries == kTile && quad_aligned(scores))
      count_first<true>(room, scores, tile.entries);
    else
      count_first<false>(room, scores, tile.entries);
    note_entries(room, tile.entries);
  }
  TopkWorkspace& workspace = *args.workspace;
  if (!merge(room, workspace.histogram, workspace.state, static_cast<uint32_t>(topk.n))) return;
  const Window window = narrow_first(room, group_of(topk), kAnyDigit);
  if (thread_id() == 0) workspace.state.window = window;
}

// One more digit if the window still has too many keys. One warp per tile of scores.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_narrow_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  const Window window = current_window(args);  // read before this block publishes, so before the last block replaces it
  if (window.inside <= kCapacity) return;
  const int shift = window_shift(window);
  const Range share = block_range(tiles_of(topk.n));
  clear(room);
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) {
    const Tile tile(topk.n, number);
    count_inside(room, window, shift, topk.scores + tile.first, tile.entries, static_cast<uint32_t>(tile.first));
    note_entries(room, tile.entries);
  }
  if (!merge(room, workspace.histogram, workspace.state, static_cast<uint32_t>(topk.n))) return;
  const Window narrowed = narrow(room, window, shift, window.lo);
  if (thread_id() == 0) workspace.state.window = narrowed;
}

// One warp decides one tile. What is undecided is 0 for now and, if `list` is not null, becomes a candidate.
template <bool kVector>
__device__ void apply_tile(const Topk& topk, const Tile& tile, const Window& window, GroupState& state, Candidate* list) {
  const ScoreRange range(window);
  for (int base = lane_id() * kQuad; base < tile.entries; base += kAhead * kStride) {
    Quad<float> s[kAhead];
    load_ahead<kVector>(s, topk.scores + tile.first, base, tile.entries);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int i = base + ahead * kStride, exist = tile.entries - i;
      Quad<uint8_t> kept;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const uint32_t score = score_key(s[ahead].x[j]), index = static_cast<uint32_t>(tile.first) + i + j;
        const Verdict verdict = judge(window, range, score, index);
        kept.x[j] = verdict == Verdict::kept;
        if (verdict == Verdict::undecided && list && (kVector || j < exist)) collect(state, list, full_key(score, index), 0, index);
      }
      store_quad<kVector>(topk.mask + tile.first + i, kept, exist);
    }
  }
}

__device__ __forceinline__ void apply_tile(const Topk& topk, const Tile& tile, const Window& window, GroupState& state, Candidate* list) {
  if (tile.entries == kTile && quad_aligned(topk.scores) && quad_aligned(topk.mask))
    apply_tile<true>(topk, tile, window, state, list);
  else
    apply_tile<false>(topk, tile, window, state, list);
}

// One warp per tile writes the mask; the last block settles the candidates.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) topk_apply_kernel(const TopkArgs __grid_constant__ args) {
  __shared__ Room room;
  const Topk& topk = args.topk;
  TopkWorkspace& workspace = *args.workspace;
  const Window window = current_window(args);
  Candidate* list = workspace.candidates;
  const Range share = block_range(tiles_of(topk.n));
  clear(room);
  for (int number = share.begin + warp_id(); number < share.end; number += kWarps) {
    const Tile tile(topk.n, number);
    apply_tile(topk, tile, window, workspace.state, window.inside <= kCapacity ? list : nullptr);
    note_entries(room, tile.entries);
  }
  if (window.inside == 0 || !publish_is_last(room, workspace.state, static_cast<uint32_t>(topk.n))) return;
  const auto for_tiles = [&](auto body) {
    for (int number = warp_id(); number < tiles_of(topk.n); number += kWarps) body(Tile(topk.n, number));
  };
  const auto count_all = [&](const Window& now, int shift) {
    for_tiles([&](const Tile& tile) {
      count_inside(room, now, shift, topk.scores + tile.first, tile.entries, static_cast<uint32_t>(tile.first));
    });
  };
  const auto apply_all = [&](const Window& now) {
    for_tiles([&](const Tile& tile) { apply_tile(topk, tile, now, workspace.state, list); });
  };
  const auto repair = [&](const Candidate& candidate, bool kept) { topk.mask[candidate.entry] = kept; };
  settle(room, workspace.state, list, kCapacity, window, count_all, apply_all, repair);
}

}  // namespace

int64_t topk_workspace_bytes(int64_t) { return sizeof(TopkWorkspace); }

void topk(const Topk& topk, void* stream) {
  if (topk.n == 0) return;
  const TopkArgs args{topk, static_cast<TopkWorkspace*>(topk.workspace)};
  check(cudaMemsetAsync(args.workspace, 0, offsetof(TopkWorkspace, candidates), stream_of(stream)), "topk", "cudaMemsetAsync");
  const int64_t blocks = grid_for(tiles_of(topk.n), "topk");
  if (topk.n > kCapacity && topk.k > 0 && topk.k < topk.n) {
    launch("topk", "topk_count_kernel", topk_count_kernel, blocks, stream, args);
    for (int pass = 0; pass < kNarrowPasses; ++pass) launch("topk", "topk_narrow_kernel", topk_narrow_kernel, blocks, stream, args);
  }
  launch("topk", "topk_apply_kernel", topk_apply_kernel, blocks, stream, args);
}

}  // namespace bip::cuda
