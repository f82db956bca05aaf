"""What `measure` found: figures of every network, and the sentence that says why it is or is not faster than the dense one.

A sentence is a function of the figures alone: nothing is claimed that they do not show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tables import aligned

__all__ = ["Measurement", "Timing", "Variant", "sentence"]

NEAR = 0.05  # ratios that differ less from 1 are no difference
SLOW = 0.7  # share of the dense network's FLOP rate below which that is said also of a faster one: arithmetic is not what takes the time


class Timing(NamedTuple):
    """Time of a forward pass at one batch size.

    Attributes:
        seconds: the median.
        speedup: the median, over rounds in which all networks take turns, of the dense network's time divided by this one's.
        low: the lower quartile of the same.
        high: its upper quartile.
    """

    seconds: float
    speedup: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def faster(self) -> bool:
        """Faster than the dense network, beyond the noise of the rounds."""
        return self.speedup >= 1 + NEAR and self.low > 1

    @property
    def slower(self) -> bool:
        return self.speedup <= 1 - NEAR and self.high < 1


@dataclass(frozen=True)
class Variant:
    """One network: dense, masked, shrunk or 2:4.

    Attributes:
        name: "dense", "masked", "shrunk" or "2:4".
        times: by batch size; empty if it was not measured.
        parameters: how many numbers its parameters have, each counted once.
        nonzeros: how many of them are not 0.
        sparsity: fraction of zeros in the weights that `FastBiP` would prune.
        flops: of a forward pass of one sample, multiplications and additions; None where torch's counter does not see them.
        file_bytes: its state dict as a safetensors file (for 2:4: its tensors); None without safetensors.
        packed_bytes: the same with kept values and one bit per weight for every weight that has zeros.
        accuracy: in [0, 1], if there was data.
        note: why it was not measured, or what else to know about it.
        doubt: what about it was not checked.
        sentence: why it is or is not faster than the dense network.
    """

    name: str
    times: dict[int, Timing] = field(default_factory=dict)
    parameters: int | None = None
    nonzeros: int | None = None
    sparsity: float | None = None
    flops: int | None = None
    file_bytes: int | None = None
    packed_bytes: int | None = None
    accuracy: float | None = None
    note: str = ""
    doubt: str = ""
    sentence: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.times)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; keys that are batch sizes become text there."""
        figures = ("parameters", "nonzeros", "sparsity", "flops", "file_bytes", "packed_bytes", "accuracy")
        return {
            "name": self.name,
            "measured": self.measured,
            "milliseconds": {str(size): 1e3 * t.seconds for size, t in self.times.items()},
            "speedup": {str(size): t.speedup for size, t in self.times.items()},
            "speedup_quartiles": {str(size): [t.low, t.high] for size, t in self.times.items()},
            "samples_per_second": {str(size): size / t.seconds for size, t in self.times.items()},
            **{name: getattr(self, name) for name in figures},
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`: networks measured beside each other, the dense one first. ``print`` shows a table and a sentence for each.

    Attributes:
        variants: a row for each network; ``measurement["shrunk"]`` finds one by name.
        device: what it was measured on.
        threads: the number of CPU threads.
        dtype: of the networks.
        runtime: what ran them, with its version.
        rounds: how often each network ran, by batch size.
    """

    variants: tuple[Variant, ...]
    device: str
    threads: int
    dtype: str
    runtime: str  # with its version
    rounds: dict[int, int]  # by batch size

    def __getitem__(self, name: str) -> Variant:
        """The variant of that name; KeyError if there is none."""
        return {row.name: row for row in self.variants}[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {"device": self.device, "threads": self.threads, "dtype": self.dtype, "runtime": self.runtime}
        rounds = {str(size): count for size, count in self.rounds.items()}
        return {**about, "rounds": rounds, "variants": [row.as_dict() for row in self.variants]}

    def __str__(self) -> str:
        times = [f"batch {size}" for size in self.rounds]
        header = ("network", *times, "samples/s", "parameters", "non-zeros", "MFLOPs", "file", "packed", "accuracy")
        lines = aligned([header, *(self._cells(row) for row in self.variants if row.measured)])
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        about = f"{self.device}, {threads}, {self.runtime}, {self.dtype}; medians of rounds in which all take turns"
        width = max(len(row.name) for row in self.variants)
        return "\n".join([about, *lines, "", *(f"{row.name.ljust(width)}  {row.sentence}" for row in self.variants)])

    def _cells(self, row: Variant) -> tuple[str, ...]:
        first = row is self.variants[0]
        times = [f"{1e3 * t.seconds:.3g} ms" + ("" if first else f" ({t.speedup:.2f}x)") for t in row.times.values()]
        most = max(size / t.seconds for size, t in row.times.items())
        counts = [_number(most), _number(row.parameters), _number(row.nonzeros)]
        flops = "-" if row.flops is None else f"{row.flops / 1e6:,.2f}"
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
        return (row.name, *times, *counts, flops, _bytes(row.file_bytes), _bytes(row.packed_bytes), accuracy)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}"


def _bytes(x: int | None) -> str:
    if x is None:
        return "-"
    return f"{x / 1e6:,.2f} MB" if x >= 1e6 else f"{x / 1e3:,.1f} kB"


def sentence(dense: Variant, own: Variant) -> str:
    """Why ``own`` is or is not faster than ``dense``, in one sentence from their figures."""
    if not own.measured:
        return f"Not measured: {own.note}."
    if own is dense:
        return own.note or "What the others are compared with."
    return f"{_speeds(own.times)}: {_cause(dense, own)}{f'; {own.doubt}' if own.doubt else ''}."


def _speeds(times: dict[int, Timing]) -> str:
    """Whether it is faster, and at which batch sizes."""
    each = [(f"{t.speedup:.2f}x", size) for size, t in times.items()]
    if all(t.faster for t in times.values()):
        return ", ".join(f"{x} faster at batch {size}" if not i else f"{x} at batch {size}" for i, (x, size) in enumerate(each))
    listed = ", ".join(f"{x} at batch {size}" for x, size in each)
    if any(t.faster for t in times.values()):
        return f"Faster only at batch {' and '.join(str(size) for size, t in times.items() if t.faster)} ({listed})"
    if any(t.slower for t in times.values()):
        return f"Slower ({listed})"
    noise = ", within the noise" if any(abs(t.speedup - 1) >= NEAR for t in times.values()) else ""
    return f"Not faster ({listed}{noise})"


def _cause(dense: Variant, own: Variant) -> str:
    if own.note:  # what only the maker of the variant knows
        return own.note
    if own.flops and dense.flops and own.flops < 0.99 * dense.flops:
        return _fewer_flops(dense.flops / own.flops, own.times)
    if not own.sparsity:
        return "its weights have no zeros and the arithmetic is the same"
    share = f"its {100 * own.sparsity:.3g} % zeros are stored and multiplied like other numbers"
    if any(t.faster for t in own.times.values()):
        return f"not by skipping, {share}"
    return f"{share}; unstructured sparsity needs a sparse runtime"


def _fewer_flops(ratio: float, times: dict[int, Timing]) -> str:
    """``ratio``: FLOPs of the dense network over those of this one; speedup / ratio is the ratio of their FLOP rates, this one's first."""
    gone = f"{100 * (1 - 1 / ratio):.3g} % of the FLOPs are gone ({ratio:.2f}x fewer)"
    rates = {size: t.speedup / ratio for size, t in times.items()}
    slow = {size: rate for size, rate in rates.items() if rate < SLOW or (rate < 0.995 and not times[size].faster)}
    if not slow:
        return gone
    told = " and ".join(f"{100 * rate:.0f} % at batch {size}" for size, rate in slow.items())
    return f"{gone}, but the rest runs at a lower FLOP rate ({told} of the dense one's): small layers wait for memory and launches"
