"""The targets, and whether the rows of a run meet them: one line for each, all ratios made inside one run.

A target without its rows says so; nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.workload import size_name

Row = dict[str, Any]
GRAPH = ", CUDA graph"


class Rows:
    """Median seconds by group and implementation."""

    def __init__(self, *results: dict[str, Any] | None) -> None:
        self.rows = [row for found in results if found for row in found["rows"]]

    def of(self, step: str, state: str, implementation: str, layout: str = "", usual: bool = True, rule: str = "sgd") -> dict[int, Row]:
        """Rows by n, at the usual density and dtype."""
        return {
            row["n"]: row
            for row in self.rows
            if row.get("step") == step
            and row.get("rule", "sgd") == rule
            and row.get("state") == state
            and row["implementation"] == implementation
            and layout in row["group"]
            and (not usual or (row["density"] == 0.1 and "bf16" not in row["group"]))
        }


Line = tuple[str, str, float | None, float, bool]  # what, where, measured, target, whether more is better


def ratio(what: str, ours: dict[int, Row], peer: dict[int, Row], target: float, least: int = 0, more: bool = True) -> Iterator[Line]:
    """Times of ``peer`` over ours (more is better), or of ours over the peer's, at every size that both have."""
    sizes = [n for n in ours if n in peer and n >= least]
    for n in sizes:
        value = peer[n]["median_seconds"] / ours[n]["median_seconds"]
        yield what, size_name(n), value if more else 1 / value, target, more
    if not sizes:
        yield what, "-", None, target, more


def bandwidth(what: str, ours: dict[int, Row], target: float, least: int) -> Iterator[Line]:
    """Percent of copy bandwidth."""
    sizes = [n for n in ours if n >= least]
    for n in sizes:
        yield what, size_name(n), 100 * ours[n]["copy_seconds"] / ours[n]["median_seconds"], target, True
    if not sizes:
        yield what, "-", None, target, True


def missed_windows(warm: dict[int, Row], least: int) -> Iterator[Line]:
    """The share of the "warm" steps whose window missed; if it is not small, they were not warm."""
    for n, row in warm.items():
        if n >= least:
            yield "upper step, share of the warm steps that missed", size_name(n), row.get("slow_steps"), 0.05, False


def adamw_lines(rows: Rows, least: int) -> Iterator[Line]:
    """An alternating iteration is a lower and an upper step."""
    dense = rows.of("lower", "warm", "AdamW(fused=True), no pruning", "flat", rule="adamw")
    lower = rows.of("lower", "warm", "bip_fast", "flat", rule="adamw")
    yield from ratio("lower step with AdamW, times torch's fused AdamW", lower, dense, 1.3, least, more=False)
    yield from ratio(
        "lower step with SGD, times torch's fused SGD",
        rows.of("lower", "warm", "bip_fast", "flat"),
        rows.of("lower", "warm", "SGD(fused=True), no pruning", "flat"),
        1.3,
        least,
        more=False,
    )
    for what, where, percent, _, _ in bandwidth(
        "joint step with AdamW, times a copy", rows.of("joint", "warm", "bip_fast", "flat", rule="adamw"), 0, least
    ):
        yield what, where, 100 / percent if percent else None, 1.25, False
    upper = rows.of("upper", "warm", "bip_fast", "flat")
    both = {n: {"median_seconds": lower[n]["median_seconds"] + upper[n]["median_seconds"]} for n in lower if n in upper}
    twice = {n: {"median_seconds": 2 * row["median_seconds"]} for n, row in dense.items()}
    yield from ratio("lower step with AdamW and upper step, times two fused steps of AdamW", both, twice, 1.0, least, more=False)


def gpu_lines(rows: Rows) -> Iterator[Line]:
    big = 25_000_000
    warm = rows.of("upper", "warm", "bip_fast", "flat")
    yield from bandwidth("upper step, % of copy bandwidth", warm, 85, big)
    yield from missed_windows(warm, big)
    for step in ("lower", "joint"):
        yield from bandwidth(f"{step} step, % of copy bandwidth", rows.of(step, "warm", "bip_fast", "flat"), 85, big)
    yield from adamw_lines(rows, big)
    yield from ratio("upper step, times faster than plain torch", warm, rows.of("upper", "warm", "plain torch", "flat"), 20, big)
    yield from ratio("upper step, times faster than torch.compile", warm, rows.of("upper", "warm", "torch.compile", "flat"), 5, big)
    for peer in ("torch.topk, bare", "torch.topk(sorted=False), bare", "CUB DeviceTopK, bare"):
        yield from ratio(f"upper step, times faster than {peer}", warm, rows.of("top-k", "trained-like", peer), 3, big)
    for state, target in (("no window", 2), ("all equal", 3)):
        slow = rows.of("upper", state, "bip_fast", "flat")
        yield from ratio(f"upper step, {state}, times the warm one", slow, warm, target, big, more=False)
    for kind, target in (("joint iteration", 1.05), ("iteration", 1.03)):
        for network in ("resnet18", "resnet50"):
            ours = rows.of(kind, network, "bip_fast" + GRAPH, usual=False)
            dense = rows.of(kind, network, "dense SGD(fused=True)" + GRAPH, usual=False)
            yield from ratio(f"{kind} of {network}, times dense, both in a graph", ours, dense, target, more=False)
    graph, eager, plain = (rows.of("iteration", "resnet20", name, usual=False) for name in ("bip_fast" + GRAPH, "bip_fast", "plain torch"))
    yield from ratio("iteration of resnet20, in a graph, times faster than plain torch in eager mode", graph, plain, 8)
    yield from ratio("iteration of resnet20, eager, times faster than plain torch", eager, plain, 1)


def cpu_lines(rows: Rows) -> Iterator[Line]:
    at = 11_000_000
    warm = rows.of("upper", "warm", "bip_fast", "flat")
    for what, where, percent, _, _ in bandwidth("upper step, times a copy", warm, 0, at):
        yield what, where, 100 / percent if percent else None, 1.6, False
    yield from ratio("upper step, times faster than plain torch", warm, rows.of("upper", "warm", "plain torch", "flat"), 30, at)
    yield from adamw_lines(rows, at)


def table(steps: dict[str, Any] | None, iterations: dict[str, Any] | None) -> str:
    """Markdown: a line for each target and size."""
    found = steps or iterations
    assert found
    rows = Rows(steps, iterations)
    lines = ["| target | n | measured | wanted | |", "|---|---|---|---|---|"]
    for what, where, value, target, more in cpu_lines(rows) if found["machine"]["device"].startswith("CPU") else gpu_lines(rows):
        wanted = f"{'at least' if more else 'at most'} {target:g}"
        if value is None:
            lines.append(f"| {what} | {where} |  | {wanted} | not measured |")
        else:
            met = value >= target if more else value <= target
            lines.append(f"| {what} | {where} | {value:.3g} | {wanted} | {'met' if met else '**missed**'} |")
    return "\n".join(lines)
