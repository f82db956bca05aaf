"""Pruning layer by layer from what flows into the matrices, block after block: the way that Wanda and SparseGPT share.

    1. the network runs on the calibration batches as far as its last block; kept are the inputs of the first block, and what else each gets
    2. for every block: it runs on its inputs, and every matrix sums a statistic of what it reads (`Rule.statistic`);
       its matrices are pruned (`Rule.prune`); it runs again, and its outputs are the inputs of the next one

So a block sees what the blocks before it give after they were pruned, and its own matrices see each other as they were, as in the code of
both papers. Two forward passes; no gradients. In memory stay one hidden state for every calibration token, and the statistics of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...engine.layers import Use, uses
from ...engine.patterns import NofM, parse

__all__ = ["Rule", "Share", "blocks_of", "counts", "prune_blocks_", "share_of"]


class Rule(NamedTuple):
    """How the matrices of a block are pruned.

    Args:
        statistic: of float32 inputs (tokens, inputs) of a matrix; summed over batches.
        prune: called with a float32 matrix (outputs, inputs) and that sum; gives the matrix after pruning and its mask, bool. May change
            what it gets.
    """

    statistic: Callable[[Tensor], Tensor]
    prune: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Share(NamedTuple):
    """How much of a matrix goes: a fraction of zeros, or N of every M inputs stay."""

    sparsity: float
    n_of_m: NofM | None = None


def share_of(sparsity: float | None, pattern: str) -> Share:
    """What the two options ask for.

    Raises:
        ValueError: the pattern is neither "unstructured" nor N:M, or the sparsity is out of range, missing, or not that of the pattern.
    """
    kind = parse(pattern)
    if kind.kind not in ("unstructured", "N:M"):
        raise ValueError(f'pattern must be "unstructured" or N:M, got {pattern!r}')
    if kind.sparsity is not None:
        if sparsity not in (None, kind.sparsity):
            raise ValueError(f"sparsity must be {kind.sparsity:g} or None with pattern={pattern!r}, got {sparsity!r}")
        return Share(kind.sparsity, NofM(*kind.sizes))
    if sparsity is None or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")
    return Share(sparsity)


def counts(sizes: Sequence[int], sparsity: float) -> list[int]:
    """How many entries go of every group of so many. Each loses its share as far as whole numbers allow, and all of them together
    ``round(sparsity * n)``, as `FastBiP` has it."""
    found, before, total = [], 0, 0
    for size in sizes:
        total += size
        found.append(round(sparsity * total) - before)
        before += found[-1]
    return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The chain of modules that holds most of the matrices: the layers of a transformer, or the children of a Sequential. ``[model]`` where
    there is no chain."""
    chains = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    inside = {m: sum(1 for _ in _matrices(m)) for m in chains}
    best = max(chains, key=lambda m: inside[m], default=None)
    return list(best) if best is not None and inside[best] else [model]


@torch.no_grad()
def prune_blocks_(
    model: nn.Module, batches: Iterable[Any], rule: Rule, only: Collection[str] | None = None, *, multiple: int = 1
) -> dict[str, Tensor]:
    """Prune the matrices in the blocks of ``model`` in place. What stands outside of the blocks, such as an output layer, stays dense.

    Args:
        model: with layers that multiply their input with a ``weight`` of two dimensions, as far as `engine.layers` lets them be pruned
            (Linear, Conv1D of `transformers`); works in eval mode, and is left in the mode that it had.
        batches: what it is called with: a tensor, a tuple of arguments, or a mapping of named ones.
        only: names of the weights that are pruned, None: all in the blocks.
        multiple: the number of inputs of a matrix must be a multiple of it; others stay dense.

    Returns:
        Masks by the names of the weights, bool, shaped like them, True where a weight stays.

    Raises:
        ValueError: there is no batch or nothing to prune, the blocks are no chain, or no batch reaches one of the matrices.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    blocks = blocks_of(model)
    masks: dict[str, Tensor] = {}
    with _in_eval_mode(model):
        flow = [_recorded(model, blocks, batch) for batch in batches]
        if not flow:
            raise ValueError("batches must have at least one, got none")
        for number, block in enumerate(blocks):
            own = {names[use.parameter]: use for use in _matrices(block) if use.parameter in names}
            own = {name: use for name, use in own.items() if (only is None or name in only) and name not in masks}
            own = {name: use for name, use in own.items() if _matrix(use).shape[1] % multiple == 0}
            sums = _sums(block, number, flow, rule, own)
            for name, use in own.items():
                if name not in sums:
                    raise ValueError(f"batches must reach every matrix, got none that reaches {name}: give more, or leave it out of `only`")
                matrix = _matrix(use)
                pruned, mask = rule.prune(matrix.float().clone(), sums.pop(name))
                matrix.copy_(pruned)
                masks[name] = mask.T.contiguous() if use.layer.transposed else mask
            if number + 1 < len(blocks):
                for sample in flow:
                    sample.hidden = sample.through(block, number)
    if not masks:
        raise ValueError("model must have matrices to prune in its blocks, got none")
    return masks


# --- matrices ------------------------------------------------------------------------------------------------------------------------


def _matrices(module: nn.Module) -> Iterator[Use]:
    """Those whose input is that of their module: not what recurrent layers, attention and experts keep inside."""
    return (
        use
        for use in uses(module)
        if use.dense is None and use.parameter is getattr(use.module, "weight", None) and use.parameter.dim() == 2
    )


def _matrix(use: Use) -> Tensor:
    """The weight as (outputs, inputs), a view."""
    return use.parameter.T if use.layer.transposed else use.parameter


# --- what flows through the blocks ---------------------------------------------------------------------------------------------------


class _LastBlock(Exception):
    """The network has come to it."""


class _Sample:
    """One batch on its way: the hidden state before a block, and what every block gets beside it."""

    def __init__(self) -> None:
        self.hidden: Any = None
        self.beside: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def through(self, block: nn.Module, number: int) -> Any:
        args, named = self.beside[number]
        return _first(block(self.hidden, *args, **named))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _recorded(model: nn.Module, blocks: Sequence[nn.Module], batch: Any) -> _Sample:
    sample = _Sample()
    last: list[Any] = []

    def before(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        number = len(sample.beside)
        if number >= len(blocks) or block is not blocks[number] or not args or (number and args[0] is not last[0]):
            raise ValueError(f"model must hand the output of every block to the next one, got another order at {type(block).__name__}")
        if not number:
            sample.hidden = args[0]
        sample.beside.append((args[1:], named))
        if number + 1 == len(blocks):
            raise _LastBlock

    def after(block: nn.Module, args: Any, output: Any) -> None:
        last[:] = [_first(output)]

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except _LastBlock:
        return sample
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(f"model must run all of its {len(blocks)} blocks, got {len(sample.beside)}")


def _sums(block: nn.Module, number: int, flow: Sequence[_Sample], rule: Rule, own: Mapping[str, Use]) -> dict[str, Tensor]:
    """The statistic of every matrix of ``own`` over all batches, by name."""
    sums: dict[str, Tensor] = {}

    def adds(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            statistic = rule.statistic(args[0].reshape(-1, args[0].shape[-1]).float())
            sums[name] = sums[name].add_(statistic) if name in sums else statistic

        return add

    hooks = [use.module.register_forward_pre_hook(adds(name)) for name, use in own.items()]
    try:
        for sample in flow if own else ():
            sample.through(block, number)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout, and nothing is remembered from call to call (the cache of keys and values)."""
    training, config = {m: m.training for m in model.modules()}, getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if cache is not None:
            config.use_cache = cache  # type: ignore[union-attr]
