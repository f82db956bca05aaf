"""A lower level of the user's own: torch optimizers that make the step of theta.

Their parameters are tensors of theta, fp32 and shaped like the model's; their gradients are ``m*g``, which the kernels write where other
rules have a momentum. After their step the kernels write ``z = m*theta``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arena import Arena
from .options import SHARED_KEYS
from .shards import is_sharded, like, local_of, point_at

__all__ = ["INNER", "InnerOptimizer"]

INNER = "optimizer"  # the key of a parameter's saved state for what the inner optimizer keeps of it

Groups = Sequence[dict[str, Any]]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _same(x: Any, y: Any) -> bool:
    """Whether an option has not changed. One tensor may change in place, where both sides see it."""
    return x is y or (isinstance(x, (bool, int, float, str, tuple)) and x == y)


def _goes_with(shape: torch.Size, of: torch.Size) -> bool:
    """Whether a tensor of ``shape`` can be what an optimizer keeps of a parameter: where it has as many dimensions, it has the same sizes,
    or 1 as a sum over a dimension has (Adafactor), or is square over one of them (a preconditioner of Shampoo)."""
    if len(shape) != len(of):
        return True
    return all(size in (1, own) for size, own in zip(shape, of, strict=True)) or (len(set(shape)) == 1 and shape[0] in of)


def _without_values(theta: Tensor) -> Tensor:
    """An empty tensor; a DTensor of the same shape, of which this rank has no entry, where ``theta`` is sharded."""
    return like(theta, local_of(theta).new_empty(0)) if is_sharded(theta) else theta.detach().new_empty(0)


class InnerOptimizer:
    """The optimizers that a user's function made, over a theta for every parameter.

    Args:
        make: takes a list of parameter groups of theta and returns a torch optimizer over all of it, or several. A group has the keys that
            the user gave it, besides those of `FastBiP`.
        param_groups: of `FastBiP`, one for each of the inner ones. Options that the optimizers have are added to them.

    Raises:
        TypeError: ``make`` returns something else.
        ValueError: a step needs a closure, the groups are not those that ``make`` was given, or the weights have moved meanwhile.
    """

    @torch.inference_mode(False)
    def __init__(self, make: Callable[[list[dict[str, Any]]], Any], param_groups: Groups) -> None:
        self._thetas: dict[Tensor, nn.Parameter] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._apart: dict[Tensor, Tensor] = {}  # theta in the flat arrays, where it has another shape than the parameter
        twins = [self._twin(group) for group in param_groups]
        versions = [theta._version for theta in self._thetas.values()]
        made = make(twins)
        self.optimizers: list[torch.optim.Optimizer] = list(made) if isinstance(made, (list, tuple)) else [made]
        for inner in self.optimizers:
            if not isinstance(inner, torch.optim.Optimizer):
                raise TypeError(f"optimizer must return a torch optimizer or a list of some, got {type(inner).__name__}")
            closure = inspect.signature(inner.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"optimizer must take steps without a closure, got {type(inner).__name__}, which evaluates the model several times in "
                    "a step: the masks would move between"
                )
        self._pulled: list[dict[str, Any]] = []
        self._match(param_groups)
        if versions != [theta._version for theta in self._thetas.values()]:  # they start as the model's are
            raise ValueError(f"optimizer must leave the weights as they are while it is made, got {self.name}, which has moved them")
        self.pull(param_groups)

    @property
    def name(self) -> str:
        return " and ".join(type(inner).__name__ for inner in self.optimizers)

    @property
    def defaults(self) -> dict[str, Any]:
        """What schedulers look for among the defaults of an optimizer."""
        return {key: value for inner in self.optimizers for key, value in inner.defaults.items() if key not in SHARED_KEYS}

    def _twin(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of theta for a group of parameters."""
        for p in group["params"]:
            if not isinstance(p, Tensor):
                raise TypeError(f"params must hold parameters, got {type(p).__name__}")
            self._thetas.setdefault(p, nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=True))
        own = {key: value for key, value in group.items() if key not in (*SHARED_KEYS, "density", "params", "param_names")}
        return own | {"params": [self._thetas[p] for p in group["params"]]}

    def _match(self, param_groups: Groups) -> None:
        """Find the inner group of every group."""
        own = [group for inner in self.optimizers for group in inner.param_groups]
        inner_groups = {tuple(map(id, group["params"])): group for group in own}
        self._groups = []
        for number, group in enumerate(param_groups):
            found = inner_groups.get(tuple(id(self._thetas[p]) for p in group["params"]))
            if found is None:
                raise ValueError(
                    f"optimizer must take every parameter group that it is given as it is, got {self.name} without group {number} of "
                    f"{len(group['params'])} parameters; a list of optimizers can have groups that differ"
                )
            taken = [key for key in found if key in SHARED_KEYS]
            if taken:
                raise ValueError(f"optimizer must have no option that FastBiP has too, got {self.name} with {', '.join(taken)}")
            self._groups.append(found)
        if len(own) != len(self._groups):
            raise ValueError(f"optimizer must have each of the {len(self._groups)} parameter groups that it is given once, got {len(own)}")

    # --- options, which schedulers move in the groups of FastBiP -----------------------------------------------------------------------

    def pull(self, param_groups: Groups) -> None:
        """Take the options of the inner groups, which a step may change, into the groups."""
        self._pulled = [_options(inner) for inner in self._groups]
        for group, pulled in zip(param_groups, self._pulled, strict=True):
            group |= pulled

    def push(self, param_groups: Groups) -> None:
        """Give the inner groups the options that have changed in the groups since the last `pull`; what has changed in the inner ones
        (as ``train()`` of a schedule-free optimizer changes them) stays."""
        for group, inner, pulled in zip(param_groups, self._groups, self._pulled, strict=True):
            inner |= {key: group[key] for key in inner if key in group and key in pulled and not _same(group[key], pulled[key])}

    def settle(self, param_groups: Groups) -> None:
        """Bring theta home and the options into the groups, after an optimizer has changed them outside of a step."""
        for p, own in self._apart.items():
            own.copy_(self._thetas[p].data.reshape(own.shape))
        self.pull(param_groups)

    # --- steps -------------------------------------------------------------------------------------------------------------------------

    def bind(self, arena: Arena) -> None:
        """Let the thetas be those of ``arena``, and remember where it has their gradients."""
        self._gradients, self._apart = {}, {}
        for p, theta in self._thetas.items():
            param = arena.place_of[p]
            own = arena.theta_of(param)
            self._gradients[p] = like(p, arena.moments_of(param)[0])
            if own.shape == param.shape and own.stride() == param.stride:
                point_at(theta, own)
            else:  # stacked matrices with room between them
                theta.data, self._apart[p] = arena.weight_of(param), own

    @torch.inference_mode(False)
    def replace(self, new: Mapping[Tensor, Tensor]) -> None:
        """Let parameters take the place of others, or of themselves on another device: each has a new theta, with the state of the old
        one's."""
        now: dict[Tensor, Tensor] = {theta: new.get(p, p) for p, theta in self._thetas.items()}
        moved = [theta for p, theta in self._thetas.items() if p in new or theta.device != p.device]
        changed: dict[Tensor, nn.Parameter] = {theta: nn.Parameter(now[theta].detach().to(torch.float32, copy=True)) for theta in moved}
        self._thetas = {new.get(p, p): changed.get(theta, theta) for p, theta in self._thetas.items()}
        for inner in self.optimizers:
            for group in inner.param_groups:
                group["params"] = [changed.get(theta, theta) for theta in group["params"]]
            for theta in [theta for theta in inner.state if theta in changed]:
                inner.state[changed[theta]] = inner.state.pop(theta)

    def step(self, param_groups: Groups) -> None:
        """One step of theta by the gradients ``m*g`` of the parameters that have one."""
        self.push(param_groups)
        for p, own in self._apart.items():  # a load may have changed it
            self._thetas[p].data.copy_(own.reshape(p.shape))
        for p, theta in self._thetas.items():
            g = self._gradients[p]
            theta.grad = None if p.grad is None else g.reshape(p.shape).contiguous() if p in self._apart else g
        try:
            for inner in self.optimizers:
                inner.step()
        finally:  # an error of theirs may come after some weights have moved
            for p, own in self._apart.items():
                own.copy_(self._thetas[p].data.reshape(own.shape))
            for theta in self._thetas.values():
                theta.grad = None
            self.pull(param_groups)

    @torch.inference_mode(False)
    def add(self, group: dict[str, Any]) -> None:
        """Take one more group; `keep` undoes it, also when this fails."""
        if len(self.optimizers) != 1:
            raise ValueError(f"a parameter group can be added to one inner optimizer, got {self.name}")
        inner = self.optimizers[0]
        inner.add_param_group(self._twin(group))
        self._groups.append(inner.param_groups[-1])
        self._pulled.append(_options(self._groups[-1]))
        group |= self._pulled[-1]

    def keep(self, count: int) -> None:
        """Forget all groups but the first ``count``: those that `add` has brought, whole or in part."""
        self._groups, self._pulled = self._groups[:count], self._pulled[:count]
        kept = {id(theta) for group in self._groups for theta in group["params"]}
        for theta in (theta for theta in self._thetas.values() if id(theta) not in kept):
            self.optimizers[0].state.pop(theta, None)
        self._thetas = {p: theta for p, theta in self._thetas.items() if id(theta) in kept}
        if len(self.optimizers) == 1:  # else nothing was added
            del self.optimizers[0].param_groups[count:]

    # --- saving and loading ------------------------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[Tensor, dict[str, Any]]:
        """What the optimizers keep of every parameter that has taken a step."""
        of_theta: dict[Tensor, Tensor] = {theta: p for p, theta in self._thetas.items()}
        return {of_theta[theta]: dict(own) for inner in self.optimizers for theta, own in inner.state.items() if theta in of_theta}

    def check_state(self, states: Mapping[Tensor, Any]) -> None:
        """ValueError unless every state is a dict of named values, whose tensors have shapes that go with the parameter's."""
        for p, own in states.items():
            what = f"{self.name} for a parameter of shape {tuple(p.shape)}"
            if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
                raise ValueError(f"state_dict must hold a dict of {what}, got {own!r:.80}")
            for key, x in own.items():
                if isinstance(x, Tensor) and not _goes_with(x.shape, p.shape):
                    raise ValueError(f"state_dict must hold a state of {what}, got {key} of shape {tuple(x.shape)}")
                if is_sharded(x) and x.shape == p.shape and local_of(x).shape != local_of(p).shape:
                    found = f"{tuple(local_of(x).shape)} in place of {tuple(local_of(p).shape)}"
                    raise ValueError(f"state_dict must hold a state of {what}, got {key} whose part on this rank is {found}")

    def load(self, states: Mapping[Tensor, dict[str, Any]], param_groups: Groups) -> None:
        """Continue with saved states and with the options of the groups."""
        for group, own in zip(param_groups, self._groups, strict=True):
            own |= {key: group[key] for key in _options(own) if key in group}
        of_theta = {theta: p for p, theta in self._thetas.items()}
        for inner in self.optimizers:
            thetas = [theta for group in inner.param_groups for theta in group["params"]]
            saved = {number: copy.deepcopy(states[of_theta[theta]]) for number, theta in enumerate(thetas) if of_theta[theta] in states}
            inner.load_state_dict({"state": saved, "param_groups": inner.state_dict()["param_groups"]})
        self._match(param_groups)  # torch has made new groups
        self.pull(param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, until the next `bind`: thetas without values, which are in the flat arrays that a copy makes anew."""
        empty: dict[Tensor, nn.Parameter] = {theta: nn.Parameter(_without_values(theta)) for theta in self._thetas.values()}
        twins = []
        for inner in self.optimizers:
            twin = copy.copy(inner)
            groups = [{**group, "params": [empty[theta] for theta in group["params"]]} for group in inner.param_groups]
            twin.__setstate__({"state": {empty[theta]: own for theta, own in inner.state.items()}, "param_groups": groups})
            twins.append((inner, twin))
        new_groups = {id(group): own for inner, twin in twins for group, own in zip(inner.param_groups, twin.param_groups, strict=True)}
        return {
            "_thetas": {p: empty[theta] for p, theta in self._thetas.items()},
            "_gradients": {},
            "_apart": {},
            "optimizers": [twin for _, twin in twins],
            "_groups": [new_groups[id(group)] for group in self._groups],
            "_pulled": self._pulled,
        }
