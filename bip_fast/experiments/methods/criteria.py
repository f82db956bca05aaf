"""Criteria that prune at one moment: what a weight is worth before anything is trained under its mask.

Each gives one score per entry of every Conv and Linear weight, by name; larger is kept; a filter, channel or block has the mean of its
entries, also where their papers know single weights only. The model is left as it was: everything happens on
a copy, in training mode as far as batch-norm is concerned, and no random numbers but those of the argument are drawn.

    magnitude   |theta|                                            no passes
    layer       |theta| / max |theta| of its layer                 no passes               Sehwag et al. 2020 (arXiv 2002.10509), the start
    random      uniform in [0, 1)                                  no passes
    snip        |theta * g|, g = dloss/dtheta                      one batch               Lee et al. 2019 (arXiv 1810.02340), eq. 5
    grasp       theta * (H g), H = d2loss/dtheta2, softened loss   two passes a batch      Wang et al. 2020 (arXiv 2002.07376), eq. 8
    synflow     |theta * dR/dtheta|, R = sum of the outputs of the network of |theta| for an image of ones, in rounds
                                                                   no data                 Tanaka et al. 2020 (arXiv 2006.05467), eq. 3
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.layers import weights

__all__ = ["Scores", "grasp", "layer_magnitude", "magnitude", "random", "snip", "synflow", "to_unit_interval"]

Scores = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Select = Callable[[Scores, float], dict[str, Tensor]]  # which entries stay at a sparsity; no mask: all

TEMPERATURE = 200.0  # of GraSP's softmax, as in its paper
ROUNDS = 100  # of SynFlow, as in its paper


@contextmanager
def _deterministic_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy in training mode; dropout and the like draw from a random state that is put back."""
    state = torch.get_rng_state()
    twin = copy.deepcopy(model).train()
    for p in twin.parameters():
        p.grad = None
    try:
        with torch.enable_grad():
            yield twin
    finally:
        torch.set_rng_state(state)


def to_unit_interval(scores: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The same order in [0, 1], as `FastBiP.set_scores` takes it. What is not negative is divided by a power of two, which is exact;
    otherwise the lowest becomes 0, rounded to float32."""
    lowest = min((float(x.min()) for x in scores.values() if x.numel()), default=0.0)
    largest = max((float(x.max()) for x in scores.values() if x.numel()), default=1.0)
    if lowest < 0:
        span = (largest - lowest) or 1.0
        return {key: ((x.double() - lowest) / span).float() for key, x in scores.items()}
    exponent = math.frexp(largest)[1] if largest > 1 else 0
    return {key: torch.ldexp(x.float(), torch.tensor(-exponent)) for key, x in scores.items()}


def magnitude(model: nn.Module) -> Scores:
    """|theta| of every Conv and Linear weight."""
    return {name: x.detach().abs() for name, x in weights(model)}


def layer_magnitude(model: nn.Module) -> Scores:
    """|theta| as a share of the largest of its layer: what Hydra's scores start from, in every layer as large."""
    return {name: x / x.max().clamp(min=torch.finfo(x.dtype).tiny) for name, x in magnitude(model).items()}


def random(model: nn.Module, generator: torch.Generator) -> Scores:
    """Uniform numbers, drawn on the CPU by ``generator`` so that every device has the same."""
    return {name: torch.rand(x.shape, generator=generator).to(x.device) for name, x in weights(model)}


def snip(model: nn.Module, batches: Sequence[Batch]) -> Scores:
    """|theta * g|: how much the loss depends on the weight being there. ``g`` is the mean gradient over ``batches``."""
    with _deterministic_copy(model) as twin:
        found = weights(twin)
        params = [x for _, x in found]
        total = [torch.zeros_like(x) for x in params]
        for images, labels in batches:
            gradients = torch.autograd.grad(F.cross_entropy(twin(images), labels), params)
            torch._foreach_add_(total, list(gradients))
        return {name: (x.detach() * g / len(batches)).abs() for (name, x), g in zip(found, total, strict=True)}


def grasp(model: nn.Module, batches: Sequence[Batch]) -> Scores:
    """theta * (H g): to remove a weight changes the squared norm of the gradient by about ``-2 theta (H g)``, and GraSP keeps what holds
    it up. ``H g`` is the gradient of ``g . stop(g)``, over all ``batches``."""
    with _deterministic_copy(model) as twin:
        found = weights(twin)
        params = [x for _, x in found]

        def gradients(batch: Batch, create_graph: bool) -> Sequence[Tensor]:
            loss = F.cross_entropy(twin(batch[0]) / TEMPERATURE, batch[1])
            return torch.autograd.grad(loss, params, create_graph=create_graph)

        g = [torch.zeros_like(x) for x in params]
        for batch in batches:
            torch._foreach_add_(g, list(gradients(batch, False)))
        products = [torch.zeros_like(x) for x in params]
        for batch in batches:
            flow = sum((own * whole).sum() for own, whole in zip(gradients(batch, True), g, strict=True))
            assert isinstance(flow, Tensor)
            found_products = torch.autograd.grad(flow, params, allow_unused=True)
            for total, h in zip(products, found_products, strict=True):
                if h is not None:  # a linear network has no curvature in some weights
                    total.add_(h)
        return {name: x.detach() * h for (name, x), h in zip(found, products, strict=True)}


def synflow(model: nn.Module, shape: Sequence[int], sparsity: float, select: Select, rounds: int = ROUNDS) -> Scores:
    """Synaptic flow after ``rounds`` rounds in which the density falls exponentially to ``1 - sparsity``.

    Args:
        shape: of one image, (channels, height, width).
        select: masks as they are chosen in the end: rounds under another scope or pattern would remove what is then kept.

    Returns:
        float32 scores of the last round, divided by the largest; 0 for what an earlier round removed.
    """
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for x in twin.state_dict().values():
            if x.is_floating_point():
                x.abs_()
    found = weights(twin)
    params = [x for _, x in found]
    ones = torch.ones(1, *shape, dtype=torch.float64, device=params[0].device)
    names = [name for name, _ in found]
    flow = dict(zip(names, _flow(twin, ones, params), strict=True))
    for i in range(1, rounds):
        masks = select(flow, 1 - (1 - sparsity) ** (i / rounds))
        with torch.no_grad():
            for name, x in found:
                if name in masks:
                    x.mul_(masks[name])
        flow = dict(zip(names, _flow(twin, ones, params), strict=True))
    return flow


def _flow(model: nn.Module, ones: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """|theta * dR/dtheta| in float32, as shares of the largest: the flow of a deep network leaves the range of float32."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(model(ones).sum(), params)
    flow = [(x.detach() * g).abs() for x, g in zip(params, gradients, strict=True)]
    largest = max(float(x.max()) for x in flow) or 1.0
    return [(x / largest).float() for x in flow]
