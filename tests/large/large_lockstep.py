"""The CUDA kernels beside the CPU kernels at sizes that reach every path of a step: state, masks and parameters equal bit for bit.

    python3 tests/large/large_lockstep.py --out FILE.json                 every case, each in a process of its own, five at once
    python3 tests/large/large_lockstep.py --case "25.6M" --device cuda    one case, here

The tests of tests/kernels reach what 500,000 weights reach: one launch that does everything. Here the later launches have work: many blocks
finish a window, windows miss and are crowded, hundreds of tensors, tensors of one group far apart. One process a case, so that an illegal
access in one does not end the others; FILE.json is written after each. ``--device sim`` takes the simulator instead of a GPU, with
``--shrink`` for its speed. Exit status 0: all cases passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bip_fast import FastBiP, topk_mask  # noqa: E402
from bip_fast.engine import native  # noqa: E402
from bip_fast.graphs import GraphedIteration  # noqa: E402

RATES = {"lr": 0.05, "mask_lr": 0.3, "gamma": 0.7, "weight_decay": 0.013}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GOLDEN = 2654435761


@dataclass(frozen=True)
class Case:
    """Weights of ``tensors`` parameters, ``n`` in all, and what is special about them."""

    name: str
    n: int
    tensors: int = 1
    dtype: torch.dtype = torch.float32
    scope: str = "global"
    pattern: str = "unstructured"
    sparsity: float = 0.9
    misaligned: bool = False  # gradients begin one entry after an address that vectors need
    mask_momentum: float = 0.0
    rule: str = "sgd"
    script: str = "whole"  # whole | short | graph | topk
    seconds: int = 90

    def shapes(self, shrink: int) -> list[tuple[int, ...]]:
        """Sizes that differ and are no multiples of anything, but of 16 rows and columns for patterns."""
        n = max(self.n // shrink, 2000 * self.tensors)
        if self.pattern != "unstructured":
            side = max(int((n / self.tensors) ** 0.5) // 16 * 16, 16)
            return [(side, side + 16 * (i % 3)) for i in range(self.tensors)]
        if self.tensors == 1:
            return [(1, n)]
        weights = [1 + (i * GOLDEN % 2**32) / 2**30 for i in range(self.tensors)]
        sizes = [max(int(n * w / sum(weights)), 1) for w in weights]
        return [(1, size + n - sum(sizes) if i == 0 else size) for i, size in enumerate(sizes)]


CASES = [
    Case("600k", 600_000),
    Case("600k, 54 tensors, layer", 600_000, 54, scope="layer"),
    Case("5M, 54 tensors", 5_000_000, 54),
    Case("5M, 54 tensors, layer", 5_000_000, 54, scope="layer"),
    Case("5M, 450 tensors", 5_000_000, 450),
    Case("5M, 450 tensors, layer", 5_000_000, 450, scope="layer"),
    Case("5M, mask momentum", 5_000_000, 3, mask_momentum=0.5),
    Case("5M, bf16, misaligned", 5_000_000, 54, dtype=torch.bfloat16, misaligned=True),
    Case("5M, misaligned", 5_000_000, 54, misaligned=True),
    Case("5M, 450 tensors, AdamW", 5_000_000, 450, rule="adamw"),
    Case("5M, bf16, misaligned, AdamW", 5_000_000, 54, dtype=torch.bfloat16, misaligned=True, rule="adamw"),
    Case("25.6M, AdamW", 25_600_000, rule="adamw"),
    Case("25.6M", 25_600_000),
    Case("25.6M, 54 tensors, bf16", 25_600_000, 54, dtype=torch.bfloat16),
    Case("25.6M, half kept", 25_600_000, 54, sparsity=0.5),
    Case("25.6M, 1 % kept", 25_600_000, 54, sparsity=0.99),
    Case("138M", 138_000_000, 16, script="short", seconds=120),
    Case("5M, filter", 5_000_000, 8, pattern="filter", sparsity=0.5),
    Case("5M, channel", 5_000_000, 8, pattern="channel", sparsity=0.5),
    Case("5M, 2:4", 5_000_000, 8, pattern="2:4", sparsity=0.5),
    Case("20M, block:1x4", 20_000_000, 8, pattern="block:1x4", sparsity=0.8),
    Case("1M, graph", 1_000_000, 5, script="graph"),
    Case("5M, 450 tensors, two graphs", 5_000_000, 450, script="graph"),
    Case("1M, graph, AdamW", 1_000_000, 5, script="graph", rule="adamw"),
    Case("top-k, 1M", 1_000_000, script="topk"),
    Case("top-k, 25.6M", 25_600_000, script="topk"),
    Case("top-k, 138M", 138_000_000, script="topk", seconds=120),
]


# --- both sides ------------------------------------------------------------------------------------------------------------------


@contextmanager
def kernels_of(device: str) -> Iterator[torch.device]:
    """Inside, optimizers are made for the kernels under test: on a GPU, or the same kernels on the simulator."""
    if device != "sim":
        yield torch.device(device)
        return
    from sim.build import load

    before = native.BACKENDS["cpu"]
    native.BACKENDS["cpu"] = load().cuda
    try:
        yield torch.device("cpu")
    finally:
        native.BACKENDS["cpu"] = before


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(INTEGER[x.element_size()])


def differ(given: Tensor, expected: Tensor) -> int:
    return int((bits(given) != bits(expected.to(given.device, non_blocking=True))).sum())


class Pair:
    """The same weights under two optimizers: the CPU's kernels and those under test."""

    def __init__(self, case: Case, device: str, shrink: int) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
        self.case = case
        self.weights = [torch.randn(shape, generator=generator).mul_(0.3).to(case.dtype) for shape in case.shapes(shrink)]
        options: dict[str, Any] = {**RATES, "scope": case.scope, "pattern": case.pattern, "mask_momentum": case.mask_momentum}
        options["optimizer"] = case.rule
        if ":" not in case.pattern or case.pattern.startswith("block"):
            options["sparsity"] = case.sparsity
        self.cpu = FastBiP([nn.Parameter(w.clone()) for w in self.weights], **options)
        with kernels_of(device) as self.device:
            self.tested = FastBiP([nn.Parameter(w.to(self.device, copy=True)) for w in self.weights], **options)
        self.generator = torch.Generator(self.device).manual_seed(1)
        self.paths: Counter[str] = Counter()
        self.compare("at the start")

    def sides(self) -> tuple[FastBiP, FastBiP]:
        return self.cpu, self.tested

    def arrays(self, opt: FastBiP) -> dict[str, Tensor]:
        arena = opt._running("step").arena
        found = {name: getattr(arena, name) for name in ("theta", "scores", "mask", "score_momentum", "num_nonfinite")}
        found |= dict(zip(arena.rule.moments, arena._moments, strict=True)) | {"steps": arena._steps}
        found |= {f"parameter {i}": p for i, p in enumerate(opt.param_groups[0]["params"])}
        for number in range(len(arena.units.sets)):
            found |= {f"{name} of units {number}": x for name, x in arena.units.state_of(number).items()}
        return {name: x for name, x in found.items() if x is not None and x.numel()}

    def compare(self, when: str) -> None:
        given, expected = self.arrays(self.tested), self.arrays(self.cpu)
        assert given.keys() == expected.keys()
        wrong = {name: count for name in given if (count := differ(given[name], expected[name]))}
        if wrong:
            name = next(iter(wrong))
            at = int((bits(given[name]).cpu() != bits(expected[name])).flatten().nonzero()[0])
            values = given[name].detach().flatten()[at].item(), expected[name].detach().flatten()[at].item()
            raise AssertionError(f"{when}: entries differ: {dict(list(wrong.items())[:8])}; first in {name} at {at}: {values}")

    # --- steps

    def give(self, scale: float, nonfinite: bool = False) -> None:
        """The same gradients on both sides; at an odd address where the case says so."""
        for p, q in zip(*(opt.param_groups[0]["params"] for opt in self.sides()), strict=True):
            memory = torch.empty(p.numel() + 1, dtype=p.dtype, device=self.device)
            g = memory[int(self.case.misaligned) :][: p.numel()].view(p.shape)
            g.copy_(torch.randn(p.shape, generator=self.generator, device=self.device).mul_(scale))
            if nonfinite:
                g.view(-1)[:: max(p.numel() // 7, 1)] = float("nan")
                g.view(-1)[1 :: max(p.numel() // 5, 1)] = float("inf")
            q.grad, p.grad = g, g.to("cpu", copy=True)

    def counters(self) -> Counter[str]:
        rows = self.tested._running("step").plan.counters()
        return Counter({name: int(rows[name].sum()) for name in ("first", "missed", "crowded", "candidates")})

    def step(self, phase: str, what: str, scale: float = 0.02, nonfinite: bool = False) -> None:
        """One step of both; the tested side takes it twice from the same state, and once more without a window."""
        self.give(scale, nonfinite)
        before, plan = self._saved(), self.tested._running("step").plan
        counted = self.counters()
        self._take(self.tested, phase)
        found = self.counters()
        found.subtract(counted)
        self.paths.update({f"{what} {name}": value for name, value in found.items() if value})
        first = {name: x.detach().clone() for name, x in self.arrays(self.tested).items()}
        for how in ("again", "without a window"):
            self._restore(before)
            if how != "again":
                plan._workspace.zero_()
                plan._unit_scratch.zero_()
            self._take(self.tested, phase)
            wrong = {name: count for name, x in self.arrays(self.tested).items() if (count := differ(x, first[name]))}
            assert not wrong, f"{what}, {phase}, taken {how}: entries differ from the first time: {dict(list(wrong.items())[:8])}"
            if how == "again":
                after = plan._workspace.clone(), plan._unit_scratch.clone()
        plan._workspace.copy_(after[0])
        plan._unit_scratch.copy_(after[1])
        self._take(self.cpu, phase)
        self.compare(f"{what}, {phase}")

    def _take(self, opt: FastBiP, phase: str) -> None:
        with getattr(opt, phase)():
            opt.step()

    def _saved(self) -> list[tuple[Tensor, Tensor]]:
        plan = self.tested._running("step").plan
        held = [*self.arrays(self.tested).values(), plan._workspace, plan._unit_scratch, plan._counters]
        return [(x, x.detach().clone()) for x in held]

    @torch.no_grad()
    def _restore(self, saved: list[tuple[Tensor, Tensor]]) -> None:
        for x, was in saved:
            x.detach().copy_(was)
        self.tested._running("step").arena.mark_written()

    # --- scores

    @torch.no_grad()
    def set_scores(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same new scores on both sides, behind the back of the window."""
        given, other = self.arrays(self.tested), self.arrays(self.cpu)
        for name in given:
            if name.startswith("scores"):
                new = change(given[name]).clamp_(0, 1)
                given[name].copy_(new)
                other[name].copy_(new)

    def threshold(self) -> float:
        """About the smallest kept score."""
        scores = torch.cat([x.flatten() for name, x in self.arrays(self.cpu).items() if name.startswith("scores")])
        return float(scores[:: 1 + scores.numel() // 1_000_000].quantile(self.case.sparsity))


def whole(pair: Pair) -> None:
    """Every phase and every way to a threshold."""
    short = pair.case.script == "short"
    pair.step("upper", "first")
    for number in range(1 if short else 3):
        pair.step("lower", f"warm {number}")
        pair.step("upper", f"warm {number}")
        pair.step("joint", f"warm {number}")
    pair.step("upper", "not finite", nonfinite=True)
    pair.step("joint", "not finite", nonfinite=True)
    pair.set_scores(lambda s: s * 0.5 + 0.25)
    pair.step("upper", "missed")
    if short:
        return
    pair.step("joint", "after a miss")
    middle = pair.threshold()
    pair.set_scores(lambda s: middle + (s - middle) * 1e-3)
    pair.step("upper", "crowded", scale=1e-5)
    pair.step("joint", "after a crowd", scale=1e-5)
    pair.set_scores(lambda s: torch.full_like(s, 0.5))
    for number in range(2):
        pair.step("upper", f"all equal {number}", scale=0.0)
    pair.set_scores(lambda s: (torch.arange(s.numel(), device=s.device).view(s.shape) % 3 == 0).float())
    for number in range(2):
        pair.step("upper", f"atoms {number}", scale=0.0)
    pair.set_scores(lambda s: torch.where(torch.arange(s.numel(), device=s.device).view(s.shape) % 50 == 7, s + 0.3, 0.0))
    pair.step("joint", "atom and others")
    pair.set_scores(lambda s: (0x3F000000 + torch.arange(s.numel(), device=s.device).view(s.shape) % 5).to(torch.int32).view(torch.float32))
    pair.step("upper", "neighbours", scale=0.0)
    pair.step("upper", "neighbours", scale=1e-7)


# --- graphs ----------------------------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """Its gradients are its inputs, exactly, so that no library has a say in the bits."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        total, at = x.new_zeros(()), 0
        for w in self.weights:
            total = total + (w * x[at : at + w.numel()].view(w.shape)).sum()
            at += w.numel()
        return total


def graph(case: Case, device: str, shrink: int) -> Counter[str]:
    """Two models whose captured steps alternate, beside two on the CPU in eager mode."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator).mul_(0.3) for shape in case.shapes(shrink)]
    n = sum(w.numel() for w in weights)
    options = {**RATES, "sparsity": case.sparsity, "scope": case.scope, "optimizer": case.rule}
    levels = ("alternating", "joint")
    cpu = [FastBiP(Linears(weights).parameters(), levels=level, **options) for level in levels]
    with kernels_of(device) as where:
        models = [Linears(weights).to(where) for _ in levels]
        tested = [FastBiP(model.parameters(), levels=level, **options) for model, level in zip(models, levels, strict=True)]
    iterations = [GraphedIteration(model, opt, lambda loss: loss, warmup=1) for model, opt in zip(models, tested, strict=True)]
    gradients = torch.randn(n, generator=generator)
    for number in range(14):
        factor = 0.02 if number < 9 else 0.2  # the hyper-parameters of a captured graph follow the schedule
        for i, (opt, other) in enumerate(zip(tested, cpu, strict=True)):
            for side in (opt, other):
                side.param_groups[0]["mask_lr"] = 0.3 if number < 6 else 0.15
            moved = factor * torch.roll(gradients, 1000 * number + i)
            iterations[i](moved.to(where))
            at = 0
            for p in other.param_groups[0]["params"]:
                p.grad = moved[at : at + p.numel()].view(p.shape).clone()
                at += p.numel()
            other.step()
            for j, (p, q) in enumerate(zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)):
                assert not differ(p, q), f"step {number} of model {i}: parameter {j} differs"
                assert not differ(opt.mask_of(p), other.mask_of(q)), f"step {number} of model {i}: mask {j} differs"
    reasons = {iteration.reason for iteration in iterations}
    assert where.type != "cuda" or reasons == {None}, f"nothing was captured: {reasons}"
    return Counter(graphs=sum(len(iteration._graphs) for iteration in iterations))


# --- masks -----------------------------------------------------------------------------------------------------------------------


def spread(n: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    index = torch.arange(n, device=device)
    generator = torch.Generator(device).manual_seed(3)
    uniform = torch.rand(n, generator=generator, device=device)
    yield "uniform", uniform
    yield "normal", torch.randn(n, generator=generator, device=device)
    yield "atoms 0 and 1", torch.where(uniform < 0.45, 0.0, torch.where(uniform > 0.95, 1.0, uniform))
    yield "all equal", torch.full((n,), 0.5, device=device)
    yield "neighbouring bits", (0x3F000000 + index % 5).to(torch.int32).view(torch.float32)
    yield "ascending", index.float() / n
    yield "two sorted halves", torch.where(index < n // 2, index.float() / n, 1 - index.float() / n)
    yield "any bits", torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator, device=device).to(torch.int32).view(torch.float32)
    yield "all nan", torch.full((n,), float("nan"), device=device)


def topk(case: Case, device: str, shrink: int) -> Counter[str]:
    n = case.n // shrink
    done: Counter[str] = Counter()
    with kernels_of(device) as where:
        pass
    for name, scores in spread(n, where):
        here = scores.cpu()
        for k in sorted({1, n // 1000, n // 10, n // 2, n - 1000, n - 1} if n < 5e7 else {n // 10, n // 2}):
            with kernels_of(device):
                given, again = topk_mask(scores, k), topk_mask(scores, k)
            assert torch.equal(given, again), f"{name}, k = {k}: two calls differ"
            wrong = differ(given, topk_mask(here, k))
            assert not wrong, f"{name}, k = {k}: {wrong} of {n} differ"
            done[name] += 1
    return done


# --- processes -------------------------------------------------------------------------------------------------------------------


def run(case: Case, device: str, shrink: int) -> dict[str, Any]:
    start = time.perf_counter()
    if case.script == "topk":
        paths = topk(case, device, shrink)
    elif case.script == "graph":
        paths = graph(case, device, shrink)
    else:
        pair = Pair(case, device, shrink)
        whole(pair)
        paths = pair.paths
    return {"case": case.name, "passed": True, "seconds": round(time.perf_counter() - start, 2), "paths": dict(paths)}


def in_a_process(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case.name, "--device", options.device, "--shrink", str(options.shrink)]
    command += ["--jobs", str(options.jobs)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        try:
            status: Any = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=case.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {case.seconds} s"
        log.seek(0)
        lines = log.read().splitlines()
    if status == 0 and lines:
        return json.loads(lines[-1])
    return {"case": case.name, "passed": False, "status": status, "seconds": round(time.perf_counter() - start, 2), "log": lines[-25:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or sim")
    parser.add_argument("--case", help="one case, in this process")
    parser.add_argument("--cases", nargs="*", help="parts of names, of the cases to run; default: all")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes")
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results as JSON, written after every case")
    options = parser.parse_args(arguments)
    if options.case:
        torch.set_num_threads(max((os.cpu_count() or 1) // options.jobs, 1))
        print(json.dumps(run(next(case for case in CASES if case.name == options.case), options.device, options.shrink)))
        return 0
    cases = [case for case in CASES if not options.cases or any(part in case.name for part in options.cases)]
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        longest_first = sorted(cases, key=lambda case: -case.n * case.seconds)
        for future in as_completed([pool.submit(in_a_process, case, options) for case in longest_first]):
            result = future.result()
            results.append(result)
            print(f"{'ok    ' if result['passed'] else 'FAILED'} {result['seconds']:6.1f} s  {result['case']}", flush=True)
            if not result["passed"]:
                print("\n".join("       " + line for line in result["log"]), flush=True)
            if options.out:
                partial = options.out.with_name(options.out.name + ".partial")
                partial.write_text(json.dumps(results, indent=1) + "\n")
                partial.replace(options.out)
    failed = [result["case"] for result in results if not result["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} cases passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
