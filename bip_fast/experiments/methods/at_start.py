"""Methods that prune random weights at one moment, by a criterion of their own, and then train what is left.

    random      uniform in [0, 1)                                  no passes
    snip        |theta * g|, g = dloss/dtheta                      one batch               Lee et al. 2019 (arXiv 1810.02340), eq. 5
    grasp       theta * (H g), H = d2loss/dtheta2, softened loss   two passes a batch      Wang et al. 2020 (arXiv 2002.07376), eq. 8
    synflow     |theta * dR/dtheta|, R = sum of the outputs of the network of |theta| for an image of ones, in rounds
                                                                   no data                 Tanaka et al. 2020 (arXiv 2006.05467), eq. 3

The model is left as it was: everything happens on a copy, in training mode as far as batch-norm is concerned, and no random numbers but
those of the argument are drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...engine.layers import weights
from ..data.parts import AnyData
from ..data.scoring import loss_of
from ..settings import Settings
from .criteria import Criterion, Scored, Scores, Select
from .stage import Method, Stage, as_dense

__all__ = ["GRASP", "RANDOM", "SNIP", "SYNFLOW", "grasp", "random", "snip", "synflow"]

Batch = tuple[Tensor, Tensor]

TEMPERATURE = 200.0  # of GraSP's softmax, as in its paper
GRASP_IMAGES = 10  # of every class, as in its paper
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


def random(model: nn.Module, generator: torch.Generator) -> Scores:
    """Uniform numbers, drawn on the CPU by ``generator`` so that every device has the same."""
    return {name: torch.rand(x.shape, generator=generator).to(x.device) for name, x in weights(model)}


def snip(model: nn.Module, batches: Sequence[Batch]) -> Scores:
    """|theta * g|: how much the loss depends on the weight being there. ``g`` is the mean gradient over ``batches``."""
    with _deterministic_copy(model) as twin:
        found = weights(twin)
        params = [x for _, x in found]
        total = [torch.zeros_like(x) for x in params]
        for inputs, labels in batches:
            gradients = torch.autograd.grad(loss_of(twin(inputs), labels), params)
            torch._foreach_add_(total, list(gradients))
        return {name: (x.detach() * g / len(batches)).abs() for (name, x), g in zip(found, total, strict=True)}


def grasp(model: nn.Module, batches: Sequence[Batch]) -> Scores:
    """theta * (H g): to remove a weight changes the squared norm of the gradient by about ``-2 theta (H g)``, and GraSP keeps what holds
    it up. ``H g`` is the gradient of ``g . stop(g)``, over all ``batches``."""
    with _deterministic_copy(model) as twin:
        found = weights(twin)
        params = [x for _, x in found]

        def gradients(batch: Batch, create_graph: bool) -> Sequence[Tensor]:
            loss = loss_of(twin(batch[0]) / TEMPERATURE, batch[1])
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


# --- the methods ---------------------------------------------------------------------------------------------------------------------


def _grasp_batches(settings: Settings, data: AnyData) -> int:
    available = max(1, len(data.train_labels) // settings.batch_size)
    return min(available, math.ceil(GRASP_IMAGES * data.classes / settings.batch_size))


def _images(batches: int, settings: Settings, data: AnyData) -> int:
    return batches * min(settings.batch_size, len(data.train_labels))


def _synflow(of: Scored) -> Scores:
    return synflow(of.model, of.data.example().shape[1:], of.sparsity, of.select)


# GraSP: one backward for g, one with a graph and one through it for H g.
CRITERIA = {
    "snip": Criterion("snip", lambda of: snip(of.model, of.batches(1)), lambda settings, data: _images(1, settings, data)),
    "grasp": Criterion(
        "grasp",
        lambda of: grasp(of.model, of.batches(_grasp_batches(of.settings, of.data))),
        lambda settings, data: 3 * _images(_grasp_batches(settings, data), settings, data),
    ),
    "synflow": Criterion("synflow", _synflow, lambda settings, data: ROUNDS),
    "random": Criterion("random", lambda of: random(of.model, of.position.generator(0))),
}


def _at_init(criterion: str) -> Callable[[Settings, float], tuple[Stage, ...]]:
    def plan(settings: Settings, start: float) -> tuple[Stage, ...]:
        own = as_dense(settings, "train", epochs=settings.pretrain_epochs + settings.epochs)
        return (Stage(own, settings.sparsity, criterion=CRITERIA[criterion]),)

    return plan


SNIP = Method(
    "prunes the first weights, random or of a pretrained network, once by |theta * g| on a batch, then trains",
    "D + E",
    "Lee et al. 2019, arXiv 1810.02340",
    False,
    _at_init("snip"),
)

GRASP = Method(
    "prunes random weights once by theta * (Hessian g), then trains",
    "D + E",
    "Wang et al. 2020, arXiv 2002.07376",
    False,
    _at_init("grasp"),
    images_only=True,  # attention has no second derivatives in every torch
)

SYNFLOW = Method(
    "prunes random weights in 100 rounds by their share in the flow through the network, without data, then trains",
    "D + E",
    "Tanaka et al. 2020, arXiv 2006.05467",
    False,
    _at_init("synflow"),
    any_sparsity=True,
    images_only=True,
)

RANDOM = Method(
    "prunes the first weights, random or of a pretrained network, at random, then trains",
    "D + E",
    "",
    False,
    _at_init("random"),
)
