"""Sentences: files and what may be wrong with them, tokens, and batches of about one length."""

import numpy as np
import pytest
import torch
from text_files import WORDS, sentences, write_sst2, write_tsv

from bip_fast.errors import UserError
from bip_fast.experiments.data import sources
from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.data.parts import hold_out, subset
from bip_fast.experiments.data.sentences import PADDING, POOL


def tokenize(texts):
    return [[2, *(WORDS.index(word) for word in text.split()), 3] for text in texts]


@pytest.fixture
def data(tmp_path):
    return sources.load("sst2", write_sst2(tmp_path / "sst2", train=203, dev=31)).tokens(tokenize)


def rows_of(batch):
    return [tuple(row[row != PADDING].tolist()) for row in batch]


# --- files -------------------------------------------------------------------------------------------------------------------------------


def test_the_standard_files_are_found_in_their_folder(tmp_path):
    write_sst2(tmp_path / "sst2")
    read = sources.load("sst2", tmp_path)
    assert (read.name, read.classes, read.labels) == ("sst2", 2, ("0", "1"))
    assert [(text, str(int(label))) for text, label in zip(read.train_texts, read.train_labels, strict=True)] == sentences(90, 0)
    assert [(text, str(int(label))) for text, label in zip(read.test_texts, read.test_labels, strict=True)] == sentences(30, 1)


def test_a_folder_of_ones_own_has_any_labels_and_test_comes_before_dev(tmp_path):
    rows = [("one", "happy"), ("two", "sad"), ("three", "angry")]
    write_tsv(tmp_path / "train.tsv", rows)
    write_tsv(tmp_path / "dev.tsv", rows[:1])
    assert sources.load(f"tsv:{tmp_path}").test_texts == ["one"]
    write_tsv(tmp_path / "test.tsv", rows[1:])
    read = sources.load(f"tsv:{tmp_path}")
    assert (read.labels, read.test_texts) == (("angry", "happy", "sad"), ["two", "three"])
    assert read.train_labels.tolist() == [1, 2, 0]


def test_numbers_as_labels_are_in_the_order_of_their_size(tmp_path):
    path = write_tsv(tmp_path / "own.tsv", [(f"text {i}", str(i % 11)) for i in range(110)])
    assert sources.load(f"tsv:{path}").labels == tuple(map(str, range(11)))


def test_of_one_file_a_fifth_of_every_label_is_held_out(tmp_path):
    rows = [(f"text {i}", "x" if i % 4 else "y") for i in range(80)]
    path = tmp_path / "own.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"text\tlabel\r\n" + "".join(f"{text}\t{label}\r\n" for text, label in rows).encode())
    read = sources.load(f"tsv:{path}")
    assert sorted([*read.train_texts, *read.test_texts]) == sorted(text for text, _ in rows)
    assert torch.bincount(read.test_labels).tolist() == [12, 4]
    known = dict(rows)
    assert [read.labels[i] for i in read.test_labels] == [known[text] for text in read.test_texts]
    assert sources.load(f"tsv:{path}").test_texts == read.test_texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no label here", "train.tsv, line 3: expected a sentence, a tab and a label, got 'no label here'"),
        (b"two\ttabs\t1", "train.tsv, line 3: expected a sentence, a tab and a label, got 'two\\ttabs\\t1'"),
        (b"\t1", "train.tsv, line 3: expected a sentence, a tab and a label"),
        (b"", "train.tsv, line 3: expected a sentence, a tab and a label, got ''"),
        (b"fine\t2", "train.tsv, line 3: the label must be one of 0, 1, got '2'"),
        (b"caf\xe9\t1", "train.tsv, line 3: expected UTF-8, got the byte 0xe9"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    write_sst2(tmp_path)
    lines = (tmp_path / "train.tsv").read_bytes().splitlines()
    (tmp_path / "train.tsv").write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UserError) as error:
        sources.load("sst2", tmp_path)
    assert str(tmp_path / message) in str(error.value)


def test_a_label_that_training_does_not_know_is_named(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("one", "a"), ("two", "b")])
    write_tsv(tmp_path / "test.tsv", [("one", "a"), ("two", "c")])
    with pytest.raises(UserError, match=r"test\.tsv, line 2: the label must be one of a, b, got 'c'"):
        sources.load(f"tsv:{tmp_path}")


def test_missing_files_and_files_without_a_choice(tmp_path):
    with pytest.raises(UserError, match=r"absent\.tsv is missing"):
        sources.load(f"tsv:{tmp_path / 'absent.tsv'}")
    with pytest.raises(UserError, match="--data sst2 needs --data-dir"):
        sources.load("sst2")
    write_tsv(tmp_path / "train.tsv", [("one", "a"), ("two", "a")])
    with pytest.raises(UserError, match=r"test\.tsv or dev\.tsv is missing in"):
        sources.load(f"tsv:{tmp_path}")
    with pytest.raises(UserError, match="expected two or more labels, got 'a' alone"):
        sources.load(f"tsv:{tmp_path / 'train.tsv'}")
    with pytest.raises(UserError, match="enough sentences to hold out a fifth"):
        sources.load(f"tsv:{write_tsv(tmp_path / 'few.tsv', [('one', 'a'), ('two', 'b')])}")
    (tmp_path / "empty.tsv").write_text("text\tlabel\n")
    with pytest.raises(UserError, match="has no sentences"):
        sources.load(f"tsv:{tmp_path / 'empty.tsv'}")
    with pytest.raises(UserError, match="--data must be one of digits"):
        sources.load("tsv:")


def test_other_sentences_are_other_data(tmp_path):
    path = write_tsv(tmp_path / "own.tsv", sentences(20, 0))
    first = sources.fingerprint(f"tsv:{path}")
    assert first == sources.fingerprint(f"tsv:{path}", tmp_path)
    write_tsv(path, sentences(20, 1))
    assert first != sources.fingerprint(f"tsv:{path}")
    write_sst2(tmp_path / "sst2")
    assert sources.fingerprint("sst2", tmp_path) == sources.fingerprint("sst2", tmp_path / "sst2") != ""


# --- parts -------------------------------------------------------------------------------------------------------------------------------


def test_held_out_sentences_are_none_of_the_test_and_none_that_are_left(tmp_path):
    read = sources.load("sst2", write_sst2(tmp_path))
    held = hold_out(read, 18)
    assert (len(held.train_texts), len(held.test_texts)) == (72, 18)
    assert sorted([*held.train_texts, *held.test_texts]) == sorted(read.train_texts)
    assert torch.bincount(held.test_labels).tolist() == [9, 9]
    few = subset(held, 10)
    assert (len(few.train_texts), few.test_texts) == (10, held.test_texts)


# --- tokens ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 64, 203, 500])
def test_an_epoch_has_every_sentence_once(data, batch_size):
    batches = [data.epoch(batch_size, Position(0, "prune", 1)).batch(step) for step in range(data.steps(batch_size))]
    assert data.steps(batch_size) == -(-203 // batch_size)
    assert sum(len(labels) for _, labels in batches) == data.seen(batch_size) == 203
    found = sorted((row, int(label)) for ids, labels in batches for row, label in zip(rows_of(ids), labels, strict=True))
    expected = [(row, int(label)) for row, label in zip(rows_of(data.train_ids), data.train_labels, strict=True)]
    assert found == sorted(expected)


def test_batches_are_a_function_of_seed_stage_and_epoch(data):
    def ids(*position, step=0):
        epoch = data.epoch(16, Position(*position, step))
        return [epoch.batch(i)[0].tolist() for i in range(data.steps(16))]

    first = ids(0, "prune", 1)
    assert ids(0, "prune", 1) == first
    assert ids(0, "prune", 1, step=7) == first, "also when a run goes on in the middle"
    assert all(ids(*other) != first for other in ((1, "prune", 1), (0, "more", 1), (0, "prune", 2)))


def test_batches_are_of_about_one_length_and_no_wider_than_they_must_be(data):
    epoch = data.epoch(16, Position(0, "prune", 0))
    batches = [epoch.batch(i)[0] for i in range(data.steps(16))]
    padding = sum(int((ids == PADDING).sum()) for ids in batches)
    assert padding < 0.1 * sum(ids.numel() for ids in batches)
    assert 16 * POOL > 203, "one pool: sorted as a whole"
    for ids in batches:
        assert (ids[:, -1] != PADDING).any()
    widths = [ids.shape[1] for ids in batches]
    assert widths != sorted(widths), "but in random order"


def test_long_epochs_are_sorted_in_pools():
    from bip_fast.experiments.data.sentences import bucketed

    rng = np.random.default_rng(0)
    lengths, order = torch.from_numpy(rng.integers(1, 100, 3 * POOL * 4 + 1)), torch.randperm(3 * POOL * 4 + 1)
    batches = bucketed(lengths, order, 4, torch.Generator().manual_seed(0))
    assert sorted(map(len, batches)) == [1, *[4] * (3 * POOL)]
    place = {int(row): i // (4 * POOL) for i, row in enumerate(order)}
    assert all(len({place[int(row)] for row in batch}) == 1 for batch in batches)


def test_the_test_part_comes_whole_and_in_one_order(data):
    parts = [list(data.test_batches()) for _ in range(2)]
    rows = [row for ids, _ in parts[0] for row in rows_of(ids)]
    assert sorted(rows) == sorted(rows_of(data.test_ids))
    assert all(torch.equal(a, b) for one, other in zip(*parts, strict=True) for a, b in zip(one, other, strict=True))
