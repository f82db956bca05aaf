"""`bip-fast measure`: the networks of a finished run, side by side."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from ..experiments import ExperimentError, resnet
from ..experiments.data import Dataset, load, ordered_batches
from ..experiments.run import RunFolder, load_into, read_state_dict
from ..experiments.settings import Settings
from .measure import Measurement, measure
from .semi_structured import to_semi_structured
from .shrink import shrink

__all__ = ["measure_run"]


def measure_run(path: Path, data_dir: Path | None, device: torch.device, batch_sizes: list[int]) -> tuple[Measurement, list[str]]:
    """Dense, masked, shrunk and 2:4 networks of a run folder, on its test images.

    Returns:
        the measurement, and in words what could not be removed or converted.

    Raises:
        ExperimentError: there is no finished run, or its files or data are not to be read.
    """
    folder = RunFolder(path)
    if not folder.finished:
        raise ExperimentError(f"there is no finished run in {path}: `bip-fast prune` makes one")
    settings = folder.settings({})
    data = load(settings.data, data_dir).to(device)
    dense_file = path / "dense.safetensors" if settings.checkpoint is None else Path(settings.checkpoint)
    masked = _network(path / "model.safetensors", settings, data, device)
    dense = _network(dense_file, settings, data, device) if dense_file.is_file() else _filled(masked)
    example = next(iter(ordered_batches(data)))[0][:2]
    networks, notes = {"dense": dense, "masked": masked}, []
    try:
        small = shrink(masked, example)
        notes += [f"not removed: {row.channels} pruned channels of {row.name}: {row.reason}" for row in small.kept]
        if small.removed:
            networks["shrunk"] = small.model
        else:
            notes.append("shrunk: no filter or channel is pruned as a whole, so there is nothing to remove")
    except ImportError as error:
        notes.append(f"shrunk: {error}")
    converted = to_semi_structured(masked)
    if any(row.reason is None for row in converted.layers):
        networks["2:4"] = converted.model
    else:
        reasons = sorted({f"{row.name}: {row.reason}" for row in converted.layers if "no semi-structured" not in (row.reason or "")})
        notes.append(
            "2:4: no layer is converted" + (f" ({'; '.join(reasons[:3])})" if reasons else ": torch has no semi-structured convolution")
        )
    return measure(networks, example, batch_sizes=batch_sizes, data=list(ordered_batches(data))), notes


def _network(file: Path, settings: Settings, data: Dataset, device: torch.device) -> nn.Module:
    model = resnet.build(settings.model, data.channels, data.classes, settings.width)
    load_into(model, read_state_dict(file), file)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _filled(masked: nn.Module) -> nn.Module:
    """Stands in for a dense network whose file is gone: as large, and as fast."""
    dense = copy.deepcopy(masked)
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(std=0.02)
    return dense
