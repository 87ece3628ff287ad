"""Images that studies learn: Fashion-MNIST, MNIST and SVHN, as they are published."""

from __future__ import annotations

import gzip
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
FOLDER = "folder of the published files; without it, the command that gets them is told"


class Source(Protocol):
    """Settings that say where images come from."""

    @property
    def dataset(self) -> Dataset:
        """Which of `CLASSES`."""

    @property
    def data(self) -> Path | None:
        """Folder of its files."""


def how_to_get(dataset: Dataset) -> str:
    """Return the command that gets a data set's files, and the setting that names them."""
    name, inside = CLASSES[dataset]
    which = "split=s" if dataset == "svhn" else "train=s"
    over = "('train', 'test')" if dataset == "svhn" else "(True, False)"
    folder = str(Path("data") / inside)
    debian = (
        "apt-get install dataset-fashion-mnist, then --data /usr/share/datasets/fashion-mnist; or: "
        if dataset == "fashion"
        else ""
    )
    return debian + (
        f"python -c \"from torchvision.datasets import {name} as D; [D('data', {which}, "
        f'download=True) for s in {over}]", then --data {folder}'
    )


def read_images(
    folder: Path | None, split: Split, dataset: Dataset = "fashion"
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, ``(n, 28, 28)`` or ``(n, 32, 32, 3)`` of uint8, and labels.

    Raises
    ------
    StoreError
        There is no folder, or it lacks a file; the message has the command that gets it.
    """
    paths = _files(folder, split, dataset)
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
    if folder is None:
        raise StoreError(f"no folder of {CLASSES[dataset][0]}'s files: {how_to_get(dataset)}")
    if dataset == "svhn":
        path = folder / f"{split}_32x32.mat"  # as published and as torchvision keeps it
        if not path.exists():
            raise StoreError(f"{folder} has no {path.name}: {how_to_get('svhn')}")
        return [path]
    packed = folder / f"{dataset}.npz"  # arrays train_images, train_labels, test_images, ...
    if packed.exists():
        return [packed]
    files = []
    inside = folder / CLASSES[dataset][1]
    folder = inside if inside.is_dir() else folder  # a root of torchvision's will do
    for kind in ("images-idx3", "labels-idx1"):
        path = folder / f"{'t10k' if split == 'test' else split}-{kind}-ubyte.gz"
        if not path.exists():
            path = path.with_suffix("")
        if not path.exists():
            raise StoreError(
                f"{folder} has no {path.name} or {path.name}.gz: {how_to_get(dataset)}"
            )
        files.append(path)
    return files


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
