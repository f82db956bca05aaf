"""Other inputs than the example, on which a network and its smaller copy are compared: as different from it as the model takes them.

Every tensor is drawn anew; where the model raises, or computes nan, it is drawn in more cautious ways, and stays as it is if none is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["Probes", "fresh", "probes_of"]

SEEDS = 3


def fresh(arguments: Any) -> Any:
    """Copies of the tensors: a model may write into what it is given."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, arguments)


@dataclass(frozen=True)
class Probes:
    """Arguments of a model, the example first.

    Args:
        fixed: which of the tensors in the arguments, counted from 1, are the same in all, as the model takes no other numbers there.
    """

    inputs: list[tuple[Any, ...]]
    fixed: list[int]

    @property
    def doubt(self) -> str:
        """What they do not show, "" if nothing."""
        if len(self.inputs) == 1:
            return "checked on example_input alone, as the model takes no other numbers"
        if self.fixed:
            which = " and ".join(map(str, self.fixed))
            return f"checked with tensor {which} of example_input as it is, as the model takes no other numbers there"
        return ""


@torch.no_grad()
def probes_of(model: nn.Module, example: tuple[Any, ...], *, seeds: int = SEEDS, sizes: bool = True) -> Probes:
    """The example, other inputs of its shapes, and one of another size where there are images or sequences and the model takes that.

    Args:
        model: in eval mode.
        seeds: how many others.
        sizes: whether one of another size, too.
    """
    leaves, spec = tree_flatten(example)
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.numel() and x.layout == torch.strided and not x.is_nested]
    takes = _taker(model, example)
    if any(x.device.type != "cpu" for x in tree_leaves(example) if isinstance(x, Tensor)) and any(_one_integer(leaves[i]) for i in where):
        # Others may be indices out of range, and what a GPU does then cannot be caught.
        trial = _taker(copy.deepcopy(model).cpu(), _on_cpu(example))
        if trial(_on_cpu(example)):
            takes = lambda tried: trial(_on_cpu(tried))  # noqa: E731
        else:
            where = [i for i in where if not _one_integer(leaves[i])]

    def accepted(tried: Sequence[Any]) -> bool:
        return takes(tree_unflatten(list(tried), spec))

    found = []
    for seed in range(seeds):
        draws = DRAWS if seed else (_of_its_own, *DRAWS)
        drawn = [_drawn(x, draws[0], seed) if i in where else x for i, x in enumerate(leaves)]
        if not accepted(drawn):
            drawn = list(leaves)
            for i in where:
                tries = ([*drawn[:i], _drawn(leaves[i], draw, seed), *drawn[i + 1 :]] for draw in draws)
                drawn = next((tried for tried in tries if not _equal(tried[i], leaves[i]) and accepted(tried)), drawn)
        if any(not _equal(drawn[i], leaves[i]) for i in where):
            found.append(drawn)
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    fixed = [n for n, i in enumerate(tensors, 1) if leaves[i].numel() and all(_equal(own[i], leaves[i]) for own in found)]
    resized = [tried for tried in _resized(leaves) if accepted(tried)][:1] if found and sizes else []
    return Probes([example, *(tuple(tree_unflatten(own, spec)) for own in found + resized)], fixed)


def _taker(model: nn.Module, example: tuple[Any, ...]) -> Callable[[Any], bool]:
    """A function that says whether the model takes arguments: it does not raise, and gives nan only if it does so for the example."""

    def computes(arguments: Any, nan: bool) -> bool:
        try:
            outputs = [y for y in tree_leaves(model(*fresh(arguments))) if isinstance(y, Tensor)]
            return nan or not any(bool(y.isnan().any()) for y in outputs)
        except Exception:  # the model's way to say that it takes nothing of the kind; or no memory for another size
            return False

    nan = not computes(example, False)
    return lambda arguments: computes(arguments, nan)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def _on_cpu(arguments: Any) -> Any:
    return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, arguments)


def _one_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool) and len(x.unique()) == 1


# --- numbers -------------------------------------------------------------------------------------------------------------------------


def _drawn(x: Tensor, draw: Callable[[Tensor, Generator], Tensor], seed: int) -> Tensor:
    """A tensor drawn anew: on the CPU, so that it is the same everywhere. As it is where torch has no such arithmetic for its dtype."""
    try:
        return torch.empty_like(x).copy_(draw(x.detach().cpu(), Generator().manual_seed(seed)))
    except (NotImplementedError, RuntimeError):
        return x


def _anew(x: Tensor, generator: Generator) -> Tensor:
    """Normal numbers; integers in the range of the example, widened to 0 or 1 if it is one value; a quarter of the bools flipped."""
    if x.dtype == torch.bool:
        return x ^ (torch.rand(x.shape, generator=generator) < 0.25)
    if x.is_floating_point() or x.is_complex():
        return torch.randn(x.shape, generator=generator, dtype=torch.complex64 if x.is_complex() else torch.float32)
    low, high = int(x.long().min()), int(x.long().max())
    if low == high:
        low, high = min(low, 0), max(high, 1)
    return torch.randint(low, min(high, 2**63 - 2) + 1, x.shape, generator=generator)


def _of_its_own(x: Tensor, generator: Generator) -> Tensor:
    """Numbers of the example, in other places and in other amounts."""
    return x.flatten()[torch.randint(x.numel(), x.shape, generator=generator)]


def _zeros_and_ones(x: Tensor, generator: Generator) -> Tensor:
    return torch.randint(2, x.shape, generator=generator)


def _in_its_order(x: Tensor, generator: Generator) -> Tensor:
    """Other numbers from the same range that grow where those of the example grow."""
    if x.is_complex() or x.dtype == torch.bool:
        return x
    low, high = float(x.min()), float(x.max())
    drawn = low + (high - low) * torch.rand(x.numel(), generator=generator)
    ranks = x.flatten().argsort(stable=True).argsort()
    return (drawn if x.is_floating_point() else drawn.round()).sort().values[ranks].view(x.shape)


def _but_one(x: Tensor, generator: Generator) -> Tensor:
    """The example with one number drawn anew."""
    place = int(torch.randint(x.numel(), (), generator=generator))
    new = x.clone(memory_format=torch.contiguous_format)
    new.view(-1)[place] = ~new.view(-1)[place] if x.dtype == torch.bool else _anew(x, generator).reshape(-1)[place].to(x.dtype)
    return new


DRAWS = (_anew, _of_its_own, _zeros_and_ones, _in_its_order, _but_one)


# --- sizes ---------------------------------------------------------------------------------------------------------------------------


def _resized(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """Images of twice the height and width, sequences twice as long, of random numbers: one sample, and as many as there are."""
    images = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3 and x.numel()]
    batch = len(images[0]) if images else 0

    def sized(x: Any, dims: slice, samples: int) -> Any:
        if not any(x is other for other in images):
            return x[:samples] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x
        size = [samples, *x.shape[1:]]
        size[dims] = [2 * n for n in size[dims]]
        return torch.randn(size, generator=Generator().manual_seed(SEEDS)).to(x)

    for samples in dict.fromkeys((1, batch)):
        for dims in (slice(2, None), slice(1, 2)):
            if batch:
                yield [sized(x, dims, samples) for x in leaves]
