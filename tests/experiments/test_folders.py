"""Tiny-ImageNet in its published form: a tree of a few JPEG files, and what can be wrong with it."""

import numpy as np
import pytest
from data_files import save

from bip_fast.errors import UserError
from bip_fast.experiments.data import batches, sources, tiny_imagenet

WNIDS = ("n03", "n01", "n02")  # not in alphabetical order: the order of wnids.txt is that of the labels


def write_tiny_imagenet(root, train=3, val=2):
    """Returns the colours: of training images by class, of validation images by file."""
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    colours, lines = {}, []
    for label, wnid in enumerate(WNIDS):
        for i in range(train):
            colours[wnid, i] = save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * label + i, grey=i == 1)
        for i in range(val):
            name = f"val_{2 * i + label % 2}{label}.JPEG"
            colours[name] = save(root / "val" / "images" / name, 100 + 10 * label + i)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return colours


@pytest.fixture
def root(tmp_path):
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    return tmp_path / "tiny-imagenet-200"


def test_images_and_labels(tmp_path):
    colours = write_tiny_imagenet(tmp_path / "tree")
    read = tiny_imagenet.read_tiny_imagenet(tmp_path / "tree", 3)
    assert read.train_images.shape == (9, 3, 64, 64)
    assert (read.train_images.dtype, read.train_labels.dtype) == (np.uint8, np.int64)
    assert read.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i, image in enumerate(read.train_images):
        assert np.abs(image[:, 30, 30].astype(int) - colours[WNIDS[i // 3], i % 3]).max() <= 4
        assert i % 3 != 1 or (image[0] == image[2]).all(), "grey images have three equal channels"
    names = sorted(path.name for path in (tmp_path / "tree" / "val" / "images").iterdir())
    assert read.test_labels.tolist() == [int(name[-6]) for name in names]
    for name, image in zip(names, read.test_images, strict=True):
        assert np.abs(image[:, 5, 60].astype(int) - colours[name]).max() <= 4


def test_as_a_data_set(root, monkeypatch):
    monkeypatch.setitem(sources.DATA, "tiny-imagenet", sources.DATA["tiny-imagenet"]._replace(classes=3))
    read = sources.load("tiny-imagenet", root.parent)
    assert (read.shape, read.classes, len(read.train_labels)) == ((3, 64, 64), 3, 9)
    images, labels = read.epoch(4, batches.Position(0, "prune", 0)).batch(1)
    assert images.shape == (4, 3, 64, 64)
    assert labels.shape == (4,)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:200])


WRONG = {
    "no list": (lambda root: (root / "wnids.txt").unlink(), r"cannot read .*wnids\.txt: No such file"),
    "other classes": (lambda root: (root / "wnids.txt").write_text("n01\nn02\n"), r"expected 3 different classes, got 2 in 2 lines"),
    "a class twice": (lambda root: (root / "wnids.txt").write_text("n01\nn02\nn02\n"), r"expected 3 different classes, got 2 in 3 lines"),
    "an empty class": (
        lambda root: [path.unlink() for path in (root / "train" / "n02" / "images").iterdir()],
        r"there are no \.JPEG files in .*n02",
    ),
    "an unknown class": (lambda root: (root / "train" / "n99").mkdir(), r"n99 is no class of wnids\.txt"),
    "no annotations": (lambda root: (root / "val" / "val_annotations.txt").unlink(), r"cannot read .*val_annotations\.txt"),
    "a line of words": (
        lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n01 0 0 1 1\n"),
        r"line 1: expected file, class of wnids\.txt and box with tabs between, got 'val_0\.JPEG n01",
    ),
    "a class that is not listed": (
        lambda root: (root / "val" / "val_annotations.txt").write_text("a.JPEG\tn77\t0\t0\t1\t1\n"),
        r"line 1: expected file, class",
    ),
    "named twice": (
        lambda root: (root / "val" / "val_annotations.txt").write_text(2 * "val_00.JPEG\tn01\t0\t0\t1\t1\n"),
        r"line 2: val_00\.JPEG was in an earlier line",
    ),
    "not annotated": (lambda root: save(root / "val" / "images" / "more.JPEG", 0), r"more\.JPEG is not in val_annotations\.txt"),
    "a missing image": (lambda root: (root / "val" / "images" / "val_00.JPEG").unlink(), r"val_00\.JPEG is missing"),
    "a damaged image": (lambda root: _truncate(root / "train" / "n01" / "images" / "n01_0.JPEG"), r"n01_0\.JPEG is damaged"),
    "no image": (lambda root: (root / "val" / "images" / "val_00.JPEG").write_text("hello"), r"val_00\.JPEG is damaged"),
    "another size": (
        lambda root: save(root / "train" / "n01" / "images" / "n01_0.JPEG", 0, size=(64, 48)),
        r"n01_0\.JPEG: expected 64x64 pixels, got 64x48",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line(root, what):
    spoil, message = WRONG[what]
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        tiny_imagenet.read_tiny_imagenet(root, 3)
    assert "\n" not in str(error.value)


def test_pillow_is_named_where_it_is_missing(root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Pillow: pip install"):
        tiny_imagenet.read_tiny_imagenet(root, 3)


def test_the_fingerprint_is_of_classes_and_annotations(root):
    found = sources.fingerprint("tiny-imagenet", root)
    (root / "train" / ".directory").write_text("of a file manager")
    (root / "val" / "readme.txt").write_text("not read")
    assert sources.fingerprint("tiny-imagenet", root) == found
    (root / "wnids.txt").write_text("\n".join(WNIDS[::-1]) + "\n")
    assert sources.fingerprint("tiny-imagenet", root) != found
