"""Masks without the network: one bit for each weight in a file, put back onto a dense checkpoint, kept alive under any optimizer.

A mask file is a safetensors file. Each pruned weight has a tensor of int32 words under its name: bit i%32 of word i/32 is entry i of the
weight in index order, row-major, whatever its memory layout. The metadata hold the shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import FastBiP
from ..report import weights
from ..units import pack_mask, unpack_mask

__all__ = ["AttachedMasks", "apply_masks", "attach_masks", "load_masks", "masks_of", "save_masks"]

FORMAT = "bip_fast masks"
VERSION = 1


def masks_of(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool tensors of the Conv and Linear weights of a model, or of the matrices of a state dict: which entries are not 0.

    Weights without a zero are left out: they are not pruned.
    """
    return {name: mask for name, x in weights(source) if not bool((mask := x.detach() != 0).all())}


def save_masks(path: str | os.PathLike[str], source: nn.Module | Mapping[str, Tensor]) -> None:
    """Write the masks of a model, or bool tensors by name, with one bit for each weight. An older file stays whole until the new one is.

    Args:
        path: the file, usually ``*.safetensors``.
        source: a model with exact zeros (`masks_of`), or bool tensors of any shape by name.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: there is no mask to save, or a tensor is not bool.
    """
    save_file = _safetensors().save_file
    masks = masks_of(source) if isinstance(source, nn.Module) else dict(source)
    if not masks:
        raise ValueError("source must have masks, got none: a model without a zero in its Conv and Linear weights is not pruned")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"source must hold bool tensors, got {kind} for {name!r}")
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    words = {name: pack_mask(mask.cpu().flatten()) for name, mask in masks.items()}
    target = Path(path)
    beside = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        save_file(words, beside, {"format": FORMAT, "version": str(VERSION), "shapes": json.dumps(shapes)})
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Bool tensors by name from a file of `save_masks`.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a file of masks.
    """
    safe_open = _safe_open()
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no mask file {path}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("version") != str(VERSION):
                raise ValueError(f"its format is {about.get('format')!r}, version {about.get('version')!r}")
            shapes = json.loads(about["shapes"])
            masks = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                shape, words = tuple(shapes[name]), file.get_tensor(name)
                numel = torch.Size(shape).numel()
                if words.dtype != torch.int32 or words.numel() != -(-numel // 32):
                    raise ValueError(f"{name} has {words.numel()} words of {words.dtype} for {numel} weights")
                masks[name] = unpack_mask(words, numel).view(shape)
    except Exception as error:  # whatever safetensors and json raise for a damaged file
        raise ValueError(f"{path} must be a file of save_masks() of version {VERSION}: {' '.join(str(error).split())}") from error
    if set(masks) != set(shapes):
        raise ValueError(f"{path} must be a file of save_masks(): masks are missing")
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to 0 what the masks drop, in place: a dense checkpoint becomes the pruned one.

    Raises:
        ValueError: a name is no parameter of the model, or its shape is another. Nothing has changed then.
    """
    params = _fitting(model, masks)
    for name, p in params.items():
        p.masked_fill_(~masks[name].to(p.device), 0)


def _fitting(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in params:
            raise ValueError(f"masks must be of parameters of the model, got {name!r}, which is none")
        if params[name].shape != mask.shape:
            raise ValueError(f"masks must have the shapes of the model, got {tuple(mask.shape)} for {name} of {tuple(params[name].shape)}")
    return {name: params[name] for name in masks}


class AttachedMasks:
    """What `attach_masks` returns: `remove` it, or use it in ``with``."""

    def __init__(self, pairs: list[tuple[nn.Parameter, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self._pairs = [(p, mask.to(p.device)) for p, mask in pairs]
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self._after()

    def _on_device(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The masks where the parameters are now."""
        self._pairs = [(p, mask if mask.device == p.device else mask.to(p.device)) for p, mask in self._pairs]
        return self._pairs

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """Dropped weights have no gradient, so that momenta and norms are those of the weights that are there."""
        for p, mask in self._on_device():
            if p.grad is not None:
                p.grad.masked_fill_(~mask, 0)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for p, mask in self._on_device():
            p.masked_fill_(~mask, 0)

    def remove(self) -> None:
        """Let the optimizer move all weights again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> AttachedMasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def attach_masks(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None) -> AttachedMasks:
    """Keep pruned weights at 0 while another optimizer trains the others.

    Before each step the gradients of dropped weights are set to 0, after it the weights themselves, in place and without waiting for the
    device. Call it once all parameters are where they stay; moving the model to another device afterwards is fine.

    Args:
        model: its exact zeros in Conv and Linear weights are the masks.
        optimizer: any optimizer over (some of) its parameters, but not a `FastBiP` that still runs.
        masks: bool tensors by parameter name, instead of the zeros.

    Raises:
        ValueError: the optimizer is a FastBiP, has none of the masked parameters, or a mask does not fit the model.

    Example:
        >>> opt.finalize()
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> attach_masks(model, adam)
    """
    if isinstance(optimizer, FastBiP):
        raise ValueError("optimizer must be another one than FastBiP, which keeps its masks itself; call freeze_masks() for fine-tuning")
    masks = masks_of(model) if masks is None else masks
    own = {p for group in optimizer.param_groups for p in group["params"]}
    pairs = [(p, masks[name].detach().bool()) for name, p in _fitting(model, masks).items() if p in own]
    if not pairs:
        raise ValueError(f"optimizer must have parameters that are masked, got one with none of the {len(masks)} masks' parameters")
    return AttachedMasks(pairs, optimizer)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("mask files need safetensors: pip install 'bip_fast[export]'") from error
    return safetensors.torch


def _safe_open() -> Any:
    _safetensors()
    import safetensors

    return safetensors.safe_open
