"""Nonsense for whatever takes files and states of others: only an answer that is right or a clear error may come out.

    python3 tests/large/fuzz.py --seconds 120                          every target that long, each in a process of its own
    python3 tests/large/fuzz.py --seconds 600 checkpoints --seed 7     one of them, other inputs

topk         `topk_mask` of any scores, layout and k: equal to the reference, or a TypeError or ValueError
masks        `load_masks` of damaged files: the masks that were saved, or a ValueError
checkpoints  `FastBiP.load_state_dict` of damaged states: a ValueError or TypeError, after which nothing has changed; or steps that hold the
             invariant
weights      `read_state_dict` of damaged .pt and .safetensors files: tensors, or a UserError
configs      grids of `bip-fast compare`, damaged as text and as content: a grid, or a UserError

Hypothesis draws the inputs from random bytes. An input is named by the seed and its number, and can be had again with --first N
--count 1. More than a minute for one is a hang. Exit status 0: nothing was found. Needs hypothesis, and what the command line needs.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bip_fast import FastBiP, reference, topk_mask  # noqa: E402
from bip_fast.errors import UserError  # noqa: E402
from bip_fast.experiments.compare import grid  # noqa: E402
from bip_fast.export import load_masks, save_masks  # noqa: E402
from bip_fast.state_dicts import read_state_dict  # noqa: E402

HANG = 60  # seconds
FOUND = 3  # status of a process that found something; that of a hang is 1
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
OUTCOMES: Counter[str] = Counter()

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
)
HALVES = [torch.float16, torch.bfloat16]
dtypes = st.sampled_from([*HALVES, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64])


@st.composite
def tensors(draw: Any) -> Tensor:
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    x = torch.full(shape, draw(st.sampled_from([0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")]))).to(draw(dtypes))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return x.to("meta")
    if kind == 1 and x.dim() == 2:
        return x.to_sparse()
    return x.transpose(0, -1) if kind == 2 and x.dim() > 1 else x


keys = st.one_of(st.text(max_size=5), st.integers(-1, 9))
anything = st.one_of(scalars, tensors(), st.lists(scalars, max_size=3), st.dictionaries(keys, scalars, max_size=3))


def damaged_bytes(draw: Any, whole: bytes) -> bytes:
    """Some bytes changed, cut out, put in, or swapped."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # headers are where the sense is
        at = draw(st.one_of(st.integers(0, min(len(content), 600)), st.integers(0, len(content))))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = draw(st.binary(max_size=9))
        elif kind == 3:
            del content[at : at + draw(st.integers(1, 40))]
        else:
            other = draw(st.integers(0, len(content)))
            content[at : at + 8] = content[other : other + 8]
    return bytes(content)


def damaged(draw: Any, whole: Any, values: Any) -> Any:
    """A copy with one or two places changed: another value, one more, or one less."""
    content = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        inside = [content]
        while True:
            here = inside[-1]
            places = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
            if not places:
                break
            key = draw(st.sampled_from(places))
            if not isinstance(here[key], (dict, list)) or draw(st.integers(0, 4)) == 0:
                break
            inside.append(here[key])
        here = inside[-1]
        if not places:
            continue
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[draw(keys)] = draw(values)
        elif kind == 2 and isinstance(here[key], Tensor) and here[key].numel():
            flat = here[key].clone().view(-1)
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from([-1, 0, 1, 2, 100]))
            here[key] = flat.view(here[key].shape)
        else:
            here[key] = draw(values)
    return content


# --- targets -------------------------------------------------------------------------------------------------------------------------


def topk(draw: Any) -> str:
    n = draw(st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 1023, 1025, 4097, 70_001])))
    pool = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5))  # bit patterns, repeated: ties
    bits = torch.tensor(pool, dtype=torch.int64)[torch.randint(len(pool), (n,), generator=torch.Generator().manual_seed(n))]
    scores = bits.to(torch.int32).view(torch.float32).to(draw(st.sampled_from([torch.float32, *HALVES])))
    if draw(st.integers(0, 4)) == 0:
        scores = draw(tensors())
    if draw(st.booleans()) and scores.layout == torch.strided and scores.dim() == 1:
        scores = scores[:: draw(st.integers(1, 3))]
    k = draw(st.one_of(st.integers(0, max(scores.numel(), 1)), scalars))
    torch.set_num_threads(draw(st.integers(1, 3)))
    try:
        mask = topk_mask(scores, k)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        # A RuntimeError is torch's word for a device without kernels.
        if isinstance(error, RuntimeError) and scores.device.type == "cpu":
            raise
        return type(error).__name__
    assert mask.shape == scores.shape
    assert int(mask.sum()) == k
    assert torch.equal(mask, reference.topk_mask(scores, k))
    return "a mask"


def _mask_file() -> tuple[bytes, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in {"a.weight": (4, 3, 3), "b": (17,), "c": (0, 2)}.items()}
    save_masks(FOLDER / "whole.safetensors", masks)
    return (FOLDER / "whole.safetensors").read_bytes(), masks


def masks(draw: Any, whole: list[Any] = []) -> str:  # noqa: B006
    whole = whole or whole.extend(_mask_file()) or whole
    path = FOLDER / "damaged.safetensors"
    path.write_bytes(damaged_bytes(draw, whole[0]))
    try:
        found = load_masks(path)
    except ValueError:
        return "ValueError"
    assert all(mask.dtype == torch.bool for mask in found.values())
    same = found.keys() == whole[1].keys() and all(torch.equal(found[name], mask) for name, mask in whole[1].items())
    return "the masks that were saved" if same else "other masks, well formed"


def _optimizer(kind: int) -> tuple[nn.Module, FastBiP]:
    torch.manual_seed(kind)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    options: list[dict[str, Any]] = [
        {}, {"optimizer": "adamw", "pattern": "2:4"}, {"pattern": "filter", "mask_momentum": 0.5}, {"preset": "joint", "steps": 50},
        {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)},
    ]  # fmt: skip
    chosen = options[kind]
    return model, FastBiP(model, **({} if chosen.get("pattern") == "2:4" else {"sparsity": 0.5}), **chosen)


def _step(model: nn.Module, opt: FastBiP) -> None:
    model(torch.ones(2, 4, 4, 4)).square().mean().backward()
    opt.step()
    opt.zero_grad()


def checkpoints(draw: Any) -> str:
    kind = draw(st.integers(0, 4))
    model, opt = _optimizer(kind)
    for _ in range(draw(st.integers(0, 2))):
        _step(model, opt)
    state = damaged(draw, opt.state_dict(), anything)
    before = [p.detach().clone() for p in model.parameters()]
    outcome = "loaded"
    try:
        opt.load_state_dict(state)
    except (TypeError, ValueError) as error:
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), "an error after a change"
        outcome = type(error).__name__
    for _ in range(2):
        try:
            _step(model, opt)
        except OverflowError:
            if kind != 4:
                raise
            return "an option that torch's optimizer cannot use"
        pruned = [p for p in model.parameters() if "mask" in opt.state[p]]
        assert pruned
        for p in pruned:
            theta, mask = opt.weight_of(p), opt.mask_of(p)
            assert torch.equal(p.detach().nan_to_num(), theta.where(mask, 0).nan_to_num())
    return outcome


def _weights() -> dict[str, bytes]:
    from safetensors.torch import save

    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"state_dict": state}, FOLDER / "whole.pt")
    return {".pt": (FOLDER / "whole.pt").read_bytes(), ".safetensors": save(state)}


def weights(draw: Any, whole: dict[str, bytes] = {}) -> str:  # noqa: B006
    whole.update({} if whole else _weights())
    suffix = draw(st.sampled_from(sorted(whole)))
    path = FOLDER / f"weights{suffix}"
    path.write_bytes(damaged_bytes(draw, whole[suffix]))
    try:
        found = read_state_dict(path)
    except UserError:
        return f"UserError, {suffix}"
    assert all(isinstance(x, Tensor) for x in found.values())
    return f"tensors, {suffix}"


def configs(draw: Any, whole: list[str] = []) -> str:  # noqa: B006
    import yaml

    if not whole:  # a data set that is always there, so that its fingerprint is
        shared = "data: digits\nmodel: resnet20\nwidth: 8\nsparsity: [0.9, 0.95]\nseed: [0, 1]\nepochs: 2\npretrain_epochs: 1\n"
        methods = "methods:\n  BiP: {method: bip}\n  IMP: {method: imp, rewind: 1}\n  SNIP: {lr: 0.1, method: snip}\n"
        whole.append(shared + "more_seeds: {0.9: [2]}\n" + methods)
    path = FOLDER / "grid.yaml"
    try:
        if draw(st.booleans()):
            path.write_bytes(damaged_bytes(draw, whole[0].encode()))
            found = grid.read(path)
        else:
            found = grid.build(
                path,
                damaged(
                    draw,
                    yaml.safe_load(whole[0]),
                    st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(keys, scalars, max_size=3)),
                ),
            )
    except UserError:
        return "UserError"
    return f"a grid of {min(len(found.cells), 20)} runs or more"


TARGETS: dict[str, Callable[[Any], str]] = {target.__name__: target for target in (topk, masks, checkpoints, weights, configs)}


# --- the loop ------------------------------------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: float, seed: int, first: int, count: int) -> int:
    """Runs one target here. Returns the number of kinds of failures, told as they are found."""
    target, failures = TARGETS[name], Counter()
    progress = FOLDER / "input"
    print(f"{name}: inputs in {progress}", file=sys.stderr)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: Any) -> None:
        OUTCOMES[target(data.draw)] += 1

    _step(*_optimizer(0))  # what torch imports at the first step is no hang of an input
    started, number = time.monotonic(), first
    while number < first + count and time.monotonic() - started < seconds:
        progress.write_text(str(number))
        content = random.Random(f"{name} {seed} {number}").randbytes(2000)
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            run.hypothesis.fuzz_one_input(content)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hypothesis" not in frame.filename]
            place = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            failures[place] += 1
            if failures[place] == 1:
                print(f"{name}: --seed {seed} --first {number} --count 1: {place}")
                print("".join(traceback.format_exception(error, limit=-6))[:3000])
        faulthandler.cancel_dump_traceback_later()
        number += 1
    took = time.monotonic() - started
    print(f"{name}: {number - first} inputs in {took:.0f} s, seed {seed}; {dict(OUTCOMES)}; failures: {dict(failures) or 'none'}")
    sys.stdout.flush()
    return len(failures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}; all when none is named")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    parser.add_argument("--count", type=int, default=10**9, metavar="N", help="no more inputs than that")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"expected targets of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    names = options.targets or list(TARGETS)
    if options.here:
        found = sum(fuzz(name, options.seconds, options.seed, options.first, options.count) for name in names)
        return FOUND if found else 0
    status = 0
    for name in names:
        numbers = ("seconds", "seed", "first", "count")
        words = [word for number in numbers for word in (f"--{number}", str(getattr(options, number)))]
        code = subprocess.run([sys.executable, __file__, name, "--here", *words], check=False).returncode
        if code not in (0, FOUND):
            print(f"{name}: CRASHED or hung, status {code}; the file named above has the number of the input")
        status |= code != 0
    return status


if __name__ == "__main__":
    sys.exit(main())
