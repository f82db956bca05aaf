"""The table of gradients, made anew for every step: where every parameter's ``grad`` lies, in the layout that the kernels read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arena import Arena
from ..native import DTYPES, kernels
from ..parameter import Parameter
from ..shards import gradient_of

__all__ = ["gradient_table", "no_gradients"]


def no_gradients(arena: Arena) -> np.ndarray:
    """A table without any gradient."""
    return np.zeros(arena.num_rows, dtype=kernels().gradient_dtype)


def _same_layout(x: Tensor, param: Parameter) -> bool:
    """Whether ``x``, which has the parameter's shape, has its entries in the same order in memory."""
    return x.stride() == param.stride or all(size == 1 or a == b for size, a, b in zip(param.shape, x.stride(), param.stride, strict=True))


def gradient_table(arena: Arena) -> tuple[np.ndarray, list[Tensor]]:
    """Address and dtype of every parameter's ``grad``, and the tensors that must stay alive until the kernels ran.

    A gradient of another memory layout than the parameter's is copied.

    Raises:
        RuntimeError: a gradient is sparse, on another device or of another dtype than the kernels know.
    """
    table = no_gradients(arena)
    pointers, dtypes, alive = [0] * len(table), [0] * len(table), []
    for param in arena.parameters:
        g = param.tensor.grad
        if g is None:
            continue
        g = gradient_of(param.tensor, g)
        if g.layout != torch.strided or g.device != arena.device or g.dtype not in DTYPES:
            kind = "sparse" if g.layout != torch.strided else "dense"
            raise RuntimeError(
                f"the gradient of {param.name} must be dense, on {arena.device}, and float32, bfloat16 or float16, "
                f"got a {kind} one of {g.dtype} on {g.device}"
            )
        if not _same_layout(g, param) or g.is_neg():
            g = torch.empty_strided(param.shape, param.stride, dtype=g.dtype, device=arena.device).copy_(g)
        alive.append(g)
        for part in param.parts:
            pointers[part.row], dtypes[part.row] = g.data_ptr() + part.offset * g.element_size(), DTYPES[g.dtype]
    table["data"], table["dtype"] = pointers, dtypes
    return table, alive
