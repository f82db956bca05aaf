// What goes over all entries of a step, as launches. Who decides on the windows: on one device step.cu, with several ranks shards.cu.
#pragma once

#include "workspace.cuh"

namespace bip::cuda {

// A step, its workspace, and its gradients in the form that kernels take.
class Pass {
 public:
  // `searches`: where groups have entries on several ranks, what the workspace has for that; else null.
  Pass(const Step& step, Search* searches, void* stream);

  const Args& args() const { return args_; }
  bool has_units() const { return args_.step.unit_tile_end != args_.step.unit_tile_begin; }
  int64_t unit_words() const { return (args_.step.unit_tile_end - args_.step.unit_tile_begin) * (kTile / kWarp); }  // of their masks

  void launch_gradients() const;  // those that do not fit into the parameters, before any kernel that reads them
  void launch_scores() const;     // of units: their sums and their scores
  void launch_update() const;     // the entries, by phase and rule
  void launch_spread() const;     // the masks of units to their weights, where several ranks have decided on them

 private:
  void launch_lower() const;
  void launch_joint() const;

  Args args_;
  GradientTable table_;
  void* stream_;
};

}  // namespace bip::cuda
