"""Half of the filters, removed for good: accuracy and speed of ResNet-20 on digits and Fashion-MNIST.

    python3 -m bench.studies.structured --data-dir DIR           train, prune, shrink, measure; JSON under bench/results/<device>, table
    python3 -m bench.studies.structured --data digits            the rows of one data set anew

BiP (joint) beside one-shot group magnitude pruning: both start from the same dense network, keep half of the filters of every set of
coupled layers, and get the same number of forward and backward passes on the same batches; "dense" is the network trained on for as long.
ResNet-20b: 1x1 convolutions on the shortcuts that change the shape, so that whole channels of a stage can go. Fashion-MNIST: 10,000
training images at 28x28. Test images choose nothing: step sizes were chosen on other training images. A finished network is kept in
--work, so an interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.report import folder_name, read
from bench.workload import machine
from bip_fast.experiments.data.dataset import Dataset, split
from bip_fast.experiments.data.sources import load
from bip_fast.experiments.methods.begin import dense_optimizer, pruner
from bip_fast.experiments.methods.table import stages
from bip_fast.experiments.models.names import build
from bip_fast.experiments.runs.folder import RunFolder
from bip_fast.experiments.runs.resolve import resolve
from bip_fast.experiments.runs.training import Cursor, evaluate, train
from bip_fast.experiments.settings import Settings
from bip_fast.export import measure, shrink
from bip_fast.export.runtimes import RUNTIMES
from bip_fast.state_dicts import load_into, read_state_dict, write_safetensors

BATCH = 64
BASE: dict[str, dict[str, Any]] = {
    "digits": {"method": "bip-paper", "data": "digits", "model": "resnet20b", "weight_decay": 5e-4},
    "fashion-mnist": {
        "method": "bip-paper",
        "data": "fashion-mnist",
        "model": "resnet20b",
        "pretrain_epochs": 10,
        "epochs": 10,
        "batch_size": 64,
        "weight_decay": 5e-4,
    },
}
FILTERS = {"pattern": "filter", "scope": "layer", "sparsity": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0, "freeze": 0.0, "lr": 0.05},
    "group magnitude, fine-tuned": {**FILTERS, "freeze": 0.0, "lr": 0.1},
    "BiP joint": {**FILTERS, "levels": "joint", "lr": 0.05, "mask_lr": 1.0},
}


def data_of(name: str, data_dir: Path | None) -> Dataset:
    """The whole of digits; a sixth of the training images of Fashion-MNIST."""
    full = load(name, data_dir)
    if name == "digits":
        return full
    _, chosen = split(full.train_labels, 1 / 6)
    return replace(full, train_images=full.train_images[chosen], train_labels=full.train_labels[chosen]).with_own_statistics()


class Runs:
    """Networks of one data set, each kept in ``work`` once it is trained."""

    def __init__(self, data: Dataset, work: Path) -> None:
        self.data, self.work = data, RunFolder(work)
        work.mkdir(parents=True, exist_ok=True)

    def network(self, settings: Settings) -> nn.Module:
        torch.manual_seed(settings.seed)
        model = build(settings.model, self.data.channels, self.data.classes)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def trained(self, name: str, settings: Settings, start: nn.Module | None) -> nn.Module:
        """The network of a method from ``start``; None: dense training from the beginning."""
        stem = f"{settings.data}-{folder_name(name)}-seed{settings.seed}"
        weights, model = self.work.path / f"{stem}.safetensors", self.network(settings)
        if weights.is_file() and self.work.read_json(f"{stem}.json") == settings.as_dict():
            load_into(model, read_state_dict(weights), weights)
            return model
        dense, sparse = (stage.recipe for stage in stages(settings))
        if start is None:
            optimizer, recipe = dense_optimizer(model, settings), dense
        else:
            model.load_state_dict(start.state_dict())
            optimizer, recipe = pruner(model, settings, self.data), sparse
        train(model, optimizer, self.data, recipe, Cursor())
        if start is not None:
            optimizer.finalize()  # type: ignore[attr-defined]
        self.work.write_json(f"{stem}.json", settings.as_dict())
        self.work.write(weights.name, lambda path: write_safetensors(path, model))
        return model


def rows_of(name: str, data_dir: Path | None, work: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Accuracy of every method and seed; size and speed of what was pruned, beside the dense network in the same run."""
    data, rows = data_of(name, data_dir), []
    for seed in seeds:
        runs = Runs(data, work)
        start = runs.trained("start", resolve({**BASE[name], "seed": seed}), None)
        dense = None
        for method, options in METHODS.items():
            model = runs.trained(method, resolve({**BASE[name], **options, "seed": seed}), start)
            accuracy = evaluate(model, data).accuracy
            row: dict[str, Any] = {"data": name, "seed": seed, "method": method, "accuracy": accuracy}
            if dense is None:
                dense = model
            else:
                small = shrink(model, data.test_images[:2].float())
                row |= {"shrunk_accuracy": evaluate(small.model, data).accuracy, **small.as_dict()}
                for runtime in RUNTIMES:
                    example = data.test_images[:BATCH].float()
                    measured = measure(model, example, dense=dense, batch_sizes=[BATCH], seconds=20, runtime=runtime)
                    row[runtime] = measured.as_dict()
            rows.append(row)
            print(method, f"{100 * accuracy:.2f} %", flush=True)
    return rows


def _pair(row: dict[str, Any], runtime: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the dense and of the shrunk network."""
    own = {variant["name"]: variant for variant in row[runtime]["variants"]}
    return own["dense"], own["shrunk"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each data set, seed and method."""
    lines = [
        "| data | seed | method | accuracy | shrunk | weights | MFLOPs | ms, torch | faster | ms, ONNX Runtime | faster |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [row["data"], str(row["seed"]), row["method"], f"{100 * row['accuracy']:.2f} %"]
        if "shrunk_accuracy" in row:
            dense, small = _pair(row, "torch")
            cells += [f"{100 * row['shrunk_accuracy']:.2f} %", f"{small['parameters']:,} of {dense['parameters']:,}"]
            cells += [f"{small['flops'] / 1e6:.2f} of {dense['flops'] / 1e6:.2f}"]
            for runtime in RUNTIMES:
                if runtime not in row:
                    cells += ["", ""]
                    continue
                dense, small = _pair(row, runtime)
                milliseconds = " of ".join(f"{own['milliseconds'][str(BATCH)]:.3g}" for own in (small, dense))
                cells += [milliseconds, f"{small['speedup'][str(BATCH)]:.2f}x"]
        else:
            cells += [""] * 7
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.structured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(BASE), default=list(BASE), help="default: both")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--work", type=Path, default=Path("runs") / "structured", metavar="DIR", help="default: runs/structured")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "date": datetime.date.today().isoformat()}
    target = options.results / folder_name(results["machine"]["device"]) / "structured.json"
    kept = [row for row in (read(target) or {"rows": []})["rows"] if row["data"] not in options.data]
    rows = [row for name in options.data for row in rows_of(name, options.data_dir, options.work, options.seeds)]
    results["rows"] = sorted(rows + kept, key=lambda row: list(BASE).index(row["data"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results['rows'])}\n\n{target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
