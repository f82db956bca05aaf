"""The settings of a run: one record, whose fields say what they mean, what values they may have, and where the command line shows them.

What depends on several of them, or on the method, is in `runs.resolve`. Defaults were chosen on a part of the training images
(`--validate`), never on test images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..engine.options import LEVELS, SCOPES, SCORE_STARTS
from ..engine.rules import RULES
from ..errors import UserError
from .data.parts import VALIDATION_IMAGES, AnyData, AnyRead, Split, at_stride, hold_out, subset
from .data.sentences import Sentences
from .data.sources import DATA, OWN
from .data.windows import Prose
from .models.decoder import tokens_of
from .models.names import MODELS
from .models.transformer import DECODERS, PREFIX, TRANSFORMERS, tokenizer

__all__ = ["DECAYS", "FIELDS", "PARTS", "PATHS", "RUN", "Settings", "described", "option", "user_error"]

# What step sizes do after they have warmed up, from 1 at the beginning to 0 at the end.
DECAYS = {"cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)), "linear": lambda t: 1 - t}
DTYPES = ("float32", "bfloat16")
# Parts of the help of `bip-fast prune`.
PARTS = WHAT, HOW, TRAINING, RUN = "what to prune", "how to prune", "training", "the run"


def _told(part: str, metavar: str, text: str, *, default: str | None = None, **limits: Any) -> Any:
    """A field that is an option of the command line.

    Args:
        part: of the help that it stands in.
        metavar: name of its value there.
        default: the default in words; "": none is shown; None: the value.
    """
    return Field(description=text, json_schema_extra={"part": part, "metavar": metavar, "default": default}, **limits)


def _checked(expected: str, right: Callable[[Any], bool], hint: Callable[[Any], str] = lambda value: "") -> AfterValidator:
    def check(value: Any) -> Any:
        if value is not None and not right(value):
            raise PydanticCustomError("expected", "{expected}", {"expected": expected, "hint": hint(value)})
        return value

    return AfterValidator(check)


def _one_of(names: Iterable[str]) -> AfterValidator:
    return _checked(f"one of {', '.join(names)}", lambda value: value in names)


def _percent(value: float) -> str:
    return f" (write {value / 100:g} for {value:g} %)" if 1 < value < 100 else ""


# Step sizes and the like: finite, and 0 or more.
_Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Settings:
    """Everything that decides the result of a run; `config.json` holds exactly this.

    Raises:
        pydantic.ValidationError: a value is of another type or out of range; `user_error` makes a sentence of it.
    """

    data: Annotated[
        str,
        _checked(f"one of {', '.join(DATA)}, tsv:FILE or text:FILE", lambda value: value in DATA or value.startswith(OWN)),
        _told(
            WHAT,
            "NAME",
            f"{', '.join(DATA)}; or tsv:PATH, labelled texts: a file with a text, a tab and a label on each line, of which a fifth is held "
            "out as the test part, or a folder with train.tsv and test.tsv (or dev.tsv); or text:PATH, running text for a network that "
            "predicts tokens: a file, whose last fifth is the test part, or a folder with train.txt (or valid.txt) and test.txt",
        ),
    ] = "digits"
    train_images: Annotated[
        int | None, _told(WHAT, "N", "use only N training images or texts, the same share of every class", default="", ge=1)
    ] = None
    stride: Annotated[int, _told(WHAT, "N", "use only every N-th pixel in both directions", ge=1)] = 1
    model: Annotated[
        str,
        _told(
            WHAT,
            "NAME",
            f"{', '.join(MODELS)}, timm:NAME, torchvision:NAME, or your own: FILE.py:function(channels, classes); for text "
            f"{', '.join((*TRANSFORMERS, *DECODERS))}, or hf:PATH, a folder of transformers with a classification head, or for running "
            "text one that predicts tokens",
        ),
    ] = "resnet20"
    width: Annotated[
        int | None,
        _told(WHAT, "N", "channels of the first stage", default="16, for resnet18, resnet50 and vgg16bn 64", ge=1),
    ] = None
    max_tokens: Annotated[int, _told(WHAT, "N", "longest text, longer ones are cut; or length of a window of running text", ge=2)] = 128
    test_tokens: Annotated[int | None, _told(WHAT, "N", "use only the first N tokens of a running test text", default="", ge=2)] = None
    dtype: Annotated[
        str,
        _one_of(DTYPES),
        _told(WHAT, "NAME", f"{' or '.join(DTYPES)}: dtype of a transformer's parameters; the optimizer's state stays float32"),
    ] = "float32"
    method: Annotated[str, _told(HOW, "NAME", "docs/compare.md has a table of what each does")] = "bip"
    sparsity: Annotated[
        float,
        _checked("in [0, 1)", lambda value: 0 <= value < 1, _percent),
        _told(
            WHAT,
            "S",
            "fraction of zeros among all weights that can be pruned: those of convolutions, Linear layers, attention, recurrent layers and "
            "experts, but not of a transformer's head; or pruned share of the units of --pattern; in [0, 1)",
        ),
    ] = 0.95
    pattern: Annotated[str, _told(WHAT, "NAME", "unstructured, filter, channel, N:M such as 2:4, or block:RxC")] = "unstructured"
    scope: Annotated[str, _one_of(SCOPES), _told(WHAT, "NAME", f"{', '.join(SCOPES)}: how the sparsity is shared out among the layers")] = (
        "global"
    )
    levels: Annotated[
        str,
        _one_of(LEVELS),
        _told(HOW, "NAME", f"{' or '.join(LEVELS)}: a lower and an upper step on different batches, or both from one"),
    ] = "alternating"
    pretrain_epochs: Annotated[int, _told(TRAINING, "N", "epochs of dense training", ge=0)] = 30
    # Its range depends on the method: runs.resolve.
    epochs: Annotated[int, _told(HOW, "N", "passes over the training images or texts while pruning")] = 40
    batch_size: Annotated[int, _told(TRAINING, "N", "images or texts in a batch", ge=2)] = 64
    optimizer: Annotated[str, _one_of(RULES), _told(TRAINING, "NAME", f"{' or '.join(RULES)}: the rule that moves the weights")] = "sgd"
    pretrain_lr: Annotated[_Size, _told(TRAINING, "X", "step size of dense training, before it decays")] = 0.1
    lr: Annotated[_Size, _told(HOW, "X", "step size of the weights, before it decays")] = 0.05
    mask_lr: Annotated[_Size, _told(HOW, "X", "step size of the scores, before it decays as that of the weights")] = 1.0
    gamma: Annotated[
        float,
        _told(
            HOW,
            "X",
            "weight of the proximal term of the lower level; a larger one weakens the implicit gradient",
            gt=0,
            allow_inf_nan=False,
        ),
    ] = 1.0
    head_lr: Annotated[
        _Size, _told(TRAINING, "X", "step size of a transformer's head, before it decays; 0: the same as for all other weights")
    ] = 0.0
    warmup: Annotated[
        float, _told(TRAINING, "X", "share of a stage in which all step sizes grow from 0 to their full size", ge=0, lt=1)
    ] = 0.0
    decay: Annotated[str, _one_of(DECAYS), _told(TRAINING, "NAME", f"{' or '.join(DECAYS)}: how step sizes fall to 0")] = "cosine"
    clip: Annotated[_Size, _told(TRAINING, "X", "clip gradients to this norm, taken over all of them; 0: no clipping")] = 0.0
    momentum: Annotated[float, _told(TRAINING, "X", "momentum of the weights, for sgd", ge=0, lt=1)] = 0.9
    beta1: Annotated[float, _told(TRAINING, "X", "decay rate of the mean of gradients, for adamw", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, _told(TRAINING, "X", "decay rate of the mean of squared gradients, for adamw", ge=0, lt=1)] = 0.999
    eps: Annotated[
        float, _told(TRAINING, "X", "added to the root of the mean of squared gradients, for adamw", gt=0, allow_inf_nan=False)
    ] = 1e-8
    weight_decay: Annotated[_Size, _told(TRAINING, "X", "weight decay of pruning and fine-tuning")] = 5e-4
    pretrain_weight_decay: Annotated[
        _Size,
        _told(
            TRAINING,
            "X",
            "weight decay of dense training, also where a method trains by its schedule",
            default="that of --weight-decay, or of the data set",
        ),
    ] = 5e-4
    mask_momentum: Annotated[float, _told(HOW, "X", "momentum of the scores", ge=0, lt=1)] = 0.0
    score_start: Annotated[
        str,
        _one_of(SCORE_STARTS),
        _told(HOW, "NAME", f"{' or '.join(SCORE_STARTS)}: scores of bip start at min(|theta|, 1) or at theta^2 / 2"),
    ] = "magnitude"
    ramp: Annotated[
        float,
        _told(HOW, "X", "when the sparsity has fully grown, as a share of the time until masks freeze; 0: all of it at once", ge=0, le=1),
    ] = 0.0
    ramp_start: Annotated[
        float, _told(HOW, "X", "when the sparsity begins to grow, as a share of the time until masks freeze", ge=0, lt=1)
    ] = 0.0
    freeze: Annotated[
        float,
        _told(
            HOW,
            "X",
            "when masks freeze, as a share of the epochs of pruning; 0: at once, which is one-shot magnitude pruning; 1: never",
            ge=0,
            le=1,
        ),
    ] = 1.0
    rewind: Annotated[
        str | None,
        _checked("init, lr or a number of epochs", lambda value: value in ("init", "lr") or bool(re.fullmatch("0|[1-9][0-9]*", value))),
        _told(
            HOW,
            "E",
            "what to retrain from under the mask: the weights of this epoch of dense training (a number, or init), with the rest of its "
            "schedule (all of it after the last epoch); or lr: the trained weights, with the whole schedule",
            default="init for imp and omp, otherwise not",
        ),
    ] = None
    per_round: Annotated[float, _told(HOW, "X", "imp: share of the remaining weights that each round prunes", gt=0, lt=1)] = 0.2
    seed: Annotated[
        int,
        _checked("less than 2**63", lambda value: value < 2**63),
        _told(TRAINING, "N", "seed of the first weights and of the order of the data", ge=0),
    ] = 0
    checkpoint: Annotated[
        str | None,
        _checked("the name of a file", bool),
        _told(WHAT, "FILE", "trained dense weights to prune (.safetensors or .pt): no dense training", default=""),
    ] = None
    rewind_checkpoint: Annotated[
        str | None, _told(HOW, "FILE", "with --checkpoint: the weights that --rewind goes back to", default="")
    ] = None
    validate: Annotated[
        bool,
        _told(
            TRAINING,
            "",
            f"hold out {VALIDATION_IMAGES:,} training images or texts (or a fifth, if less) and measure on these, to choose options by",
            default="",
        ),
    ] = False
    validation_images: Annotated[int, Field(ge=1)] = VALIDATION_IMAGES
    amp: Annotated[
        bool,
        _told(
            TRAINING,
            "",
            "train under bfloat16 autocast, for speed on a GPU",
            default="float32 on every device, and results are measured in it",
        ),
    ] = False
    # Of the CPU: they decide the order in which sums are made, and so the last bits of a result.
    calibration: Annotated[int, _told(HOW, "N", "wanda and sparsegpt: how many windows of the training text they look at", ge=1)] = 128
    threads: Annotated[
        int | None,
        _told(RUN, "N", "CPU threads; their number changes the order of sums, and so the results", default="one for each core", ge=1),
    ] = None

    @property
    def folder_name(self) -> str:
        """Name of the default run folder: what a person tells runs apart by."""
        own = (Path(name).stem if name.startswith((*OWN, PREFIX)) else name for name in (self.data, self.model))
        data, model, pattern = ("".join(c if c.isalnum() else "-" for c in name) for name in (*own, self.pattern))
        kind = "" if self.pattern == "unstructured" else f"-{pattern}"
        method = "" if self.method == "bip" else f"-{self.method}"
        return f"{data}-{model}{method}-{100 * self.sparsity:g}{kind}-seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def decays(self) -> Callable[[float], float]:
        """The factor of all step sizes at a share of the way from the end of the warm-up to the end."""
        return DECAYS[self.decay]

    def part_of(self, data: AnyRead) -> AnyData:
        """What a run works on: held-out images or texts in place of the test part, fewer of them, fewer pixels; the tokens of texts."""
        part: Split = data.windows(tokens_of(self.model), self.max_tokens, self.test_tokens) if isinstance(data, Prose) else data
        if self.validate:
            part = hold_out(part, self.validation_images)
        if self.train_images is not None:
            part = subset(part, self.train_images)
        if self.stride > 1:
            part = at_stride(part, self.stride)
        return part.tokens(tokenizer(self.model, self.max_tokens)) if isinstance(part, Sentences) else part


FIELDS = tuple(field.name for field in fields(Settings))
PATHS = ("checkpoint", "rewind_checkpoint")  # where something is; all others say what the run is


def option(field: str) -> str:
    """Option of the command line that sets a field."""
    return "--" + field.replace("_", "-")


def described() -> dict[str, FieldInfo]:
    """What pydantic knows of every field: its annotation, description, and ``json_schema_extra`` for the command line."""
    return dict(Settings.__pydantic_fields__)  # type: ignore[attr-defined]


# --- errors --------------------------------------------------------------------------------------------------------------------------


def user_error(error: ValidationError) -> UserError:
    """The first of the errors in the words of the command line: the option, what was expected, and what came."""
    first = error.errors(include_url=False)[0]
    name, value, own = str(first["loc"][0]), first["input"], first.get("ctx", {})
    if name not in FIELDS:
        return UserError(f"there is no setting {name!r}; there are {', '.join(FIELDS)}")
    info = described()[name]
    got = f"{value:g}" if isinstance(value, float) else repr(value)
    if first["type"] == "expected":
        expected = own["expected"]
    elif first["type"].endswith("_type"):
        expected, got = _type(info), repr(value)  # 40.0 and not 40, which it would have to be
    else:
        expected = _range(info)
    return UserError(f"{option(name)} must be {expected}, got {got}{own.get('hint', '')}")


def _type(info: FieldInfo) -> str:
    parts = get_args(info.annotation) or (info.annotation,)
    return " or ".join("float or int" if part is float else part.__name__ for part in parts)


def _range(info: FieldInfo) -> str:
    """The limits of a field as people write them: "in [0, 1)", "at least 1", "0 or more", "more than 0"."""
    limits = {kind: getattr(limit, kind) for limit in info.metadata for kind in ("ge", "gt", "le", "lt") if hasattr(limit, kind)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in limits else '('}{low:g}, {high:g}{']' if 'le' in limits else ')'}"
    if "gt" in limits:
        return f"more than {low:g}"
    return f"{low:g} or more" if info.annotation is float else f"at least {low:g}"
