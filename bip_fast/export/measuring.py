"""Is it smaller and faster now? A pruned network beside the dense one: as it is, with dead channels removed, and as 2:4.

All run in eval mode, without gradients, on the same inputs, in one process: in every round each network has its turn, in another order, and
a speedup is the median of the ratios within the rounds. So what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..engine.layers import weights
from ..engine.native import launch_guard
from ..engine.report import layer_table
from ..errors import one_line
from ..state_dicts import write_safetensors
from ..timing.clock import calls_in, synchronize
from .measurement import Measurement, Timing, Variant, sentence
from .probes import fresh
from .runtimes import check_runtime, prepared_call, version
from .variants import device_of, variants_of

__all__ = ["Measurement", "Timing", "Variant", "measure"]

WARM_UP = 3  # calls: memory is allocated, algorithms are chosen
LEAST, MOST = 5, 200  # rounds


def measure(
    model: nn.Module,
    example_input: Any,
    *,
    dense: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    device: torch.device | str | None = None,
    data: Iterable[tuple[Any, Tensor]] | None = None,
    seconds: float = 2.0,
    runtime: str = "torch",
) -> Measurement:
    """Measure a pruned network in four forms: "dense", "masked" (as it is), "shrunk" (see `shrink`) and "2:4" (see `to_semi_structured`).

    For each form: the time of a forward pass, samples per second, parameters, non-zeros, FLOPs, bytes, accuracy, and one sentence that
    says why it is or is not faster than the dense network, or why it was not measured. Waits for the device.

    Args:
        model: a model with exact zeros, as after `FastBiP.finalize`. Neither it nor ``dense`` is changed, and their modes are restored.
        example_input: one argument of the model, or a tuple of them; in every tensor the first dimension is the batch. It is repeated or
            cut to each batch size, so one sample is enough.
        dense: the network before pruning, measured in the memory format of ``model``. Without it, a copy of ``model`` with its zeros
            filled takes its place; that has no accuracy.
        batch_sizes: the batch sizes to measure at.
        device: where to measure; by default where the model is. For another device copies are made.
        data: batches ``(x, y)`` for the accuracy, which is the share of labels at which the logit is largest. ``x`` is like
            ``example_input``; ``y`` has the shape of the output without its dimension 1, that of the classes.
        seconds: about how long to measure each batch size, after the warm-up.
        runtime: what runs the networks while they are timed: "torch", or "onnxruntime" (on a CPU), for which each is exported first.

    Returns:
        The figures of all four; print it for a table.

    Raises:
        ImportError: a package of the runtime is not installed.
        ValueError: an argument is out of range, the example has no batch, the device cannot be used, the runtime cannot run the model, or
            labels do not fit its output.

    Examples:
        >>> print(measure(model, images[:1], dense=before, data=test_loader))
    """
    sizes = _checked_sizes(batch_sizes)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds must be more than 0, got {seconds}")
    where = device_of(model) if device is None else _usable(device)
    check_runtime(runtime, where)
    model, dense = _on(model, where), None if dense is None else _on(dense, where)
    inputs = _inputs(example_input, where)
    networks, rows = variants_of(model, dense, inputs)
    with torch.no_grad(), launch_guard(where), _eval_mode(networks.values()):
        for name, network in networks.items():
            rows[name] = _with_facts(rows[name], network, _batch(inputs, 1))
        if "2:4" in networks:
            rows["2:4"] = replace(rows["2:4"], nonzeros=rows["masked"].nonzeros, sparsity=rows["masked"].sparsity)
        times, rounds = _timed(networks, {size: _batch(inputs, size) for size in sizes}, runtime, where, seconds)
        scores = _accuracies(networks, data, where)
    if dense is None:
        scores["dense"] = None
    rows |= {name: replace(rows[name], times=times[name], accuracy=scores[name]) for name in networks}
    told = tuple(replace(row, sentence=sentence(rows["dense"], row)) for row in rows.values())
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type.upper()
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "no parameters")
    return Measurement(told, name, torch.get_num_threads(), dtype, version(runtime), rounds)


def _checked_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """Each once; ValueError unless they are whole numbers of at least 1."""
    sizes = list(dict.fromkeys(batch_sizes))
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes must be whole numbers of at least 1, got {batch_sizes}")
    return sizes


def _timed(
    networks: Mapping[str, nn.Module], batches: Mapping[int, tuple[Any, ...]], runtime: str, where: torch.device, seconds: float
) -> tuple[dict[str, dict[int, Timing]], dict[int, int]]:
    """Times of every network and the number of rounds, by batch size."""
    times: dict[str, dict[int, Timing]] = {name: {} for name in networks}
    rounds: dict[int, int] = {}
    for size, batch in batches.items():
        taken = _race([prepared_call(runtime, network, batch) for network in networks.values()], where, seconds)
        rounds[size] = len(taken[0])
        for name, own in zip(networks, taken, strict=True):
            times[name][size] = _timing(own, taken[0])
    return times, rounds


# --- facts ---------------------------------------------------------------------------------------------------------------------------


def _with_facts(row: Variant, network: nn.Module, inputs: tuple[Any, ...]) -> Variant:
    """The row with every figure but times and accuracy."""
    if row.name == "2:4":  # counters and files do not know its tensors
        held = sum(_bytes_of(x) for x in network.state_dict().values() if isinstance(x, Tensor))
        return replace(row, parameters=sum(p.numel() for p in network.parameters()), file_bytes=held)
    counted, size, found = layer_table(network.named_parameters()), _file_bytes(network), weights(network)
    layers, saved = layer_table(found), 0
    for (_, x), layer in zip(found, layers, strict=True):
        saved += max((layer.total - layer.kept) * x.element_size() - -(-layer.total // 8), 0)
    packed = size - saved if size is not None and saved else None
    row = replace(row, parameters=counted.total, nonzeros=counted.kept, sparsity=layers.sparsity)
    return replace(row, flops=_flops(network, inputs), file_bytes=size, packed_bytes=packed)


def _flops(network: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    try:
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
        return int(counter.get_total_flops())
    except Exception:  # an operation that the counter cannot follow
        return None


def _bytes_of(x: Tensor) -> int:
    if hasattr(x, "__tensor_flatten__"):  # a tensor made of others
        return sum(_bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def _file_bytes(network: nn.Module) -> int | None:
    """Size of its safetensors file, which is written and deleted; None if that cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        try:
            write_safetensors(path, network)
        except (ImportError, AttributeError, RuntimeError, ValueError):  # not installed; or a state dict with more than tensors
            return None
        return path.stat().st_size


def _answers(logits: Any, labels: Tensor) -> Tensor:
    """The class of the largest logit, wherever there is a label."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"data needs a model that returns one tensor of logits, got {type(logits).__name__}")
    if logits.dim() < 2 or labels.shape != (places := logits.shape[:1] + logits.shape[2:]):
        expected = "an output of (batch, classes, ...)" if logits.dim() < 2 else f"labels of shape {tuple(places)}"
        raise ValueError(f"data must have {expected}, got labels {tuple(labels.shape)} for an output {tuple(logits.shape)}")
    return logits.argmax(1)


def _accuracies(networks: dict[str, nn.Module], data: Iterable[tuple[Any, Tensor]] | None, device: torch.device) -> dict[str, float | None]:
    """Share of right answers of every network, in one pass over the data."""
    right, count = dict.fromkeys(networks, 0), 0
    for x, y in data or ():
        inputs, labels = _inputs(x, device), y.to(device)
        count += labels.numel()
        for name, network in networks.items():
            right[name] += int((_answers(network(*fresh(inputs)), labels) == labels).sum())
    return {name: right[name] / count if count else None for name in networks}


# --- time ----------------------------------------------------------------------------------------------------------------------------


def _race(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of each call in every round; all have the same number of rounds, and start one in turn."""

    def timed(call: Callable[[], object], times: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / times

    once = [min(timed(call, 1) for _ in range(WARM_UP)) for call in calls]
    repeats = calls_in(min(once), device)
    rounds = max(LEAST, min(MOST, int(seconds / max(sum(once) * repeats, 1e-9))))
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in range(len(calls)):
            number = (turn + i) % len(calls)
            taken[number].append(timed(calls[number], repeats))
    return taken


def _timing(own: list[float], dense: list[float]) -> Timing:
    if own is dense:
        return Timing(statistics.median(own))
    ratios = [a / b for a, b in zip(dense, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(own), middle, low, high)


# --- inputs and modes ----------------------------------------------------------------------------------------------------------------


def _usable(device: torch.device | str) -> torch.device:
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except Exception as error:  # each kind of device has its own way to say that it is not there
        raise ValueError(f"device must be one that this machine and this torch have, got {device}: {one_line(error)}") from error


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, or a copy where it is not on ``device``."""
    own = device_of(model)
    same = own.type == device.type and device.index in (None, own.index)
    return model if same else copy.deepcopy(model).to(device)


def _inputs(example: Any, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a call, on ``device``."""
    given = example if isinstance(example, tuple) else tuple(example) if isinstance(example, list) else (example,)
    inputs = tuple(tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, x) for x in given)
    if not any(isinstance(x, Tensor) and x.dim() and len(x) for x in tree_leaves(inputs)):
        raise ValueError("example_input must have a tensor whose first dimension is a batch of at least one")
    return inputs


def _batch(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The arguments repeated or cut to ``size`` samples, in the memory format that they have."""

    def sized(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or not len(x):
            return x
        return torch.cat([x] * -(-size // len(x)))[:size]

    return tuple(tree_map(sized, x) for x in inputs)


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode for all; afterwards every module has the mode it had."""
    models = list(models)
    roots = [(model, model.training) for model in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in roots:
            model.train(training)  # some do more in it than set the mode
        for module, training in modes:
            module.training = training
