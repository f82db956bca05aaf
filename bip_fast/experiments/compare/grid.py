"""What a comparison consists of: a file of settings, the runs it stands for, and which run starts from which.

The file is YAML: names of settings (`experiments.settings`), each with a value or a list of values, and `methods`, a mapping from the
label of a row to the settings of that row alone. The runs are all combinations; with `more_seeds`, a mapping from sparsities to lists of
seeds, those at these sparsities have these seeds too. Methods that prune a trained network share a dense run. Every round of iterative
pruning is a run that starts from the one before, and rows share the rounds that they have in common. The address of a run is a hash of its
settings, its data and the run it starts from, so a finished run is never repeated, whichever file names it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError, one_line
from ..data.sources import fingerprint
from ..methods.imp import rounds
from ..methods.stage import first_epoch
from ..methods.table import METHODS, stages
from ..models.names import fingerprint as model_files
from ..runs.resolve import resolve, unused
from ..settings import FIELDS, PATHS, Settings

__all__ = ["Cell", "Grid", "build", "read"]

FORMAT = 2  # enters every address: one more when the same settings mean another run
# All that decides a dense network.
DENSE = (
    "data", "train_images", "stride", "model", "width", "pretrain_epochs", "batch_size", "pretrain_lr", "momentum",
    "pretrain_weight_decay", "seed", "validate", "validation_images", "amp", "threads", "max_tokens", "optimizer", "head_lr", "warmup",
    "decay", "clip", "beta1", "beta2", "eps",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        label: row of the results it belongs to; empty for a run that is there for others to start from.
        settings: without the files it starts from.
        parent: run whose network it starts from.
        dense: run whose early weights it rewinds to.
        swept: settings that the file gives a list of, other than sparsity and seed, with the value of this run.
        files: `data.sources.fingerprint` of its data set.
    """

    label: str
    settings: Settings
    parent: Cell | None = None
    dense: Cell | None = None
    swept: tuple[tuple[str, Any], ...] = ()
    files: str = ""

    @functools.cached_property
    def address(self) -> str:
        """Hash of everything that decides the result, but the version of the library and the machine; taken once, when the grid is read."""
        settings = {name: value for name, value in self.settings.as_dict().items() if name not in PATHS}
        parts: list[Any] = [FORMAT, settings, self.files, self.parent.address if self.parent else None]
        if own := model_files(self.settings.model):
            parts.append(own)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.settings.folder_name}-{self.address}"

    @property
    def epochs(self) -> int:
        """Passes over the training images that are its own."""
        settings = self.settings if self.parent is None else replace(self.settings, checkpoint="parent")
        return sum(stage.recipe.epochs - stage.recipe.first_epoch for stage in stages(settings, self.start))

    @property
    def start(self) -> float:
        """Sparsity that was asked of the network it starts from."""
        return self.parent.settings.sparsity if self.parent else 0.0

    @property
    def name(self) -> str:
        """What a person calls it."""
        if not self.label and self.settings.method == "dense":
            return f"dense network, {self.settings.data} {self.settings.model}, seed {self.settings.seed}"
        label = self.label or f"{self.settings.method}, on the way"
        swept = "".join(f", {name} {value}" for name, value in self.swept)
        return f"{label}{swept}, {100 * self.settings.sparsity:.4g} %, seed {self.settings.seed}"

    def ancestors(self) -> Iterator[Cell]:
        """The runs it stands on, the nearest first."""
        if self.parent:
            yield self.parent
            yield from self.parent.ancestors()


@dataclass(frozen=True)
class Grid:
    """What a file stands for.

    Args:
        cells: runs by address, each after the one it starts from.
        snapshots: epochs of dense runs that others rewind to.
        rows: cells that have a row in the results; several rows may show one run.
        gpus: share of a GPU that a run takes on Ray; None: the GPUs are shared out among the runs that go at a time.
    """

    name: str
    cells: dict[str, Cell]
    snapshots: dict[str, set[int]]
    rows: list[Cell]
    gpus: float | None = None


def read(path: Path, data_dir: Path | None = None) -> Grid:
    """The grid of a file, for the data sets in ``data_dir``.

    Raises:
        UserError: it cannot be read, or a setting is unknown or out of range.
    """
    import yaml

    try:
        text = path.read_text()
        if repeated := _repeated_key(yaml.compose(text, yaml.SafeLoader)):
            raise UserError(f"{path}, line {repeated.start_mark.line + 1}: {repeated.value!r} is there twice")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except UserError:
        raise
    except Exception as error:  # dates and numbers that are none, and depths, raise other errors than YAML's own
        raise UserError(f"{path} is not YAML: {one_line(error)}") from error
    return build(path, content, data_dir)


def build(path: Path, content: Any, data_dir: Path | None = None) -> Grid:
    """The grid of the content of a file; ``path`` gives it its name, and stands in messages.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    if not isinstance(content, dict) or not isinstance(content.get("methods"), dict) or not content["methods"]:
        raise UserError(f"{path} must have settings and `methods:`, a mapping from labels to the settings of a method")
    shared = {name: value for name, value in content.items() if name not in ("methods", "gpus", "more_seeds")}
    more_seeds = content.get("more_seeds") or {}
    if not isinstance(more_seeds, dict) or not all(isinstance(seeds, list) and seeds for seeds in more_seeds.values()):
        raise UserError(f"{path}: more_seeds must be a mapping from sparsities to lists of seeds, got {more_seeds!r}")
    gpus = content.get("gpus")
    if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or not gpus > 0 or (gpus > 1 and gpus % 1)):
        raise UserError(f"{path}: gpus must be a share of a GPU, such as 0.5, or a whole number of GPUs, got {gpus!r}")
    grid = _Builder(path, functools.cache(lambda name: fingerprint(name, data_dir)))
    for label, own in content["methods"].items():
        if not isinstance(own, (dict, type(None))):
            raise UserError(f"{path}: methods: {label}: expected settings, got {own!r}")
        given = {"threads": 1, **shared, **(own or {})}  # a fixed number, whatever else runs at the same time
        given.setdefault("method", str(label))
        grid.add_row(str(label), given, tuple(own or ()), more_seeds)
    return Grid(path.stem, grid.cells, grid.snapshots, list(grid.rows.values()), gpus)


def _repeated_key(node: Any, depth: int = 3) -> Any:
    """The first node that repeats a key, of which YAML would keep the last; None if there is none. ``depth``: file, methods, a method."""
    if node is None or node.id != "mapping" or not depth:
        return None
    keys: set[str] = set()
    for key, value in node.value:
        if str(key.value) in keys:
            return key
        keys.add(str(key.value))
        if (inner := _repeated_key(value, depth - 1)) is not None:
            return inner
    return None


def _starts_from_a_run(settings: Settings) -> bool:
    """Whether there is a dense run before it. Without an epoch of that there is none, unless runs rewind to its start."""
    method = METHODS[settings.method]
    return method.needs_dense and bool(settings.pretrain_epochs or method.in_rounds or settings.rewind not in (None, "lr"))


class _Builder:
    def __init__(self, path: Path, fingerprint: Callable[[str], str]) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.cells: dict[str, Cell] = {}
        self.snapshots: dict[str, set[int]] = {}
        self.rows: dict[tuple[Any, ...], Cell] = {}

    def add_row(self, label: str, given: Mapping[str, Any], own: Sequence[str], more_seeds: Mapping[float, list[int]]) -> None:
        """All runs of a label.

        Args:
            own: the settings of this row alone, of which each must have a meaning for its method.
            more_seeds: by sparsity.
        """
        for name in given:
            if name not in FIELDS or name in PATHS:
                raise UserError(f"{self.path}: methods: {label}: unknown setting {name!r}; there are {', '.join(FIELDS)}")
        lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        for name, given_values in lists.items():
            if not given_values:
                raise UserError(f"{self.path}: methods: {label}: {name} must have a value, got an empty list")
            if (twice := next((x for i, x in enumerate(given_values) if x in given_values[:i]), None)) is not None:
                raise UserError(f"{self.path}: methods: {label}: {name} lists {twice!r} twice")
        swept = [name for name, own in lists.items() if len(own) > 1 and name not in ("sparsity", "seed", "data", "model")]
        more = [
            {**lists, "sparsity": [sparsity], "seed": seeds}
            for sparsity, seeds in more_seeds.items()
            if sparsity in lists.get("sparsity", ())
        ]
        combinations = (
            dict(zip(own_lists, values, strict=True)) for own_lists in (lists, *more) for values in itertools.product(*own_lists.values())
        )
        for combination in combinations:
            if combination["method"] == "dense":
                combination |= {"sparsity": 0.0, "pattern": Settings.pattern}
            self._add(label, combination, own, tuple((name, combination[name]) for name in swept))

    def _add(self, label: str, given: dict[str, Any], own: Sequence[str], swept: tuple[tuple[str, Any], ...]) -> None:
        if isinstance(given.get("rewind"), int):
            given["rewind"] = str(given["rewind"])
        try:
            settings = resolve(given)
        except UserError as error:
            message = str(error).removeprefix("--")
            if isinstance(given.get("pattern"), int) and message.startswith("pattern"):
                message += ": YAML takes it for a number, quote it"
            raise UserError(f"{self.path}: methods: {label}: {message}") from error
        if (useless := unused(settings, own)) is not None:
            raise UserError(f"{self.path}: methods: {label}: method {settings.method} makes no use of {useless}: leave it out")
        dense = self._dense(settings) if _starts_from_a_run(settings) else None
        parent, files = dense, self.fingerprint(settings.data)
        if METHODS[settings.method].in_rounds:
            for sparsity in rounds(0.0, settings.sparsity, settings.per_round)[:-1]:
                parent = Cell("", replace(settings, sparsity=sparsity), parent, dense, files=files)
                parent = self.cells.setdefault(parent.address, parent)
        cell = Cell(label, settings, parent, dense, swept, files)
        if settings.method == "dense" and not settings.epochs and dense is not None:
            cell = replace(dense, label=label, swept=tuple((name, value) for name, value in swept if name in DENSE))
        elif dense is not None and settings.rewind not in (None, "lr"):
            self.snapshots[dense.address].add(first_epoch(settings))
        self.cells[cell.address] = cell
        self.rows[label, cell.swept, cell.address] = cell

    def _dense(self, settings: Settings) -> Cell:
        """The dense run that a method with these settings starts from."""
        own = {name: getattr(settings, name) for name in DENSE}
        cell = Cell("", resolve({**own, "method": "dense", "epochs": 0}), files=self.fingerprint(settings.data))
        self.snapshots.setdefault(cell.address, set())
        return self.cells.setdefault(cell.address, cell)
