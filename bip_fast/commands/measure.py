"""`bip-fast measure`: what a finished run, or a file of weights, is worth on this machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..experiments.data.kinds import IMAGES
from ..experiments.data.parts import AnyData
from ..experiments.data.sources import DATA, load, source_of
from ..experiments.models.names import build
from ..experiments.runs.folder import RunFolder
from ..experiments.runs.resolve import resolve
from ..experiments.settings import Settings
from ..export.measuring import measure
from ..export.runtimes import RUNTIMES
from ..state_dicts import load_into, read_state_dict
from .environment import pick_device

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A pruned network beside the dense one: as it is, with dead channels removed, and as 2:4. Time, FLOPs, bytes and "
        "accuracy of each, and one sentence that says why it is or is not faster."
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="run folder of `bip-fast prune`, or a file of weights")
    parser.add_argument("--dense", type=Path, metavar="FILE", help="weights before pruning; default: dense.safetensors of the run")
    parser.add_argument("--model", metavar="NAME", help="the model of a file that is in no run folder, named as for `bip-fast prune`")
    parser.add_argument("--width", type=int, metavar="N", help="width of that model, as for `bip-fast prune`")
    parser.add_argument("--data", metavar="NAME", help=f"the data set of that model: {', '.join(DATA)}")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the files of the data set (not needed for digits)")
    parser.add_argument("--batch-sizes", type=_sizes, default=(1, 64), metavar="N,N", help="batch sizes to measure; default: 1,64")
    parser.add_argument(
        "--seconds", type=_seconds, default=2.0, metavar="S", help="about how long to measure each batch size; default: %(default)s"
    )
    parser.add_argument(
        "--runtime", choices=RUNTIMES, default="torch", help="what runs the networks; onnxruntime needs a CPU; default: torch"
    )
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1 with commas between, got {text!r}")
    return sizes


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of more than 0, got {text!r}")
    return value


@dataclass(frozen=True)
class _What:
    """What to measure: the weights, and the settings that say how to build the model and what data it knows."""

    weights: Path
    dense: Path | None
    settings: Settings


def _what(options: dict[str, Any]) -> _What:
    """What the options name; UserError if they do not say enough, or contradict the run."""
    path: Path = options["path"]
    folder = path if path.is_dir() else path.parent
    run = RunFolder(folder)
    weights = folder / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"there is no {path}")
    given = {name: options[name] for name in ("model", "width", "data") if options[name] is not None}
    if run.begun:
        if given:
            raise UserError(f"{folder} is a run, which knows its model and data; leave --{next(iter(given))} out")
        if not weights.is_file():
            raise UserError(f"{folder} has no model.safetensors: the run is not finished; bip-fast prune --resume {folder} continues it")
        settings = _settings(run)
        beside = folder / "dense.safetensors"
        return _What(weights, options["dense"] or (beside if beside.is_file() else None), settings)
    if path.is_dir():
        raise UserError(f"there is no run in {folder}")
    if "model" not in given:
        raise UserError(f"{path} is in no run folder, so --model must say what its weights are of")
    return _What(weights, options["dense"], resolve(given))


def _settings(run: RunFolder) -> Settings:
    try:
        return resolve(run.read_json("config.json"))
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.path / 'config.json'} is damaged, or of another version: {one_line(error)}") from error


def _data(settings: Settings, data_dir: Path | None) -> tuple[AnyData | None, str]:
    """The data set as the run measured on it; or None, and why."""
    if data_dir is None and source_of(settings.data).needs_folder:
        return None, f"no accuracy: --data-dir names the folder with the files of {settings.data}"
    try:
        data = load(settings.data, data_dir)
    except UserError as error:
        if data_dir is not None:
            raise
        return None, f"no accuracy: {error}"
    return settings.part_of(data), data.note


def _shape(settings: Settings) -> tuple[int, ...]:
    """Of one image."""
    channels, *size = source_of(settings.data).shape
    return channels, *(-(-pixels // settings.stride) for pixels in size)


def _model(settings: Settings, file: Path, device: torch.device) -> nn.Module:
    """As a run has it: on the device, in channels_last."""
    source = source_of(settings.data)
    try:
        model = build(settings.model, source.shape[0], source.classes, settings.width)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"cannot build --model {settings.model}: {one_line(error, 160)}") from error
    load_into(model, read_state_dict(file), file)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def run(options: dict[str, Any]) -> int:
    """Print the table, or JSON; UserError where the input is not what it should be."""
    device = pick_device(options["device"])
    what = _what(options)
    settings = what.settings
    if source_of(settings.data).kind is not IMAGES:
        raise UserError(f"bip-fast measure is for networks that look at images, got one for --data {settings.data}")
    data, note = _data(settings, options["data_dir"])
    model = _model(settings, what.weights, device)
    dense = None if what.dense is None else _model(settings, what.dense, device)
    if data is None:
        example = torch.randn(1, *_shape(settings), generator=torch.Generator().manual_seed(0))
        batches: Iterable[tuple[Tensor, Tensor]] = []
    else:
        batches = data.test_batches()
        example = next(data.test_batches())[0][:1]
    try:
        timing = {name: options[name] for name in ("batch_sizes", "seconds", "runtime")}
        found = measure(model, example, dense=dense, data=batches, **timing)
    except UserError:
        raise
    except Exception as error:  # a model of the user's own may raise anything
        raise UserError(f"cannot measure {what.weights}: {one_line(error)}") from error
    part = "validation" if settings.validate else "test"
    if data is not None:
        note = f"accuracy on {len(data.test_labels):,} {part} images{f'; {note}' if note else ''}"
    if options["json"]:
        print(json.dumps({"file": str(what.weights), "note": note, **found.as_dict()}, indent=2))
    else:
        print(found)
        print(f"note: {note}", file=sys.stderr)
    return 0
