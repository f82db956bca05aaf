"""Models by name: those of this package, of timm, torchvision and transformers where they are installed, and any of the user's own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ...errors import UserError, one_line
from .decoder import language_model
from .resnet import cifar_resnet, imagenet_resnet
from .transformer import classifier, folder_of, is_transformer
from .vgg import vgg16bn

__all__ = ["MODELS", "build", "fingerprint"]

# Called with (channels, classes, width); width: channels of the first stage, None as in the papers.
MODELS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "resnet20": cifar_resnet((3, 3, 3), 16),
    "resnet20b": cifar_resnet((3, 3, 3), 16, projection=True),
    "resnet32": cifar_resnet((5, 5, 5), 16),
    "resnet56": cifar_resnet((9, 9, 9), 16),
    "resnet18": cifar_resnet((2, 2, 2, 2), 64, projection=True),
    "resnet18-imagenet": imagenet_resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": imagenet_resnet((3, 4, 6, 3), bottleneck=True),
    "vgg16bn": vgg16bn,
}
LIBRARIES = ("timm", "torchvision")


def build(name: str, channels: int | None, classes: int, width: int | None = None) -> nn.Module:
    """Fresh model, initialised from torch's global random state; a transformer is trained but for its head.

    Args:
        name: one of `MODELS`; ``timm:NAME`` or ``torchvision:NAME``; or the user's own, ``FILE.py:function`` or
            ``package.module:function``, called with (channels, classes). For text one of `TRANSFORMERS`, or ``hf:PATH``.
        channels: of the images; None for text.
        classes: 0 for a text without labels, whose tokens are predicted.
        width: channels of the first stage, for `MODELS` only.

    Raises:
        UserError: there is no such model, its library is not installed or cannot be imported, or what makes it fails or returns no
            module.
    """
    if name in MODELS and channels is not None:
        return MODELS[name](channels, classes, width)
    library, _, model_name = name.partition(":")
    where, colon, function = name.rpartition(":")
    text = is_transformer(name)
    if not colon and not text and channels is not None:
        others = "timm:NAME, torchvision:NAME, FILE.py:function or package.module:function"
        raise UserError(f"--model must be one of {', '.join(MODELS)}, {others}, got {name!r}")
    if width is not None:
        raise UserError(f"--width is for {', '.join(MODELS)}, got --model {name}")
    if text and channels is not None:
        raise UserError(f"--model {name} reads text, and the data set has images")
    if channels is None:
        return classifier(name, classes) if classes else language_model(name)
    if library in LIBRARIES:  # before the user's own: a file or package of that name cannot take the prefix away
        make = _of_library(library, model_name, channels, classes)
    else:
        make = lambda: getattr(_import(where), function)(channels, classes)  # noqa: E731
    try:
        model = make()
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"--model {name} failed when called with ({channels}, {classes}): {one_line(error, named=True)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def fingerprint(name: str) -> str:
    """Hash of the files of the user's own that make a model; "" where there are none."""
    file = Path(name.rpartition(":")[0])
    if file.suffix == ".py" and file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if not is_transformer(name):
        return ""
    found = hashlib.sha256()
    kinds = (".json", ".safetensors", ".bin", ".txt", ".model", ".gguf")
    for path in sorted(path for path in folder_of(name).iterdir() if path.suffix in kinds):
        with path.open("rb") as opened:
            found.update(f"{path.name} {path.stat().st_size}\n".encode() + opened.read(2**20))
    return found.hexdigest()


def _of_library(library: str, name: str, channels: int, classes: int) -> Callable[[], Any]:
    """What makes a model of timm or torchvision, without trained weights."""
    try:
        module: Any = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except Exception as error:  # a build for another torch raises anything from OSError to RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise UserError(f"--model {library}:{name} needs {library}: pip install {library}") from error
        raise UserError(f"--model {library}:{name}: cannot import {library}: {one_line(error, named=True)}") from error
    known = list(module.list_models())
    # timm lists architectures; a tag after a dot names trained weights of one, and create_model takes both.
    listed = name.partition(".")[0] if library == "timm" else name
    if listed not in known:
        close = ", ".join(difflib.get_close_matches(listed, known, 3, cutoff=0))
        raise UserError(f"--model {library}:{name}: {library} has no such model; close to it: {close}")
    if library == "timm":
        return lambda: module.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
    if channels != 3:
        raise UserError(f"--model {library}:{name} takes images of 3 channels, and the data set has {channels}")
    return lambda: module.get_model(name, weights=None, num_classes=classes)


def _import(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot read {where}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
