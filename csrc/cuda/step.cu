// The lower, upper and joint step on a CUDA device: one streaming skeleton, one warp per tile of 1024 entries of one tensor.
//
//   lower  1 launch    update (update.cuh): weights                                                    24.1 bytes per fp32 weight
//   upper  4 launches  update: scores, and a histogram of their first digit                            16.1
//                      narrow, twice (returns at once where the window is small already): read s       0 to 8
//                      apply: read s and mask; write mask words and z only where an entry flips        4.1
//   joint  4 launches  update: both; then as upper                                                     28.3 to 32.3, then 4.1 to 12.1
//   1 more for every 400 gradient pointers beyond the first 400.
//
// Window, candidates and fallback are in select.cuh. Whatever the grid, a group's mask is the top-k of its scores by unique keys.
// A tensor's entries are written by one warp only until its group is complete, and then only by the block that completed it.
#include "launch.cuh"
#include "update.cuh"

namespace bip::cuda {
namespace {

// Gradient pointers travel by value; 9 bytes each in the 4 KB of kernel parameters. Those of further tensors go through the workspace.
constexpr int kInlineGradients = 400;

struct GradientTable {
  const void* data[kInlineGradients];
  uint8_t dtype[kInlineGradients];
};

// The caller's workspace. All of it is zero, or left from an earlier step and never read before it is written, between steps.
struct Workspace {
  GroupState* states;     // [num_groups]
  Histogram* histograms;  // [num_groups]
  Candidate* candidates;  // [num_groups][capacity]
  Gradient* gradients;    // [num_tensors - kInlineGradients], written in front of each step that reads them
  uint32_t capacity;
};

struct Args {
  Step step;
  Workspace workspace;
};

// Groups with no more entries than `capacity` need no histogram at all. Eight candidates for each tile are 0.6 % of a tile's memory; more
// than 8192 would take one block longer to settle than another pass takes the whole device.
uint32_t candidate_capacity(int64_t num_groups, int64_t num_tiles) {
  return num_groups ? static_cast<uint32_t>(std::clamp<int64_t>(8 * num_tiles / num_groups, 1024, 8192)) : 0;
}

// Returns the bytes needed; with a base also where everything is. All sizes are multiples of 16.
int64_t lay_out(char* base, int64_t num_tensors, int64_t num_groups, int64_t num_tiles, Workspace* workspace) {
  const uint32_t capacity = candidate_capacity(num_groups, num_tiles);
  const int64_t histograms = num_groups * static_cast<int64_t>(sizeof(GroupState));
  const int64_t candidates = histograms + num_groups * static_cast<int64_t>(sizeof(Histogram));
  const int64_t gradients = candidates + num_groups * capacity * static_cast<int64_t>(sizeof(Candidate));
  const int64_t further = std::max<int64_t>(num_tensors - kInlineGradients, 0);
  if (workspace)
    *workspace = {reinterpret_cast<GroupState*>(base), reinterpret_cast<Histogram*>(base + histograms),
                  reinterpret_cast<Candidate*>(base + candidates), reinterpret_cast<Gradient*>(base + gradients), capacity};
  return gradients + further * static_cast<int64_t>(sizeof(Gradient));
}

// Tiles of one block that one histogram serves: all pruned ones are of `group` (-1: there are none).
struct Run {
  int begin, end;
  int group;
};

// The run that starts at `begin`. Every warp finds it for itself: no barrier, and the tables are in the cache.
__device__ Run next_run(const Step& step, int begin, int end) {
  int group = -1;
  for (int tile = begin; tile < end; tile += kWarp) {
    const bool exists = tile + lane_id() < end;
    const int mine = exists ? step.tensors[step.tile_tensor[tile + lane_id()]].group : -1;
    const unsigned pruned = __ballot_sync(kAllLanes, mine >= 0);
    if (pruned == 0) continue;
    if (group < 0) group = __shfl_sync(kAllLanes, mine, __ffs(pruned) - 1);
    const unsigned other = __ballot_sync(kAllLanes, mine >= 0 && mine != group);
    if (other != 0) return {begin, tile + __ffs(other) - 1, group};
  }
  return {begin, end, group};
}

// The window of a group at the start of a launch.
__device__ __forceinline__ Window current_window(const Args& args, int group) {
  const Window window = whole_window(args.step.groups[group]);
  return window.inside > args.workspace.capacity ? args.workspace.states[group].window : window;
}

__device__ __forceinline__ uint32_t group_numel(const Step& step, int group) { return static_cast<uint32_t>(step.groups[group].numel); }

__device__ __forceinline__ Candidate* list_of(const Args& args, int group) {
  return args.workspace.candidates + static_cast<int64_t>(group) * args.workspace.capacity;
}

// One warp moves one tile, and counts it if its group has more entries than fit a candidate list: then `room` is not null.
template <Phase kPhase>
__device__ void update_tile(const Args& args, const GradientTable& table, int number, float inverse_scale, Room* room,
                            unsigned& nonfinite) {
  const Step& step = args.step;
  const int which = step.tile_tensor[number];
  const Tile tile(step, number);
  if (kPhase == Phase::upper && tile.tensor.group < 0) return;
  const bool is_inline = which < kInlineGradients;
  const Gradient* further = is_inline ? nullptr : args.workspace.gradients + (which - kInlineGradients);
  const void* data = is_inline ? table.data[which] : further->data;
  const DType dtype = is_inline ? static_cast<DType>(table.dtype[which]) : further->dtype;
  const bool counts = room && tile.tensor.group >= 0;
  if (counts) note_entries(*room, tile.entries);
  Job job{tile, step.hypers[tile.tensor.hyper], inverse_scale, data, dtype, counts ? &room->histogram : nullptr, 0};
  if (data)
    move_tile<kPhase>(job);
  else
    count_tile(job);
  nonfinite += job.nonfinite;
}

// One block per contiguous share of the tiles, in runs that one histogram serves; the block that completes a group picks its first window.
template <Phase kPhase>
__device__ __forceinline__ void update_and_count(const Args& args, const GradientTable& table, Room& room) {
  const Step& step = args.step;
  if (skipped(step)) return;
  const float inverse_scale = inverse_of(step.grad_scale);
  unsigned nonfinite = 0;
  const Range share = block_range(step.num_tiles);
  clear(room);
  for (int begin = share.begin; begin < share.end;) {
    const Run run = next_run(step, begin, share.end);
    begin = run.end;
    const bool counts = run.group >= 0 && whole_window(step.groups[run.group]).inside > args.workspace.capacity;
    for (int tile = run.begin + warp_id(); tile < run.end; tile += kWarps)
      update_tile<kPhase>(args, table, tile, inverse_scale, counts ? &room : nullptr, nonfinite);
    if (!counts) continue;
    GroupState& state = args.workspace.states[run.group];
    if (!merge(room, args.workspace.histograms[run.group], state, group_numel(step, run.group))) continue;
    const Window window = narrow_first(room, step.groups[run.group], kScoreDigit);
    if (thread_id() == 0) state.window = window;
  }
  report_nonfinite(step, nonfinite);
}

// One thread per gradient pointer that did not fit into the parameters of the update.
__global__ void __launch_bounds__(kThreads) step_gradients_kernel(const GradientTable __grid_constant__ table, Gradient* to, int count) {
  for (int i = thread_id(); i < count; i += kThreads) to[i] = {table.data[i], static_cast<DType>(table.dtype[i]), 0};
}

// One warp per tile; nothing is shared.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_lower_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  if (skipped(args.step)) return;
  const float inverse_scale = inverse_of(args.step.grad_scale);
  const Range share = block_range(args.step.num_tiles);
  unsigned nonfinite = 0;
  for (int tile = share.begin + warp_id(); tile < share.end; tile += kWarps)
    update_tile<Phase::lower>(args, table, tile, inverse_scale, nullptr, nonfinite);
  report_nonfinite(args.step, nonfinite);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_upper_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ Room room;
  update_and_count<Phase::upper>(args, table, room);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_joint_kernel(const Args __grid_constant__ args, const GradientTable __grid_constant__ table) {
  __shared__ Room room;
  update_and_count<Phase::joint>(args, table, room);
}

// One more digit for the groups whose window still has too many keys: one block per share, one warp per tile, scores only.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_narrow_kernel(const Args __grid_constant__ args) {
  __shared__ Room room;
  const Step& step = args.step;
  if (skipped(step)) return;
  const Range share = block_range(step.num_tiles);
  clear(room);
  for (int begin = share.begin; begin < share.end;) {
    const Run run = next_run(step, begin, share.end);
    begin = run.end;
    if (run.group < 0) continue;
    // Read before this block publishes any entry of the group, so before the last block can replace it.
    const Window window = current_window(args, run.group);
    if (window.inside <= args.workspace.capacity) continue;
    const int shift = window_shift(window);
    for (int number = run.begin + warp_id(); number < run.end; number += kWarps) {
      const Tile tile(step, number);
      if (tile.tensor.group < 0) continue;
      count_inside(room, window, shift, tile.tensor.scores + tile.first, tile.entries, tile.index());
      note_entries(room, tile.entries);
    }
    GroupState& state = args.workspace.states[run.group];
    if (!merge(room, args.workspace.histograms[run.group], state, group_numel(step, run.group))) continue;
    const Window narrowed = narrow(room, window, shift, window.lo);
    if (thread_id() == 0) state.window = narrowed;
  }
}

// The lane's four mask bits, of all lanes' fours: the eight lanes of a word each get the word.
__device__ __forceinline__ uint32_t word_of_bits(unsigned bits) {
  uint32_t word = bits << (lane_id() % 8 * kQuad);
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return word;
}

// The lane's quad of a tile: new mask bits; what is undecided keeps its bit for now and, if `list` is not null, becomes a candidate.
template <bool kVector>
__device__ __forceinline__ unsigned decide_quad(const Tile& tile, int number, int place, const Quad<float>& s, unsigned old_bits,
                                                const Window& window, GroupState& state, Candidate* list) {
  const ScoreRange range(window);
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const uint32_t score = score_key(s.x[j]), index = tile.index() + place + j;
    const Verdict verdict = judge(window, range, score, index);
    if ((!kVector && place + j >= tile.entries) || verdict == Verdict::dropped) continue;
    bits |= verdict == Verdict::kept ? 1u << j : old_bits & 1u << j;
    if (verdict == Verdict::undecided && list) collect(state, list, full_key(score, index), number, place + j);
  }
  return bits;
}

constexpr int kApplyAhead = 2;  // quads, and their mask words, that a lane loads before it uses the first: what 80 registers hold

// One warp decides one tile. Its loop bounds are the warp's, because the lanes build words together.
template <bool kVector>
__device__ void apply_tile(const Tile& tile, int number, const Window& window, GroupState& state, Candidate* list) {
  const Tensor& tensor = tile.tensor;
  for (int base = 0; base < tile.entries; base += kApplyAhead * kStride) {
    Quad<float> s[kApplyAhead];
    uint32_t old_words[kApplyAhead];
#pragma unroll
    for (int ahead = 0; ahead < kApplyAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad, exist = tile.entries - place;
      old_words[ahead] = kVector || exist > 0 ? tensor.mask[(tile.first + place) / kWarp] : 0u;
      s[ahead] = load_quad<kVector>(tensor.scores + tile.first + place, exist);
    }
#pragma unroll
    for (int ahead = 0; ahead < kApplyAhead; ++ahead) {
      const int place = base + ahead * kStride + lane_id() * kQuad;
      const unsigned old_bits = old_words[ahead] >> (place % kWarp) & 0xfu;
      const unsigned bits = decide_quad<kVector>(tile, number, place, s[ahead], old_bits, window, state, list);
      const uint32_t word = word_of_bits(bits);
      for (unsigned flips = bits ^ old_bits; flips; flips &= flips - 1) {
        const int j = __ffs(flips) - 1;
        flip_z(tensor, tile.first + place + j, bits >> j & 1u);
      }
      if (lane_id() % 8 == 0 && word != old_words[ahead]) tensor.mask[(tile.first + place) / kWarp] = word;
    }
  }
}

__device__ __forceinline__ void apply_tile(const Tile& tile, int number, const Window& window, GroupState& state, Candidate* list) {
  if (tile.entries == kTile && quad_aligned(tile.tensor.scores))
    apply_tile<true>(tile, number, window, state, list);
  else
    apply_tile<false>(tile, number, window, state, list);
}

// The block that completed a group in the apply pass decides what is left of it.
__device__ void settle_group(const Args& args, Room& room, int group, const Window& window) {
  const Step& step = args.step;
  GroupState& state = args.workspace.states[group];
  Candidate* list = list_of(args, group);
  const auto for_tiles = [&](auto body) {
    for (int number = warp_id(); number < step.num_tiles; number += kWarps) {
      const Tile tile(step, number);
      if (tile.tensor.group == group) body(tile, number);
    }
  };
  const auto count_all = [&](const Window& now, int shift) {
    for_tiles([&](const Tile& tile, int) { count_inside(room, now, shift, tile.tensor.scores + tile.first, tile.entries, tile.index()); });
  };
  const auto apply_all = [&](const Window& now) {
    for_tiles([&](const Tile& tile, int number) { apply_tile(tile, number, now, state, list); });
  };
  const auto repair = [&](const Candidate& candidate, bool kept) {
    const Tile tile(step, candidate.tile);
    const int64_t entry = tile.first + candidate.entry;
    const uint32_t bit = 1u << (entry % kWarp);
    uint32_t& word = tile.tensor.mask[entry / kWarp];
    if (kept == ((word & bit) != 0)) return;  // other threads flip other bits of the word; this one is ours
    atomicXor(&word, bit);
    flip_z(tile.tensor, entry, kept);
  };
  settle(room, state, list, args.workspace.capacity, window, count_all, apply_all, repair);
}

// One block per share, one warp per tile: new mask words, z where a bit flips; the block that completes a group settles its candidates.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_apply_kernel(const Args __grid_constant__ args) {
  __shared__ Room room;
  const Step& step = args.step;
  if (skipped(step)) return;
  const Range share = block_range(step.num_tiles);
  clear(room);
  for (int begin = share.begin; begin < share.end;) {
    const Run run = next_run(step, begin, share.end);
    begin = run.end;
    if (run.group < 0) continue;
    const Window window = current_window(args, run.group);
    GroupState& state = args.workspace.states[run.group];
    Candidate* list = window.inside <= args.workspace.capacity ? list_of(args, run.group) : nullptr;
    for (int number = run.begin + warp_id(); number < run.end; number += kWarps) {
      const Tile tile(step, number);
      if (tile.tensor.group < 0) continue;
      apply_tile(tile, number, window, state, list);
      if (window.inside != 0) note_entries(room, tile.entries);
    }
    if (window.inside == 0) continue;
    if (publish_is_last(room, state, group_numel(step, run.group))) settle_group(args, room, run.group, window);
  }
}

// The gradients [first, first + count) by value.
GradientTable table_of(const Gradient* gradients, int64_t first, int64_t count) {
  GradientTable table{};
  for (int64_t i = 0; i < count; ++i) {
    table.data[i] = gradients[first + i].data;
    table.dtype[i] = static_cast<uint8_t>(gradients[first + i].dtype);
  }
  return table;
}

}  // namespace

int64_t step_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_tiles) {
  return lay_out(nullptr, num_tensors, num_groups, num_tiles, nullptr);
}

void step(const Step& step, void* stream) {
  if (step.num_tiles == 0) return;
  Args args{step, {}};
  lay_out(static_cast<char*>(step.workspace), step.num_tensors, step.num_groups, step.num_tiles, &args.workspace);
  for (int64_t first = kInlineGradients; first < step.num_tensors; first += kInlineGradients) {
    const int64_t count = std::min<int64_t>(step.num_tensors - first, kInlineGradients);
    launch("step", "step_gradients_kernel", step_gradients_kernel, 1, stream, table_of(step.gradients, first, count),
           args.workspace.gradients + (first - kInlineGradients), static_cast<int>(count));
  }
  const GradientTable table = table_of(step.gradients, 0, std::min<int64_t>(step.num_tensors, kInlineGradients));
  const int64_t blocks = grid_for(step.num_tiles, "step");
  if (step.phase == Phase::lower) return launch("step", "step_lower_kernel", step_lower_kernel, blocks, stream, args, table);
  if (step.phase == Phase::upper)
    launch("step", "step_upper_kernel", step_upper_kernel, blocks, stream, args, table);
  else
    launch("step", "step_joint_kernel", step_joint_kernel, blocks, stream, args, table);
  if (step.num_groups == 0) return;
  for (int pass = 0; pass < kNarrowPasses; ++pass) launch("step", "step_narrow_kernel", step_narrow_kernel, blocks, stream, args);
  launch("step", "step_apply_kernel", step_apply_kernel, blocks, stream, args);
}

}  // namespace bip::cuda
