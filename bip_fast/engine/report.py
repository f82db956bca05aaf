"""The layer table: which layer kept how many of its weights.

`report(model)` looks at the weights that `FastBiP(model)` would prune; `report(state_dict)`, where layers have no type any more, at the
floating-point tensors of two or more dimensions. A weight is kept when it is not exactly 0. One pass, no state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tables import aligned
from .layers import weights

__all__ = ["Decision", "Report", "Row", "Selection", "UnitCount", "flat_metrics", "layer_row", "layer_table", "report"]


class Row(NamedTuple):
    """One layer: ``kept`` of ``total`` weights are not zero. The report of an optimizer also has the ``pattern``, and for filters,
    channels and blocks ``units``: how many are kept, of how many."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    pattern: str | None = None
    units: tuple[int, int] | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 for an empty tensor."""
        return 1 - self.kept / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        row = {"name": self.name, "shape": list(self.shape), "kept": self.kept, "total": self.total, "sparsity": self.sparsity}
        pattern = {"pattern": self.pattern} if self.pattern else {}
        return row | pattern | ({"units": list(self.units)} if self.units else {})


class UnitCount(NamedTuple):
    """Filters, channels or blocks of all layers with one pattern. Coupled ones count once. The option ``sparsity`` is about these units, so
    the fraction of zero weights can differ."""

    pattern: str
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of units that are pruned."""
        return 1 - self.kept / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "sparsity": self.sparsity}


class Decision(NamedTuple):
    """What became of a parameter of two or more dimensions: its ``pattern``, or None and the ``reason`` why it stays dense."""

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "shape": list(self.shape)}


class Selection(NamedTuple):
    """How the masks of one selection group were found, since the present plan was made (a new optimizer, a load, another group).

    ``steps`` counts upper and joint steps. Some took more than one pass, which costs time and changes nothing else: ``first``, no step
    before had left a window; ``missed``, the new threshold lay outside the window; ``crowded``, too many scores lay inside. In all other
    steps together ``candidates`` scores were looked at twice. ``flips`` mask entries have changed (those of a parameter that
    several ranks have whole count on each of them); steps of more than one pass also count
    those that changed back. Kept scores are at or above ``threshold``, the others at or below; it is infinite where all or none are kept.
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
    """What each layer has kept. ``print(report)`` shows an aligned table, `as_dict` is ready for JSON.

    Attributes:
        rows: a row for each layer, in the order of the model.
        selections: of an optimizer, a row for each group of weights that compete.
        decisions: of an optimizer, a row for each parameter that might have been pruned.
        units: of an optimizer, a row for each pattern of filters, channels or blocks.
    """

    rows: tuple[Row, ...]
    selections: tuple[Selection, ...] = ()
    decisions: tuple[Decision, ...] = ()
    units: tuple[UnitCount, ...] = ()

    @property
    def kept(self) -> int:
        """Number of weights kept, over all rows."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Number of weights, over all rows."""
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
        """For JSON."""
        table = {"kept": self.kept, "total": self.total, "sparsity": self.sparsity, "layers": [row.as_dict() for row in self.rows]}
        selections = {"selections": [row.as_dict() for row in self.selections]} if self.selections else {}
        decisions = {"decisions": [row.as_dict() for row in self.decisions]} if self.decisions else {}
        units = {"units": [row.as_dict() for row in self.units]} if self.units else {}
        return table | units | selections | decisions

    def __str__(self) -> str:
        several = len({row.pattern for row in self.rows}) > 1
        counted = any(row.units for row in self.rows)

        def cells(row: Row) -> tuple[str, ...]:
            pattern = (row.pattern or "",) if several else ()
            units = (tuple(f"{count:,}" for count in row.units) if row.units else ("", "")) if counted else ()
            shape = "x".join(map(str, row.shape))
            return row.name, shape, *pattern, *units, f"{row.kept:,}", f"{row.total:,}", f"{100 * row.sparsity:.2f} %"

        header = ("layer", "shape", *("pattern",) * several, *("units", "of") * counted, "kept", "of", "sparsity")
        lines = aligned([header, *map(cells, self.rows), cells(Row("all layers", (), self.kept, self.total))], left=2 + several)
        rule = "-" * len(lines[0])
        below = [*self._unit_lines(), *self._selection_lines(), *self.decision_lines()]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *below])

    def _unit_lines(self) -> list[str]:
        lines = []
        for own in self.units:
            coupled = sum(row.units[1] for row in self.rows if row.units and row.pattern == own.pattern) > own.total
            line = f"{own.pattern}: {own.kept:,} of {own.total:,} units kept, sparsity {100 * own.sparsity:.2f} %"
            lines.append(line + ", coupled ones counted once" * coupled)
        return lines

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


def flat_metrics(rows: Sequence[Row], selections: Sequence[Selection], nonfinite: int) -> dict[str, float]:
    """What `FastBiP.metrics` returns, with the entries of single layers and groups behind the others: their names have a "/".

    Args:
        rows: ``kept`` counts the ones of the masks.
        selections: with ``flips`` over all ranks.
        nonfinite: entries that were skipped, over all ranks.
    """
    table = Report(tuple(rows))
    found: dict[str, float] = {"sparsity": table.sparsity, "kept": table.kept, "nonfinite": nonfinite}
    if selections:
        found["selections"] = sum(row.steps for row in selections)
        found |= {name: sum(getattr(row, name) for row in selections) for name in ("flips", "candidates", "fallbacks")}
    chosen = [row for row in selections if row.steps]
    # A threshold is infinite where all or none are kept. Scores are in [0, 1], so the ends of that say the same.
    thresholds = [min(max(row.threshold, 0.0), 1.0) for row in chosen]
    if total := sum(row.numel for row in chosen):
        found["threshold"] = sum(row.numel * threshold for row, threshold in zip(chosen, thresholds, strict=True)) / total
    found |= {f"layer_sparsity/{row.name}": row.sparsity for row in rows}
    if len(selections) > 1:
        found |= {f"group_threshold/{row.name}": threshold for row, threshold in zip(chosen, thresholds, strict=True)}
    return found


def _nonzero(x: Tensor) -> int:
    if x.layout != torch.strided or x.device.type == "meta" or x.is_quantized:
        raise ValueError(f"cannot count zeros in a tensor of {x.layout}, {x.dtype} on {x.device}")
    x = x.detach()
    return int(torch.count_nonzero(x.float() if x.element_size() == 1 else x))  # torch cannot count in 8-bit floats


def layer_row(name: str, x: Tensor) -> Row:
    """A weight of any shape, on any device."""
    return Row(name, tuple(x.shape), _nonzero(x), x.numel())


def layer_table(tensors: Iterable[tuple[str, Tensor]]) -> Report:
    """Report of named weights."""
    return Report(tuple(layer_row(name, x) for name, x in tensors))


def report(source: nn.Module | Mapping[str, Any]) -> Report:
    """Report of a model or of a state dict.

    Raises:
        ValueError: it has no weights of two or more dimensions.
    """
    found = weights(source)
    if not found:
        raise ValueError("no weights of two or more dimensions to report on")
    return layer_table(found)
