// What a step keeps in the caller's workspace, and who owns which part of it.
//
// Per group: 16 KB of histogram, and two lists of candidates: 32 KB, and 16 bytes for every 128 entries.
#pragma once

#include <algorithm>

#include "sample.cuh"
#include "search.h"

namespace bip::cuda {

// Gradient pointers travel by value; 9 bytes each in the 4 KB of kernel parameters. Those of further tensors go through the workspace.
constexpr int kInlineGradients = 400;

struct GradientTable {
  const void* data[kInlineGradients];
  uint8_t dtype[kInlineGradients];
};

// What the later launches of a step have to do for a group.
enum class Task : uint32_t { none, finish, fall_back };

struct GroupState {
  Memory memory;      // from step to step
  Window window;      // of this step, while there is a task
  Progress progress;  // of the launch
  Task task;
  uint32_t listed;   // candidates, while they are finished
  uint32_t counted;  // steps that fell back and that a sample did not serve; for tests
  // Of a group that falls back: one in how many runs of neighbours is sampled, what the sample says, and how far apart keys near the threshold are.
  uint32_t stride;
  Edges edges;
  EdgeRanks ranks;
  double distance;
};

// Work that is not shared out beforehand, and groups that have a task. The list is in no particular order, which nothing depends on. All 0
// between steps.
struct Queue {
  uint32_t taken;                 // free tiles that a warp has asked for in this launch
  uint32_t through;               // blocks that are through with their tiles in this launch, where steps are counted
  uint32_t finishing;             // groups in the list of those to finish
  uint32_t falling;               // groups that fall back
  uint32_t open[kMaxRounds + 1];  // of these, groups that a sample did not serve; then those with too many keys inside, after each round
};

// Room for what is undecided once the bin of the k-th key is known.
BIP_HD uint32_t few_capacity(int64_t numel) { return 1024 + static_cast<uint32_t>(numel / (128 * 256)); }

// Up to this many candidates, 8 for each thread, the last block settles itself; more are left to the finish, which takes 8 us on an H200.
constexpr uint32_t kAloneUpTo = 2048;
// Up to this many tiles with scores, one launch does everything, which saves most steps a launch. In a step that falls back (the first
// of a training run and few others, see bench/studies/window.py) one block then narrows the window alone. Not tuned on a GPU yet.
constexpr int64_t kAloneTiles = 512;

struct Workspace {
  Queue* queue;
  GroupState* states;     // [num_groups]
  int32_t* finish_list;   // [num_groups]
  Histogram* histograms;  // [num_groups]; 0 between launches
  Candidate* few;         // a list of few_capacity() for each group
  Candidate* candidates;  // a list of candidate_capacity() for each group
  Gradient* gradients;    // [num_tensors - kInlineGradients], written in front of each step that reads them
  Search* searches;       // [num_groups] of groups that have entries on several ranks; else null
  bool alone;             // the first launch does all
};

struct Args {
  Step step;
  Workspace workspace;
};

// Returns the bytes needed; with a base also where everything is.
inline int64_t lay_out(char* base, int64_t num_tensors, int64_t num_groups, int64_t num_scored_tiles, Workspace* workspace) {
  int64_t offset = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + offset);
    offset += (count * static_cast<int64_t>(sizeof *pointer) + 15) / 16 * 16;
  };
  Workspace parts{};
  take(parts.queue, 1);
  take(parts.states, num_groups);
  take(parts.finish_list, num_groups);
  take(parts.histograms, num_groups);
  const int64_t entries = num_groups ? num_scored_tiles * kTile : 0;
  take(parts.few, num_groups * few_capacity(0) + entries / (128 * 256) + 1);
  take(parts.candidates, num_groups * candidate_capacity(0) + entries / 128 + 1);
  take(parts.gradients, std::max<int64_t>(num_tensors - kInlineGradients, 0));
  parts.alone = num_scored_tiles <= kAloneTiles;
  if (workspace) *workspace = parts;
  return offset;
}

// The lists of a group begin where those of all groups before end, each rounded up.
__device__ __forceinline__ Candidate* few_of(const Args& args, int group) {
  return args.workspace.few + group * static_cast<int64_t>(few_capacity(0)) + args.step.groups[group].first / (128 * 256);
}
__device__ __forceinline__ Candidate* candidates_of(const Args& args, int group) {
  return args.workspace.candidates + group * static_cast<int64_t>(candidate_capacity(0)) + args.step.groups[group].first / 128;
}

__device__ __forceinline__ GroupState& state_of(const Args& args, int group) { return args.workspace.states[group]; }
__device__ __forceinline__ uint32_t entries_of(const Args& args, int group) {
  return static_cast<uint32_t>(args.step.groups[group].entries);
}
__device__ __forceinline__ uint32_t capacity_of(const Args& args, int group) { return candidate_capacity(args.step.groups[group].entries); }

}  // namespace bip::cuda
