"""ImageNet from its folders, with a stand-in for torchvision: files, crops, the same images at any batch, and training from them."""

import os
import sys
import types
from dataclasses import replace

import pytest
import torch
from data_files import save
from PIL import Image
from torch import nn

from bip_fast.errors import UserError
from bip_fast.experiments.data import image_folders, parts, sources
from bip_fast.experiments.data.batches import Position
from bip_fast.experiments.methods.stage import Recipe
from bip_fast.experiments.ranks import Share
from bip_fast.experiments.runs.training import Cursor, evaluate, train


class Group:
    """In the place of a decoder: the group of the process that it works in."""

    def __getitem__(self, item):
        return torch.tensor(os.getpgrp())


CLASSES = ("n01", "n02", "n03")


class ImageFolder:
    """What this package uses of torchvision's class of that name."""

    def __init__(self, root):
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        self.samples = [
            (os.path.join(root, name, file), i) for i, name in enumerate(names) for file in sorted(os.listdir(os.path.join(root, name)))
        ]


def resize(image, size):
    scale = size / min(image.size)
    return image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))


def center_crop(image, size):
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def resized_crop(image, top, left, height, width, size):
    assert 0 <= top <= image.height - height
    assert 0 <= left <= image.width - width
    return image.crop((left, top, left + width, top + height)).resize(tuple(size[::-1]))


def pil_to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)


@pytest.fixture
def torchvision(monkeypatch):
    functional = types.SimpleNamespace(
        resize=resize,
        center_crop=center_crop,
        resized_crop=resized_crop,
        pil_to_tensor=pil_to_tensor,
        hflip=lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    )
    modules = {
        "torchvision": types.SimpleNamespace(__spec__=types.SimpleNamespace()),
        "torchvision.datasets": types.SimpleNamespace(ImageFolder=ImageFolder),
        "torchvision.datasets.folder": types.SimpleNamespace(default_loader=lambda path: Image.open(path).convert("RGB")),
        "torchvision.transforms.functional": functional,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def tree(tmp_path):
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.JPEG", 100 * label + i, size=(260 + 20 * i, 240))
    return tmp_path


@pytest.fixture
def images(tree, torchvision):
    found = image_folders.read_image_folders(tree, "imagenet", 3)
    return replace(found, workers=0)  # a stand-in is in this process only


def test_files_and_labels(images):
    assert images.train_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert images.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.shape == (3, 224, 224)
    assert images.example().shape == (2, 3, 224, 224)


def test_an_epoch_has_every_image_once_and_any_batch_alone(images):
    position = Position(3, "prune", 0)
    whole = images.epoch(5, position)
    batches = [whole.batch(step) for step in range(3)]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == images.train_labels.tolist()
    assert batches[0][0].shape == (5, 3, 224, 224)
    assert batches[0][0].dtype == torch.float32
    late = images.epoch(5, position._replace(step=2))
    for a, b in zip(late.batch(2), batches[2], strict=True):
        assert torch.equal(a, b)
    other = images.epoch(5, position._replace(epoch=1)).batch(0)
    assert not torch.equal(other[0], batches[0][0])
    late = images.epoch(5, position)
    late.batch(0)
    with pytest.raises(ValueError, match="expected 1, got 2"):
        late.batch(2)


def test_ranks_share_what_is_decoded(images):
    position, shares = Position(3, "prune", 0), [Share(rank, 2) for rank in range(2)]
    found, labels = images.epoch(5, position).batch(0)
    for share in shares:
        part, own, divisor = images.epoch(5, position, share).batch(0)
        assert torch.equal(part, found[share.rank :: 2])
        assert own.tolist() == labels[share.rank :: 2].tolist()
        assert float(divisor) == 2.5
    assert [len(list(images.test_batches(share))) for share in shares] == [1, 0]


def test_evaluation_sees_the_centre_of_every_image_in_order(images):
    (found, labels), *more = images.test_batches()
    assert not more
    assert torch.equal(labels, images.test_labels)
    loaded = center_crop(resize(Image.open(os.fsdecode(images.test_files[3])).convert("RGB"), 256), (224, 224))
    expected = images.normalised(pil_to_tensor(loaded)[None])[0]
    torch.testing.assert_close(found[3], expected)


def test_torchs_random_state_is_not_touched(images):
    state = torch.get_rng_state()
    images.epoch(5, Position(0, "prune", 0)).batch(0)
    list(images.test_batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_for_choosing_options(images):
    held = parts.hold_out(images, 3)
    assert (len(held.train_labels), len(held.test_labels)) == (12, 3)
    assert held.test_labels.tolist() == [0, 1, 2]
    files = {bytes(x) for x in images.train_files}
    assert {bytes(x) for x in held.train_files} | {bytes(x) for x in held.test_files} == files
    assert parts.subset(images, 6).train_labels.bincount().tolist() == [2, 2, 2]
    with pytest.raises(UserError, match="--stride is for data sets in memory"):
        parts.at_stride(images, 2)


def test_crops_stay_inside_and_have_the_customary_size():
    generator = torch.Generator().manual_seed(0)
    for width, height in ((500, 375), (50, 400), (1000, 20), (8, 8)):
        areas = []
        for _ in range(300):
            numbers = torch.rand(2 * image_folders.TRIES + 2, generator=generator, dtype=torch.float64).tolist()
            top, left, h, w = image_folders.crop_of(width, height, numbers)
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert 0 < h <= height
            assert 0 < w <= width
            areas.append(h * w / (width * height))
            if min(width, height) > 50:
                assert 0.7 < w / h < 1.4
        if (width, height) == (500, 375):
            assert min(areas) < 0.15
            assert max(areas) > 0.85
            assert 0.35 < sum(areas) / len(areas) < 0.55


def test_training_and_evaluation(images):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    models, recipe = [], Recipe("pretrain", 2, 5, 0, 0.1)
    for stops in ([], [2, 4]):
        torch.manual_seed(0)
        model = Small()
        opt, cursor = torch.optim.SGD(model.parameters(), 0.1), Cursor()
        for stop in stops:

            def halt(cursor, stop=stop):
                if cursor.epoch * 3 + cursor.step == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train(model, opt, images, recipe, cursor, halt)
        train(model, opt, images, recipe, cursor)
        models.append(model)
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)
    assert 0 <= evaluate(models[0], images).accuracy <= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: [path.unlink() for path in (tree / "val" / "n03").iterdir()] and (tree / "val" / "n03").rmdir(), "got 3 and 2"),
        (lambda tree: (tree / "train" / "n04").mkdir(), "the same 3 folders, got 4 and 3"),
        (lambda tree: (tree / "val").rename(tree / "test"), "val"),
    ],
)
def test_wrong_folders_are_one_line(tree, torchvision, spoil, message):
    spoil(tree)
    with pytest.raises(UserError, match=message) as error:
        image_folders.read_image_folders(tree, "imagenet", 3)
    assert "\n" not in str(error.value)


def test_a_damaged_image_is_one_line(tree, images):
    for path in (tree / "train").rglob("*.JPEG"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"\.JPEG is damaged") as error:
        images.epoch(5, Position(0, "prune", 0)).batch(0)
    assert "\n" not in str(error.value)


def test_torchvision_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torchvision: pip install torchvision"):
        sources.load("imagenet", tmp_path)


@pytest.mark.slow
def test_a_signal_to_the_processes_of_a_group_does_not_reach_the_workers(monkeypatch):
    """torchrun sends one to the group of each rank, which still needs its workers for the batch after which it stops."""
    monkeypatch.setattr(image_folders, "_Decoder", Group)
    [found] = image_folders._stream([[(b"", None)]], 1)
    assert int(found) != os.getpgrp()
