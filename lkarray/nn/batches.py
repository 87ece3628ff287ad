"""Random access to a map-style dataset, as batches of tensors on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from lkarray.nn.flat import tensor_bytes

#: Datasets up to this size are held in memory; larger ones are read item by item.
CACHE_BYTES = 2 << 30
_EVAL_BYTES = 64 << 20
_EVAL_ROWS = 4096
_HASHED_ITEMS = 64


class MapDataset(Protocol):
    """A torch ``Dataset`` with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """A dataset of ``(input, target)`` as batches of tensors.

    A dataset of up to 2 GiB is read once and kept on ``device``; a larger one is read item by
    item for each batch. Items must not change from one reading to the next: turn random
    augmentation off, or a resumed run could not repeat the numbers.

    Parameters
    ----------
    dataset
        A map-style dataset of pairs.
    name
        What to call it in errors.
    device
        Where batches go.

    Attributes
    ----------
    identity
        A hash of the data: of all of it where it is held in memory, of 64 evenly spaced items
        and the length otherwise.

    Raises
    ------
    TypeError
        Not a map-style dataset, or its items are not pairs.
    ValueError
        It is empty, or an item changes between two readings.
    """

    def __init__(self, dataset: MapDataset, *, name: str, device: torch.device) -> None:
        self._dataset, self._name, self._device = dataset, name, device
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{name} must be a map-style dataset with len() and indexing, "
                f"not {type(dataset).__name__}; wrap tensors in torch.utils.data.TensorDataset"
            )
        self.n = len(dataset)
        if self.n == 0:
            raise ValueError(f"{name} is empty; give at least one (input, target)")
        first, again = self._item(0), self._item(0)
        if any(tensor_bytes(a) != tensor_bytes(b) for a, b in zip(first, again, strict=True)):
            raise ValueError(
                f"{name}: item 0 differs between two readings; turn random augmentation off, so "
                "that every step is a function of seed, chain and step"
            )
        self.item_bytes = max(sum(part.nbytes for part in first), 1)
        self._held: tuple[Tensor, Tensor] | None = None
        self._views: list[tuple[Tensor, Tensor]] | None = None
        if _plain(dataset) or self.item_bytes * self.n <= CACHE_BYTES:
            self._held = self._read_all(dataset)
        self.identity = self._hash()

    def _item(self, index: int) -> tuple[Tensor, Tensor]:
        item = self._dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(
                f"{self._name}: item {index} is {type(item).__name__}, expected a pair "
                "(input, target)"
            )
        inputs, target = default_collate([tuple(item)])
        if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
            raise TypeError(
                f"{self._name}: item {index} must hold tensors, arrays or numbers, not "
                f"{type(item[0]).__name__} and {type(item[1]).__name__}"
            )
        return inputs, target

    def _read_all(self, dataset: MapDataset) -> tuple[Tensor, Tensor]:
        if _plain(dataset):
            inputs, target = dataset.tensors  # type: ignore[attr-defined]
        else:
            pairs = [self._item(i) for i in range(self.n)]
            inputs, target = (torch.cat(part) for part in zip(*pairs, strict=True))
        return inputs.detach().to(self._device), target.detach().to(self._device)

    def _hash(self) -> str:
        digest = hashlib.sha256(str(self.n).encode())
        if self._held is not None:
            parts = list(self._held)
        else:
            spread = np.linspace(0, self.n - 1, _HASHED_ITEMS).astype(int)
            parts = [part for i in spread for part in self._item(int(i))]
        for part in parts:
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(tensor_bytes(part))
        return digest.hexdigest()[:16]

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the items at ``indices``, as one batch."""
        if self._held is not None:
            rows = torch.from_numpy(indices).to(self._device)
            return self._held[0].index_select(0, rows), self._held[1].index_select(0, rows)
        pairs = [self._item(int(i)) for i in indices]
        inputs, target = (torch.cat(part) for part in zip(*pairs, strict=True))
        return inputs.to(self._device), target.to(self._device)

    def slices(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all items in order, ``rows`` at a time."""
        if self._held is not None:
            if self._views is None or len(self._views[0][1]) != min(rows, self.n):
                parts = (part.split(rows) for part in self._held)
                self._views = list(zip(*parts, strict=True))
            yield from self._views
        else:
            for start in range(0, self.n, rows):
                yield self.take(np.arange(start, min(start + rows, self.n)))

    def eval_rows(self) -> int:
        """Return how many items to evaluate at once: up to 4,096 items or 64 MiB of them."""
        return max(1, min(self.n, _EVAL_ROWS, _EVAL_BYTES // self.item_bytes))


def _plain(dataset: MapDataset) -> bool:
    """Say whether the items are the rows of tensors and nothing else."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is (
        TensorDataset.__getitem__
    )
