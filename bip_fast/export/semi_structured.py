"""2:4 weights of Linear layers as torch's semi-structured tensors, which GPUs with sparse tensor cores multiply at half the arithmetic.

A weight (out_features, in_features) is 2:4 when at most two of every four consecutive entries of a row are not 0. What torch can multiply
is narrower, so every layer gets a line: converted, or all the reasons why not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..engine.layers import conv_and_linear, uses
from ..engine.native import is_ordinary
from ..errors import one_line
from ..tables import aligned

__all__ = ["Conversion", "Converted", "refusals", "to_semi_structured", "violations"]

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.int8,
)  # of those that torch can pack: float32 only with CUTLASS, float8 without a plain matmul
OLDEST = (8, 0)  # compute capability of the first sparse tensor cores
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # in eval mode their fused kernels read weights as dense memory
ONLY_LINEAR = "torch has semi-structured weights for Linear layers only"
NO_CONVOLUTION = "torch has no semi-structured convolution"


class Conversion(NamedTuple):
    """What became of one layer, with its ``name`` and the ``shape`` of its weight: converted, if there is no ``reason``."""

    name: str
    shape: tuple[int, ...]
    reason: str = ""

    @property
    def converted(self) -> bool:
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "converted": self.converted, "reason": self.reason or None}


@dataclass(frozen=True)
class Converted:
    """The result of `to_semi_structured`. ``print`` shows a table of the layers.

    Attributes:
        model: the new model.
        layers: a row for every layer whose weights can be pruned.
    """

    model: nn.Module
    layers: tuple[Conversion, ...]

    @property
    def count(self) -> int:
        """Number of converted layers."""
        return sum(row.converted for row in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {"converted": self.count, "layers": [row.as_dict() for row in self.layers]}

    def __str__(self) -> str:
        rows = [(row.name, "x".join(map(str, row.shape)), row.reason or "converted") for row in self.layers]
        return "\n".join([*aligned([("layer", "shape", "2:4"), *rows], left=3), f"{self.count} of {len(self.layers)} layers converted"])


def violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """How many groups of ``m`` consecutive entries of a row keep more than ``n``; 0: the weight is n:m. Waits for the device.

    Args:
        weight: (..., in_features) of any dtype; nan counts as kept.

    Raises:
        ValueError: the last dimension is not a multiple of ``m``, or not 0 < n <= m.
    """
    if not 0 < n <= m:
        raise ValueError(f"n and m must have 0 < n <= m, got {n}:{m}")
    if not weight.dim() or weight.shape[-1] % m:
        raise ValueError(f"weight must have a last dimension that is a multiple of {m}, got shape {tuple(weight.shape)}")
    kept = (weight.detach() != 0).reshape(weight.numel() // m, m).sum(1)
    return int((kept > n).sum())


def refusals(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    capability: tuple[int, int] | None = None,
    multiples: dict[torch.dtype, tuple[int, int]] | None = None,
) -> list[str]:
    """Everything about a Linear weight, apart from its zeros, that keeps torch from multiplying it as 2:4; empty if nothing does.

    Args:
        shape: (out_features, in_features).
        device: its type, such as "cuda".
        capability: compute capability of the CUDA device.
        multiples: what the two sizes must be multiples of, by dtype; default: of the backend that this torch would use.
    """
    reasons = []
    if device != "cuda":
        reasons.append(f"is on the {device.upper()}, needs an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer")
    elif capability is not None and capability < OLDEST:
        reasons.append(f"compute capability {capability[0]}.{capability[1]}: needs {OLDEST[0]}.{OLDEST[1]} or newer")
    if dtype not in DTYPES:
        reasons.append(f"{str(dtype).removeprefix('torch.')}: needs float16, bfloat16 or int8")
    sizes = _multiples(_backend()) if multiples is None else multiples
    of = sizes[dtype if dtype in DTYPES else torch.float16]  # what it would have to be once the dtype is right
    for name, size, multiple in zip(("out_features", "in_features"), shape, of, strict=True):
        if not size or size % multiple:
            reasons.append(f"{name} {size} is not a multiple of {multiple}")
    return reasons


def _backend() -> Any:
    """The tensor class that packs: cuSPARSELt's where this torch has it, else CUTLASS's."""
    known = getattr(torch.backends, "cusparselt", None)
    if torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS or known is None or not known.is_available():
        return torch.sparse.SparseSemiStructuredTensorCUTLASS
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT


def _multiples(backend: Any) -> dict[torch.dtype, tuple[int, int]]:
    return {dtype: tuple(backend._DTYPE_SHAPE_CONSTRAINTS[dtype][:2]) for dtype in DTYPES}


def to_semi_structured(model: nn.Module) -> Converted:
    """Make a copy of ``model`` in which the 2:4 weights of Linear layers are semi-structured, where device, dtype and shape allow it.

    The copy computes the same up to rounding, which is checked on every layer. It is for inference: the new weights take no gradients, and
    its `state_dict` holds packed tensors, which safetensors cannot save. Layers that share a weight share the new one too.

    Args:
        model: the model in the dtype and on the device that it will run with (``model.half().cuda()``); not changed.

    Returns:
        The copy, and a row for every layer whose weights can be pruned: converted, or all the reasons why not.
    """
    new = copy.deepcopy(model)
    fused = {child for module in new.modules() if isinstance(module, FUSED) for child in module.children()}
    done: dict[Tensor, tuple[nn.Parameter | None, str]] = {}
    rows = []
    for name, layer in conv_and_linear(new):
        weight = layer._parameters.get("weight")
        if weight is None or is_lazy(weight) or not is_ordinary(weight):
            rows.append(Conversion(name, (), _unusual(weight)))
        elif isinstance(layer, _ConvNd):
            rows.append(Conversion(name, tuple(weight.shape), NO_CONVOLUTION))
        elif layer in fused:
            rows.append(Conversion(name, tuple(weight.shape), "the fused attention of torch reads it as a dense weight"))
        else:
            if weight not in done:
                done[weight] = _packed(layer, weight.detach())
            packed, reason = done[weight]
            if packed is not None:
                layer.weight = packed
            rows.append(Conversion(name, tuple(weight.shape), reason))
    others = [use for use in uses(new) if use.dense is None and not isinstance(use.module, (_ConvNd, nn.Linear))]
    name_of: dict[Tensor, str] = {p: name for name, p in new.named_parameters()}
    rows += [Conversion(name_of[use.parameter], tuple(use.parameter.shape), ONLY_LINEAR) for use in others]
    return Converted(new, tuple(rows))


def _unusual(weight: Tensor | None) -> str:
    if weight is None:
        return "a parametrization computes its weight"
    return "has no shape yet" if is_lazy(weight) else f"its weight is a {type(weight).__name__}"


def _packed(layer: nn.Linear, weight: Tensor) -> tuple[nn.Parameter | None, str]:
    """The semi-structured weight, or None and the reasons."""
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    reasons = refusals(tuple(weight.shape), weight.dtype, weight.device.type, capability)
    if weight.device.type != "meta" and weight.shape[1] % 4 == 0 and (broken := violations(weight)):
        reasons.append(f"not 2:4: {broken:,} of {weight.numel() // 4:,} groups keep more than two")
    if reasons:
        return None, "; ".join(reasons)
    try:
        sparse = _backend().from_dense(weight.contiguous())
        return nn.Parameter(sparse, requires_grad=False), _trial(layer, weight, sparse)
    except Exception as error:  # a backend that is not built in, a GPU that it does not know: whatever it raises is a reason
        return None, f"torch refused it: {one_line(error, 160, named=True)}"


@torch.no_grad()
def _trial(layer: nn.Linear, weight: Tensor, sparse: Tensor) -> str:
    """Multiply once; raises where torch cannot, or gets another result than with the dense weight."""
    x = torch.randn(16, weight.shape[1], device=weight.device).to(weight.dtype)
    if weight.dtype == torch.int8:  # there is no dense int8 Linear to compare with
        F.linear(x, sparse)
        return ""
    expected, found = F.linear(x, weight, layer.bias).float(), F.linear(x, sparse, layer.bias).float()
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= 0.02 * scale:
        raise RuntimeError(f"its product is off by {worst:.3g} where the largest entry is {scale:.3g}")
    return ""
