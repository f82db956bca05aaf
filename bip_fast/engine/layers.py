"""Layers whose weights can be pruned: the one table that says which parameters of which modules are matrices, and of what kind.

`PRUNABLE` has a rule for each kind of parameter, `register_layer` adds more. A rule is found along the classes of a module, the most
derived first, and of two rules for one class the later counts. Classes of other packages are known by their full names, so that nothing is
imported. A parameter that no rule names stays dense, and so does what a rule with a reason names: embeddings, and what chooses experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

__all__ = ["PRUNABLE", "Layer", "LayerRule", "Use", "conv_and_linear", "joined", "plain_name", "register_layer", "uses", "weights"]


class Layer(NamedTuple):
    """What a pattern asks about the layer of a weight.

    Args:
        transposed: its outputs are dimension 1 of a matrix, and not 0.
        groups: in how many groups inputs fall (convolutions).
        matrices: how many matrices lie behind each other along dimension 0 of the parameter.
        experts: dimension 0 counts the matrices, and is none of theirs.
    """

    transposed: bool = False
    groups: int = 1
    matrices: int = 1
    experts: bool = False


class LayerRule(NamedTuple):
    """One row of the table; see `register_layer`."""

    module: type[nn.Module] | str
    parameter: str
    matrices: int | str = 1
    experts: bool = False
    transposed: bool | str = False
    bias: str | None = None
    dense: str | None = None

    def names(self, cls: type) -> bool:
        return cls is self.module if isinstance(self.module, type) else fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", self.module)

    def layer(self, module: nn.Module, p: Tensor) -> Layer:
        """What a pattern asks, of the parameter ``p`` of ``module``."""
        transposed = getattr(module, self.transposed, False) if isinstance(self.transposed, str) else self.transposed
        matrices = getattr(module, self.matrices, None) if isinstance(self.matrices, str) else self.matrices
        if not isinstance(matrices, int) or matrices < 1:
            found = f"{self.matrices!r}: {matrices!r}"
            raise ValueError(f"matrices must be an attribute of {type(module).__name__} that is a number, got {found}")
        if transposed is not None and not isinstance(transposed, (bool, int)):
            found = f"{self.transposed!r}: a {type(transposed).__name__}"
            raise ValueError(f"transposed must be an attribute of {type(module).__name__} that is True or False, got {found}")
        groups = module.groups if isinstance(module, _ConvNd) else 1
        return Layer(bool(transposed), groups, p.shape[0] if self.experts else matrices, self.experts)


EMBEDDING = "it is an embedding"
ROUTER = "it chooses among experts"

PRUNABLE = [
    LayerRule(_ConvNd, "weight", transposed="transposed", bias="bias"),
    LayerRule(nn.Linear, "weight", bias="bias"),
    LayerRule("transformers.pytorch_utils.Conv1D", "weight", transposed=True, bias="bias"),
    LayerRule(nn.MultiheadAttention, "in_proj_weight", matrices=3, bias="in_proj_bias"),  # queries, keys, values
    LayerRule(nn.MultiheadAttention, "[qkv]_proj_weight"),  # where their inputs differ in size
    # A gate adds what two matrices make, of the input and of the state, so that no bias goes with the filters of one.
    *(LayerRule(cls, "weight_[ih]h*", matrices=4) for cls in (nn.LSTM, nn.LSTMCell)),
    *(LayerRule(cls, "weight_[ih]h*", matrices=3) for cls in (nn.GRU, nn.GRUCell)),
    *(LayerRule(cls, "weight_[ih]h*") for cls in (nn.RNN, nn.RNNCell)),
    LayerRule(nn.LSTM, "weight_hr*"),  # projections of the state
    LayerRule("transformers.models.*Experts", "*", experts=True, transposed="is_transposed"),
    *(LayerRule(f"transformers.models.*{name}Experts", "*", experts=True, transposed=True) for name in ("Llama4Text", "GptOss")),
    LayerRule("transformers.models.*DbrxExpertGLU", "[vw]1", matrices="moe_num_experts"),
    LayerRule("transformers.models.*DbrxExpertGLU", "w2", matrices="moe_num_experts", transposed=True),
    *(LayerRule(cls, "weight", dense=EMBEDDING) for cls in (nn.Embedding, nn.EmbeddingBag)),
    *(LayerRule(f"transformers.models.*{name}", "*", dense=ROUTER) for name in ("Router", "TopKGating")),
]
GATES = ("gate", "router", "wg", "*_gate")  # names of modules that choose, beside "experts" or a module with stacked ones


def register_layer(
    module: type[nn.Module] | str,
    parameter: str = "weight",
    *,
    matrices: int | str = 1,
    experts: bool = False,
    transposed: bool | str = False,
    bias: str | None = None,
    dense: str | None = None,
) -> None:
    """Tell `FastBiP` which parameters of a class of modules to prune, or why they stay dense.

    This applies to every `FastBiP(model)` made afterwards, for the class and classes derived from it. A later call for the same class and
    parameter replaces an earlier one.

    Args:
        module: the class, or its full name, such as "my_package.layers.Experts". The name may be an `fnmatch` pattern.
        parameter: the parameter's name in the module; it may be an `fnmatch` pattern. Its dimensions are (outputs, inputs, ...).
        matrices: how many matrices of equal size are stacked along dimension 0 (such as queries, keys and values), or the name of the
            module's attribute that holds this number. Each matrix has a budget of its own when budgets are by layer, and no unit crosses
            from one into the next.
        experts: the parameter has three dimensions, and the first counts the matrices, one for each expert.
        transposed: whether matrices have dimensions (inputs, outputs), or the name of the module's attribute that says so.
        bias: name of the module's vector with one entry for every output, which is pruned along with filters.
        dense: the reason why these parameters stay dense, for reports. With "*" as ``parameter`` everything inside the module stays dense.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``matrices`` is less than 1 or given together with ``experts``, or ``dense`` is given together with options that make
            no sense for dense parameters.

    Examples:
        >>> bip_fast.register_layer(MyExperts, "w[12]", experts=True)
        >>> bip_fast.register_layer("my_package.moe.Router", "*", dense="it chooses among experts")
    """
    if not (isinstance(module, str) and module) and not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"module must be a class of modules or a full name, got {module!r}")
    strings = {"parameter": parameter} | {key: value for key, value in (("bias", bias), ("dense", dense)) if value is not None}
    for key, value in strings.items():
        if not isinstance(value, str) or not value:
            raise TypeError(f"{key} must be a string that is not empty, got {value!r}")
    if not isinstance(matrices, (int, str)) or isinstance(matrices, bool):
        raise TypeError(f"matrices must be a number or the name of an attribute, got {matrices!r}")
    if not isinstance(experts, bool) or not isinstance(transposed, (bool, str)):
        raise TypeError(f"experts must be True or False, and transposed that or the name of an attribute, got {experts!r}, {transposed!r}")
    if isinstance(matrices, int) and matrices < 1:
        raise ValueError(f"matrices must be at least 1, got {matrices}")
    if experts and matrices != 1:
        raise ValueError(f"matrices must be left out with experts=True, where dimension 0 counts them, got {matrices!r}")
    if dense is not None and (matrices, experts, transposed, bias) != (1, False, False, None):
        raise ValueError("dense must come alone: what is not pruned has no matrices, experts, transposed or bias")
    PRUNABLE.append(LayerRule(module, parameter, matrices, experts, transposed, bias, dense))


# --- a model against the table -------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A parameter as one module has it. ``dense`` is the reason of a rule against pruning; without one there is a ``layer``."""

    name: str  # of the module
    module: nn.Module
    parameter: Tensor
    layer: Layer = Layer()
    bias: Tensor | None = None
    dense: str | None = None


class _Rules:
    """The table by class, for one walk over a model, which meets the same few classes again and again."""

    def __init__(self) -> None:
        self._by_class: dict[type, list[LayerRule]] = {}

    def of(self, module: nn.Module, key: str, dims: int | None) -> LayerRule | None:
        """The rule for a parameter of a module; ``dims`` is None where nobody knows them yet."""
        cls = type(module)
        if cls not in self._by_class:  # the first of these counts
            self._by_class[cls] = [rule for base in cls.__mro__ for rule in reversed(PRUNABLE) if rule.names(base)]
        for rule in self._by_class[cls]:
            if fnmatchcase(key, rule.parameter) and (dims is None or dims > 1) and (dims == 3 or not rule.experts):
                return rule
        return None


def _dims(p: Tensor) -> int | None:
    return None if is_lazy(p) else p.dim()


def _has_experts(module: nn.Module, rules: _Rules) -> bool:
    found = (rules.of(module, key, _dims(p)) for key, p in module._parameters.items() if p is not None)
    return any(rule is not None and rule.experts for rule in found)


def _dense_inside(model: nn.Module, rules: _Rules) -> dict[nn.Module, str]:
    """Modules of which everything stays dense: those that a rule for "*" names, what chooses among experts, and what they contain."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        rule = rules.of(module, "*", 2)
        if rule is not None and rule.dense is not None and rule.parameter == "*":
            reasons |= dict.fromkeys(module.modules(), rule.dense)
        children = dict(module.named_children())
        if "experts" in children or any(_has_experts(child, rules) for child in children.values()):
            for name, child in children.items():
                if any(fnmatchcase(name, gate) for gate in GATES):
                    reasons |= dict.fromkeys(child.modules(), ROUTER)
    return reasons


def uses(model: nn.Module) -> Iterator[Use]:
    """Every use of a parameter that the table names, in the order in which the model made its modules."""
    rules = _Rules()
    dense_inside = _dense_inside(model, rules)
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None:
                continue
            rule = rules.of(module, key, _dims(p))
            why = dense_inside.get(module, rule.dense if rule is not None else None)
            if why is not None:
                yield Use(name, module, p, dense=why)
            elif rule is not None:
                bias = module._parameters.get(rule.bias) if rule.bias else None
                yield Use(name, module, p, rule.layer(module, p) if not is_lazy(p) else Layer(), bias)


def joined(model: nn.Module, found: list[Use]) -> dict[Tensor, Use]:
    """One use of every parameter of ``model``: the last, or where one of them is dense that one, whose reason names the others."""
    by_parameter: dict[Tensor, list[Use]] = {}
    for use in found:
        by_parameter.setdefault(use.parameter, []).append(use)
    one = {}
    for p, own in by_parameter.items():
        dense = next((use for use in own if use.dense), None)
        others = [plain_name(model, use.name) for use in own if not use.dense]
        if dense is not None and others:
            dense = dense._replace(dense=f"{dense.dense}, which {' and '.join(others)} shares")
        one[p] = dense or own[-1]
    return one


def conv_and_linear(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of convolutions and Linear layers, in the order in which the model made them."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (_ConvNd, nn.Linear)))


def weights(source: nn.Module | Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Names and tensors that a report counts: of a Module what `FastBiP(model)` would prune, trainable or not; of a state dict, which knows
    no layers, what has two or more dimensions. A weight that several layers share appears once, under its first name."""
    if isinstance(source, nn.Module):
        pruned = {p for p, use in joined(source, list(uses(source))).items() if use.dense is None}
        found: list[tuple[str, Tensor]] = [(plain_name(source, name), p) for name, p in source.named_parameters() if p in pruned]
        computed = [(name, layer) for name, layer in conv_and_linear(source) if "weight" not in layer._parameters]  # by a parametrization
        found += [(plain_name(source, f"{name}.weight".lstrip(".")), layer.weight) for name, layer in computed]
    else:
        found = [(name, x) for name, x in source.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2]
    first: dict[Any, tuple[str, Tensor]] = {}
    for name, x in found:
        storage = (
            (x.data_ptr(), tuple(x.shape), tuple(x.stride()))
            if x.numel() and x.layout == torch.strided and x.device.type != "meta"
            else name
        )
        first.setdefault(storage, (name, x))
    return list(first.values())


# --- names ---------------------------------------------------------------------------------------------------------------------------

COMPILED = "_orig_mod"  # what torch.compile calls the module that it wraps
CHECKPOINTED = "_checkpoint_wrapped_module"  # and torch's activation checkpointing


def plain_name(model: nn.Module, name: str) -> str:
    """The name that a parameter or module of ``model`` has without the wrappers of torch.compile, data parallelism and activation
    checkpointing."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model, name = model.module, name.removeprefix("module.")
        elif (inner := model._modules.get(COMPILED)) is not None:
            model, name = inner, name.removeprefix(COMPILED + ".")
        else:
            return re.sub(rf"(?<![^.])({COMPILED}|{CHECKPOINTED})\.", "", name)
