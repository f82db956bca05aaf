# Types of the compiled module (csrc/bindings.cpp). All pointers are integers; bip_fast/engine/native.py checks what reaches them.
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    compiler: str
    simd: str
    cuda: bool
    cuda_toolkit: str | None
    cuda_architectures: str
    mutation: str | None

class _Backend(Protocol):
    """The functions of one backend. `where` is the number of threads on the CPU and the stream handle on a CUDA device."""

    def step_workspace_bytes(self, num_tensors: int, num_groups: int, num_scored_tiles: int) -> int: ...
    def topk_workspace_bytes(self, n: int) -> int: ...
    def step(
        self,
        *,
        phase: int,
        rule: int,
        tensors: int,
        num_tensors: int,
        tile_tensor: int,
        num_tiles: int,
        groups: int,
        num_groups: int,
        unit_sets: int,
        num_unit_sets: int,
        parts: int,
        num_parts: int,
        num_items: int,
        num_scored_tiles: int,
        unit_tile_begin: int,
        unit_tile_end: int,
        hypers: int,
        gradients: NDArray[Any],
        grad_scale: int,
        found_inf: int,
        num_nonfinite: int,
        counters: int,
        workspace: int,
        where: int,
        sums: int = 0,
        turn: int = 0,
    ) -> None: ...
    def topk(self, *, scores: int, n: int, k: int, mask: int, workspace: int, where: int) -> None: ...

class _Shards(Protocol):
    """The stages of a step whose groups have entries on several ranks (csrc/bip.h). All take the arguments of `_Backend.step`."""

    ABSENT: int

    def sums(self, num_groups: int) -> int: ...
    def rounds(self, num_groups: int) -> int: ...
    def workspace_bytes(self, num_tensors: int, num_groups: int, num_scored_tiles: int) -> int: ...
    def score(self, **step: Any) -> None: ...
    def offer(self, **step: Any) -> None: ...
    def lift(self, **step: Any) -> None: ...
    def begin(self, **step: Any) -> None: ...
    def narrow(self, **step: Any) -> bool: ...
    def end(self, **step: Any) -> None: ...

TILE: int
ALIGN: int
STRIP: int
tensor_dtype: np.dtype[np.void]
gradient_dtype: np.dtype[np.void]
hyper_dtype: np.dtype[np.void]
group_dtype: np.dtype[np.void]
unit_set_dtype: np.dtype[np.void]
part_dtype: np.dtype[np.void]
counters_dtype: np.dtype[np.void]
cpu: _Backend
cpu_shards: _Shards
cuda: _Backend  # the last two only where build_info()["cuda"]
cuda_shards: _Shards

def build_info() -> _BuildInfo: ...
def num_items(rows: int, cols: int, block_rows: int, block_cols: int) -> int: ...
