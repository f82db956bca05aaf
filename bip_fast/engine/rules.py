"""Rules of the lower level: what moves theta, the state that this needs, and the options of parameter groups that it reads.

The formulas are in csrc/update_rule.h and, to be read beside the papers, in `bip_fast.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ADAMW", "GIVEN", "NONE", "RULES", "SGD", "Rule", "rule_of"]

NONE = 0  # bip::Rule::none: a lower step in which theta stays, so that it is z = m*theta alone


class Rule(NamedTuple):
    """One rule.

    Args:
        name: what ``optimizer=`` calls it.
        number: in csrc (bip::Rule).
        options: keys of parameter groups that belong to it; groups do not have those of other rules.
        moments: its running means of gradients, under the names that they have in torch: fp32 arrays with an entry for each weight, the
            first for ``momentum`` of bip::Tensor and the second for ``square``.
        counts: it needs the number of steps that a parameter has taken, "step" in its state.
        gradient: the kernels leave ``m*g`` in an array of its own, for an optimizer of the user's (`inner`).
    """

    name: str
    number: int
    options: tuple[str, ...]
    moments: tuple[str, ...]
    counts: bool = False
    gradient: bool = False


SGD = Rule("sgd", 1, ("lr", "momentum", "weight_decay", "nesterov"), ("momentum",))
ADAMW = Rule("adamw", 2, ("lr", "betas", "eps", "weight_decay"), ("exp_avg", "exp_avg_sq"), counts=True)
RULES = {rule.name: rule for rule in (SGD, ADAMW)}
GIVEN = Rule("given", 3, (), (), gradient=True)


def rule_of(optimizer: Any) -> Rule:
    """The rule that ``optimizer=`` names, or `GIVEN` for a function; ValueError if it is neither."""
    if callable(optimizer):
        return GIVEN
    rule = RULES.get(optimizer) if isinstance(optimizer, str) else None
    if rule is None:
        expected = ", ".join(map(repr, RULES))
        raise ValueError(f"optimizer must be {expected} or a function from parameter groups to a torch optimizer, got {optimizer!r}")
    return rule
