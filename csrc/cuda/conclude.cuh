// What the block that completes a group does: it accepts the candidates and settles them, or makes the group fall back; and it sets the
// window of the next step.
#pragma once

#include "judge.cuh"
#include "workspace.cuh"

namespace bip::cuda {

// The window that a group is judged by in the first launch of a step.
struct Guess {
  Window window;  // lo and hi; all keys if nothing is known
  bool known;     // false: there is none, and there are too many entries to list them all
};

// The same where other entries are on other ranks. Without a window, everything is inside.
__device__ __forceinline__ Guess shared_guess_of(const Args& args, int group) {
  const Search& search = args.workspace.searches[group];
  const bool known = search.settled || state_of(args, group).memory.known || entries_of(args, group) <= capacity_of(args, group);
  return {{search.window.lo, search.window.hi, 0, 0}, known};
}

__device__ __forceinline__ Guess guess_of(const Args& args, int group) {
  if (args.workspace.searches) return shared_guess_of(args, group);
  const Window whole = whole_window(args.step.groups[group]);
  if (whole.inside <= capacity_of(args, group)) return {whole, true};
  Memory memory = state_of(args, group).memory;
  follow(memory, args.step.groups[group].kept, args.step.groups[group].numel);
  return memory.known ? Guess{{memory.lo, memory.hi, 0, 0}, true} : Guess{whole, false};
}

// Calls body(tile) for all tiles of a group: one block, one warp per tile.
template <class Body>
__device__ __forceinline__ void for_tiles_of(const Args& args, int group, Body body) {
  const Group& selection = args.step.groups[group];
  for (int number = static_cast<int>(selection.tile_begin) + warp_id(); number < selection.tile_end; number += kWarps) {
    const Tile tile(args.step, number);
    if (tile.tensor.group == group) body(tile);
  }
}

// Nobody waits for what a counter held.
__device__ __forceinline__ void add(int64_t& counter, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&counter), static_cast<unsigned long long>(value));
}

// After end_judging: the bits that the block has changed.
__device__ __forceinline__ void report_flips(const JudgeRoom& room, Counters& counters) {
  if (thread_id() == 0 && room.flips) add(counters.flips, room.flips);
}

// Flips the mask bit and z of one candidate.
__device__ __noinline__ inline void flip(const Args& args, int group, const Candidate& candidate, bool kept) {
  const Tile tile(args.step, candidate.tile);
  const int64_t entry = tile.first + (candidate.entry & ~kKeptNow);
  atomicXor(&tile.tensor.mask[entry / kWarp], 1u << (entry % kWarp));  // other threads flip other bits of the word
  if (tile.tensor.param) flip_z(tile.tensor, entry, kept);             // units have none
  add(args.step.counters[group].flips, 1);
}

// Gives one candidate its final mask bit and z. Most have them already, and nothing of theirs is read.
__device__ __forceinline__ void repair(const Args& args, int group, const Candidate& candidate, bool kept) {
  if (kept != ((candidate.entry & kKeptNow) != 0)) flip(args, group, candidate, kept);
}

// Selects exactly among a list that has all keys inside the window, repairs those inside `unsettled`, and ends the step for the group.
__device__ __noinline__ inline void settle_group(const Args& args, Room& room, int group, const Candidate* list, uint32_t candidates,
                                                 Window window, Window unsettled) {
  const Window settled = settle(room, list, candidates, window, unsettled,
                                [&](const Candidate& candidate, bool kept) { repair(args, group, candidate, kept); });
  if (thread_id() != 0) return;
  GroupState& state = state_of(args, group);
  state.memory.threshold = settled.hi;
  state.memory.known = 1;
  state.progress = {};
  state.task = Task::none;
  args.step.counters[group].threshold = key_score(static_cast<uint32_t>(settled.hi >> 32));
}

// One block alone: narrows the window of a group until its keys can be listed, lists and settles them.
__device__ __noinline__ inline void fall_back_alone(const Args& args, JudgeRoom& room, int group, Window window) {
  GroupState& state = state_of(args, group);
  const uint32_t capacity = capacity_of(args, group);
  while (window.inside > capacity) {
    const int shift = window_shift(window);
    for_tiles_of(args, group,
                 [&](const Tile& tile) { count_inside(room, window, shift, tile.tensor.scores + tile.first, tile.entries, tile.index()); });
    window = narrow(room, window, shift, window.lo, &state.memory);
  }
  if (thread_id() == 0) state.progress = {};
  begin_judging(room, window, state.progress, candidates_of(args, group), capacity);
  uint32_t num_above = 0;
  for_tiles_of(args, group, [&](const Tile& tile) { judge_tile(room, num_above, tile); });
  end_judging(room, num_above);
  report_flips(room, args.step.counters[group]);
  __syncthreads();
  if (thread_id() == 0) room.above = 0;  // not needed: the window is certain
  settle_group(args, room, group, candidates_of(args, group), window.inside, window, window);
}

// Whole block, with the keys inside a window that held the k-th key in `room`'s histogram, and what the group remembers in room.memory:
// returns the window of the bin of the k-th key, and sets the window of the next step. The histogram is empty afterwards. `sampled`: the
// group fell back, and how far the next window reaches is known (reject).
__device__ __noinline__ inline Window next_window(const Args& args, JudgeRoom& room, int group, const Window& judged, bool sampled) {
  const int shift = window_shift(judged);
  if (!sampled) {
    const uint32_t rank = rank_of(room, judged, shift, room.memory.threshold);
    if (thread_id() == 0) {
      const int64_t error = static_cast<int64_t>(rank) - judged.wanted;
      widen_window(room.memory, error < 0 ? -error : error, args.step.groups[group].numel);
      add(args.step.counters[group].candidates, judged.inside);
    }
    __syncthreads();
  }
  Window window = closed_if_settled(judged);
  if (window.inside == 0) {  // the k-th key is at the window's edge, and there is no bin to look for
    clear(room);
    if (thread_id() == 0) {
      const double way = distance_in(judged) * room.memory.half;
      room.memory.lo = key_below(window.hi, way);
      room.memory.hi = key_above(window.hi, way);
    }
  } else {
    window = narrow(room, judged, shift, judged.lo, &room.memory, distance_in(judged));
  }
  if (thread_id() == 0) state_of(args, group).memory = room.memory;
  return window;
}

constexpr uint32_t kStaged = kWarps * kPending;

// Whole block: a list, copied to where the candidates of its warps were, if it fits: passes over it then take no trips to memory.
__device__ __noinline__ inline const Candidate* staged(JudgeRoom& room, const Candidate* list, uint32_t candidates) {
  if (candidates > kStaged) return list;
  constexpr int kTogether = 4;
  Candidate* copy = room.pending[0];
  for (uint32_t base = thread_id(); base < candidates; base += kTogether * kThreads) {
    Candidate some[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) some[j] = list[base + j * kThreads < candidates ? base + j * kThreads : base];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (base + j * kThreads < candidates) copy[base + j * kThreads] = some[j];
  }
  return copy;
}

// Whether a window held the k-th key, and all keys inside are listed.
__device__ __forceinline__ bool served(const Args& args, int group, int64_t above, int64_t inside) {
  const int64_t kept = args.step.groups[group].kept;
  return above <= kept && kept <= above + inside && inside <= capacity_of(args, group);
}

// The window served: `wanted` of the keys inside are kept. `sampled`: as in next_window.
__device__ inline void accept(const Args& args, JudgeRoom& room, int group, const Window& judged, bool sampled) {
  if (args.workspace.alone || judged.inside <= kAloneUpTo) {
    const Candidate* list = staged(room, candidates_of(args, group), judged.inside);
    clear(room);
    count_keys(room, list, judged.inside, judged, window_shift(judged));
    const Window window = next_window(args, room, group, judged, sampled);
    return settle_group(args, room, group, list, judged.inside, window, judged);
  }
  if (thread_id() != 0) return;
  GroupState& state = state_of(args, group);
  state.window = judged;
  state.task = Task::finish;
  args.workspace.finish_list[atomicAdd(&args.workspace.queue->finishing, 1u)] = group;
}

// The guess was wrong, or there was none.
__device__ inline void reject(const Args& args, JudgeRoom& room, int group, bool known, int64_t above, int64_t inside) {
  GroupState& state = state_of(args, group);
  const Group& selection = args.step.groups[group];
  if (thread_id() == 0) {
    Counters& counters = args.step.counters[group];
    const int64_t missed = above > selection.kept ? above - selection.kept : selection.kept - above - inside;
    add(!known ? counters.first : missed > 0 ? counters.missed : counters.crowded, 1);
    widen_window(state.memory, known && missed > 0 ? missed + state.memory.half : 0, selection.numel);
  }
  clear(room);
  if (args.workspace.alone) {
    for_tiles_of(args, group, [&](const Tile& tile) { count_first(room, tile.tensor.scores + tile.first, tile.entries); });
    return fall_back_alone(args, room, group, narrow_first(room, selection, state.memory));
  }
  if (thread_id() != 0) return;
  state.task = Task::fall_back;
  state.stride = sample_stride(selection.numel, selection.kept);
  atomicAdd(&args.workspace.queue->falling, 1u);
}

// Run by the block that has published the last entry of a group in the first launch. A call, so that what it needs does not take registers
// from the streaming loop.
__device__ __noinline__ inline void conclude(const Args& args, JudgeRoom& room, int group) {
  const bool known = room.group.capacity != 0;
  GroupState& state = state_of(args, group);
  const int64_t kept = args.step.groups[group].kept, above = state.progress.above, inside = state.progress.collected;
  __syncthreads();  // all threads have read it
  if (thread_id() == 0) {
    follow(state.memory, kept, args.step.groups[group].numel);
    room.memory = state.memory;
    state.progress = {};
    add(args.step.counters[group].steps, 1);
  }
  const Window& judged = room.group.window;
  if (known && served(args, group, above, inside))
    accept(args, room, group, {judged.lo, judged.hi, static_cast<uint32_t>(kept - above), static_cast<uint32_t>(inside)}, false);
  else
    reject(args, room, group, known, above, inside);
}

}  // namespace bip::cuda
