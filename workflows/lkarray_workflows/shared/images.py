"""Images that studies learn: MNIST, Fashion-MNIST and SVHN, as they are published."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lkarray.errors import StoreError

Dataset = Literal["fashion", "mnist", "svhn"]
Split = Literal["train", "test"]
#: Torchvision's classes, and the subfolder that holds the files.
CLASSES = {
    "fashion": ("FashionMNIST", "FashionMNIST/raw"),
    "mnist": ("MNIST", "MNIST/raw"),
    "svhn": ("SVHN", ""),
}
NAMES = {
    "fashion": (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    ),
    "mnist": tuple("0123456789"),
    "svhn": tuple("0123456789"),
}
FOLDER = "where the images are: a folder of torchvision's, the published files, or an .npz archive"
#: The first labels as published: both data sets have files of the same names.
FIRST = {
    "fashion": {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "test": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]},
    "mnist": {"train": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "test": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]},
}
#: Arrays of an archive.
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class Source(Protocol):
    """Settings that say where images come from."""

    @property
    def dataset(self) -> Dataset:
        """Which of `CLASSES`."""

    @property
    def data(self) -> Path | None:
        """Folder of its files."""


def how_to_get(dataset: Dataset) -> str:
    """Return where a data set can be had, and the setting that names it."""
    name, _ = CLASSES[dataset]
    which = "split=s" if dataset == "svhn" else "train=s"
    over = "('train', 'test')" if dataset == "svhn" else "(True, False)"
    ways = [
        f"python -c \"from torchvision.datasets import {name} as D; [D('data', {which}, "
        f'download=True) for s in {over}]", then --data data'
    ]
    if dataset == "fashion":
        ways.insert(
            0,
            "apt-get install dataset-fashion-mnist, then --data /usr/share/datasets/fashion-mnist",
        )
    if dataset != "svhn":
        ways.append(f"--data {dataset}.npz, an archive of {', '.join(ARRAYS)}")
    return "; or: ".join(ways)


def read_images(
    folder: Path | None, split: Split, dataset: Dataset = "fashion"
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, ``(n, 28, 28)`` or ``(n, 32, 32, 3)`` of uint8, and labels.

    Parameters
    ----------
    folder
        A root of torchvision's, or a folder of the published files, packed or not; or of
        ``mnist.npz`` (``fashion.npz``), or that archive itself.

    Raises
    ------
    StoreError
        There is no folder, it lacks a file, or one is damaged or of another data set; the message
        says where the data set can be had.
    """
    paths = _files(folder, split, dataset)
    try:
        images, labels = _read(paths, split, dataset)
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{paths[0]} cannot be read ({error}); get it again: {how_to_get(dataset)}"
        ) from error
    if len(images) != len(labels):
        raise StoreError(
            f"{paths[0].parent} has {len(images):,} images and {len(labels):,} labels for {split}; "
            f"get them again: {how_to_get(dataset)}"
        )
    for other, first in FIRST.items():
        if other != dataset and labels[:10].tolist() == first[split]:
            raise StoreError(
                f"{paths[-1]} is of {CLASSES[other][0]}, and {CLASSES[dataset][0]} was asked for: "
                f"give --dataset {other}, or other files"
            )
    return images, labels


def _read(paths: list[Path], split: Split, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    if paths[0].suffix == ".npz":
        with np.load(paths[0]) as arrays:
            return arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if dataset == "svhn":
        return _read_svhn(paths[0])
    arrays = []
    for path, header in zip(paths, (16, 8), strict=True):
        content = path.read_bytes()
        raw = gzip.decompress(content) if path.suffix == ".gz" else content
        arrays.append(np.frombuffer(raw, np.uint8, offset=header))
    return arrays[0].reshape(-1, 28, 28), arrays[1]


def require_files(source: Source, made: Path | None = None) -> None:
    """Raise, as `read_images` would, unless all files of a data set are there.

    Nothing is required once ``made``, the study's own copy of what it takes of them, exists.
    """
    if made is not None and made.exists():
        return
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        _files(source.data, split, source.dataset)


def _files(folder: Path | None, split: Split, dataset: Dataset) -> list[Path]:
    """Return the files of images and of labels, packed or not; of SVHN, or an archive, one file."""
    name, inside = CLASSES[dataset]
    if folder is None:
        raise StoreError(f"no --data with {name}'s images: {how_to_get(dataset)}")
    if not folder.exists():
        raise StoreError(f"there is no {folder} with {name}'s images: {how_to_get(dataset)}")
    if dataset == "svhn":
        names = [f"{split}_32x32.mat"]  # as published and as torchvision keeps it
    else:
        archive = folder if folder.suffix == ".npz" else folder / f"{dataset}.npz"
        if archive.exists():
            return [archive]
        part = "t10k" if split == "test" else split
        names = [f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    home = folder / inside if (folder / inside).is_dir() else folder  # a root of torchvision's
    return [_file(home, some, dataset) for some in names]


def _file(home: Path, name: str, dataset: Dataset) -> Path:
    names = [name] if dataset == "svhn" else [name, f"{name}.gz"]
    for some in names:
        if (home / some).exists():
            return home / some
    raise StoreError(f"{home} has no {' or '.join(names)}: {how_to_get(dataset)}")


def _read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    arrays = loadmat(str(path))
    labels = arrays["y"].ravel().astype(np.int64) % 10  # the digit 0 has the label 10
    return np.ascontiguousarray(arrays["X"].transpose(3, 0, 1, 2)), labels


def take_images(source: Source, train: int, test: int, *, seed: int) -> dict[str, Any]:
    """Return some images and labels of either split: ``train_images``, ``test_labels``, ..."""
    rng = np.random.default_rng(seed)
    kept: dict[str, Any] = {}
    wanted: dict[Split, int] = {"train": train, "test": test}
    for split, count in wanted.items():
        images, labels = read_images(source.data, split, source.dataset)
        chosen = rng.choice(len(labels), min(count, len(labels)), replace=False)
        kept |= {f"{split}_images": images[chosen], f"{split}_labels": labels[chosen]}
    return kept


def as_inputs(images: np.ndarray) -> torch.Tensor:
    """Return images as networks take them: ``(n, channel, row, column)`` of 0 to 1."""
    values = torch.from_numpy(images).float() / 255
    return values.unsqueeze(1) if values.ndim == 3 else values.permute(0, 3, 1, 2).contiguous()


def data_set(path: Path, split: str, count: int | None = None) -> TensorDataset:
    """Return images ``(n, channel, row, column)`` of 0 to 1 from a file, and their classes."""
    with np.load(path) as data:
        images = as_inputs(data[f"{split}_images"][:count])
        return TensorDataset(images, torch.from_numpy(data[f"{split}_labels"][:count]).long())
