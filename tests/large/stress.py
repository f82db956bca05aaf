"""Upper steps of very many selections, each taken again and again, beside the CPU kernels bit for bit: what finds a race between blocks.

    python3 tests/large/stress.py                                       on a GPU: must end with exit status 0
    BIP_FAST_MUTATION=no-fences python3 setup.py build_ext --build-lib build/no-fences
    timeout 600 python3 tests/large/stress.py --module build/no-fences/bip_fast/_C.*.so       with status 1, or hang, or die

The second line builds the same kernels without memory fences, and the third shows that the first would find that. At 5M weights in 400
tensors, scope "layer" makes 400 groups, nearly all of which two blocks complete; scope "global" makes one that all blocks complete. Each
step is taken ``--repeats`` times from one state. Exit status 1: something differs, and the first difference is printed, or CUDA fails in a
step. 2: it could not begin.

``--device cpu`` and ``--device sim`` (the kernels on the host simulator) show that the script itself is right.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "large")]

import torch  # noqa: E402
from large_lockstep import GOLDEN, RATES, bits, kernels_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bip_fast import FastBiP  # noqa: E402
from bip_fast.engine import native  # noqa: E402


class Difference(AssertionError):
    """The message names the first entry that differs."""


def sizes_of(n: int, tensors: int) -> list[int]:
    """``tensors`` sizes that differ, about ``n`` in all; multiples of 4, so that views of one array are aligned."""
    weights = [1 + (i * GOLDEN % 2**32) / 2**31 for i in range(tensors)]
    return [max(int(n * w / sum(weights)) // 4 * 4, 4) for w in weights]


class Side:
    """One optimizer whose parameters are views of one array, so that a state is saved, restored and compared in a few copies."""

    def __init__(self, weights: Tensor, sizes: list[int], scope: str) -> None:
        self.values = weights
        self.params = [nn.Parameter(x.view(1, -1)) for x in weights.split(sizes)]
        self.sizes = sizes
        self.opt = FastBiP(self.params, sparsity=0.9, scope=scope, **RATES)

    def arrays(self) -> dict[str, Tensor]:
        """What an upper step writes and a user sees."""
        arena = self.opt._running("step").arena
        return {"parameters": self.values, "scores": arena.scores, "mask": arena.mask}

    def give(self, gradient: Tensor) -> None:
        for p, g in zip(self.params, gradient.split(self.sizes), strict=True):
            p.grad = g.view(1, -1)

    def step(self) -> None:
        with self.opt.upper():
            self.opt.step()

    def save(self) -> list[tuple[Tensor, Tensor]]:
        plan = self.opt._running("step").plan
        return [(x, x.clone()) for x in (*self.arrays().values(), plan._workspace, plan._counters)]

    @torch.no_grad()
    def restore(self, saved: list[tuple[Tensor, Tensor]]) -> None:
        for x, was in saved:
            x.copy_(was)
        self.opt._running("step").arena.mark_written()


def compare(given: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    """Raises `Difference`. Waits for the device once where all is well."""
    wrong = {name: bits(x) != bits(expected[name].to(x.device)) for name, x in given.items()}
    if not torch.stack([x.any() for x in wrong.values()]).any():
        return
    name, where = next((name, x.flatten().nonzero()[0].item()) for name, x in wrong.items() if x.any())
    values = given[name].flatten()[where].item(), expected[name].flatten()[where].item()
    counts = {name: int(x.sum()) for name, x in wrong.items()}
    raise Difference(f"{when}: first in {name} at {where}: {values[0]!r}, not {values[1]!r}; entries that differ: {counts}")


def stress(scope: str, options: argparse.Namespace) -> None:
    """Raises `Difference`."""
    sizes = sizes_of(options.weights, options.tensors)
    weights = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1)).mul_(0.3)
    cpu = Side(weights.clone(), sizes, scope)
    with kernels_of(options.device) as device:
        tested = Side(weights.to(device, copy=True), sizes, scope)
    compare(tested.arrays(), cpu.arrays(), "at the start")
    generator = torch.Generator(device).manual_seed(2)
    for number in range(options.steps):
        gradient = torch.randn(sum(sizes), generator=generator, device=device).mul_(0.02)
        tested.give(gradient)
        cpu.give(gradient.cpu())
        before = tested.save()
        tested.step()
        first = {name: x.clone() for name, x in tested.arrays().items()}
        cpu.step()
        compare(first, cpu.arrays(), f"scope {scope}, step {number}, against the CPU")
        for again in range(1, options.repeats):
            tested.restore(before)
            tested.step()
            compare(tested.arrays(), first, f"scope {scope}, step {number}, taken for the {again + 1}. time, against the first time")


def load(path: Path) -> ModuleType:
    """Another build of the kernels, beside the one that is imported."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path.resolve()))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu or sim")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10, help="how often each step is taken")
    parser.add_argument("--weights", type=int, default=5_000_000)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--scopes", nargs="*", default=["layer", "global"])
    parser.add_argument("--module", type=Path, help="take the CUDA kernels from this build of bip_fast._C")
    options = parser.parse_args(arguments)
    try:
        if options.module:
            module = load(options.module)
            print(f"CUDA kernels of {options.module}, mutation: {module.build_info()['mutation']}", flush=True)
            native.BACKENDS["cuda"] = module.cuda
        with kernels_of(options.device) as device:
            native.backend(torch.zeros(1, device=device).device)
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        parser.error(f"{error}")
    for scope in options.scopes:
        start = time.perf_counter()
        try:
            stress(scope, options)
        except (Difference, RuntimeError) as error:  # a RuntimeError is CUDA's
            print(f"DIFFERS after {time.perf_counter() - start:.1f} s: {error}", flush=True)
            return 1
        taken = f"{options.steps} steps of {options.weights:,} weights in {options.tensors} tensors, each taken {options.repeats} times"
        print(f"equal   scope {scope}: {taken}, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
