"""Masks apart from weights: a file of one bit per weight, masks onto a dense checkpoint, and zeros that outlive any torch optimizer.

A mask file is a safetensors file: for each pruned weight, and each vector that is masked with filters, a uint8 tensor under its name, bit
i%8 of byte i/8 being entry i in index order (row-major, whatever its memory format), 1 where it is kept; bits past the end are 0. These are
the bytes of the int32 mask words in a state_dict of `FastBiP`. The metadata hold "format", "version" and, as JSON, shape and CRC-32 of
every mask.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..atomic import write_beside
from ..engine.layers import plain_name, uses, weights
from ..errors import one_line
from ..optimizer import FastBiP
from .channels import zero_filters

__all__ = ["AttachedMasks", "apply_masks", "attach_masks", "load_masks", "masks_of", "save_masks"]

FORMAT, VERSION = "bip_fast.masks", "1"
RESERVED = "__metadata__"
NAMELESS = re.compile(r"parameter \d+ of shape ")  # FastBiP's label of a parameter that came without a name


# --- where masks come from -----------------------------------------------------------------------------------------------------------


def masks_of(source: nn.Module | Mapping[str, Tensor] | FastBiP) -> dict[str, Tensor]:
    """Masks by the names of the weights: bool, shaped like them, on their device, True where a weight is kept.

    Args:
        source: a Module, a `FastBiP` that has not been finalized, or a mapping from names to bool tensors, which is checked and returned.

            Of a Module, a weight is kept where it is not 0. It gives a mask for each weight that `FastBiP` would prune and that has a zero;
            a tied one is listed under its first name. A bias is masked where it is 0 and its filter is too. A batch-norm is masked where
            its weight and bias are both 0, if these are exactly the zero filters of a layer.

            A `FastBiP` has masks of its own, so it also knows a kept weight that happens to be 0, and every vector that goes with filters.

    Raises:
        TypeError: ``source`` is none of these, or a mask is not a bool tensor.
        ValueError: there is no mask in it, a weight has no data, or the optimizer was given parameters without names.
        RuntimeError: the optimizer was finalized.
    """
    if isinstance(source, nn.Module):
        masks = {name: x.detach() != 0 for name, x in weights(source) if _looked_at(name, x)} | _masks_of_vectors(source)
        masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        nothing = "a model without zeros in the weights of its layers"
    elif isinstance(source, FastBiP):
        masks, nothing = _masks_of_optimizer(source), "an optimizer that prunes nothing"
    elif isinstance(source, Mapping):
        masks, nothing = dict(source), "an empty mapping"
        for name, mask in masks.items():
            if not isinstance(name, str) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"masks must map names to bool tensors, got {found} for {name!r}")
    else:
        raise TypeError(f"masks must come from a Module, a mapping or a FastBiP, got {type(source).__name__}")
    if not masks:
        raise ValueError(f"there are no masks: got {nothing}")
    return masks


def _looked_at(name: str, x: Tensor) -> bool:
    if x.layout != torch.strided or x.device.type == "meta" or x.is_quantized:
        raise ValueError(f"{name} must be a dense tensor with data, got {x.layout}, {x.dtype} on {x.device}")
    return True


def _masks_of_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Masks of the vectors that belong to zero filters. A model does not say which batch-norm follows which layer, and the last one of a
    residual block may start at 0. So a batch-norm counts only if its zeros are exactly those of a layer."""
    pruned = [use for use in uses(model) if use.dense is None and use.parameter.numel()]
    filters = [(use, zero) for use in pruned if bool((zero := zero_filters(use)).any())]
    dead = {use.bias: zero & (use.bias.detach() == 0) for use, zero in filters if use.bias is not None}
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            own = (norm.weight.detach() == 0) & (norm.bias.detach() == 0)
            if any(own.equal(zero) for _, zero in filters):
                dead |= {norm.weight: own, norm.bias: own}
    return {plain_name(model, name): ~dead[p] for name, p in model.named_parameters() if p in dead}


def _masks_of_optimizer(optimizer: FastBiP) -> dict[str, Tensor]:
    arena = optimizer._arena_of("look at masks")
    params = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    masks = {arena.place_of[p].name: optimizer.mask_of(p) for p in params if arena.place_of[p].masked}
    if nameless := next((name for name in masks if NAMELESS.match(name)), None):
        raise ValueError(f"masks need names, but FastBiP was made from parameters without them (it has {nameless!r}); pass the model")
    return masks


# --- files ---------------------------------------------------------------------------------------------------------------------------


def save_masks(path: str | os.PathLike[str], source: nn.Module | Mapping[str, Tensor] | FastBiP) -> None:
    """Write the masks of ``source`` into a file with one bit per weight. It appears, or replaces an old one, only when it is complete.

    Args:
        path: the file to write; its folder must exist.
        source: a model with zeros, a `FastBiP`, or a mapping from names to bool tensors; see `masks_of`.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: the folder of ``path`` does not exist.
        TypeError: as from `masks_of`.
        ValueError: as from `masks_of`, or a mask has the name ``__metadata__``, which the format keeps for itself.
        RuntimeError: as from `masks_of`.
    """
    from safetensors.torch import save_file

    target = Path(path)
    packed: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, mask in masks_of(source).items():
        if name == RESERVED:
            raise ValueError(f"masks must have other names than {RESERVED!r}, which a safetensors file keeps for itself")
        bits = np.packbits(mask.detach().cpu().contiguous().view(-1).numpy(), bitorder="little")
        packed[name] = torch.from_numpy(bits)
        about[name] = {"shape": list(mask.shape), "crc32": zlib.crc32(bits.tobytes())}
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {target}")
    metadata = {"format": FORMAT, "version": VERSION, "masks": json.dumps(about)}
    write_beside(target, lambda beside: save_file(packed, beside, metadata))


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file that `save_masks` wrote.

    Returns:
        bool tensors by name, contiguous, on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is not a mask file, its version is unknown, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"path must name a mask file, there is no file {source}")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()} if metadata.get("format") == FORMAT else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{source} is not a mask file, or damaged: {one_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} is not a mask file: its metadata must have the format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{source} has version {metadata.get('version')!r} of the mask format, this bip_fast reads {VERSION!r}")
    try:
        about = json.loads(metadata["masks"])
        if about.keys() != packed.keys():
            raise ValueError("its metadata are of other weights")
        return {name: _unpacked(name, x, about[name]) for name, x in packed.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged: {type(error).__name__}: {error}") from error


def _unpacked(name: str, packed: Tensor, about: Mapping[str, Any]) -> Tensor:
    """A mask from its bytes; ValueError unless they are exactly what `save_masks` wrote."""
    shape = about["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name} must have a shape of sizes, got {shape!r}")
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-numel // 8),):
        raise ValueError(f"{name} of shape {shape} must have {-(-numel // 8)} bytes, got {tuple(packed.shape)} of {packed.dtype}")
    bits = packed.numpy()
    if zlib.crc32(bits.tobytes()) != about["crc32"]:
        raise ValueError(f"the checksum of {name} is wrong")
    return torch.from_numpy(np.unpackbits(bits, count=numel, bitorder="little").astype(bool)).view(shape)


# --- masks onto models ---------------------------------------------------------------------------------------------------------------


class _Masked:
    """One masked parameter: the module that has it, and which entries are dead (bool, in the parameter's memory format)."""

    def __init__(self, name: str, module: nn.Module, key: str, mask: Tensor) -> None:
        self.name, self.module, self.key = name, module, key
        self.param: nn.Parameter = module._parameters[key]  # type: ignore[assignment]
        self.dead = torch.empty_like(self.param, dtype=torch.bool, requires_grad=False).copy_(~mask)

    def zero_(self, x: Tensor) -> None:
        """Exact zeros (not x*0, which is nan where x is not finite) at the dead entries of ``x``; one launch, no sync."""
        if x.shape != self.dead.shape:
            raise RuntimeError(f"{self.name} must keep the shape {tuple(self.dead.shape)} of its mask, got {tuple(x.shape)}")
        if x.device != self.dead.device:  # the model was moved
            self.dead = self.dead.to(x.device)
        x.masked_fill_(self.dead, 0)

    def check_in_place(self) -> None:
        if self.module._parameters.get(self.key) is not self.param:
            raise RuntimeError(f"{self.name} is not the parameter any more that attach_masks saw, so its zeros are not kept; attach again")


@torch.no_grad()
def _masked_parameters(model: nn.Module, masks: Mapping[str, Tensor]) -> list[_Masked]:
    """A `_Masked` for every named parameter; ValueError if a mask does not fit. If a tied parameter has two masks, both count."""
    found: dict[Tensor, _Masked] = {}
    owners: dict[str, tuple[nn.Module, str]] = {}
    for where, module in model.named_modules(remove_duplicate=False):
        for key in (key for key, p in module._parameters.items() if p is not None):
            name = f"{where}.{key}".lstrip(".")
            owners[name] = owners[plain_name(model, name)] = module, key
    for name, mask in masks_of(masks).items():
        module, key = owners.get(name, (None, ""))
        p = module._parameters.get(key) if module is not None else None
        if module is None or p is None:
            raise ValueError(f"masks must be of parameters of the model, got {name!r}, which it does not have")
        if p.shape != mask.shape:
            raise ValueError(f"the mask of {name} must have shape {tuple(p.shape)}, got {tuple(mask.shape)}")
        _looked_at(name, p)
        if p in found:
            found[p].dead |= ~mask.to(p.device)
        else:
            found[p] = _Masked(name, module, key, mask.to(p.device))
    return list(found.values())


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write exact zeros into the parameters of ``model`` wherever ``masks`` are False.

    Changes the parameters in place, whatever their dtype, device and memory format. Kept entries stay as they are.

    Args:
        model: the model to prune.
        masks: bool tensors by the names of parameters, such as `load_masks` returns.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: the model has no parameter of that name or shape, or the parameter has no data. Nothing has changed then.
    """
    for masked in _masked_parameters(model, masks):
        masked.zero_(masked.param)


class AttachedMasks:
    """What `attach_masks` returns. As a context manager it removes the masks at its end; ``len`` is the number of masked parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, masked: list[_Masked]) -> None:
        self._of = {one.param: one for one in masked}
        self._hooks: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        self._hooks += [p.register_post_accumulate_grad_hook(self._after_backward) for p in self._of if p.requires_grad]

    def __len__(self) -> int:
        """Number of masked parameters."""
        return len(self._of)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies of the masks by name, for `save_masks`."""
        return {one.name: ~one.dead for one in self._of.values()}

    def remove(self) -> None:
        """Let go of optimizer and model. Later steps move all weights again. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> AttachedMasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    @torch.no_grad()
    def _after_backward(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.layout == torch.strided:
            self._of[p].zero_(p.grad)  # type: ignore[index]

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if (one := self._of.get(p)) is not None:
                    one.check_in_place()
                    one.zero_(p)


def attach_masks(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None) -> AttachedMasks:
    """Keep the zeros of ``model`` exact while any torch optimizer trains it, whatever its momentum and weight decay.

    After each step the pruned weights are set to zero again, so nothing that the optimizer remembers can revive one. After each backward
    their gradients are set to zero, so that they count neither in Adam's moments nor in the norm that gradients are clipped by. Both are
    one small kernel per weight tensor and do not wait for the device. Masks take one byte per weight, on its device, and follow
    ``model.to(...)``.

    Args:
        model: the model that is trained. Its masked weights are set to zero in place at once.
        optimizer: an optimizer that has the weights in its groups. Its other parameters learn as usual, and groups may be added later. A
            copy of the optimizer has no masks.
        masks: bool tensors by name. By default a weight is kept if it is not 0 now (see `masks_of`).

    Returns:
        A handle: call its ``remove()``, or use it as a context manager.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or is a `FastBiP`, which keeps its own masks.
        ValueError: there is no mask, a mask does not fit the model, or no mask is of a parameter that the optimizer has. Nothing has
            changed then.
        RuntimeError: (from a step) a parameter has changed its shape, or another one has taken its place in the model.

    Examples:
        >>> opt = torch.optim.AdamW(model.parameters())
        >>> with attach_masks(model, opt):
        ...     train(model, opt)
    """
    if isinstance(optimizer, FastBiP):
        raise TypeError(
            "optimizer must not be a FastBiP, which keeps its own masks: to fine-tune, call its freeze_masks(), "
            "or finalize() and make another optimizer"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    masked = _masked_parameters(model, masks_of(model) if masks is None else masks)
    own = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(one.param in own for one in masked):
        names = ", ".join(one.name for one in masked[:3])
        raise ValueError(f"optimizer must have parameters with a mask, got one that has none of {names}{', ...' * (len(masked) > 3)}")
    with torch.no_grad():
        for one in masked:
            one.zero_(one.param)
    return AttachedMasks(optimizer, masked)
