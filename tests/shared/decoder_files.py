"""A tiny Llama with its tokenizer, and running text, for the tests of decoders: nothing is fetched."""

import numpy as np
import torch
from text_files import tokenizers, transformers

WORDS = ("<unk>", "\n", "=", *(f"w{i}" for i in range(29)))


def write_words(folder):
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", model_max_length=8).save_pretrained(folder)


def tiny_llama(*, tied=True, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def write_llama(folder, **given):
    tiny_llama(**given).save_pretrained(folder)
    write_words(folder)
    return folder


def words(count, seed):
    """Text in which a word mostly follows from the one before it."""
    rng = np.random.default_rng(seed)
    found, last = [], 3
    for _ in range(count):
        last = 3 + (5 * last + int(rng.integers(0, 2))) % 29
        found.append(WORDS[last])
    return " ".join(found)


def write_text(folder, *, train=1500, test=400):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(words(train, 0))
    (folder / "test.txt").write_text(words(test, 1))
    return folder
