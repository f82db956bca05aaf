"""The data sets that there are: what is fixed for each, where its files are, and `load`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import UserError
from .arrays import Arrays
from .cifar import cifar_files, read_cifar
from .dataset import Dataset, statistics
from .digits import read_digits
from .idx import fashion_mnist_files, read_fashion_mnist
from .image_folders import Streamed, read_image_folders
from .kinds import IMAGES, LANGUAGE, TEXT, Kind
from .parts import AnyRead
from .prose import prose_files, read_prose
from .sentences import Sentences
from .tiny_imagenet import read_tiny_imagenet
from .tsv import read_sst2, read_tsv, tsv_files
from .windows import Prose

__all__ = ["DATA", "OWN", "TSV", "Source", "fingerprint", "load", "source_of"]


class Source(NamedTuple):
    """A data set.

    Args:
        shape: of an image: channels, height, width; of a text, ().
        classes: 0: as many as the files have.
        padding: of the random crop, in pixels.
        mirror: whether images may be mirrored.
        read: reads its files in a folder, called with that and ``classes``.
        files: what ``read`` reads in a folder, of images in folders for each class these folders; not all need be there. None: no files.
        folders: customary names of the folder.
        preset: settings of a run that differ from their defaults.
        place: the folder or file, where the name of the data set says it.
    """

    shape: tuple[int, ...]
    classes: int
    padding: int
    mirror: bool
    read: Callable[[Path, int], Arrays | Streamed | Sentences | Prose]
    files: Callable[[Path], list[Path]] | None = None
    folders: tuple[str, ...] = ()
    preset: Mapping[str, Any] = {}
    place: Path | None = None
    kind: Kind = IMAGES

    @property
    def needs_folder(self) -> bool:
        """Whether ``--data-dir`` must say where its files are."""
        return self.files is not None and self.place is None


def _tiny_imagenet_files(folder: Path) -> list[Path]:
    return [*_class_folders(folder, "train"), folder / "wnids.txt", folder / "val" / "val_annotations.txt"]


def _class_folders(folder: Path, *parts: str) -> list[Path]:
    return [path for part in parts for path in (folder / part).glob("*") if path.is_dir()]


# CIFAR: the schedule of the paper, whose 100 epochs of BiP take two batches, a lower and an upper one, in each iteration; here an epoch is
# one pass over the images, so they are 200.
_PAPER = {"pretrain_epochs": 200, "epochs": 200, "batch_size": 128, "pretrain_lr": 0.1}
# Fine-tuning of a network that is trained: pruned from the first step on, with the settings of DESIGN's first trial.
_FINE_TUNING = {
    "model": "minilm", "pretrain_epochs": 0, "epochs": 3, "batch_size": 32, "optimizer": "adamw", "pretrain_lr": 1e-4, "lr": 1e-4,
    "head_lr": 1e-3, "weight_decay": 0.01, "warmup": 0.06, "clip": 1.0,
}  # fmt: skip
# Training of a decoder that goes on, on a text of which one pass is long enough.
_CONTINUED = {
    **_FINE_TUNING, "model": "smollm2", "epochs": 1, "batch_size": 8, "head_lr": 0.0, "sparsity": 0.5, "max_tokens": 512,
}  # fmt: skip
_IMAGENET = {"model": "resnet50", "pretrain_epochs": 90, "epochs": 90, "batch_size": 256, "pretrain_lr": 0.1, "weight_decay": 1e-4}
DATA = {
    "digits": Source((1, 8, 8), 10, 1, False, lambda folder, classes: read_digits()),
    "fashion-mnist": Source(
        (1, 28, 28),
        10,
        2,
        True,
        lambda folder, classes: read_fashion_mnist(folder),
        fashion_mnist_files,
        ("fashion-mnist", "FashionMNIST/raw"),
        {"pretrain_epochs": 20, "epochs": 20, "batch_size": 128},
    ),
    "cifar10": Source((3, 32, 32), 10, 4, True, read_cifar, lambda folder: cifar_files(folder, 10), ("cifar10",), _PAPER),
    "cifar100": Source((3, 32, 32), 100, 4, True, read_cifar, lambda folder: cifar_files(folder, 100), ("cifar100",), _PAPER),
    "tiny-imagenet": Source(
        (3, 64, 64), 200, 4, True, read_tiny_imagenet, _tiny_imagenet_files, ("tiny-imagenet-200", "tiny-imagenet"), _PAPER
    ),
    # Crops are not shifts, see image_folders.
    "imagenet": Source(
        (3, 224, 224),
        1000,
        0,
        True,
        lambda folder, classes: read_image_folders(folder, "imagenet", classes),
        lambda folder: _class_folders(folder, "train", "val"),
        ("imagenet",),
        _IMAGENET,
    ),
    "sst2": Source((), 2, 0, False, read_sst2, tsv_files, ("sst2", "SST-2"), _FINE_TUNING, kind=TEXT),
    "wikitext2": Source(
        (),
        0,
        0,
        False,
        lambda at, classes: read_prose("wikitext2", at),
        prose_files,
        ("wikitext-2", "wikitext2"),
        _CONTINUED,
        kind=LANGUAGE,
    ),
}
TSV = "tsv:"  # in front of a file or folder of one's own, of sentences with labels
PROSE = "text:"  # the same, of running text
OWN = (TSV, PROSE)


def source_of(name: Any) -> Source:
    """The data set of a name, one of `DATA`, ``tsv:FILE`` or ``text:FILE``.

    Raises:
        UserError: there is none.
    """
    if isinstance(name, str) and name in DATA:
        return DATA[name]
    prefix = next((prefix for prefix in OWN if isinstance(name, str) and name.startswith(prefix)), None)
    place = Path(str(name).removeprefix(prefix or ""))
    if prefix is None or not place.name:
        raise UserError(f"--data must be one of {', '.join(DATA)}, tsv:FILE or text:FILE, got {name!r}")
    if prefix == PROSE:
        return Source((), 0, 0, False, lambda at, classes: read_prose(name, at), prose_files, (), _CONTINUED, place, LANGUAGE)
    return Source((), 0, 0, False, lambda at, classes: read_tsv(name, at), tsv_files, (), _FINE_TUNING, place, TEXT)


def load(name: str, data_dir: Path | None = None) -> AnyRead:
    """Data set ``name``, as for `source_of`.

    Args:
        data_dir: the folder with the standard files, or one that has them in the customary subfolder. Digits come with scikit-learn.

    Raises:
        UserError: a file is missing or damaged, or scikit-learn is not installed.
    """
    source = source_of(name)
    if source.needs_folder and data_dir is None:
        raise UserError(f"--data {name} needs --data-dir, the folder with its files")
    if source.needs_folder and data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir must be a folder, got {data_dir}")
    arrays = source.read(_folder(source, data_dir or Path()), source.classes)
    if isinstance(arrays, (Streamed, Sentences, Prose)):
        return arrays
    # Bytes of a file are read-only, which torch does not know.
    images, labels, test_images, test_labels = (torch.from_numpy(part if part.flags.writeable else part.copy()) for part in arrays[:4])
    mean, std = statistics(images)
    note = f"not the official files (md5): {', '.join(arrays.unofficial)}" if arrays.unofficial else ""
    return Dataset(name, source.classes, source.padding, source.mirror, images, labels, test_images, test_labels, mean, std, note)


def _folder(source: Source, data_dir: Path) -> Path:
    if source.place is not None:
        return source.place
    return next((data_dir / sub for sub in source.folders if (data_dir / sub).is_dir()), data_dir)


def fingerprint(name: str, data_dir: Path | None = None) -> str:
    """Hash of names, sizes and first megabytes of the files that `load` reads, of folders only the names; "" for a data set without any."""
    source = source_of(name)
    if source.files is None or (data_dir is None and source.needs_folder):
        return ""
    folder, found = _folder(source, data_dir or Path()), hashlib.sha256()
    for path in sorted(path for path in source.files(folder) if path.exists()):
        found.update(str(path.relative_to(folder) if path != folder else path.name).encode())
        if path.is_file():
            found.update(f" {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                found.update(file.read(2**20))
    return found.hexdigest()
