"""Small files in the formats of the real data sets."""

import gzip
import pickle
import struct

import numpy as np
from PIL import Image

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(folder, *, train=40, test=20, zipped=True):
    """Four IDX files of random images; returns the arrays in the order of `IDX`."""
    rng = np.random.default_rng(0)
    arrays = []
    for n in (train, test):
        arrays += [rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(IDX, arrays, strict=True):
        contents = idx_bytes(array)
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(contents, mtime=0) if zipped else contents)
    return arrays


def cifar_names(classes):
    return ([f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"], "test_batch" if classes == 10 else "test")


def write_cifar(folder, classes, n=12):
    """Pickles as in the published archives: protocol 2, keys that are bytes, labels in a list."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = cifar_names(classes)
    written = {}
    for name in [*train, test]:
        images = rng.integers(0, 256, (n, 3072), np.uint8)
        labels = rng.integers(0, classes, n).tolist()
        batch = {b"data": images, b"batch_label": b"tiny"}
        batch |= {b"labels": labels} if classes == 10 else {b"fine_labels": labels, b"coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        written[name] = images.reshape(n, 3, 32, 32), labels
    return written


def save(path, seed, *, grey=False, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    # One colour for each image, which JPEG keeps nearly as it is.
    colour = np.random.default_rng(seed).integers(0, 256, 1 if grey else 3)
    pixels = np.broadcast_to(colour.astype(np.uint8), (*size[::-1], len(colour)))
    Image.fromarray(pixels[..., 0] if grey else np.ascontiguousarray(pixels)).save(path, "JPEG", quality=95)
    return colour
