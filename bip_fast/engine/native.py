"""The door to csrc: the compiled module, which devices it has kernels for, and `topk_mask`.

A backend is a submodule of `bip_fast._C` with ``step`` and ``topk``: `BACKENDS` maps a device type to it. ``topk`` is called here,
``step`` in `launch.plan`. Kernels take raw pointers, so everything they trust is checked before: of parameters in `coverage` and
`arena`, of gradients in `launch.gradients`. All memory is allocated by torch, workspaces too.
"""

from __future__ import annotations

import operator
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as error:  # let `bip-fast doctor` say what is wrong
    _C = None  # type: ignore[assignment]
    _C_ERROR: ImportError | None = error
else:
    _C_ERROR = None
    if _mutation := _C.build_info().get("mutation"):
        warnings.warn(
            f"this build of bip_fast gives wrong results on purpose (BIP_FAST_MUTATION={_mutation}); build it again without that variable",
            RuntimeWarning,
            stacklevel=2,
        )

__all__ = [
    "BACKENDS", "DTYPES", "MAX_GROUP", "MAX_SHARDED_GROUP", "PHASES", "backend", "build_info", "is_ordinary", "kernels",
    "launch_guard", "launch_where", "not_capturing", "shard_kernels", "topk_mask",
]  # fmt: skip

BACKENDS: dict[str, Any] = {name: getattr(_C, name) for name in ("cpu", "cuda") if hasattr(_C, name)}
SHARD_BACKENDS: dict[str, Any] = {name: getattr(_C, f"{name}_shards") for name in BACKENDS}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # bip::DType
PHASES = {"lower": 0, "upper": 1, "joint": 2}  # bip::Phase
MAX_GROUP = 2**32  # a tie key has 32 bits
MAX_SHARDED_GROUP = 2**40  # over several ranks, of which none has as many as one device could


def kernels() -> ModuleType:
    """The compiled module, or an ImportError that says how to build it."""
    if _C is None:
        raise ImportError(
            f"the kernels of bip_fast are not built ({_C_ERROR}); run `python3 -m pip install -e .` in its source tree, "
            "or install bip_fast and start Python outside of that tree"
        ) from _C_ERROR
    return _C


def build_info() -> dict[str, Any]:
    """How the kernels were built: the compiler, the vector instructions chosen on this machine, the CUDA toolkit and GPU architectures.

    ``mutation`` is None, except in a build that is wrong on purpose, for the tests.
    """
    return dict(kernels().build_info())


def backend(device: torch.device) -> Any:
    """Kernels for ``device``; RuntimeError when this build has none."""
    module = kernels()
    found = BACKENDS.get(device.type)
    if found is not None:
        return found
    if device.type == "cuda" and not hasattr(module, "cuda"):
        raise RuntimeError(
            f"tensors are on {device}, but bip_fast was built without CUDA; install the CUDA toolkit and run "
            "`BIP_FAST_CUDA=1 python3 -m pip install --force-reinstall --no-deps` on its source, or move the model to the CPU"
        )
    raise RuntimeError(f"bip_fast has kernels for {sorted(BACKENDS)}, got tensors on {device}")


def shard_kernels(device: torch.device) -> Any:
    """Kernels for parameters that are sharded over ranks, of a ``device`` that `backend` knows."""
    return SHARD_BACKENDS[device.type]


def launch_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current; CUDA launches go to its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_where(device: torch.device) -> int:
    """Stream handle on CUDA, number of threads on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else torch.get_num_threads()


def not_capturing(device: torch.device, what: str) -> None:
    """RuntimeError while the current stream of ``device`` is being captured in a CUDA graph: ``what`` must then not happen.

    A copy from the host would be captured with the address of memory that is gone when the graph runs.
    """
    if device.type == "cuda":
        with launch_guard(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise RuntimeError(
                f"{what} while a CUDA graph is being captured: take one step with these options before the capture, or let "
                "bip_fast.graphs.GraphedIteration capture"
            )


def is_ordinary(x: Tensor) -> bool:
    """False for a tensor without memory of its own to point at: fake, sharded, or another subclass that redefines every operation."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


@torch._disable_dynamo  # type: ignore[attr-defined]  # as torch.optim does: a compiled graph calls this as it is
def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest scores: exactly ``k`` ones, the same on every device.

    Larger score first; equal scores by ``(i * 2654435761) mod 2**32``, lowest first, with ``i`` the position in ``scores.flatten()``.
    NaN is smaller than every number, and -0 equals +0. On a GPU the host does not wait.

    Args:
        scores: float32, bfloat16 or float16 of any shape with fewer than 2**32 entries, on the CPU or a CUDA device.
        k: number of ones, 0 <= k <= scores.numel().

    Returns:
        bool tensor of the shape of ``scores``.

    Raises:
        TypeError: ``scores`` is not a dense tensor of a supported dtype, or ``k`` is not an integer.
        ValueError: ``k`` or the number of scores is out of range.

    Examples:
        >>> topk_mask(torch.tensor([0.3, 0.9, 0.1]), 2)
        tensor([ True,  True, False])
    """
    if not isinstance(scores, Tensor) or scores.layout != torch.strided or scores.dtype not in DTYPES or not is_ordinary(scores):
        got = f"{type(scores).__name__} of {scores.dtype}, {scores.layout}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a dense tensor of float32, bfloat16 or float16, got {got}")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer, got {type(k).__name__}") from None
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], the number of scores, got {k}")
    if n >= MAX_GROUP:
        raise ValueError(f"scores must have fewer than 2**32 entries, got {n}")
    kernel = backend(scores.device)
    flat = scores.detach().resolve_neg().to(torch.float32).contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    workspace = torch.empty(max(kernel.topk_workspace_bytes(n), 1), dtype=torch.uint8, device=scores.device)
    with launch_guard(scores.device):
        kernel.topk(
            scores=flat.data_ptr(), n=n, k=k, mask=mask.data_ptr(), workspace=workspace.data_ptr(), where=launch_where(scores.device)
        )
    return mask
