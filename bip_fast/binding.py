"""When `FastBiP` takes hold of its parameters: whether they are final, which ones took the place of others, and whether all ranks agree.

Trainers make the optimizer first and shard the model later, and then put other parameters in the place of those that the groups held.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .engine.agreement import number_of
from .engine.parameter import Seen
from .engine.shards import is_sharded

__all__ = [
    "Origin",
    "check_agreement",
    "check_memory",
    "check_place",
    "members_of",
    "place_of",
    "replacements",
    "same_members",
    "with_tensors",
    "world_size",
]

Groups = Sequence[Mapping[str, Any]]
Members = list[list[Tensor]]


def world_size() -> int:
    """Processes of the job; 1 where `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Origin:
    """The Module that the parameters came from, if it was one, which is asked for the parameters it has now. It is not kept alive.

    Args:
        params: what the user gave.
    """

    def __init__(self, params: Any) -> None:
        self._model = weakref.ref(params) if isinstance(params, nn.Module) else None
        self._names = _named(params) if isinstance(params, nn.Module) else {}
        self.replicated = isinstance(params, nn.parallel.DistributedDataParallel)

    def final(self, param_groups: Groups) -> bool:
        """Whether these are the parameters that will be trained. They are not on the meta device, and not where a job of several ranks
        has plain ones without DDP, as someone may be about to shard them."""
        tensors = [p for group in param_groups for p in group["params"] if isinstance(p, Tensor)]
        if any(p.is_meta for p in tensors):
            return False
        return world_size() == 1 or self.replicated or any(map(is_sharded, tensors))

    def replaced(self) -> dict[Tensor, Tensor]:
        """The parameter that the Module has now under its name, for every one that is another than it was."""
        model = self._model() if self._model is not None else None
        now = _named(model) if model is not None else {}
        return {p: now[name] for name, p in self._names.items() if name in now and now[name] is not p}

    def follow(self, new: Mapping[Tensor, Tensor]) -> None:
        """Know the new parameters from here."""
        self._names = {name: new.get(p, p) for name, p in self._names.items()}

    def process_groups(self, param_groups: Groups) -> list[Any]:
        """Of the ranks that have the same parameters, or shares of them."""
        model = self._model() if self._model is not None else None
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return [model.process_group]
        meshes = {p.device_mesh: None for group in param_groups for p in group["params"] if is_sharded(p)}
        return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, without what activation checkpointing puts between."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}


# --- parameters in the place of others -----------------------------------------------------------------------------------------------


def members_of(param_groups: Groups) -> Members:
    """The parameters of every group."""
    return [list(group["params"]) for group in param_groups]


def same_members(members: Members, param_groups: Groups) -> bool:
    """Whether the groups still hold the very same parameters."""
    if len(members) != len(param_groups):
        return False
    pairs = zip(members, param_groups, strict=True)
    return all(len(own) == len(group["params"]) and all(map(operator.is_, own, group["params"])) for own, group in pairs)


def replacements(members: Members, param_groups: Groups, seen: Seen) -> dict[Tensor, Tensor]:
    """The new parameter for every one of ``members`` that another has taken the place of.

    Raises:
        RuntimeError: there are more or fewer than before, or one has another whole shape.
    """
    before, now = [len(own) for own in members], [len(group["params"]) for group in param_groups]
    if before != now:
        name = seen.of(members[0][0]).name or f"a parameter of shape {tuple(members[0][0].shape)}"
        raise RuntimeError(f"param_groups must hold as many parameters as before, {before}, got {now} (the first was {name})")
    pairs = [pair for own, group in zip(members, param_groups, strict=True) for pair in zip(own, group["params"], strict=True)]
    new = {p: q for p, q in pairs if p is not q}
    for p, q in new.items():
        if q.shape != p.shape:
            name = seen.of(p).name or "a parameter"
            raise RuntimeError(f"{name} must be replaced by a parameter of its shape {tuple(p.shape)}, got {tuple(q.shape)}")
    return new


def with_tensors(seen: Seen, new: Mapping[Tensor, Tensor]) -> Seen:
    """What is known of the old parameters, for the new ones."""
    return replace(
        seen,
        parameters={new.get(p, p): replace(param, tensor=new.get(p, p)) for p, param in seen.parameters.items()},
        coupled=[[new.get(p, p) for p in tensors] for tensors in seen.coupled],
        biases=[(new.get(weight, weight), new.get(bias, bias)) for weight, bias in seen.biases],
    )


def check_memory(param_groups: Groups, seen: Seen) -> None:
    """RuntimeError while a parameter is on the meta device."""
    for p in (p for group in param_groups for p in group["params"]):
        if p.is_meta:
            name = seen.of(p).name or f"a parameter of shape {tuple(p.shape)}"
            raise RuntimeError(
                f"{name} is on the meta device and has no memory yet: call model.to_empty(device=...) and load its weights first. "
                "If that is done, the model has new parameters, which the optimizer does not know: give it the Module"
            )


# --- several ranks -------------------------------------------------------------------------------------------------------------------


def place_of(param_groups: Groups) -> tuple[int, int] | None:
    """Number of this rank and of all ranks, where parameters are sharded over some."""
    sharded = any(is_sharded(p) for group in param_groups for p in group["params"])
    return (dist.get_rank(), dist.get_world_size()) if sharded and dist.is_initialized() else None


def check_place(place: tuple[int, int] | None) -> None:
    """RuntimeError where parameters that were sharded in a job (`place_of`) are unpickled by another rank, or in a job of another size."""
    now = (dist.get_rank(), world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if place is not None and place != now:
        raise RuntimeError(
            "a pickle of sharded parameters must be loaded by the rank that made it, rank {} of {}, got rank {} of {}; save state_dict() "
            "with torch.distributed.checkpoint instead, which any number of ranks can load".format(*place, *now)
        )


def check_agreement(origin: Origin, param_groups: Groups, seen: Seen, rule: str, levels: tuple[Any, ...]) -> None:
    """One small collective for every group of ranks that share parameters.

    Raises:
        ValueError: (on every one of these ranks) they were given different arguments; says which.
    """
    groups = origin.process_groups(param_groups) if world_size() > 1 else []
    if not groups:
        return
    keys = ("sparsity", "pattern", "scope", "min_kept", "prune")
    said = {
        "sparsity, pattern, scope, min_kept and prune": [[group[key] for key in keys] for group in param_groups],
        "names and shapes of parameters": [[(seen.of(p).name, tuple(p.shape)) for p in group["params"]] for group in param_groups],
        "exclude, overrides and coupled": [
            [seen.of(p).dense for group in param_groups for p in group["params"]],
            [[seen.of(p).name for p in tensors] for tensors in seen.coupled],
        ],
        "optimizer, levels and lower_steps": (rule, levels),
    }
    for group in groups:
        own = torch.tensor([number_of(value) for value in said.values()], device=param_groups[0]["params"][0].device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, own, group=group)
        table = torch.stack(found).cpu()
        for number, what in enumerate(said):
            others = [rank for rank in range(len(found)) if table[rank, number] != table[0, number]]
            if others:
                raise ValueError(f"all ranks must give FastBiP the same {what}, but those of ranks {others} differ from those of rank 0")
