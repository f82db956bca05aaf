"""Which step is next: the cycle of lower and upper steps, phases chosen by the user, and frozen masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Phases"]


class Phases:
    """The cycle of one optimizer.

    Args:
        levels: "alternating": ``lower_steps`` lower steps, then one upper step; "joint": joint steps.
        lower_steps: at least 1.
    """

    def __init__(self, levels: str, lower_steps: int) -> None:
        self.levels, self.lower_steps = levels, lower_steps
        self.cycle = 0  # steps taken in the present cycle of lower_steps + 1
        self.frozen = False
        self._forced: list[tuple[object, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forced": []}  # a copy is outside of the `with` that its original is in

    @property
    def current(self) -> str:
        """Phase of the next step: "lower", "upper" or "joint"."""
        if self._forced:
            return self._forced[-1][1]
        if self.frozen:
            return "lower"
        if self.levels == "joint":
            return "joint"
        return "lower" if self.cycle < self.lower_steps else "upper"

    @contextmanager
    def force(self, phase: str) -> Iterator[None]:
        """Inside, every step has this phase and does not count in the cycle. May be nested."""
        own = (object(), phase)  # contexts may end in another order than they began
        self._forced.append(own)
        try:
            yield
        finally:
            self._forced.remove(own)

    def check(self) -> str:
        """The current phase; RuntimeError when it would move masks that are frozen."""
        if self.frozen and self.current != "lower":
            raise RuntimeError(f"masks are frozen since freeze_masks(), so a step must be lower, got {self.current}")
        return self.current

    def advance(self) -> None:
        """A step was taken."""
        if not self._forced and not self.frozen and self.levels == "alternating":
            self.cycle = (self.cycle + 1) % (self.lower_steps + 1)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"levels": self.levels, "lower_steps": self.lower_steps, "cycle": self.cycle, "frozen": self.frozen}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError unless ``state`` is of the same cycle."""
        expected, given = ((side["levels"], side["lower_steps"]) for side in (self.state(), state))
        if expected != given or not 0 <= state["cycle"] <= self.lower_steps:
            raise ValueError(f"state_dict must be of (levels, lower_steps) {expected}, got {given} at step {state['cycle']} of the cycle")

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved cycle stood."""
        self.cycle, self.frozen = int(state["cycle"]), bool(state["frozen"])
