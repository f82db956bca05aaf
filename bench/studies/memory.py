"""Memory of a pruned weight: what FastBiP adds to a network that trains, as the peak of the process, against DESIGN section 4.

    python3 -m bench.studies.memory                         all cases, JSON under bench/results/<device>, table
    python3 -m bench.studies.memory --models minilm         some of them

Each case is a process of its own: the network is loaded, and its peak resident memory is taken (VmHWM of /proc, which only Linux has) over
two forward and backward passes, then over the making of FastBiP, then over two whole steps. Passes are over 2 sentences of 8 tokens, so
that activations are small. State is what the last peak has more than the first, parameters and gradients are counted; state of what is not
pruned and workspaces are in the figure.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.report import folder_name
from bench.workload import machine
from bip_fast import FastBiP
from bip_fast.experiments.data.scoring import loss_of
from bip_fast.experiments.models.heads import stays_dense
from bip_fast.experiments.models.names import build

CLASSES = {"minilm": 2, "smollm2": 0}  # 0: of tokens
DTYPES = ("float32", "bfloat16")
MOMENTS = {"sgd": 4, "adamw": 8}  # bytes of a weight


def modelled(dtype: str, optimizer: str) -> float:
    """Bytes of a pruned weight by DESIGN section 4: z, theta, s, moments, mask, g."""
    size = getattr(torch, dtype).itemsize
    return size + 4 + 4 + MOMENTS[optimizer] + 1 / 8 + size


def peak() -> int:
    """Bytes: the most that the process has had since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget() -> None:
    """Start the peak from what the process has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def one_case(name: str, dtype: str, optimizer: str) -> dict[str, Any]:
    """Peaks in this process."""
    torch.manual_seed(0)
    model = build(name, None, CLASSES[name]).to(getattr(torch, dtype)).train()
    ids = torch.randint(5, 1000, (2, 8))
    labels = torch.randint(0, 2, (2, 8) if not CLASSES[name] else (2,))
    peaks = []

    def passes(step: Any) -> None:
        forget()
        for _ in range(2):
            loss_of(model(ids), labels).backward()
            step()
            model.zero_grad()
        peaks.append(peak())

    passes(lambda: None)
    passes(lambda: None)  # the first has made buffers that stay
    forget()
    opt = FastBiP(model, sparsity=0.9, optimizer=optimizer, preset="joint", exclude=stays_dense(model))
    peaks.append(peak())
    passes(opt.step)
    weights = sum(p.numel() for p in opt.pruned_params)
    own, size = sum(p.numel() for p in model.parameters() if p.requires_grad), getattr(torch, dtype).itemsize
    state = peaks[3] - peaks[1]
    return {
        "model": name,
        "dtype": dtype,
        "optimizer": optimizer,
        "pruned": weights,
        "trainable": own,
        "passes_peak": peaks[1],
        "making_peak": peaks[2],
        "steps_peak": peaks[3],
        "bytes_per_weight": state / weights + 2 * size,
        "modelled": modelled(dtype, optimizer),
    }


def in_a_process(name: str, dtype: str, optimizer: str) -> dict[str, Any]:
    """`one_case` in a fresh process, in which freed tensors go back to the system at once."""
    command = [sys.executable, "-m", "bench.studies.memory", "--case", name, dtype, optimizer]
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **own})
    return json.loads(result.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each case."""
    lines = ["| network | parameters | rule | weights pruned | bytes by the model | measured |", "|---" * 6 + "|"]
    for row in results["rows"]:
        figures = f"{row['modelled']:.1f} | {row['bytes_per_weight']:.1f}"
        lines.append(f"| {row['model']} | {row['dtype']} | {row['optimizer']} | {row['pruned']:,} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CLASSES, default=list(CLASSES), help="default: all")
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "DTYPE", "RULE"), help="one of them in this process, as JSON")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(one_case(*options.case)))
        return 0
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "date": datetime.date.today().isoformat()}
    results["rows"] = [in_a_process(name, dtype, rule) for name in options.models for dtype in DTYPES for rule in MOMENTS]
    target = options.results / folder_name(results["machine"]["device"]) / "memory.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
