"""The paper, the authors' code and this project: what each difference does to the accuracy, by the plain-torch reference.

    python3 -m bench.studies.paper --data-dir DIR   part of Fashion-MNIST, JSON under bench/results/<device>, table; 6 minutes a seed
    python3 -m bench.studies.paper --data digits    the same on digits, in two minutes

Every variant starts from the same dense network, takes as many forward and backward passes, and differs from the paper's BiP in one thing
(`bip_fast.reference.Variant`, and which batch the upper level sees). The settings of the runs are `configs/quick.yaml`'s, with the
paper's form of BiP: alternating levels, scores that start as min(|theta|, 1), gamma 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.report import folder_name
from bench.workload import machine
from bip_fast import reference
from bip_fast.engine.layers import weights
from bip_fast.experiments.data.batches import Position, batch_count
from bip_fast.experiments.data.parts import AnyData
from bip_fast.experiments.data.sources import load
from bip_fast.experiments.methods.begin import dense_optimizer
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models.names import build
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.runs.training import Cursor, evaluate, train
from bip_fast.experiments.settings import Settings
from bip_fast.reference import PAPER, Hyper, State, Variant

SPARSITIES = (0.95,)
# The paper's own, 0.01 and 0.1, move hardly any mask in so few epochs.
STEPS = {"method": "bip-paper", "lr": 0.05, "mask_lr": 1.0, "weight_decay": 5e-4}
BASE: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "data": "fashion-mnist",
        "train_images": 10000,
        "stride": 2,
        "width": 8,
        "batch_size": 64,
        "pretrain_epochs": 10,
        "epochs": 10,
    },
    "digits": {"data": "digits", "width": 8, "pretrain_epochs": 20, "epochs": 20},
}
# What the levels see: "two" batches in turn, one backward each; the "same" batch, one backward each; "joint": one backward for both.
VARIANTS: dict[str, tuple[Variant, str]] = {
    "the paper: implicit term -m g^2 / gamma, two batches": (PAPER, "two"),
    "no implicit term": (Variant("none"), "two"),
    "the published implicit term, -1e-4 (theta g)^2": (Variant("published"), "two"),
    "that term, scores that are the weights: upper steps move these, masks go by size": (Variant("published", shared=True), "two"),
    "one batch for both levels, a backward for each": (PAPER, "same"),
    "one batch and one backward (joint)": (PAPER, "joint"),
    "joint, no implicit term": (Variant("none"), "joint"),
}


class Reference:
    """BiP by `bip_fast.reference` on a model: all Conv and Linear weights under one mask, everything else by plain SGD."""

    def __init__(self, model: nn.Module, settings: Settings, variant: Variant) -> None:
        self.params = [p for _, p in weights(model)]
        self.others = [p for p in model.parameters() if not any(p is q for q in self.params)]
        self.sgd = torch.optim.SGD(self.others, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
        self.sizes = [p.numel() for p in self.params]
        theta = torch.cat([p.detach().flatten() for p in self.params])
        self.k = reference.kept(theta.numel(), settings.sparsity)
        self.state: State = reference.start(theta, self.k)
        self.settings, self.variant = settings, variant
        self.first_mask = self.state.m
        self._write()

    def step(self, phase: str, factor: float) -> None:
        """A lower, upper or joint step, both step sizes times ``factor``."""
        s = self.settings
        hyper = Hyper(s.lr * factor, s.mask_lr * factor, s.gamma, s.momentum, weight_decay=s.weight_decay)
        g = torch.cat([p.grad.flatten() for p in self.params if p.grad is not None])
        if phase == "lower":
            self.state = reference.lower(self.state, g, hyper)
        else:
            move = reference.upper if phase == "upper" else reference.joint
            self.state = move(self.state, g, hyper, self.k, self.variant)
        if phase != "upper":
            self.sgd.param_groups[0]["lr"] = hyper.lr
            self.sgd.step()
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        z = reference.masked(self.state.m, self.state.theta)
        for p, own in zip(self.params, z.split(self.sizes), strict=True):
            p.copy_(own.view(p.shape))

    @property
    def moved(self) -> float:
        """Share of the kept weights that the first mask had not kept."""
        return 1 - float((self.state.m & self.first_mask).sum()) / self.k


def phases(batches: str) -> Iterator[tuple[str, bool]]:
    """What a step does, and whether it takes a new batch."""
    while True:
        if batches == "joint":
            yield "joint", True
        else:
            yield "lower", True
            yield "upper", batches == "two"


def run(model: nn.Module, settings: Settings, data: AnyData, variant: Variant, batches: str) -> dict[str, Any]:
    """Prune ``model`` for as many forward and backward passes as ``settings.epochs`` have."""
    optimizer, steps = Reference(model, settings, variant), batch_count(len(data.train_labels), settings.batch_size)
    model.train()
    turn, batch, taken = phases(batches), (torch.empty(0), torch.empty(0)), 0
    total = settings.epochs * steps
    epoch: Any = None
    for done in range(total):
        phase, new = next(turn)
        if new:
            at, step = divmod(taken, steps)
            epoch = data.epoch(settings.batch_size, Position(settings.seed, "prune", at)) if not step else epoch
            batch, taken = epoch.batch(step), taken + 1
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step(phase, 0.5 * (1 + math.cos(math.pi * done / total)))
    return {"accuracy": evaluate(model, data).accuracy, "moved": optimizer.moved}


def network(settings: Settings, data: AnyData, state: dict[str, Tensor] | None = None) -> nn.Module:
    torch.manual_seed(settings.seed)
    model = build(settings.model, data.channels, data.classes, settings.width)
    if state is not None:
        model.load_state_dict(state)
    return model


def rows_of(name: str, data_dir: Path | None, seeds: list[int]) -> list[dict[str, Any]]:
    """Every variant at every sparsity, from one dense network for each seed."""
    rows = []
    loaded = load(name, data_dir)
    for seed in seeds:
        settings = resolve({**BASE[name], **STEPS, "seed": seed})
        data = settings.part_of(loaded)
        model = network(settings, data)
        train(model, dense_optimizer(model, settings), data, stages(settings)[0].recipe, Cursor())
        state = {key: x.clone() for key, x in model.state_dict().items()}
        for sparsity in SPARSITIES:
            for label, (variant, batches) in VARIANTS.items():
                own = resolve({**BASE[name], **STEPS, "seed": seed, "sparsity": sparsity})
                row = {"data": name, "seed": seed, "sparsity": sparsity, "variant": label}
                rows.append({**row, **run(network(own, data, state), own, data, variant, batches)})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each variant, the mean over seeds and every seed, and how much of the mask moved."""
    rows = results["rows"]
    sparsities = sorted({row["sparsity"] for row in rows})
    heads = [f"{100 * s:g} % zeros | mask moved" for s in sparsities]
    lines = ["| " + " | ".join(["upper level", *heads]) + " |", "|---" * (1 + 2 * len(sparsities)) + "|"]
    for label in VARIANTS:
        cells = []
        for sparsity in sparsities:
            own = [row for row in rows if (row["variant"], row["sparsity"]) == (label, sparsity)]
            accuracies = [100 * row["accuracy"] for row in own]
            each = " / ".join(f"{x:.2f}" for x in accuracies)
            cells += [f"{statistics.mean(accuracies):.2f} ({each})", f"{100 * statistics.mean(row['moved'] for row in own):.1f} %"]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(BASE), default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "date": datetime.date.today().isoformat()}
    results["settings"] = {**BASE[options.data], **STEPS}
    results["rows"] = rows_of(options.data, options.data_dir, options.seeds)
    target = options.results / folder_name(results["machine"]["device"]) / "paper.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
