"""Sparsity that grows while the masks are learned."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from .engine.options import check_count

__all__ = ["CURVES", "SparsitySchedule"]

# The share of the way from the first sparsity to the last that is still to go, after a share t of the steps.
CURVES = {"cubic": lambda t: (1 - t) ** 3, "linear": lambda t: 1 - t}


class SparsitySchedule:
    """Raise the sparsity of every pruned group of a `FastBiP` step by step, from ``start`` to the sparsity that the group has now.

    The cubic curve is that of gradual magnitude pruning (Zhu and Gupta 2017): ``s_t = s_end + (s_start - s_end) * (1 - t)^3``. It prunes
    most while there is much to choose from. A new sparsity takes effect at the next upper or joint step. The kernels read the number of
    kept weights from memory, so changing it needs no new plan and no new capture of a CUDA graph, with one exception: groups of scope
    "global" compete with each other while their sparsities are equal. Groups with different ends (as with ``overrides``) compete at their
    common ``start``, and when they leave it, one new plan and capture is made.

    Args:
        optimizer: a `FastBiP`. The ``sparsity`` that each of its groups has now is where that group ends.
        kind: "cubic" or "linear".
        start: sparsity at the beginning, in [0, 1).
        steps: the number of calls of `step` from ``start`` to the end, at least 1.
        begin: the number of calls of `step` before that, during which the sparsity is ``start``.

    Raises:
        TypeError: ``optimizer`` is not a FastBiP.
        ValueError: an argument is out of range, or the optimizer was made with ``steps`` and so has a schedule already.

    Examples:
        >>> schedule = SparsitySchedule(opt, "cubic", steps=1000)
        >>> for x, y in loader:
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     opt.zero_grad()
        ...     schedule.step()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kind: str = "cubic", *, start: float = 0.0, steps: int, begin: int = 0) -> None:
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list) or not all("sparsity" in group for group in groups):
            raise TypeError(f"optimizer must be a FastBiP, got {type(optimizer).__name__}")
        if getattr(optimizer, "_ramp", None) is not None:
            raise ValueError("optimizer must be made without steps, with which it makes its sparsity grow itself")
        self._check(kind, start, steps, begin)
        self.optimizer, self.kind, self.start, self.steps, self.begin = optimizer, kind, float(start), int(steps), int(begin)
        self._ends = [group["sparsity"] for group in optimizer.param_groups]
        self._count = 0
        self._set()

    @staticmethod
    def _check(kind: Any, start: Any, steps: Any, begin: Any) -> None:
        """ValueError for an argument out of range."""
        if kind not in tuple(CURVES):  # a list has no hash
            raise ValueError(f"kind must be {' or '.join(map(repr, CURVES))}, got {kind!r}")
        if not isinstance(start, Real) or not 0 <= float(start) < 1:
            raise ValueError(f"start must be in [0, 1), got {start!r}")
        check_count("steps", steps, 1)
        check_count("begin", begin, 0)

    def step(self) -> None:
        """Go one step further. After the last step the sparsity stays as it is, and you may set it yourself."""
        self._count += 1
        if self._count <= self.begin + self.steps:
            self._set()

    @property
    def left(self) -> int:
        """The number of calls of `step` until the sparsity has reached its end; 0 if nothing grows."""
        pairs = zip(self.optimizer.param_groups, self._ends, strict=False)
        grows = any(end is not None and group["prune"] and end != self.start for group, end in pairs)
        return max(self.begin + self.steps - self._count, 0) if grows else 0

    def _set(self) -> None:
        share = min(max(self._count - self.begin, 0) / self.steps, 1.0)
        to_go = CURVES[self.kind](share)
        for group, end in zip(self.optimizer.param_groups, self._ends, strict=False):  # groups added later keep what they have
            if end is not None and group["prune"]:
                # at the start exactly that: groups compete where their sparsities are equal to the last bit
                group["sparsity"] = self.start if to_go == 1 else end + (self.start - end) * to_go

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, for a checkpoint."""
        return {"kind": self.kind, "start": self.start, "steps": self.steps, "begin": self.begin, "ends": self._ends, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken, and set the sparsity of the groups. ValueError if it does not fit these groups."""
        self.check_state(state_dict)
        self.kind, self.start, self.steps, self.begin = (state_dict[key] for key in ("kind", "start", "steps", "begin"))
        self._ends, self._count = list(state_dict["ends"]), state_dict["count"]
        self._set()

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """ValueError if ``state_dict`` does not fit the groups, or is damaged."""
        if state_dict.keys() != self.state_dict().keys() or len(state_dict["ends"]) > len(self.optimizer.param_groups):
            raise ValueError(f"state_dict must come from SparsitySchedule.state_dict() of as many groups, got the keys {list(state_dict)}")
        self._check(*(state_dict[key] for key in ("kind", "start", "steps", "begin")))
        check_count("count", state_dict["count"], 0)
        for end in state_dict["ends"]:
            if end is not None and not (isinstance(end, Real) and 0 <= float(end) < 1):
                raise ValueError(f"state_dict must have ends in [0, 1) or None, got {end!r}")
