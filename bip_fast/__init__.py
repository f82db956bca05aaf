"""Fast BiP: prune PyTorch networks by bi-level optimisation, with hand-written CPU and CUDA kernels.

`FastBiP` is the optimizer, `SparsitySchedule` makes its sparsity grow, `topk_mask` is the exact mask of the k largest scores,
`register_layer` says what else `FastBiP(model)` prunes, and `reference` is the same mathematics in plain torch.
"""

from . import reference
from .engine.layers import register_layer
from .engine.native import build_info, topk_mask
from .optimizer import FastBiP
from .schedule import SparsitySchedule

__all__ = ["FastBiP", "SparsitySchedule", "__version__", "build_info", "reference", "register_layer", "topk_mask"]
__version__ = "0.2.0"
