"""The layer table: which layer kept how many of its weights.

`report(model)` looks at the weights of Conv and Linear layers; `report(state_dict)`, where layers have no type any more, at the
floating-point tensors of two or more dimensions. A weight is kept when it is not exactly 0. One pass, no state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .tables import aligned

__all__ = ["Decision", "Report", "Row", "Selection", "layer_table", "report", "weights"]

HEADER = ("layer", "shape", "kept", "of", "sparsity")


class Row(NamedTuple):
    """One layer: ``kept`` of ``total`` weights are not zero."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 for an empty tensor."""
        return 1 - self.kept / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "kept": self.kept, "total": self.total, "sparsity": self.sparsity}


class Decision(NamedTuple):
    """What became of a parameter of two or more dimensions: its ``pattern``, or None and the ``reason`` why it stays dense."""

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "shape": list(self.shape)}


class Selection(NamedTuple):
    """How the masks of one selection group were found, since the optimizer last laid out its groups (made, loaded, another group added).

    Of ``steps`` upper and joint steps, those that took more than one pass: ``first``, there was no window around the threshold of a step
    before; ``missed``, the new threshold lay outside; ``crowded``, too many scores lay inside. They cost time and change nothing else.
    ``candidates`` scores were looked at twice in all other steps, ``flips`` mask entries have changed, in steps of
    more than one pass also back again. Kept scores are at or above
    ``threshold``, the others at or below; it is infinite where all are kept, or none.
    """

    name: str
    numel: int
    kept: int
    steps: int
    first: int
    missed: int
    crowded: int
    candidates: int
    flips: int
    threshold: float

    @property
    def fallbacks(self) -> int:
        """Steps of more than one pass."""
        return self.first + self.missed + self.crowded

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None."""
        return {**self._asdict(), "threshold": self.threshold if math.isfinite(self.threshold) else None}


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model. ``print(report)`` shows an aligned table, `as_dict` is ready for JSON.

    If the report is of an optimizer, ``selections`` has a row for every group of weights that compete, and ``decisions`` one for every
    parameter that might have been pruned.
    """

    rows: tuple[Row, ...]
    selections: tuple[Selection, ...] = ()
    decisions: tuple[Decision, ...] = ()

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        return sum(row.total for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all rows."""
        return Row("", (), self.kept, self.total).sparsity

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, Any]:
        table = {"kept": self.kept, "total": self.total, "sparsity": self.sparsity, "layers": [row.as_dict() for row in self.rows]}
        selections = {"selections": [row.as_dict() for row in self.selections]} if self.selections else {}
        decisions = {"decisions": [row.as_dict() for row in self.decisions]} if self.decisions else {}
        return table | selections | decisions

    def __str__(self) -> str:
        cells = [_cells(row.name, "x".join(map(str, row.shape)), row) for row in self.rows]
        cells.append(_cells("all layers", "", Row("", (), self.kept, self.total)))
        lines = aligned([HEADER, *cells], left=2)
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._selection_lines(), *self.decision_lines()])

    def _selection_lines(self) -> list[str]:
        if not any(row.steps for row in self.selections):
            return []
        steps, first, missed, crowded, flips = (
            sum(getattr(row, name) for row in self.selections) for name in ("steps", "first", "missed", "crowded", "flips")
        )
        groups = f" in {len(self.selections)} groups" if len(self.selections) > 1 else ""
        text = f"selections{groups}: {steps:,}, in one pass {steps - first - missed - crowded:,}; fell back: {first:,} without a window, "
        return [text + f"{missed:,} missed it, {crowded:,} had too many inside; mask entries changed: {flips:,}"]

    def decision_lines(self) -> list[str]:
        """Which patterns there are, and what stays dense, by reason."""
        patterns = sorted({row.pattern for row in self.decisions if row.pattern})
        lines = [f"pattern: {', '.join(patterns)}"] if patterns not in ([], ["unstructured"]) else []
        reasons: dict[str, list[str]] = {}
        for row in self.decisions:
            if row.pattern is None:
                reasons.setdefault(row.reason or "", []).append(row.name)
        return lines + [f"dense: {', '.join(names)} ({reason})" for reason, names in reasons.items()]


def _cells(name: str, shape: str, row: Row) -> tuple[str, ...]:
    return name, shape, f"{row.kept:,}", f"{row.total:,}", f"{100 * row.sparsity:.2f} %"


def _nonzero(x: Tensor) -> int:
    if x.layout != torch.strided or x.device.type == "meta" or x.is_quantized:
        raise ValueError(f"cannot count zeros in a tensor of {x.layout}, {x.dtype} on {x.device}")
    x = x.detach()
    return int(torch.count_nonzero(x.float() if x.element_size() == 1 else x))  # torch cannot count in 8-bit floats


def layer_table(
    tensors: Iterable[tuple[str, Tensor]], selections: tuple[Selection, ...] = (), decisions: tuple[Decision, ...] = ()
) -> Report:
    """Report of named weights of any shape, on any device."""
    return Report(tuple(Row(name, tuple(x.shape), _nonzero(x), x.numel()) for name, x in tensors), selections, decisions)


def weights(source: nn.Module | Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Names and tensors that a report counts. A weight that several layers share appears once, under its first name."""
    if isinstance(source, nn.Module):
        layers = ((name, layer) for name, layer in source.named_modules() if isinstance(layer, (_ConvNd, nn.Linear)))
        found = [(f"{name}.weight".lstrip("."), layer.weight) for name, layer in layers]
    else:
        found = [(name, x) for name, x in source.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2]
    first: dict[Any, tuple[str, Tensor]] = {}
    for name, x in found:
        storage = (
            (x.data_ptr(), tuple(x.shape), tuple(x.stride()))
            if x.numel() and x.layout == torch.strided and x.device.type != "meta"
            else name
        )
        first.setdefault(storage, (name, x))
    return list(first.values())


def report(source: nn.Module | Mapping[str, Any]) -> Report:
    """Report of a model or of a state dict.

    Raises:
        ValueError: it has no weights of two or more dimensions.
    """
    found = weights(source)
    if not found:
        raise ValueError("no weights of two or more dimensions to report on")
    return layer_table(found)
