// The lower, upper and joint step on a CUDA device: one streaming skeleton, one warp per tile of 1024 entries of one tensor.
//
//   lower  1 launch    update (update.cuh): weights, by the rule of the optimizer                       24.1 bytes per fp32 weight
//   upper  2 launches  update: scores, judged at once against the window of the step before            16.3
//                      finish: returns at once in most steps
//   joint  2 launches  update: both; then as upper                                                     28.3 to 32.3
//   Units take a launch more, for their sums and scores, and the finish always; it also writes the masks and z of their weights.
//   With AdamW 8 bytes more in lower and joint steps. With an optimizer of the caller's these write m*g instead of theta, v and z, and a
//   launch more writes z when that optimizer has moved theta.
//   Up to kAloneTiles tiles the first launch does everything.
//   1 more for every 400 gradient pointers beyond the first 400.
//
// The block that completes a group in the update knows whether the window held its k-th key (conclude.cuh). If so, it settles the
// candidates, or leaves them to `finish` where they are many. If not, the group falls back: the finish takes a sample of its scores and judges
// all of them by the window that this gives, 4.1 bytes more per weight. Where the sample does not serve either, it counts digits of all scores
// until few enough are left, 4 bytes for each digit, and judges once more. Nothing returns to the host.
// The mask changes in two places: judge_near (judge.cuh) while streaming, repair (conclude.cuh) candidate by candidate.
// Whatever the path and the grid, a group's mask is the top-k of its scores by unique keys. A tensor's entries are written by one
// warp only until its group is complete, and then by the block that completed it or by the finish.
#include "conclude.cuh"
#include "launch.cuh"
#include "pass.cuh"
#include "runs.cuh"
#include "units.cuh"

namespace bip::cuda {
namespace {

// Calls body(run, group's state) for the runs of this block whose group falls back.
template <class Body>
__device__ __forceinline__ void for_falling_runs(const Args& args, Body body) {
  for_runs(args, [&](const Run& run) {
    GroupState& state = state_of(args, run.group);
    if (state.task == Task::fall_back) body(run, state);
  });
}

// Calls body(tile) for the pruned tiles of a run, a warp for each, and notes their entries.
template <class Body>
__device__ __forceinline__ void for_noted_tiles_in(const Args& args, Room& room, const Run& run, Body body) {
  for_tiles_in(args, run, [&](const Tile& tile) {
    body(tile);
    note_entries(room, tile.entries);
  });
}

// Whole block: judges its run by the window of the group's state.
__device__ __noinline__ void judge_run(const Args& args, JudgeRoom& room, const Run& run, GroupState& state) {
  begin_judging(room, state.window, state.progress, candidates_of(args, run.group), capacity_of(args, run.group));
  uint32_t num_above = 0;
  for_noted_tiles_in(args, room, run, [&](const Tile& tile) { judge_tile(room, num_above, tile); });
  end_judging(room, num_above);
  report_flips(room, args.step.counters[run.group]);
}

// ---- finish ----

// The contiguous share of the candidates of the `place`-th group to finish that belongs to this block: so many that few blocks have to publish
// their effects. Each group begins with another block, so that many of them keep many blocks busy.
__device__ __forceinline__ Range candidate_range(uint32_t candidates, uint32_t place) {
  constexpr uint32_t kLeast = 4 * kThreads;
  const int64_t needed = (candidates + kLeast - 1) / kLeast, blocks = needed < gridDim.x ? needed : gridDim.x;
  const int64_t block = (blockIdx.x + gridDim.x - 3 * place % gridDim.x) % gridDim.x;
  if (block >= blocks) return {0, 0};
  return {static_cast<int>(candidates * block / blocks), static_cast<int>(candidates * (block + 1) / blocks)};
}

// A block's share of the candidates of a group: counts them. The last block narrows the window to the bin of the k-th key.
__device__ __noinline__ void count_share(const Args& args, JudgeRoom& room, int group, uint32_t place, bool sampled) {
  GroupState& state = state_of(args, group);
  const Window judged = state.window;
  const Candidate* list = candidates_of(args, group);
  const Range share = candidate_range(judged.inside, place);
  if (share.begin == share.end) return;
  count_keys(room, list + share.begin, static_cast<uint32_t>(share.end - share.begin), judged, window_shift(judged));
  if (thread_id() == 0) {
    room.entries = static_cast<uint32_t>(share.end - share.begin);
    room.memory = state.memory;
  }
  if (!merge(room, args.workspace.histograms[group], state.progress, judged.inside)) return;
  const Window window = next_window(args, room, group, judged, sampled);
  if (thread_id() != 0) return;
  state.listed = judged.inside;
  state.window = window;
}

// The same share, after a barrier: candidates outside of that bin get their bit, the last block settles the others.
__device__ __noinline__ void finish_share(const Args& args, Room& room, int group, uint32_t place) {
  GroupState& state = state_of(args, group);
  const Window window = state.window;
  const uint32_t listed = state.listed;
  const Candidate* list = candidates_of(args, group);
  Candidate* few = few_of(args, group);
  const bool fits = window.inside <= few_capacity(args.step.groups[group].numel);
  const Range share = candidate_range(listed, place);
  if (share.begin == share.end) return;
  for (int i = share.begin + thread_id(); i < share.end; i += kThreads) {
    const Candidate candidate = list[i];
    if (candidate.key >= window.hi || candidate.key < window.lo)
      repair(args, group, candidate, candidate.key >= window.hi);
    else if (fits)
      few[atomicAdd(&state.progress.collected, 1u)] = candidate;
  }
  if (thread_id() == 0) room.entries = static_cast<uint32_t>(share.end - share.begin);
  if (!publish_is_last(room, state.progress, listed)) return;
  settle_group(args, room, group, fits ? few : list, fits ? window.inside : listed, window, window);
  __syncthreads();
}

// ---- sample ----

// Calls visit(key) for the sampled keys in a block's run that are this lane's, and notes all entries of the run.
template <class Visit>
__device__ __forceinline__ void for_sampled_in(const Args& args, Room& room, const Run& run, Visit visit) {
  constexpr int64_t kRuns = kTile / kWarp;
  const Step& step = args.step;
  const uint32_t stride = state_of(args, run.group).stride;
  const int64_t begin = run.begin * kRuns, end = run.end * kRuns;
  for (int64_t turn = begin / stride + warp_id(); turn * stride < end; turn += kWarps) {
    const int64_t sampled = sampled_run(turn, stride);
    if (sampled < begin || sampled >= end) continue;
    const Tile tile(step, static_cast<int>(sampled / kRuns));
    const int place = static_cast<int>(sampled % kRuns) * kWarp + lane_id();
    if (tile.tensor.group >= 0 && place < tile.entries)
      visit(full_key(score_key(tile.tensor.scores[tile.first + place]), tile.index() + static_cast<uint32_t>(place)));
  }
  for (int64_t which = step.tile_tensor[run.begin] + thread_id(); which < step.num_tensors; which += kThreads) {
    const Tensor& tensor = step.tensors[which];
    if (tensor.first_tile >= run.end) break;
    if (tensor.group < 0) continue;
    const int64_t from = (run.begin - tensor.first_tile) * kTile, to = (run.end - tensor.first_tile) * kTile;
    atomicAdd(&room.entries, static_cast<uint32_t>((to < tensor.numel ? to : tensor.numel) - (from > 0 ? from : 0)));
  }
}

// First digits of a sample of each group that falls back.
__device__ __noinline__ void sample_first_digits(const Args& args, SampleRoom& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    for_sampled_in(args, room, run, [&](uint64_t key) { count_first_key(room, kScoreDigit, key); });
    if (!merge(room, args.workspace.histograms[run.group], state.progress, entries_of(args, run.group))) return;
    const Edges edges = edges_of(room, kScoreDigit, args.step.groups[run.group].numel, args.step.groups[run.group].kept);
    if (thread_id() == 0) {
      state.edges = edges;
      state.ranks = room.ranks;
    }
    clear(room);
  });
}

// Second digits, which give the window.
__device__ __noinline__ void sample_edges(const Args& args, SampleRoom& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    const Edges edges = state.edges;
    for_sampled_in(args, room, run, [&](uint64_t key) { count_edge_key(room, edges, key); });
    if (!merge(room, args.workspace.histograms[run.group], state.progress, entries_of(args, run.group))) return;
    const Window window = window_of(room, edges, state.ranks);
    if (thread_id() == 0) state.window = window;
    clear(room);
  });
}

// Whole block, which has completed a group: settles it by the sample's window, leaves it to be finished, or has its digits counted.
__device__ __noinline__ void conclude_sampled(const Args& args, JudgeRoom& room, int group) {
  GroupState& state = state_of(args, group);
  const int64_t above = state.progress.above, inside = state.progress.collected, kept = args.step.groups[group].kept;
  __syncthreads();  // all threads have read it
  if (thread_id() == 0) {
    room.memory = state.memory;
    state.progress = {};
  }
  if (served(args, group, above, inside)) {
    const Window& judged = room.group.window;
    accept(args, room, group, {judged.lo, judged.hi, static_cast<uint32_t>(kept - above), static_cast<uint32_t>(inside)}, true);
  } else if (thread_id() == 0) {
    const Window& judged = room.group.window;
    state.distance = distance_in({judged.lo, judged.hi, 0, static_cast<uint32_t>(inside)});
    state.window = window_of_kth(judged, args.step.groups[group].numel, kept, above, inside);
    ++state.counted;
    atomicAdd(&args.workspace.queue->open[0], 1u);
  }
}

// Judges the groups that fall back by the windows of the samples.
__device__ __noinline__ void judge_by_samples(const Args& args, JudgeRoom& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    judge_run(args, room, run, state);
    if (publish_is_last(room, state.progress, entries_of(args, run.group))) conclude_sampled(args, room, run.group);
  });
}

// ---- count ----

// A group whose digits are counted is listed when at most so many keys are inside its window: few enough for one block, or for a pass over a list
// that is cheaper than one over the scores.
__device__ __forceinline__ uint32_t listable(const Args& args, int group) {
  const uint32_t most = kAloneUpTo + entries_of(args, group) / 65536, capacity = capacity_of(args, group);
  return most < capacity ? most : capacity;
}

// Counts digits of the scores of the groups that still fall back. The first time that is all of them, and shows where the window of the next
// step begins; then those with too many keys inside their windows. The last block of a group narrows its window.
__device__ __noinline__ void count_digits(const Args& args, Room& room, int round) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    // Read before this block publishes any entry of the group, so before the last block can replace it.
    const Window window = state.window;
    const uint32_t most = listable(args, run.group);
    if (round > 0 && window.inside <= most) return;
    const int shift = window_shift(window);
    for_noted_tiles_in(args, room, run, [&](const Tile& tile) {
      count_inside(room, window, shift, tile.tensor.scores + tile.first, tile.entries, tile.index());
    });
    if (!merge(room, args.workspace.histograms[run.group], state.progress, entries_of(args, run.group))) return;
    const Window narrowed = narrow(room, window, shift, window.lo, &state.memory, round == 0 ? state.distance : 0);
    if (thread_id() != 0) return;
    state.window = narrowed;
    if (narrowed.inside > most) atomicAdd(&args.workspace.queue->open[round + 1], 1u);
  });
}

// Judges them by the windows that were found; the block that completes one settles it.
__device__ __noinline__ void judge_again(const Args& args, JudgeRoom& room) {
  for_falling_runs(args, [&](const Run& run, GroupState& state) {
    judge_run(args, room, run, state);
    if (publish_is_last(room, state.progress, entries_of(args, run.group)))
      settle_group(args, room, run.group, room.group.list, room.group.window.inside, room.group.window, room.group.window);
  });
}

// Whole grid: digits of all scores narrow the windows of the groups that no sample served, until the keys inside can be listed. After each
// round all blocks read the same count of open groups: those of the next round go to another place.
__device__ __noinline__ void narrow_all(const Args& args, Room& room) {
  const Queue& queue = *args.workspace.queue;
  for (int round = 0; round < kMaxRounds && queue.open[round] != 0; ++round) {
    count_digits(args, room, round);
    wait_for_all();
  }
}

// Whole grid: groups with many candidates are finished; those that fall back are sampled and judged, counted where that does not serve, and
// finished. After a barrier all blocks read the same counts and so decide the same.
__device__ __noinline__ void finish_groups(const Args& args, SampleRoom& room, uint32_t finishing, uint32_t falling) {
  Queue& queue = *args.workspace.queue;
  clear(room);
  for (uint32_t i = 0; i < finishing; ++i) count_share(args, room, args.workspace.finish_list[i], i, false);
  uint32_t counting = 0, to_finish = finishing;
  if (falling != 0) {
    sample_first_digits(args, room);
    wait_for_all();
    sample_edges(args, room);
    wait_for_all();
    judge_by_samples(args, room);
    wait_for_all();
    counting = queue.open[0];
    to_finish = queue.finishing;
    for (uint32_t i = finishing; i < to_finish; ++i) count_share(args, room, args.workspace.finish_list[i], i, true);
    if (counting != 0) narrow_all(args, room);
  }
  if (counting == 0) wait_for_all();
  // All blocks have read all of the queue but the last count, which is 0.
  if (blockIdx.x == 0 && thread_id() == 0) queue = {};
  for (uint32_t i = 0; i < to_finish; ++i) finish_share(args, room, args.workspace.finish_list[i], i);
  if (counting != 0) judge_again(args, room);
}

// What the update could not conclude, all blocks together, all of them resident: groups, with barriers over the grid, which are nearly never
// needed, and then the weights of units whose bits have flipped.
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) step_finish_kernel(const Args __grid_constant__ args) {
  __shared__ SampleRoom room;
  if (skipped(args.step)) return;
  const bool units = args.step.unit_tile_end != args.step.unit_tile_begin;
  const uint32_t finishing = args.workspace.queue->finishing, falling = args.workspace.queue->falling;
  if (finishing != 0 || falling != 0) {
    finish_groups(args, room, finishing, falling);
    if (units) wait_for_all();
  }
  if (units) spread_units(args.step);
}

}  // namespace

int64_t step_workspace_bytes(int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles) {
  return lay_out(nullptr, num_tensors, num_groups, num_scored_tiles, nullptr);
}

void step(const Step& step, void* stream) {
  if (step.num_tiles == 0) return;
  const Pass pass(step, nullptr, stream);
  pass.launch_gradients();
  if (step.phase == Phase::lower) return pass.launch_update();
  pass.launch_scores();
  pass.launch_update();
  const int64_t words = pass.unit_words();
  if (words == 0 && (step.num_groups == 0 || pass.args().workspace.alone)) return;
  launch_together<step_finish_kernel>("step", "step_finish_kernel", std::max(step.num_scored_tiles, words), stream, pass.args());
}

}  // namespace bip::cuda
