"""Data sets: tiny files in the standard formats, splits, the random order of batches, augmentation."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import IDX, cifar_names, idx_bytes, write_cifar, write_fashion_mnist
from helpers import use_backend
from torch.nn.functional import pad

from bip_fast.errors import UserError
from bip_fast.experiments.data import arrays as arrays_module
from bip_fast.experiments.data import batches, dataset, parts, sources
from bip_fast.experiments.data.augment import normalised
from bip_fast.experiments.data.batches import Position


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("subfolder", ["", "fashion-mnist"])
def test_fashion_mnist_is_read_as_written(tmp_path, zipped, subfolder):
    arrays = write_fashion_mnist(tmp_path / subfolder, zipped=zipped)
    read = sources.load("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(read.train_images[:, 0], arrays[0])
    np.testing.assert_array_equal(read.train_labels, arrays[1])
    np.testing.assert_array_equal(read.test_images[:, 0], arrays[2])
    np.testing.assert_array_equal(read.test_labels, arrays[3])
    assert read.train_images.dtype == torch.uint8
    assert read.train_labels.dtype == torch.int64
    assert all(name in read.note for name in IDX)  # random images are not the official ones


def test_the_official_contents_are_recognised_whatever_their_compression(tmp_path, monkeypatch):
    arrays = write_fashion_mnist(tmp_path)
    md5 = {name: hashlib.md5(idx_bytes(array)).hexdigest() for name, array in zip(IDX, arrays, strict=True)}
    monkeypatch.setattr(arrays_module, "OFFICIAL", md5)
    for level in (1, 9):
        (tmp_path / f"{IDX[0]}.gz").write_bytes(gzip.compress(idx_bytes(arrays[0]), level))
        assert sources.load("fashion-mnist", tmp_path).note == ""


@pytest.mark.parametrize("name", IDX)
def test_a_missing_idx_file_is_named_with_the_place(tmp_path, name):
    write_fashion_mnist(tmp_path)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(UserError) as error:
        sources.load("fashion-mnist", tmp_path)
    assert f"{name}.gz is missing" in str(error.value)
    assert str(tmp_path) in str(error.value)


LABELS = np.zeros(40, np.uint8)
BROKEN_IDX = {
    "cut short": (IDX[0], lambda old: old[: len(old) // 2], "is damaged"),
    "not gzip": (IDX[0], lambda old: b"<html>not found</html>", "is damaged"),
    "labels for images": (IDX[0], lambda old: gzip.compress(idx_bytes(LABELS)), "is not an IDX file of bytes with 3 dimension"),
    "header too long": (IDX[1], lambda old: gzip.compress(idx_bytes(LABELS)[:-1]), "promises 40 bytes, got 39"),
    "fewer labels": (IDX[1], lambda old: gzip.compress(idx_bytes(LABELS[:39])), "40 images, but 39 labels"),
    "label 10": (IDX[1], lambda old: gzip.compress(idx_bytes(LABELS + 10)), f"{IDX[1]}: labels must be in"),
    "other size": (IDX[0], lambda old: gzip.compress(idx_bytes(np.zeros((40, 27, 28), np.uint8))), "expected uint8 images"),
    "no image": (IDX[0], lambda old: gzip.compress(idx_bytes(np.zeros((0, 28, 28), np.uint8))), "0 images"),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_a_broken_idx_file_is_named(tmp_path, case):
    write_fashion_mnist(tmp_path)
    name, broken, message = BROKEN_IDX[case]
    path = tmp_path / f"{name}.gz"
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(UserError) as error:
        sources.load("fashion-mnist", tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_cifar_is_read_as_written(tmp_path, classes, form):
    inner = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    written = write_cifar(tmp_path / inner, classes)
    place = tmp_path / inner if form == "folder" else tmp_path
    if form == "archive":
        place = tmp_path / "downloads"
        place.mkdir()
        with tarfile.open(place / f"cifar-{classes}-python.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / inner, inner)
    read = sources.load(f"cifar{classes}", place)
    train, test = cifar_names(classes)
    np.testing.assert_array_equal(read.train_images, np.concatenate([written[name][0] for name in train]))
    np.testing.assert_array_equal(read.train_labels, np.concatenate([written[name][1] for name in train]))
    np.testing.assert_array_equal(read.test_images, written[test][0])
    np.testing.assert_array_equal(read.test_labels, written[test][1])
    assert read.classes == classes


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_a_fingerprint_is_of_the_files_that_are_read(tmp_path, name):
    def write(folder, **size):
        if name == "fashion-mnist":
            write_fashion_mnist(folder, **size)
        else:
            write_cifar(folder / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"), int(name[5:]), **size)

    first, size = tmp_path / "first", {"train": 50} if name == "fashion-mnist" else {"n": 15}
    write(first)
    found = sources.fingerprint(name, first)
    (first / "tiny-imagenet-200" / "train").mkdir(parents=True)
    (first / "notes").mkdir()
    others = ["notes/train", "notes/data_batch_9", f"{name.replace('cifar', 'cifar-')}-python.tar.gz", "more-ubyte", IDX[0]]
    for other in others:
        (first / other).write_bytes(b"not read")
    assert sources.fingerprint(name, first) == found
    sources.load(name, first)
    write(tmp_path / "second", **size)
    assert sources.fingerprint(name, tmp_path / "second") != found
    assert sources.fingerprint(name, tmp_path / "notes") == sources.fingerprint(name, tmp_path)


def test_a_missing_cifar_file_is_named_with_the_places(tmp_path):
    with pytest.raises(UserError, match=r"data_batch_1 is missing; looked in .*cifar-10-batches-py and .*cifar-10-python\.tar\.gz"):
        sources.load("cifar10", tmp_path)
    write_cifar(tmp_path, 10)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4 is missing in"):
        sources.load("cifar10", tmp_path)


class Hostile:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is damaged"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, 2)[:-40], "is damaged"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, 2), "labels"),
        (pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, 2), "rows of 3072 bytes"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, 2), "uint8"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, 2), "labels must be in"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 2), "2 images, but 1 labels"),
        (pickle.dumps([1, 2], 2), "is damaged"),
    ],
)
def test_a_broken_cifar_file_is_named(tmp_path, contents, message):
    write_cifar(tmp_path, 10)
    (tmp_path / "data_batch_2").write_bytes(contents)
    with pytest.raises(UserError) as error:
        sources.load("cifar10", tmp_path)
    assert message in str(error.value)
    assert "data_batch_2" in str(error.value)


def test_a_hostile_pickle_does_not_run(tmp_path):
    write_cifar(tmp_path, 10)
    trap = tmp_path / "trap"
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Hostile(trap), b"labels": []}, 2))
    with pytest.raises(UserError, match="mkdir is not allowed"):
        sources.load("cifar10", tmp_path)
    assert not trap.exists()
    pickle.loads((tmp_path / "test_batch").read_bytes())  # the trap works where pickles are trusted
    assert trap.exists()


def test_a_damaged_archive_is_named(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", 100)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "cifar-100-python" / "train", "cifar-100-python/train")
    place = tmp_path / "downloads"
    place.mkdir()
    archive = place / "cifar-100-python.tar.gz"
    archive.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="cifar-100-python/test is missing in"):
        sources.load("cifar100", place)
    archive.write_bytes(buffer.getvalue()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        sources.load("cifar100", place)


def test_digits_have_a_fixed_stratified_split():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    digits = sources.load("digits")
    assert digits.train_images.shape == (1198, 1, 8, 8)
    assert digits.test_images.shape == (599, 1, 8, 8)
    assert int(digits.train_images.max()) == 16
    counts = digits.train_labels.bincount() + digits.test_labels.bincount()
    assert torch.equal(digits.test_labels.bincount(), (counts / 3).round().long())


def test_split_is_stratified_disjoint_and_without_a_seed():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 50, 11]))[torch.randperm(161)]
    torch.manual_seed(1)
    first, second = dataset.split(labels, 0.2)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(dataset.split(labels, 0.2), (first, second), strict=True))
    assert labels[second].bincount().tolist() == [20, 10, 2]
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(161))


def test_hold_out_leaves_the_test_images_alone(tmp_path):
    write_fashion_mnist(tmp_path, train=50)
    full = sources.load("fashion-mnist", tmp_path)
    part = parts.hold_out(full, 8, seed=1)
    assert (len(part.train_labels), len(part.test_labels)) == (42, 8)
    images = torch.cat([part.train_images, part.test_images]).flatten(1)
    assert {bytes(x.tolist()) for x in images} == {bytes(x.tolist()) for x in full.train_images.flatten(1)}
    torch.testing.assert_close(part.mean, part.train_images.double().mean((0, 2, 3)).float())


@pytest.mark.parametrize("count", [0, 1, 7, 60, 100])
def test_a_stratified_part_has_exactly_so_many(count):
    labels = torch.arange(10).repeat_interleave(torch.arange(1, 20, 2))  # 100 images, 1 to 19 of a class
    others, chosen = parts.stratified(labels, count, seed=3)
    assert len(chosen) == count
    assert torch.equal(torch.cat([others, chosen]).sort().values, torch.arange(100))
    shares = labels[chosen].bincount(minlength=10) - torch.arange(1, 20, 2) * count / 100
    assert shares.abs().max() < 1
    assert torch.equal(chosen, parts.stratified(labels, count, seed=3)[1])
    assert not 0 < count < 100 or not torch.equal(chosen, parts.stratified(labels, count, seed=4)[1])


def test_held_out_images_are_5000_or_a_fifth(tmp_path):
    write_fashion_mnist(tmp_path, train=50)
    full = sources.load("fashion-mnist", tmp_path)
    assert len(parts.hold_out(full).test_labels) == 10
    large = replace(full, train_images=full.train_images.repeat(600, 1, 1, 1), train_labels=full.train_labels.repeat(600))
    assert len(parts.hold_out(large).test_labels) == 5000


def test_subset_and_stride(tmp_path):
    write_fashion_mnist(tmp_path, train=50)
    full = sources.load("fashion-mnist", tmp_path)
    part = parts.at_stride(parts.subset(full, 20), 3)
    assert part.train_labels.bincount().tolist() == [2] * 10
    assert torch.equal(part.test_images, full.test_images[:, :, ::3, ::3])
    assert (part.shape, part.padding) == ((1, 10, 10), 1)
    torch.testing.assert_close(part.mean, part.train_images.double().mean((0, 2, 3)).float())
    with pytest.raises(UserError, match=r"--train-images must be at most 50 for --data fashion-mnist, got 51"):
        parts.subset(full, 51)


@pytest.fixture
def tiny(tmp_path):
    write_fashion_mnist(tmp_path, train=5000 + 3)  # more than one block of `statistics`
    return sources.load("fashion-mnist", tmp_path)


def test_statistics_are_those_of_the_training_images(tiny):
    x = tiny.train_images.double()
    torch.testing.assert_close(tiny.mean, x.mean((0, 2, 3)).float())
    torch.testing.assert_close(tiny.std, x.std((0, 2, 3), correction=0).float())
    batch = normalised(tiny.train_images, tiny.mean, tiny.std)
    torch.testing.assert_close(batch.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_order_is_a_function_of_seed_stage_and_epoch(tiny):
    position = Position(0, "prune", 3, 5)
    order = batches.epoch_order(tiny.train_labels, position)
    torch.manual_seed(7)
    assert torch.equal(order, batches.epoch_order(tiny.train_labels, position._replace(step=9)))
    for other in (position._replace(seed=1), position._replace(stage="pretrain"), position._replace(epoch=4)):
        assert not torch.equal(order, batches.epoch_order(tiny.train_labels, other))
    assert torch.equal(order.sort().values, torch.arange(5003))


def test_batches_of_an_epoch_are_full_and_disjoint(tiny):
    steps = batches.batch_count(len(tiny.train_labels), 64)
    assert steps == 5003 // 64
    marked = replace(tiny, train_labels=torch.arange(5003))
    epoch = marked.epoch(64, Position(0, "prune", 0))
    chosen = [epoch.batch(step)[1] for step in range(steps)]
    assert {len(batch) for batch in chosen} == {64}
    assert torch.cat(chosen).unique().numel() == 64 * steps


def test_an_epoch_of_fewer_images_than_a_batch(tiny):
    few = replace(tiny, train_images=tiny.train_images[:5], train_labels=tiny.train_labels[:5])
    images, labels = few.epoch(64, Position(0, "prune", 0)).batch(0)
    assert (images.shape, labels.shape) == ((5, 1, 28, 28), (5,))


def test_a_batch_is_a_function_of_its_position(tiny):
    """Wherever the epoch is entered, whatever else draws random numbers."""
    position = Position(0, "prune", 0)
    first, _ = tiny.epoch(64, position).batch(2)
    torch.manual_seed(123)
    assert torch.equal(first, tiny.epoch(64, position._replace(step=2)).batch(2)[0])
    assert not torch.equal(first, tiny.epoch(64, position._replace(epoch=1)).batch(2)[0])
    assert not torch.equal(first, tiny.epoch(64, position._replace(step=2)).batch(3)[0])


@pytest.mark.parametrize("mirror", [True, False])
def test_a_batch_is_drawn_by_its_own_generator(tiny, mirror):
    """The bits that committed results were made with: shifts, then flips, of (seed, stage, epoch, step)."""
    mirrored, position = replace(tiny, mirror=mirror), Position(3, "pretrain", 5, 7)
    found, labels = mirrored.epoch(32, position).batch(7)
    chosen = batches.epoch_order(mirrored.train_labels, position)[7 * 32 : 8 * 32]
    generator = position.generator(1)
    shifts = torch.randint(0, 5, (2, 32), generator=generator)
    flips = torch.rand(32, generator=generator) < 0.5 if mirror else torch.zeros(32, dtype=torch.bool)
    for i in range(32):
        top, left = shifts[:, i].tolist()
        image = pad(tiny.train_images[chosen[i]], (2, 2, 2, 2))[:, top : top + 28, left : left + 28]
        image = image.flip(2) if flips[i] else image
        assert torch.equal(found[i], (image.float() - tiny.mean[0]) / tiny.std[0])
    assert torch.equal(labels, tiny.train_labels[chosen])
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_batches_are_the_same_on_the_gpu_and_do_not_wait_for_it(tiny, monkeypatch):
    device = use_backend("cuda", monkeypatch).device
    position = Position(0, "prune", 0)
    there = tiny.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch = there.epoch(64, position)
        given = [epoch.batch(step) for step in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (images, labels) in enumerate(given):
        expected, expected_labels = tiny.epoch(64, position).batch(step)
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), expected_labels)
