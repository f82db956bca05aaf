"""What of a network competes, and what is its head.

Of a network for images all matrices compete, and it has no head of its own. A transformer (anything with a ``base_model`` inside, as those
of `transformers` have) is pruned in that base alone. What stands around the base, the classifier or the output layer, is its head: dense,
with a step size of its own (`Settings.head_lr`), because it starts from random weights where all else is trained. The pooler of a base is
dense too, at the step size of the base: it is trained, and sees one position only.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...engine.layers import weights

__all__ = ["candidates", "head_of", "stays_dense"]


def _base(model: nn.Module) -> nn.Module:
    """The transformer without its head; the model itself where it has no such part."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def head_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the head that learn, by name; what it shares with the base is none of them."""
    inside = set(_base(model).parameters())
    return {name: p for name, p in model.named_parameters() if p not in inside and p.requires_grad}


def stays_dense(model: nn.Module) -> list[str]:
    """Names of matrices that no method prunes though they learn, in the head and in poolers."""
    base = _base(model)
    if base is model:
        return []
    poolers = [module for name, module in base.named_modules() if name.rpartition(".")[2] == "pooler"]
    competing = set(base.parameters()) - {p for module in poolers for p in module.parameters()}
    return [name for name, p in weights(model) if p not in competing and p.requires_grad]


def candidates(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and matrices that compete to be kept: those that reports count. An output layer that shares the embedding is none of them."""
    dense, embeddings = set(stays_dense(model)), {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [(name, p) for name, p in weights(model) if name not in dense and p not in embeddings]
