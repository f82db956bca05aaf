"""Weights in files: a state dict is written, read, and loaded into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError, one_line

__all__ = ["load_into", "read_state_dict", "write_safetensors"]


def write_safetensors(path: Path, model: nn.Module) -> None:
    """State dict of ``model``, each tensor contiguous and on the CPU. A tensor that has several names is written under each."""
    from safetensors.torch import save

    path.write_bytes(save({name: x.detach().to("cpu", copy=True).contiguous() for name, x in model.state_dict().items()}))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or from a state dict saved by torch, also inside of "state_dict" or "model".

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}: pip install 'bip_fast[cli]'") from error
    except Exception as error:  # safetensors and torch raise errors of many kinds for a damaged file
        raise UserError(f"cannot read {path} as weights: {one_line(error, 160)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) and isinstance(name, str) for name, x in state.items()):
        raise UserError(f"{path} does not hold a state dict (names and tensors)")
    return {name.removeprefix("module."): x for name, x in state.items()}  # DataParallel's prefix


def load_into(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load a state dict of exactly the model's names and shapes.

    Raises:
        UserError: a tensor is missing, left over, or of another shape.
    """
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise UserError(f"{source} does not fit the model: {name} is missing")
        if own[name].shape != state[name].shape:
            shapes = f"expected shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
            raise UserError(f"{source} does not fit the model: {name}: {shapes}")
    for name in state:
        if name not in own:
            raise UserError(f"{source} does not fit the model: the model has no {name}")
    model.load_state_dict(state)
