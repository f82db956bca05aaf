"""Running text: files, windows for training, and windows that ask for every token of a test text once."""

import pytest
import torch
from torch.nn import functional as F

from bip_fast.errors import UserError
from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.data.parts import hold_out, subset
from bip_fast.experiments.data.scoring import IGNORED, loss_of
from bip_fast.experiments.data.sources import fingerprint, load
from bip_fast.experiments.data.windows import Prose, packed, strided


def windows(train=100, test=50, length=8, **given):
    """Tokens are numbers that count."""
    prose = Prose("text:x", " ".join(map(str, range(train))), " ".join(map(str, range(1000, 1000 + test))))
    return prose.windows(lambda text: [int(word) for word in text.split()], length, **given)


def test_training_windows_ask_for_every_token_once_and_leave_out_a_rest():
    ids, labels = packed(torch.arange(30), 8)
    assert ids.flatten().tolist() == list(range(24))
    assert labels.flatten().tolist() == list(range(1, 25))
    assert packed(torch.arange(25), 8)[0].shape == (3, 8)
    assert packed(torch.arange(24), 8)[0].shape == (2, 8)  # the last token of a third window would have no next one


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 13, 17, 40, 41])
@pytest.mark.parametrize("length", [2, 7, 8])
def test_test_windows_ask_for_every_token_once_with_half_a_window_before_it(count, length):
    tokens = torch.arange(100, 100 + count)
    ids, labels = strided(tokens, length)
    asked = []
    for row, (own, wanted) in enumerate(zip(ids, labels, strict=True)):
        for place, label in enumerate(wanted.tolist()):
            if label != IGNORED:
                assert label == own[place] + 1  # the next token of the text
                assert row == 0 or place >= length // 2
                asked.append(label)
    assert asked == tokens[1:].tolist()


def test_the_loss_over_windows_is_that_of_the_whole_text_where_context_is_short():
    """A network that sees only the last token must have the same loss however the text is cut."""
    torch.manual_seed(0)
    text = torch.randint(0, 11, (57,))
    table = torch.randn(11, 11)
    expected = F.cross_entropy(table[text[:-1]], text[1:])
    ids, labels = strided(text, 10)
    assert float(loss_of(table[ids], labels)) == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_of_logits_in_bfloat16_is_taken_in_float32():
    logits, labels = torch.randn(4, 5, 11).bfloat16(), torch.randint(0, 11, (4, 5))
    assert torch.equal(loss_of(logits, labels), F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))
    assert loss_of(logits.double(), labels).dtype == torch.float64


def test_an_epoch_takes_every_window_once_in_an_order_of_its_position():
    data = windows()
    assert (data.steps(5), data.seen(5), len(data.train_labels)) == (2, 10, 12)
    orders = []
    for epoch in (0, 0, 1):
        batches = data.epoch(5, Position(3, "prune", epoch))
        taken = [batches.batch(i) for i in range(2)]
        assert all(torch.equal(labels, ids + 1) for ids, labels in taken)
        orders.append([int(x) for ids, _ in taken for x in ids[:, 0]])
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 10
    assert [int(x) for x in data.epoch(5, Position(3, "prune", 0, 1)).batch(1)[0][:, 0]] == orders[0][5:]


def test_held_out_windows_are_the_last_ones_and_fewer_are_the_first():
    data = windows()
    kept = hold_out(data, 5000)
    assert torch.equal(kept.test_ids, data.train_ids[-2:])
    assert torch.equal(kept.train_ids, data.train_ids[:-2])
    assert torch.equal(subset(data, 3).train_labels, data.train_labels[:3])
    assert torch.equal(subset(data, 3).test_ids, data.test_ids)
    with pytest.raises(UserError, match="--train-images must be at most 12"):
        subset(data, 13)


def test_only_the_beginning_of_a_test_text():
    data = windows(test_tokens=20)
    assert sorted(data.test_labels[data.test_labels != IGNORED].tolist()) == list(range(1001, 1020))


def test_texts_that_are_too_short_are_told():
    with pytest.raises(UserError, match="--max-tokens must be less than the 8 tokens of the training text, got 8"):
        windows(train=8)
    with pytest.raises(UserError, match="must have 2 tokens or more, got 1"):
        windows(test=1)


def test_files_of_running_text(tmp_path):
    lines = [f"line {i} é\n" for i in range(10)]
    file = tmp_path / "own.txt"
    file.write_bytes("".join(lines).encode())
    one = load(f"text:{file}")
    assert (one.train_text, one.test_text) == ("".join(lines[:8]), "".join(lines[8:]))
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    (folder / "valid.txt").write_text(" = A = \n\n text \n")
    (folder / "test.txt").write_text("b\n")
    two = load("wikitext2", tmp_path)
    assert (two.train_text, two.test_text, two.note) == (" = A = \n\n text \n", "b\n", "trains on valid.txt: there is no train.txt")
    before = fingerprint("wikitext2", tmp_path)
    (folder / "train.txt").write_text("more\n")
    assert (load("wikitext2", tmp_path).train_text, load("wikitext2", tmp_path).note) == ("more\n", "")
    assert fingerprint("wikitext2", tmp_path) != before
    assert load(f"text:{folder}").train_text == "more\n"


def test_files_that_are_none_are_told(tmp_path):
    with pytest.raises(UserError, match=r"expected train.txt or wiki.train.tokens or valid.txt or wiki.valid.tokens in .*, got none"):
        load(f"text:{tmp_path}")
    with pytest.raises(UserError, match=r"cannot read .*missing.txt: No such file"):
        load(f"text:{tmp_path / 'missing.txt'}")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="expected UTF-8, got the byte 0xff at 2"):
        load(f"text:{tmp_path / 'bytes.txt'}")
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "test.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"expected text in .*test.txt, got none"):
        load(f"text:{tmp_path}")
    for name in ("text:", "tex:a"):
        with pytest.raises(UserError, match=r"--data must be one of .*, tsv:FILE or text:FILE, got"):
            load(name)
