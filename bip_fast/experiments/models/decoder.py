"""Decoders that predict the next token: SmolLM2 from its package, and any of the user's own that `transformers` can load from a folder.

A folder has either config.json with weights and tokenizer, or one GGUF file, whose quantised weights are made whole (a minute for SmolLM2
on a slow core, and again in each run; `hf:PATH` of a folder that you saved it to takes a second). Nothing is ever fetched.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError, one_line
from .transformer import folder_of, library_of, takes_tokens

__all__ = ["language_model", "tokens_of"]


def _place(folder: Path) -> dict[str, Any]:
    """Arguments that say where weights and tokenizer are."""
    own: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    quantised = sorted(folder.glob("*.gguf"))
    return own if (folder / "config.json").is_file() or not quantised else own | {"gguf_file": quantised[0].name}


@functools.lru_cache(maxsize=1)  # from a GGUF file it is made anew, which takes as long as a short run
def tokens_of(name: str) -> Callable[[str], list[int]]:
    """What makes token ids of a text, with no marks around it.

    Raises:
        UserError: the folder has no tokenizer.
    """
    folder = folder_of(name)
    library = library_of(name)
    try:
        own = library.AutoTokenizer.from_pretrained(**_place(folder))
    except Exception as error:  # whatever is wrong with the files
        raise UserError(f"--model {name}: cannot load a tokenizer from {folder}: {one_line(error, 160)}") from error
    own.model_max_length = int(1e30)  # a text is longer than a window, and nothing to warn of
    return lambda text: own(text, add_special_tokens=False)["input_ids"]


def language_model(name: str) -> nn.Module:
    """The trained network, which gives logits (batch, tokens, words) float32. Its parameters are float32, its word embeddings
    frozen, and so is an output layer that shares them.

    Raises:
        UserError: there is no such network, it cannot be loaded, or it looks at the tokens that it is asked for.
    """
    folder = folder_of(name)
    library = library_of(name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of progress, which nothing else switches off
            model = library.AutoModelForCausalLM.from_pretrained(**_place(folder), dtype=torch.float32)
    except Exception as error:  # whatever is wrong with the files
        raise UserError(f"--model {name}: cannot load a network that predicts tokens from {folder}: {one_line(error, 160)}") from error
    model.config.use_cache = False
    model.get_input_embeddings().requires_grad_(False)
    model = takes_tokens(model).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[0, 0], [0, 1]]))
    if not torch.allclose(logits[0, 0], logits[1, 0], rtol=1e-4, atol=1e-5):
        raise UserError(f"--model {name}: expected a network that reads from left to right, got {type(model).__name__}, which looks ahead")
    return model
