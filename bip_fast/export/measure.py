"""Is it smaller and faster now? Networks side by side: time, parameters, non-zeros, FLOPs, bytes, accuracy, and why.

Times are medians over rounds in which every network has its turn, so that what disturbs the machine disturbs all of them; ratios are to the
first network. Eval mode, no gradients.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .channels import as_inputs

__all__ = ["Measurement", "Variant", "measure"]

NEAR = 1.05  # a ratio closer to 1 is no difference


@dataclass
class Variant:
    """One network. FLOPs are of a single sample, multiplications and additions; bytes are those of its state dict.

    Args:
        seconds: median of one forward pass, by batch size.
        packed_bytes: kept weights and a mask of one bit each, for a network with zeros.
        accuracy: in [0, 1], if data was given.
        verdict: why it is or is not faster than the first.
    """

    name: str
    parameters: int
    nonzeros: int
    flops: int
    bytes: int
    packed_bytes: int
    seconds: dict[int, float] = field(default_factory=dict)
    accuracy: float | None = None
    verdict: str = ""

    @property
    def throughput(self) -> dict[int, float]:
        """Samples a second, by batch size."""
        return {size: size / seconds for size, seconds in self.seconds.items()}


@dataclass
class Measurement:
    """Result of `measure`; ``print`` shows a table and a sentence for each network."""

    device: str
    variants: list[Variant]

    def speedup(self, name: str, batch_size: int) -> float:
        """How many times faster than the first network."""
        found = next(row for row in self.variants if row.name == name)
        return self.variants[0].seconds[batch_size] / found.seconds[batch_size]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "seconds": {str(size): x for size, x in row.seconds.items()}} for row in self.variants]
        return {"device": self.device, "variants": rows}

    def __str__(self) -> str:
        sizes = list(self.variants[0].seconds)
        header = ["", *(f"batch {size}" for size in sizes), "parameters", "non-zeros", "MFLOPs", "bytes", "packed", "accuracy"]
        cells = [header]
        for row in self.variants:
            times = [f"{1e3 * row.seconds[size]:.2f} ms ({self.speedup(row.name, size):.2f}x)" for size in sizes]
            accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
            numbers = [f"{row.parameters:,}", f"{row.nonzeros:,}", f"{row.flops / 1e6:,.2f}", f"{row.bytes:,}", f"{row.packed_bytes:,}"]
            cells.append([row.name, *times, *numbers, accuracy])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        return "\n".join([self.device, *(line.rstrip() for line in lines), *(f"{row.name}: {row.verdict}" for row in self.variants[1:])])


def measure(
    networks: Mapping[str, nn.Module],
    example_input: Any,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    data: Iterable[tuple[Any, Tensor]] | None = None,
    rounds: int = 30,
) -> Measurement:
    """Measure networks beside each other.

    Args:
        networks: by name; ratios and verdicts are against the first, usually the dense one. On one device. Modes are put back.
        example_input: one input, or a tuple of arguments, whose first dimension is the batch; repeated or cut to each batch size.
        batch_sizes: of the timed passes.
        data: batches ``(input, labels)`` for the accuracy: the largest logit against the label.
        rounds: turns that every network has; the first fifth warms up.

    Raises:
        ValueError: there is no network, or a batch size or ``rounds`` is less than 1.
    """
    if not networks:
        raise ValueError("networks must have at least one, got none")
    for name, value in [("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)]:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    inputs = as_inputs(example_input)
    batches = list(data) if data is not None else None
    modes = {name: [module.training for module in model.modules()] for name, model in networks.items()}
    try:
        with torch.no_grad():
            for model in networks.values():
                model.eval()
            variants = [_facts(name, model, inputs) for name, model in networks.items()]
            for size in batch_sizes:
                _time(networks, variants, _batch_of(inputs, size), size, rounds)
            if batches is not None:
                for model, row in zip(networks.values(), variants, strict=True):
                    row.accuracy = _accuracy(model, batches)
    finally:
        for name, model in networks.items():
            for module, mode in zip(model.modules(), modes[name], strict=True):
                module.training = mode
    for row in variants:
        row.verdict = _verdict(variants[0], row)
    return Measurement(_device_name(next(iter(networks.values()))), variants)


def _device_name(model: nn.Module) -> str:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def _batch_of(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Arguments with ``size`` samples."""

    def of_size(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        format_ = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return x.repeat(-(-size // len(x)), *[1] * (x.dim() - 1))[:size].contiguous(memory_format=format_)

    return tuple(tree_map(of_size, x) for x in inputs)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _facts(name: str, model: nn.Module, inputs: tuple[Any, ...]) -> Variant:
    params = list(model.parameters())
    nonzeros = [int(torch.count_nonzero(p)) if p.layout == torch.strided else p.numel() for p in params]
    total = sum(_size(x) for x in model.state_dict().values() if isinstance(x, Tensor))
    packed = total
    for p, kept in zip(params, nonzeros, strict=True):
        packed -= max(_size(p) - kept * p.element_size() - -(-p.numel() // 8), 0)
    try:
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(model)(*_batch_of(inputs, 1))
        flops = int(counter.get_total_flops())
    except (RuntimeError, NotImplementedError, TypeError):  # a tensor type that the counter does not know
        flops = 0
    return Variant(name, sum(p.numel() for p in params), sum(nonzeros), flops, total, packed)


def _time(networks: Mapping[str, nn.Module], variants: Sequence[Variant], batch: tuple[Any, ...], size: int, rounds: int) -> None:
    cuda = any(isinstance(x, Tensor) and x.is_cuda for x in batch)
    seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds + rounds // 5 + 1):
        for own, model in zip(seconds, networks.values(), strict=True):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            model(*batch)
            if cuda:
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    for row, own in zip(variants, seconds, strict=True):
        row.seconds[size] = statistics.median(own[rounds // 5 + 1 :])


def _accuracy(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> float:
    right = count = 0
    for inputs, labels in batches:
        right += int((model(*as_inputs(inputs)).argmax(1) == labels).sum())
        count += len(labels)
    return right / max(count, 1)


def _verdict(first: Variant, row: Variant) -> str:
    """One sentence, from the figures."""
    if row is first:
        return "what the others are compared with"
    faster = {size: first.seconds[size] / row.seconds[size] for size in row.seconds}
    times = " and ".join(f"{ratio:.2f}x at batch {size}" for size, ratio in faster.items())
    best = max(faster.values(), default=1.0)
    if row.flops and row.flops < 0.99 * first.flops:
        gone = f"{100 * (1 - row.flops / first.flops):.0f} % of the FLOPs are gone"
        if best >= NEAR:
            short = min(faster.values()) < 0.7 * first.flops / row.flops
            rest = "; what is left is memory, launches and layers that did not shrink" if short else ""
            return f"{times}: {gone}{rest}"
        return f"not faster ({times}) although {gone}: layers this small wait for memory and launches, not for arithmetic"
    if row.nonzeros < 0.99 * row.parameters:
        zeros = f"its {100 * (1 - row.nonzeros / row.parameters):.0f} % zeros are stored and multiplied like other numbers"
        if best >= NEAR:
            return f"{times}, although {zeros}: measured, not explained by arithmetic"
        return f"not faster ({times}): {zeros}; removed filters (shrink) or 2:4 on sparse tensor cores would be"
    if best >= NEAR:
        return f"{times}, by other kernels for the same arithmetic"
    return f"not faster ({times}): the same arithmetic"
