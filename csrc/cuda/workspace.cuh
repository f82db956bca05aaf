// What a step keeps in the caller's workspace, and who owns which part of it.
//
// Per group: 24 KB of histogram and state, and two lists of candidates, 16 bytes for every 128 entries and 32 KB.
#pragma once

#include <algorithm>

#include "select.cuh"

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
  uint32_t listed;  // candidates, while the task is to finish
};

// Groups that have a task. The lists are in no particular order, which nothing depends on.
struct Queue {
  uint32_t finishing;  // groups in the list of those to finish; 0 between steps
  uint32_t falling;    // groups that fall back and are not done; 0 between steps
};

constexpr uint32_t kFew = 1024;        // room for what is undecided once the bin of the k-th key is known
constexpr uint32_t kAloneUpTo = 2048;  // candidates that the last block settles itself, sooner than another launch would
constexpr int64_t kAloneTiles = 512;   // up to so many tiles one launch does all: the fallback, too, is quicker than three launches

struct Workspace {
  Queue* queue;
  GroupState* states;     // [num_groups]
  int32_t* finish_list;   // [num_groups]
  Histogram* histograms;  // [num_groups]; 0 between launches
  Candidate* few;         // [num_groups][kFew]
  Candidate* candidates;  // a list of candidate_capacity() for each group
  Gradient* gradients;    // [num_tensors - kInlineGradients], written in front of each step that reads them
  uint32_t alone;         // candidates that a last block settles itself
};

struct Args {
  Step step;
  Workspace workspace;
};

// Returns the bytes needed; with a base also where everything is.
inline int64_t lay_out(char* base, int64_t num_tensors, int64_t num_groups, int64_t num_tiles, Workspace* workspace) {
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
  take(parts.few, num_groups * kFew);
  take(parts.candidates, num_groups ? num_groups * candidate_capacity(0) + num_tiles * kTile / 128 + 1 : 0);
  take(parts.gradients, std::max<int64_t>(num_tensors - kInlineGradients, 0));
  parts.alone = num_tiles <= kAloneTiles ? ~0u : kAloneUpTo;
  if (workspace) *workspace = parts;
  return offset;
}

// The candidates of group g begin where those of all groups before end, each rounded up.
__device__ __forceinline__ Candidate* candidates_of(const Args& args, int group) {
  return args.workspace.candidates + group * static_cast<int64_t>(candidate_capacity(0)) + args.step.groups[group].first / 128;
}

__device__ __forceinline__ GroupState& state_of(const Args& args, int group) { return args.workspace.states[group]; }
__device__ __forceinline__ uint32_t numel_of(const Args& args, int group) { return static_cast<uint32_t>(args.step.groups[group].numel); }
__device__ __forceinline__ uint32_t capacity_of(const Args& args, int group) { return candidate_capacity(args.step.groups[group].numel); }

}  // namespace bip::cuda
