"""Steps of sharded parameters on several ranks of one machine: how long the pass takes, how long the ranks talk, and what gathering costs.

    python3 -m bench.studies.distributed                    11.2M and 100M weights on 1, 2 and 4 ranks; JSON under bench/results/<device>
    python3 -m bench.studies.distributed --sizes 1e6        another size

Every rank is a process with one thread over gloo. "gathered" is the selection as tools for one device do it on sharded weights (PAT of
torchao): every rank gathers all scores and takes torch.topk of them. Ranks share the cores of the machine, so where there are fewer cores
than ranks a pass gets no faster; what grows is what the ranks tell each other, which is the point.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from bench.report import folder_name
from bench.workload import machine, size_name
from bip_fast import FastBiP
from bip_fast.engine.shards import Ranks

SIZES = (11_200_000, 100_000_000)
WORLDS = (1, 2, 4)
COLUMNS = 1024
STEPS = 9


def _weights(numel: int) -> nn.Parameter:
    """This rank's rows of a weight of about ``numel`` entries."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = -(-numel // COLUMNS // 4) * 4
    made = torch.Generator().manual_seed(dist.get_rank())
    local = torch.randn(rows // dist.get_world_size(), COLUMNS, generator=made) / 32
    return nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))


def _seconds(run: Callable[[], Any]) -> float:
    """Of one call, until the last rank has ended it."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def _times(numel: int) -> dict[str, float]:
    """Median seconds of an upper step, of what of it is talk, of a lower step, and of the gathered selection; on this rank."""
    p = _weights(numel)
    opt = FastBiP([p], sparsity=0.9, mask_lr=1e-3)
    talk = [0.0]
    add = Ranks.add

    def timed(self: Ranks, x: torch.Tensor) -> None:
        start = time.perf_counter()
        add(self, x)
        talk[0] += time.perf_counter() - start

    Ranks.add = timed  # type: ignore[method-assign]
    made = torch.Generator().manual_seed(7 + dist.get_rank())
    local = p.to_local()
    rows: dict[str, list[float]] = {"upper": [], "talk": [], "lower": [], "gathered": []}
    keep = round(0.1 * p.numel())
    scores = opt.scores_of(p).to_local()  # type: ignore[attr-defined]
    for step in range(STEPS + 2):
        p.grad = torch.distributed.tensor.DTensor.from_local(
            torch.randn(local.shape, generator=made) / 100, p.device_mesh, p.placements, run_check=False
        )
        talk[0] = 0.0
        with opt.upper():
            upper = _seconds(opt.step)
        spoken = talk[0]
        with opt.lower():
            lower = _seconds(opt.step)
        gathered = _seconds(lambda: _gathered(scores, keep)) if step < 5 else None
        if step >= 2:  # the first have no window yet
            for name, x in {"upper": upper, "talk": spoken, "lower": lower, "gathered": gathered}.items():
                rows[name] += [] if x is None else [x]
    return {name: statistics.median(x) for name, x in rows.items()}


def _gathered(scores: torch.Tensor, keep: int) -> torch.Tensor:
    parts = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, scores)
    return torch.topk(torch.cat(parts).flatten(), keep).indices


def _rank(rank: int, world: int, folder: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    rows = []
    for numel in sizes:
        rows.append({"weights": numel, "ranks": world, **_times(numel)})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each number of weights and ranks."""
    lines = ["| weights | ranks | upper step | of it told to each other | lower step | all scores gathered, then topk |", "|---" * 6 + "|"]
    for row in sorted(results["rows"], key=lambda row: (row["weights"], row["ranks"])):
        figures = " | ".join(f"{1000 * row[name]:.1f} ms" for name in ("upper", "talk", "lower", "gathered"))
        lines.append(f"| {size_name(row['weights'])} | {row['ranks']} | {figures} |")
    return "\n".join(lines)


# Of a GPU, for the table on paper. Bytes per second: what an H200 copies (measured, read and write together), what it receives over NVLink,
# and over a network of 400 Gbit/s. Seconds of one small all-reduce: in a node of 8, and between nodes (both assumed).
COPY, NVLINK, NETWORK = 4.3e12, 450e9, 50e9
IN_NODE, BETWEEN_NODES, NODE = 30e-6, 80e-6, 8
MANY = 32  # selection groups: from so many on, digits are short (csrc/search.h)


def told_of(groups: int) -> tuple[int, int]:
    """Bytes of one all-reduce, and how many of them every upper step has: on a GPU the host does not look whether fewer would do."""
    bits, rounds = (8, 10) if groups >= MANY else (11, 8)
    return 8 * (8 + 2**bits) * groups, rounds


def modelled(weights: float, gpus: int, groups: int = 1) -> dict[str, float]:
    """Seconds of an upper step on so many GPUs, nothing of which was measured: the pass over 16.3 bytes a weight, what the ranks tell each
    other, and instead of that the 4 bytes a weight that every rank receives when scores are gathered."""
    size, rounds = told_of(groups)
    speed, latency = (NVLINK, IN_NODE) if gpus <= NODE else (NETWORK, BETWEEN_NODES)
    others = (gpus - 1) / gpus
    return {
        "pass": 16.3 * weights / gpus / COPY,
        "told": rounds * (latency + 2 * others * size / speed),
        "gathered": 4 * weights * others / speed,
    }


def model_table() -> str:
    """Markdown: `modelled` for two sizes on 8 to 512 GPUs."""
    columns = "weights | groups | GPUs | pass | told to each other | scores gathered instead | which every rank must hold"
    lines = [f"| {columns} |", "|---" * 7 + "|"]
    for weights, groups in ((7e9, 1), (7e9, 300), (70e9, 1)):
        for gpus in (8, 64, 512):
            row = {name: f"{1000 * seconds:,.2f} ms" for name, seconds in modelled(weights, gpus, groups).items()}
            figures = f"{row['pass']} | {row['told']} | {row['gathered']} | {4 * weights / 1e9:g} GB"
            lines.append(f"| {weights / 1e9:g}e9 | {groups} | {gpus} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.distributed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES), metavar="N", help="weights; default: 11.2e6 100e6")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(WORLDS), metavar="N", help="default: 1 2 4")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "date": datetime.date.today().isoformat(), "rows": []}
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (world, folder, tuple(map(int, options.sizes))), nprocs=world)
            results["rows"] += json.loads(Path(folder, "rows.json").read_text())
    target = options.results / folder_name(results["machine"]["device"]) / "distributed.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
