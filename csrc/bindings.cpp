// pybind11 and nothing else: it turns integers and numpy tables into calls of bip::cpu and bip::cuda. bip_fast/engine/native.py has checked
// the pointers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <initializer_list>
#include <string>

#include "bip.h"
#include "unit_rule.h"

#ifndef BIP_MODULE
#define BIP_MODULE _C
#endif
#ifndef BIP_CUDA_ARCHITECTURES
#define BIP_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The numpy twin of a struct, so that Python fills tables without knowing the layout.
struct Field {
  const char* name;
  const char* format;
  size_t offset;
};
#define BIP_FIELD(Struct, name, format) {#name, format, offsetof(bip::Struct, name)}

py::dtype table_dtype(std::initializer_list<Field> fields, size_t size) {
  py::list names, formats, offsets;
  for (const Field& field : fields) {
    names.append(field.name);
    formats.append(py::dtype(field.format));
    offsets.append(field.offset);
  }
  return py::dtype(names, formats, offsets, static_cast<py::ssize_t>(size));
}

// What further arguments there are: `where` is the number of threads on the CPU and the stream handle on a CUDA device. For groups on several
// ranks: `sums`, which also takes the keys of units, and `turn`, how many units are lifted and how many rounds were narrowed before.
struct Extra {
  uintptr_t where;
  int64_t* sums;
  int32_t turn;

  int threads() const { return static_cast<int>(where); }
  void* stream() const { return at<void>(where); }
};

// A function that takes the arguments of a step: run(step, extra).
template <class Run>
void define_step(py::module_ backend, const char* name, Run run) {
  backend.def(
      name,
      [run](int phase, int rule, uintptr_t tensors, int64_t num_tensors, uintptr_t tile_tensor, int64_t num_tiles, uintptr_t groups,
            int64_t num_groups, uintptr_t unit_sets, int64_t num_unit_sets, uintptr_t parts, int64_t num_parts, int64_t num_items,
            int64_t num_scored_tiles, int64_t unit_tile_begin, int64_t unit_tile_end, uintptr_t hypers, const py::array& gradients,
            uintptr_t grad_scale, uintptr_t found_inf, uintptr_t num_nonfinite, uintptr_t counters, uintptr_t workspace, uintptr_t where,
            uintptr_t sums, int32_t turn) {
        if (gradients.nbytes() != static_cast<py::ssize_t>(num_tensors * sizeof(bip::Gradient)))
          throw py::value_error("gradients must have one row per tensor");
        const bip::Step step{static_cast<bip::Phase>(phase),
                             static_cast<bip::Rule>(rule),
                             at<bip::Tensor>(tensors),
                             num_tensors,
                             at<int32_t>(tile_tensor),
                             num_tiles,
                             num_scored_tiles,
                             at<bip::Group>(groups),
                             num_groups,
                             at<bip::UnitSet>(unit_sets),
                             num_unit_sets,
                             unit_tile_begin,
                             unit_tile_end,
                             at<bip::Part>(parts),
                             num_parts,
                             num_items,
                             at<bip::Hyper>(hypers),
                             static_cast<const bip::Gradient*>(gradients.data()),
                             at<float>(grad_scale),
                             at<float>(found_inf),
                             at<int64_t>(num_nonfinite),
                             at<bip::Counters>(counters),
                             at<void>(workspace)};
        py::gil_scoped_release release;
        return run(step, Extra{where, at<int64_t>(sums), turn});
      },
      py::kw_only(), py::arg("phase"), py::arg("rule"), py::arg("tensors"), py::arg("num_tensors"), py::arg("tile_tensor"),
      py::arg("num_tiles"), py::arg("groups"), py::arg("num_groups"), py::arg("unit_sets"), py::arg("num_unit_sets"), py::arg("parts"),
      py::arg("num_parts"), py::arg("num_items"), py::arg("num_scored_tiles"), py::arg("unit_tile_begin"), py::arg("unit_tile_end"),
      py::arg("hypers"), py::arg("gradients"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("num_nonfinite"), py::arg("counters"),
      py::arg("workspace"), py::arg("where"), py::arg("sums") = 0, py::arg("turn") = 0);
}

template <class RunStep, class RunTopk>
void define_backend(py::module_ backend, RunStep run_step, RunTopk run_topk, int64_t (*step_bytes)(int64_t, int64_t, int64_t),
                    int64_t (*topk_bytes)(int64_t)) {
  backend.def("step_workspace_bytes", step_bytes, py::arg("num_tensors"), py::arg("num_groups"), py::arg("num_scored_tiles"));
  backend.def("topk_workspace_bytes", topk_bytes, py::arg("n"));
  define_step(backend, "step", [run_step](const bip::Step& step, const Extra& extra) { run_step(step, extra.where); });
  backend.def(
      "topk",
      [run_topk](uintptr_t scores, int64_t n, int64_t k, uintptr_t mask, uintptr_t workspace, uintptr_t where) {
        const bip::Topk topk{at<float>(scores), n, k, at<uint8_t>(mask), at<void>(workspace)};
        py::gil_scoped_release release;
        run_topk(topk, where);
      },
      py::kw_only(), py::arg("scores"), py::arg("n"), py::arg("k"), py::arg("mask"), py::arg("workspace"), py::arg("where"));
}

}  // namespace

PYBIND11_MODULE(BIP_MODULE, m) {
  m.doc() = "Kernels of bip_fast. Private: bip_fast.engine checks what reaches them.";

  m.attr("tensor_dtype") = table_dtype(
      {BIP_FIELD(Tensor, param, "u8"), BIP_FIELD(Tensor, theta, "u8"), BIP_FIELD(Tensor, momentum, "u8"), BIP_FIELD(Tensor, square, "u8"),
       BIP_FIELD(Tensor, scores, "u8"), BIP_FIELD(Tensor, score_momentum, "u8"), BIP_FIELD(Tensor, mask, "u8"),
       BIP_FIELD(Tensor, steps, "u8"), BIP_FIELD(Tensor, numel, "i8"), BIP_FIELD(Tensor, first_tile, "i8"), BIP_FIELD(Tensor, index, "i8"),
       BIP_FIELD(Tensor, group, "i4"), BIP_FIELD(Tensor, hyper, "i4"), BIP_FIELD(Tensor, dtype, "i4"), BIP_FIELD(Tensor, elsewhere, "i4"),
       BIP_FIELD(Tensor, row_length, "i8"), BIP_FIELD(Tensor, row_stride, "i8"), BIP_FIELD(Tensor, keep, "i4"),
       BIP_FIELD(Tensor, of, "i4")},
      sizeof(bip::Tensor));
  m.attr("gradient_dtype") = table_dtype({BIP_FIELD(Gradient, data, "u8"), BIP_FIELD(Gradient, dtype, "i4")}, sizeof(bip::Gradient));
  m.attr("hyper_dtype") = table_dtype(
      {BIP_FIELD(Hyper, lr, "f4"), BIP_FIELD(Hyper, mask_lr, "f4"), BIP_FIELD(Hyper, inv_gamma, "f4"), BIP_FIELD(Hyper, momentum, "f4"),
       BIP_FIELD(Hyper, mask_momentum, "f4"), BIP_FIELD(Hyper, weight_decay, "f4"), BIP_FIELD(Hyper, nesterov, "i4"),
       BIP_FIELD(Hyper, eps, "f4"), BIP_FIELD(Hyper, beta1, "f8"), BIP_FIELD(Hyper, beta2, "f8")},
      sizeof(bip::Hyper));
  m.attr("group_dtype") = table_dtype({BIP_FIELD(Group, numel, "i8"), BIP_FIELD(Group, kept, "i8"), BIP_FIELD(Group, entries, "i8"),
                                       BIP_FIELD(Group, first, "i8"), BIP_FIELD(Group, tile_begin, "i8"), BIP_FIELD(Group, tile_end, "i8")},
                                      sizeof(bip::Group));
  m.attr("unit_set_dtype") =
      table_dtype({BIP_FIELD(UnitSet, scores, "u8"), BIP_FIELD(UnitSet, score_momentum, "u8"), BIP_FIELD(UnitSet, before, "u8"),
                   BIP_FIELD(UnitSet, best, "u8"), BIP_FIELD(UnitSet, seen, "u8"), BIP_FIELD(UnitSet, strips, "i8"),
                   BIP_FIELD(UnitSet, sums, "u8"), BIP_FIELD(UnitSet, tensor, "i4"), BIP_FIELD(UnitSet, hyper, "i4"),
                   BIP_FIELD(UnitSet, part_begin, "i4"), BIP_FIELD(UnitSet, part_end, "i4"), BIP_FIELD(UnitSet, min_kept, "i4")},
                  sizeof(bip::UnitSet));
  m.attr("part_dtype") = table_dtype(
      {BIP_FIELD(Part, rows, "i8"), BIP_FIELD(Part, cols, "i8"), BIP_FIELD(Part, block_rows, "i8"), BIP_FIELD(Part, block_cols, "i8"),
       BIP_FIELD(Part, first_item, "i8"), BIP_FIELD(Part, sums, "u8"), BIP_FIELD(Part, tensor, "i4"), BIP_FIELD(Part, set, "i4")},
      sizeof(bip::Part));
  m.def(
      "num_items",
      [](int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols) {
        return bip::num_items({rows, cols, block_rows, block_cols, 0, nullptr, 0, 0});
      },
      py::arg("rows"), py::arg("cols"), py::arg("block_rows"), py::arg("block_cols"));
  m.attr("counters_dtype") =
      table_dtype({BIP_FIELD(Counters, steps, "i8"), BIP_FIELD(Counters, first, "i8"), BIP_FIELD(Counters, missed, "i8"),
                   BIP_FIELD(Counters, crowded, "i8"), BIP_FIELD(Counters, candidates, "i8"), BIP_FIELD(Counters, flips, "i8"),
                   BIP_FIELD(Counters, threshold, "f4")},
                  sizeof(bip::Counters));
  m.attr("TILE") = bip::kTile;
  m.attr("ALIGN") = bip::kAlign;
  m.attr("STRIP") = bip::kStrip;

  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = __VERSION__;
#elif defined(__GNUC__)
    info["compiler"] = "GCC " __VERSION__;
#elif defined(_MSC_VER)
    info["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#else
    info["compiler"] = "unknown";
#endif
    info["simd"] = bip::cpu::simd();
#ifdef BIP_WITH_CUDA
    info["cuda"] = true;
    info["cuda_toolkit"] = BIP_CUDA_TOOLKIT;
#else
    info["cuda"] = false;
    info["cuda_toolkit"] = py::none();
#endif
    info["cuda_architectures"] = BIP_CUDA_ARCHITECTURES;
#ifdef BIP_MUTATION
    info["mutation"] = BIP_MUTATION;  // these kernels are wrong on purpose
#else
    info["mutation"] = py::none();
#endif
    return info;
  });

  define_backend(
      m.def_submodule("cpu"), [](const bip::Step& step, uintptr_t threads) { bip::cpu::step(step, static_cast<int>(threads)); },
      [](const bip::Topk& topk, uintptr_t threads) { bip::cpu::topk(topk, static_cast<int>(threads)); }, bip::cpu::step_workspace_bytes,
      bip::cpu::topk_workspace_bytes);
  // For groups with entries on several ranks.
  py::module_ shards = m.def_submodule("cpu_shards");
  shards.attr("ABSENT") = bip::cpu::kShardAbsent;
  shards.def("sums", bip::cpu::shard_sums, py::arg("num_groups"));
  shards.def("rounds", bip::cpu::shard_rounds, py::arg("num_groups"));
  shards.def(
      "workspace_bytes",
      [](int64_t, int64_t groups, int64_t scored_tiles) { return bip::cpu::shards_workspace_bytes(groups, scored_tiles); },
      py::arg("num_tensors"), py::arg("num_groups"), py::arg("num_scored_tiles"));
  define_step(shards, "score", [](const bip::Step& step, const Extra& extra) { bip::cpu::shards_score(step, extra.threads()); });
  define_step(shards, "offer", [](const bip::Step& step, const Extra& extra) { bip::cpu::shards_offer(step, extra.sums, extra.turn); });
  define_step(shards, "lift", [](const bip::Step& step, const Extra& extra) { bip::cpu::shards_lift(step, extra.sums); });
  define_step(shards, "begin",
              [](const bip::Step& step, const Extra& extra) { bip::cpu::shards_begin(step, extra.sums, extra.threads()); });
  define_step(shards, "narrow",
              [](const bip::Step& step, const Extra& extra) { return bip::cpu::shards_narrow(step, extra.sums, extra.threads()); });
  define_step(shards, "end", [](const bip::Step& step, const Extra& extra) { bip::cpu::shards_end(step, extra.threads()); });
#ifdef BIP_WITH_CUDA
  define_backend(
      m.def_submodule("cuda"), [](const bip::Step& step, uintptr_t stream) { bip::cuda::step(step, at<void>(stream)); },
      [](const bip::Topk& topk, uintptr_t stream) { bip::cuda::topk(topk, at<void>(stream)); }, bip::cuda::step_workspace_bytes,
      bip::cuda::topk_workspace_bytes);
  py::module_ cuda_shards = m.def_submodule("cuda_shards");
  cuda_shards.attr("ABSENT") = bip::cpu::kShardAbsent;
  cuda_shards.def("sums", bip::cuda::shard_sums, py::arg("num_groups"));
  cuda_shards.def("rounds", bip::cuda::shard_rounds, py::arg("num_groups"));
  cuda_shards.def("workspace_bytes", bip::cuda::shards_workspace_bytes, py::arg("num_tensors"), py::arg("num_groups"),
                  py::arg("num_scored_tiles"));
  define_step(cuda_shards, "score", [](const bip::Step& step, const Extra& extra) { bip::cuda::shards_score(step, extra.stream()); });
  define_step(cuda_shards, "offer",
              [](const bip::Step& step, const Extra& extra) { bip::cuda::shards_offer(step, extra.sums, extra.turn, extra.stream()); });
  define_step(cuda_shards, "lift",
              [](const bip::Step& step, const Extra& extra) { bip::cuda::shards_lift(step, extra.sums, extra.stream()); });
  define_step(cuda_shards, "begin",
              [](const bip::Step& step, const Extra& extra) { bip::cuda::shards_begin(step, extra.sums, extra.stream()); });
  define_step(cuda_shards, "narrow", [](const bip::Step& step, const Extra& extra) {
    return bip::cuda::shards_narrow(step, extra.sums, extra.turn, extra.stream());
  });
  define_step(cuda_shards, "end", [](const bip::Step& step, const Extra& extra) { bip::cuda::shards_end(step, extra.stream()); });
#endif
}
