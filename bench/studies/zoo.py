"""Half of the filters of networks from torchvision and timm pruned in coupled groups, and shrunk: does it work, and what is it worth?

    python3 -m bench.studies.zoo                              JSON under bench/results/<device>, table (.ci/zoo makes the environment)
    python3 -m bench.studies.zoo --networks timm:resnet10t    only these; rows of others stay

Weights are random, batch-norms are as after training, and no network learns: this is about what `coupled_filters` and `shrink` follow.
Every network runs in a process of its own, which has a limit of time. Both networks take turns when they are timed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.report import folder_name, read
from bench.workload import machine
from bip_fast import FastBiP
from bip_fast.errors import one_line
from bip_fast.export import coupled_filters, shrink
from bip_fast.export.same import near

# A small member of every family of torchvision's classification networks, and networks of timm that differ from these and from each other.
TORCHVISION = (
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "squeezenet1_1", "densenet121", "googlenet", "inception_v3",
    "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
TIMM = (
    "resnet10t", "skresnet18", "resnest14d", "seresnext26d_32x4d", "repvgg_a0", "ghostnet_100", "efficientnet_lite0",
    "mobilenetv4_conv_small", "mobileone_s0", "hrnet_w18_small", "dla34", "ese_vovnet19b_dw", "selecsls42b", "regnety_002", "rexnet_100",
    "tinynet_e", "convnextv2_atto", "edgenext_xx_small", "mobilevit_xxs", "levit_128s", "poolformer_s12", "mixer_s32_224",
    "deit_tiny_patch16_224", "pvt_v2_b0", "fastvit_t8",
)  # fmt: skip
NETWORKS = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))
SMALL = 128  # pixels a side, where the network takes them
ROUNDS = 20
TOLERANCE = 1e-3  # of what sums of fewer terms round to, after many layers


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights in eval mode, and an image for it: a small one, as nothing here depends on its size but time."""
    library, _, own = name.partition(":")
    torch.manual_seed(0)
    size = 224
    if library == "timm":
        import timm

        model = timm.create_model(own)
        size = model.pretrained_cfg["input_size"][-1]
    else:
        import torchvision

        model = torchvision.models.get_model(own, weights=None, **({"init_weights": False} if own in ("googlenet", "inception_v3") else {}))
        size = 299 if own == "inception_v3" else size
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for x in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(x, 0.1, 0.1)
            nn.init.ones_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.eval()
    try:
        with torch.no_grad():
            model(torch.randn(1, 3, SMALL, SMALL))
        size = SMALL
    except Exception:  # its patches, windows or positions are of one size
        pass
    return model, torch.randn(1, 3, size, size)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def speedup(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The fastest pass of one over that of the other: what else runs on the machine only adds to a time."""
    taken: dict[nn.Module, list[float]] = {dense: [], small: []}
    for turn in range(ROUNDS):
        for network in (dense, small) if turn % 2 else (small, dense):
            began = time.perf_counter()
            network(x)
            taken[network].append(time.perf_counter() - began)
    return min(taken[dense]) / min(taken[small])


def row_of(name: str) -> dict[str, Any]:
    """What becomes of one network."""
    model, x = built(name)
    dense, before = copy.deepcopy(model), parameters_of(model)
    began = time.perf_counter()
    coupled = coupled_filters(model, x)
    follows = time.perf_counter() - began
    FastBiP(model, sparsity=0.5, pattern="filter", scope="layer", coupled=coupled).finalize()
    began = time.perf_counter()
    small = shrink(model, x)
    shrinks = time.perf_counter() - began
    why = Counter({row.reason: 0 for row in small.kept})
    for row in small.kept:
        why[row.reason] += row.channels
    with torch.no_grad():
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(99))  # none of those that shrink has looked at
        same = near(small.model(other), model(other), TOLERANCE)
        faster = speedup(dense, small.model, x)
    seconds = {"coupled_seconds": round(follows, 1), "shrink_seconds": round(shrinks, 1)}
    cut = {"before": before, "after": parameters_of(small.model), "layers": len({row.name for row in small.removed})}
    left = {"kept": sum(why.values()), "reason": why.most_common(1)[0][0] if why else ""}
    return {"image": x.shape[-1], **cut, "same": same, "speedup": round(faster, 3), **seconds, **left}


def tried(name: str, limit: float) -> dict[str, Any]:
    """`row_of` in a process of its own, or why there is no row."""
    command = [sys.executable, "-m", "bench.studies.zoo", "--one", name]
    began = time.perf_counter()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        last = [line for line in (ended.stdout if ended.returncode == 0 else ended.stderr).splitlines() if line.strip()][-1:]
        row = json.loads(last[0]) if ended.returncode == 0 else {"failed": last[0] if last else f"exit code {ended.returncode}"}
    except subprocess.TimeoutExpired:
        row = {"failed": f"not done after {limit:.0f} seconds"}
    return {"network": name, **row, "seconds": round(time.perf_counter() - began, 1)}


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each network."""
    lines = [
        "| network | parameters | shrunk | outputs | faster, batch 1 | seconds | why other pruned filters stay |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"| {row['network']} |  |  | **failed** |  |  | {row['failed'].replace('|', chr(92) + '|')} |")
            continue
        share = f"{row['after'] / 1e6:.2f}M ({100 * row['after'] / row['before']:.0f} %)"
        same, seconds = "the same" if row["same"] else "**differ**", row["coupled_seconds"] + row["shrink_seconds"]
        why = f"{row['kept']}, most: {row['reason']}".replace("|", "\\|") if row["kept"] else ""
        lines.append(
            f"| {row['network']} | {row['before'] / 1e6:.2f}M | {share} | {same} | {row['speedup']:.2f}x | {seconds:.0f} | {why} |"
        )
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """One sentence on all of them."""
    rows = [row for row in results["rows"] if "failed" not in row]
    same = [row for row in rows if row["same"]]
    smaller = sum(row["after"] < row["before"] for row in same)
    longest = max((row["coupled_seconds"] + row["shrink_seconds"] for row in rows), default=0.0)
    return (
        f"{len(results['rows'])} networks: {smaller} smaller with the same outputs, {len(same) - smaller} not smaller, "
        f"{len(rows) - len(same)} with other outputs, {len(results['rows']) - len(rows)} failed. "
        f"Both functions together took at most {longest:.0f} seconds."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.studies.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="torchvision:NAME or timm:NAME; default: all of the study")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for each network; default: 300")
    parser.add_argument("--one", metavar="NAME", help="print the row of one network as JSON")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR", help="default: bench/results")
    options = parser.parse_args(arguments)
    if options.one:
        try:
            print(json.dumps(row_of(options.one)))
        except Exception as error:  # of the network, or of what is tested here
            print(one_line(error, 300, named=True), file=sys.stderr)
            return 1
        return 0
    about = machine(torch.device("cpu"))
    target = options.results / folder_name(about["device"]) / "zoo.json"
    old = {row["network"]: row for row in (read(target) or {"rows": []})["rows"]}
    for name in options.networks or NETWORKS:
        old[name] = tried(name, options.limit)
        print(json.dumps(old[name]), file=sys.stderr, flush=True)
        rows = [old[known] for known in dict.fromkeys((*NETWORKS, *old)) if known in old]
        results = {"machine": about, "date": datetime.date.today().isoformat(), "rows": rows}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1) + "\n")  # after each, as it takes long
    print(f"{summary(results)}\n\n{table(results)}\n\n{target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
