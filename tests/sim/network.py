"""A network at the level of bip.h: the tables and arrays of a step, without any torch module, every array between guard pages."""

from __future__ import annotations

import numpy as np
import torch


class Network:
    """The tables of bip.h for a list of (numel, group, dtype), between guard pages."""

    def __init__(self, module, specs, kept, *, seed=0, scores=None, rule=1, **hyper):
        self.module, self.specs, self.rule = module, specs, rule
        guarded, random = module.sim.guarded, np.random.default_rng(seed)
        starts = np.cumsum([0] + [-(-numel // module.ALIGN) * module.ALIGN for numel, _, _ in specs])
        total = max(int(starts[-1]), 1)
        self.arrays = {name: guarded(total) for name in ("theta", "momentum", "square", "scores", "score_momentum")}
        self.arrays["steps"] = guarded(max(len(specs), 1), np.int64)
        self.arrays["mask"] = guarded(-(-total // 32), np.uint32)
        for name in ("theta", "momentum", "score_momentum"):
            self.arrays[name][:] = random.standard_normal(total)
        self.arrays["square"][:] = random.random(total)
        self.arrays["steps"][:] = random.integers(0, 9, len(self.arrays["steps"]))
        self.arrays["scores"][:] = random.random(total) if scores is None else scores(total)
        self.tensors = np.zeros(len(specs), module.tensor_dtype)
        self.groups = np.zeros(len(kept), module.group_dtype)
        self.groups["kept"] = kept
        self.hypers = np.zeros(1, module.hyper_dtype)
        for name, value in (
            {"lr": 0.05, "mask_lr": 0.3, "inv_gamma": 0.7, "momentum": 0.9, "weight_decay": 0.01, "eps": 1e-6, "beta1": 0.8, "beta2": 0.95}
            | hyper
        ).items():
            self.hypers[name] = value
        tiles = []
        for i, (numel, group, dtype) in enumerate(specs):
            row, start = self.tensors[i], int(starts[i])
            param = self.arrays[f"param {i}"] = guarded(numel, np.float32 if dtype == 0 else np.uint16)
            row["param"], row["numel"], row["group"], row["dtype"] = param.ctypes.data, numel, group, dtype
            for name in ("theta", "momentum"):
                row[name] = self.arrays[name][start:].ctypes.data
            if rule == 2:
                row["square"], row["steps"] = self.arrays["square"][start:].ctypes.data, self.arrays["steps"][i:].ctypes.data
            if group >= 0:
                for name in ("scores", "score_momentum"):
                    row[name] = self.arrays[name][start:].ctypes.data
                row["mask"] = self.arrays["mask"][start // 32 :].ctypes.data
                row["index"] = self.groups[group]["numel"]
                self.groups[group]["numel"] += numel
                self.groups[group]["entries"] += numel
            elif dtype == 0:
                param[:] = self.arrays["theta"][start : start + numel]
                row["theta"] = param.ctypes.data
            row["first_tile"] = len(tiles)
            tiles += [i] * -(-numel // module.TILE)
        self.tiles = np.array(tiles, np.int32)
        self.groups["tile_end"] = len(tiles)  # any bounds will do
        self.groups["first"] = np.cumsum(self.groups["numel"]) - self.groups["numel"]
        self.workspaces, self.counters, self.begin = {}, {}, 0
        self.nonfinite = self.arrays["num_nonfinite"] = np.zeros(1, np.int64)

    def begin_at(self, entry):
        """Let every tensor begin so many entries earlier: they are in no tile, and nobody may touch them."""
        self.begin = entry
        for row in self.tensors:
            size = 4 if row["dtype"] == 0 else 2
            for name, bytes_before in {"param": entry * size, "mask": entry // 8}.items():
                row[name] -= np.uint64(bytes_before)
            for name in ("theta", "momentum", "scores", "score_momentum", *(("square",) if self.rule == 2 else ())):
                row[name] -= np.uint64(4 * entry)
            row["numel"] += entry
            row["index"] -= entry
            row["first_tile"] -= entry // self.module.TILE

    def step(self, backend, phase, *, seed=0, dtypes=(0,), align=16, without=(), scale=None, found_inf=None):
        """One step with random gradients, one in a hundred of them not finite."""
        random, keep = np.random.default_rng(seed), []
        gradients = np.zeros(len(self.specs), self.module.gradient_dtype)
        for i, (numel, _, _) in enumerate(self.specs):
            dtype = dtypes[i % len(dtypes)]
            g = torch.from_numpy(random.standard_normal(numel)).to((torch.float32, torch.bfloat16, torch.float16)[dtype])
            g[torch.from_numpy(random.random(numel) < 0.01)] = (float("nan"), float("inf"), -float("inf"))[i % 3]
            bits = (g.view(torch.int16) if dtype else g.view(torch.int32)).numpy()
            data = self.module.sim.guarded(numel, bits.dtype, align=min(align, 16) if align > 1 else bits.itemsize)
            data[:] = bits
            keep.append(data)
            if i not in without:
                gradients[i]["data"], gradients[i]["dtype"] = data.ctypes.data - self.begin * bits.itemsize, dtype
        counts = len(self.specs), len(self.groups), len(self.tiles)
        if backend not in self.workspaces:
            self.workspaces[backend] = self.module.sim.guarded(backend.step_workspace_bytes(*counts), np.uint8)
            self.counters[backend] = np.zeros(max(len(self.groups), 1), self.module.counters_dtype)
        scalars = [None if x is None else np.array([x], np.float32) for x in (scale, found_inf)]
        address = [0 if x is None else x.ctypes.data for x in scalars]
        backend.step(
            phase=phase, rule=self.rule, tensors=self.tensors.ctypes.data, num_tensors=counts[0],
            tile_tensor=self.tiles.ctypes.data, num_tiles=counts[2], num_scored_tiles=counts[2], groups=self.groups.ctypes.data,
            num_groups=counts[1], unit_sets=0, num_unit_sets=0,
            unit_tile_begin=0, unit_tile_end=0, parts=0, num_parts=0, num_items=0, hypers=self.hypers.ctypes.data, gradients=gradients,
            grad_scale=address[0], found_inf=address[1], num_nonfinite=self.nonfinite.ctypes.data,
            counters=self.counters[backend].ctypes.data, workspace=self.workspaces[backend].ctypes.data, where=1,
        )  # fmt: skip

    def state(self):
        return {name: array.tobytes() for name, array in self.arrays.items()}

    def kept(self):
        return sum(int(word).bit_count() for word in self.arrays["mask"])
