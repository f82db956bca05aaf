"""From masks to networks that are smaller and faster, and to the formats of other tools. Imported by none of the rooms of the engine.

The functions below are what users call; the room of each is imported when it is first looked up. What needs an optional package says so
when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coupling import coupled_filters
    from .masks import apply_masks, attach_masks, load_masks, save_masks
    from .measuring import measure
    from .semi_structured import to_semi_structured
    from .shrinking import shrink

__all__ = [
    "apply_masks",
    "attach_masks",
    "coupled_filters",
    "load_masks",
    "measure",
    "save_masks",
    "shrink",
    "to_semi_structured",
]

_ROOMS = {
    "apply_masks": "masks",
    "attach_masks": "masks",
    "coupled_filters": "coupling",
    "load_masks": "masks",
    "measure": "measuring",
    "save_masks": "masks",
    "shrink": "shrinking",
    "to_semi_structured": "semi_structured",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
