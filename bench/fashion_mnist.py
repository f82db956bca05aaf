"""Accuracy on Fashion-MNIST: BiP (alternating and joint) beside one-shot magnitude pruning with fine-tuning and dense training.

    python3 -m bench.fashion_mnist --data-dir DIR                compare: measure on the test images, write JSON, picture and table
    python3 -m bench.fashion_mnist --data-dir DIR --validate     the search behind `CHOSEN`: measure on other training images, print

ResNet-20 on 10,000 training images at stride 2 (14x14), all 10,000 test images. Each seed trains one dense network; from it every method
gets the same number of forward and backward passes, on the same batches: BiP alternating spends every second one on the masks. "dense" is
the same network trained on for as long. The masks of all methods are an exact global top-k over all Conv and Linear weights.
A finished cell is kept in --work, so an interrupted comparison continues where it was. On two CPU cores 0.95 and 0.98 take 14 minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bip_fast
from bench.report import folder_name
from bench.workload import processor_name
from bip_fast.experiments import models
from bip_fast.experiments.data import Dataset, load, split
from bip_fast.experiments.prune import dense_optimizer, pruner, recipes
from bip_fast.experiments.run import RunFolder, load_into, read_state_dict, write_safetensors
from bip_fast.experiments.settings import Settings
from bip_fast.experiments.train import Cursor, evaluate, train
from bip_fast.report import report

Row = dict[str, Any]

BASE: dict[str, Any] = {"data": "fashion-mnist", "pretrain_epochs": 10, "epochs": 10, "batch_size": 64, "pretrain_lr": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0, "freeze": 0.0},
    "magnitude, fine-tuned": {"freeze": 0.0},
    "BiP alternating": {"levels": "alternating"},
    "BiP joint": {"levels": "joint"},
}
# Step sizes for each method: the best mean of --validate over 95 and 98 %. Dense, a reference line, was not searched.
CHOSEN: dict[str, dict[str, Any]] = {
    "dense": {"lr": 0.05},
    "magnitude, fine-tuned": {"lr": 0.1},
    "BiP alternating": {"lr": 0.05, "mask_lr": 1.0},
    "BiP joint": {"lr": 0.05, "mask_lr": 1.0},
}
SEARCH = {
    "magnitude, fine-tuned": [{"lr": lr} for lr in (0.025, 0.05, 0.1, 0.2)],
    "BiP alternating": [{"lr": lr, "mask_lr": mask_lr} for mask_lr in (0.3, 1.0, 3.0) for lr in (0.05, 0.1)],
    "BiP joint": [{"lr": lr, "mask_lr": mask_lr} for mask_lr in (0.3, 1.0, 3.0) for lr in (0.05, 0.1)],
}
COLOURS = {"dense": "#777777", "magnitude, fine-tuned": "#ee7733", "BiP alternating": "#33bbee", "BiP joint": "#0055aa"}


def images(data_dir: Path, validate: bool) -> Dataset:
    """10,000 training images at stride 2; beside them the test images, or 10,000 other training images."""
    full = load("fashion-mnist", data_dir)
    others, chosen = split(full.train_labels, 1 / 6)
    test, test_labels = full.test_images, full.test_labels
    if validate:
        _, held = split(full.train_labels[others], 1 / 5)
        test, test_labels = full.train_images[others[held]], full.train_labels[others[held]]
    parts = {"train_images": full.train_images[chosen, :, ::2, ::2], "train_labels": full.train_labels[chosen]}
    data = replace(full, **parts, test_images=test[:, :, ::2, ::2], test_labels=test_labels, padding=1)
    return data.with_own_statistics()


class Comparison:
    """Cells of one comparison, each kept as a JSON file in ``work`` once it is finished."""

    def __init__(self, data: Dataset, work: Path, device: torch.device) -> None:
        self.data, self.device, self.work = data.to(device), device, RunFolder(work)
        work.mkdir(parents=True, exist_ok=True)

    def _network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = models.build("resnet20", self.data.channels, self.data.classes)
        return model.to(self.device).to(memory_format=torch.channels_last)

    def _kept(self, name: str, settings: Settings) -> Row | None:
        """Row of a finished cell, if it was made with the same settings."""
        if not (self.work.path / name).is_file():
            return None
        row = self.work.read_json(name)
        return row if row["settings"] == settings.as_dict() else None

    def dense_network(self, seed: int) -> nn.Module:
        """The dense network that every method of this seed starts from."""
        settings, stem = Settings.of({**BASE, "seed": seed}), f"start-seed{seed}"
        weights, model = self.work.path / f"{stem}.safetensors", self._network(seed)
        if self._kept(f"{stem}.json", settings) and weights.is_file():
            load_into(model, read_state_dict(weights), weights)
            return model
        cursor = Cursor()
        train(model, dense_optimizer(model, settings), self.data, recipes(settings)["pretrain"], cursor)
        self.work.write(weights.name, lambda path: write_safetensors(path, model))
        accuracy = evaluate(model, self.data).accuracy
        self.work.write_json(f"{stem}.json", {"settings": settings.as_dict(), "accuracy": accuracy, "seconds": cursor.seconds})
        return model

    def cell(self, method: str, sparsity: float, seed: int, steps: dict[str, Any]) -> Row:
        """One method at one sparsity from the dense network of ``seed``."""
        settings = Settings.of({**BASE, "sparsity": sparsity, **METHODS[method], **steps, "seed": seed})
        sizes = "-".join(f"{value:g}" for value in steps.values())
        name = f"{folder_name(method)}-{100 * settings.sparsity:g}-{sizes}-seed{seed}.json"
        if row := self._kept(name, settings):
            return row
        model = self.dense_network(seed)
        optimizer = pruner(model, settings, self.data)
        cursor = Cursor()
        began = time.perf_counter()
        recipe = recipes(settings)["prune"]
        train(model, optimizer, self.data, recipe, cursor)
        seconds = time.perf_counter() - began
        optimizer.finalize()
        score, table = evaluate(model, self.data), report(model)
        passes = recipe.epochs * len(self.data.train_labels)
        row = {"method": method, "sparsity": settings.sparsity, "seed": seed, **steps, "accuracy": score.accuracy, "loss": score.loss}
        row |= {"kept": table.kept, "total": table.total, "image_passes": passes, "seconds": round(seconds, 2)}
        self.work.write_json(name, {**row, "settings": settings.as_dict()})
        return {**row, "settings": settings.as_dict()}


def cells(sparsities: list[float], seeds: list[int], validate: bool) -> Iterator[tuple[str, float, int, dict[str, Any]]]:
    """Method, sparsity, seed and step sizes of every cell."""
    for seed in seeds:
        if not validate:
            yield "dense", 0.0, seed, CHOSEN["dense"]
        for sparsity in sparsities:
            for method in SEARCH:
                for steps in SEARCH[method] if validate else [CHOSEN[method]]:
                    yield method, sparsity, seed, steps


def grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[float]]:
    """Accuracies in percent by the values of ``keys``."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(100 * row["accuracy"])
    return groups


def table(rows: list[Row]) -> str:
    """Markdown: a line for each method, a column for each sparsity; the mean over seeds and every seed."""
    groups = grouped(rows, "method", "sparsity")
    sparsities = sorted({row["sparsity"] for row in rows if row["method"] != "dense"})
    dense = groups[("dense", 0.0)]
    each = " / ".join(f"{value:.2f}" for value in dense)
    lines = [
        f"Test accuracy in percent: mean over {len(dense)} seeds (each). Dense, trained as long: {statistics.mean(dense):.2f} ({each}).",
        "",
        "| method | " + " | ".join(f"{100 * sparsity:g} % zeros" for sparsity in sparsities) + " |",
        "|---|" + "---|" * len(sparsities),
    ]
    for method in SEARCH:
        values = [groups[(method, sparsity)] for sparsity in sparsities]
        texts = [f"{statistics.mean(of):.2f} ({' / '.join(f'{value:.2f}' for value in of)})" for of in values]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def chart(results: dict[str, Any], path: Path) -> None:
    """Accuracy against sparsity: a line through the means, a dot for every seed, dense training dashed."""
    from matplotlib.figure import Figure

    groups = grouped(results["rows"], "method", "sparsity")
    sparsities = sorted({sparsity for method, sparsity in groups if method != "dense"})
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    dense = statistics.mean(groups[("dense", 0.0)])
    axes.axhline(dense, color=COLOURS["dense"], linestyle="--", linewidth=1.5, label=f"dense ({dense:.1f} %)")
    for method in reversed(SEARCH):
        colour = COLOURS[method]
        means = [statistics.mean(groups[(method, sparsity)]) for sparsity in sparsities]
        axes.plot([1 - sparsity for sparsity in sparsities], means, color=colour, marker="o", linewidth=2, label=method)
        for sparsity in sparsities:
            values = groups[(method, sparsity)]
            axes.scatter([1 - sparsity] * len(values), values, s=14, color=colour, alpha=0.4, linewidths=0)
    axes.set_xlim(1.15 * (1 - sparsities[0]), 0.87 * (1 - sparsities[-1]))  # fewer weights to the right
    axes.set_xscale("log")
    axes.set_xticks([1 - sparsity for sparsity in sparsities], [f"{100 * sparsity:g} %" for sparsity in sparsities])
    axes.minorticks_off()
    axes.set_xlabel("zeros among all Conv and Linear weights (log scale of what is kept)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("ResNet-20 on Fashion-MNIST (10,000 images, 14x14), equal passes for every method", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


def machine(device: torch.device) -> Row:
    """Only what explains a number: no host names, no paths."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {processor_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), **bip_fast.build_info()}


def save(rows: list[Row], device: torch.device, out: Path | None) -> None:
    """Write fashion-mnist.json and .png and print the table."""
    results: dict[str, Any] = {"machine": machine(device), "date": datetime.date.today().isoformat(), "settings": {**BASE, "steps": CHOSEN}}
    folder = out or Path(__file__).parent / "results" / folder_name(results["machine"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    text = ",\n  ".join(json.dumps({key: value for key, value in row.items() if key != "settings"}) for row in rows)
    (folder / "fashion-mnist.json").write_text(json.dumps(results)[:-1] + ',\n "rows": [\n  ' + text + "\n]}\n")
    chart({**results, "rows": rows}, folder / "fashion-mnist.png")
    print(f"\n{table(rows)}\n\n![accuracy against sparsity]({(folder / 'fashion-mnist.png').name})")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.fashion_mnist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--sparsities", type=float, nargs="+", metavar="S", help="default: 0.9 0.95 0.98 0.99; with --validate 0.95 0.98")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: 0 1; with --validate 100")
    parser.add_argument("--validate", action="store_true", help="try the step sizes of SEARCH on other training images")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), metavar="NAME", help="default: cpu")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/fashion-mnist-bench"), metavar="DIR", help="finished cells; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>")
    options = parser.parse_args(arguments)
    sparsities = options.sparsities or ([0.95, 0.98] if options.validate else [0.9, 0.95, 0.98, 0.99])
    seeds = options.seeds or ([100] if options.validate else [0, 1])
    work = options.work / "validation" if options.validate else options.work
    comparison = Comparison(images(options.data_dir, options.validate), work, options.device)
    began, rows = time.monotonic(), []
    todo = list(cells(sparsities, seeds, options.validate))
    for done, (method, sparsity, seed, steps) in enumerate(todo, 1):
        row = comparison.cell(method, sparsity, seed, steps)
        rows.append(row)
        minutes = (time.monotonic() - began) / 60
        print(
            f"{done}/{len(todo)}  {minutes:.1f} min  {method} {100 * sparsity:g} % seed {seed} {steps}: {100 * row['accuracy']:.2f}",
            file=sys.stderr,
            flush=True,
        )
    if options.validate:
        for (method, lr, mask_lr), values in sorted(grouped(rows, "method", "lr", "mask_lr").items(), key=str):
            print(f"{statistics.mean(values):.2f}  {method}, lr {lr}, mask_lr {mask_lr}: {values}")
    else:
        save(rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
