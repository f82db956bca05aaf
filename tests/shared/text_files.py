"""A tiny BERT with its tokenizer, and files of sentences, for the tests of text: nothing is fetched."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'bip_fast[text]'")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'bip_fast[text]'")

GOOD, BAD, OTHER = ("good", "great", "fine"), ("bad", "dull", "poor"), ("a", "the", "film", "was", "and", "it", "very", "so", "plot")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER)


def write_tokenizer(folder):
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [(mark, WORDS.index(mark)) for mark in ("[CLS]", "[SEP]")]
    own.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    marked = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=32, **marked).save_pretrained(folder)


def write_bert(folder, *, head=None, seed=0):
    """A random BERT of two layers; ``head``: number of classes of the head that is saved with it, None: no head."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
        initializer_range=0.3, num_labels=head or 2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.BertModel(config) if head is None else transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def sentences(count, seed):
    """Sentences of one to twelve words whose label is that of their one word of praise or blame."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        words = [str(rng.choice(OTHER)) for _ in range(rng.integers(0, 12))]
        words.insert(int(rng.integers(0, len(words) + 1)), str(rng.choice(GOOD if i % 2 else BAD)))
        found.append((" ".join(words), str(i % 2)))
    return found


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def write_sst2(folder, *, train=90, dev=30):
    write_tsv(folder / "train.tsv", sentences(train, 0))
    write_tsv(folder / "dev.tsv", sentences(dev, 1))
    return folder
