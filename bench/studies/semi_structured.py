"""Twelve transformer layers of the size of BERT-base, 2:4, under bfloat16: dense, masked and semi-structured weights, whatever the result.

    python3 -m bench.studies.semi_structured --device cuda        JSON under bench/results/<device>, table

Masks are those of FastBiP's first step, magnitudes in groups of four. On the CPU every layer is refused, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.networks import Block
from bench.report import folder_name
from bench.workload import machine
from bip_fast import FastBiP
from bip_fast.export import measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.semi_structured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda; default: cpu")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 512], metavar="N", help="default: 1 64 512")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    dense = nn.Sequential(*(Block(768, 12) for _ in range(options.layers))).to(device, torch.bfloat16).eval()
    masked = nn.Sequential(*(Block(768, 12) for _ in range(options.layers))).to(device, torch.bfloat16).eval()
    masked.load_state_dict(dense.state_dict())
    FastBiP(masked, pattern="2:4").finalize()
    x = torch.randn(1, options.tokens, 768, device=device, dtype=torch.bfloat16)
    result = measure(masked, x, dense=dense, batch_sizes=options.batch_sizes, seconds=1.0)
    print(result)
    results: dict[str, Any] = {"machine": machine(device), "date": datetime.date.today().isoformat(), **result.as_dict()}
    if not result["2:4"].measured:
        return 0
    target = options.results / folder_name(results["machine"]["device"]) / "semi-structured.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
