"""Random access to a map-style dataset, as batches of tensors on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from lkarray.nn.flat import tensor_bytes

#: Datasets up to this size are held in memory; larger ones are read item by item.
CACHE_BYTES = 2 << 30
_HASHED_ITEMS = 64

#: What a model is called with, and what its loss is told beside the output.
Inputs = Tensor | dict[str, Tensor]
Target = Tensor | dict[str, Tensor]
Columns = dict[str, Tensor]

_INPUT, _TARGET, LABELS = "input", "target", "labels"


class MapDataset(Protocol):
    """A torch ``Dataset`` with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """A map-style dataset as batches of tensors.

    An item is ``(input, target)``; or a dict of tensors, with which the model is called by
    keyword, and whose ``labels``, where there are any, are the target (otherwise the whole dict
    is); or a lone tensor, which is its own target (a token sequence).

    A dataset of up to 2 GiB is read once and kept on ``device``; a larger one is read item by
    item for each batch. Items must not change from one reading to the next: turn random
    augmentation off, or a resumed run could not repeat the numbers.

    Parameters
    ----------
    dataset
        A map-style dataset.
    name
        What to call it in errors.
    device
        Where batches go.

    Attributes
    ----------
    n
        Number of items.
    identity
        A hash of the data: of all of it where it is held in memory, of 64 evenly spaced items
        and the length otherwise.

    Raises
    ------
    TypeError
        Not a map-style dataset, or its items are not as above.
    ValueError
        It is empty, or an item or the length changes between two readings.
    """

    def __init__(self, dataset: MapDataset, *, name: str, device: torch.device) -> None:
        self._dataset, self._name, self._device = dataset, name, device
        check_dataset(dataset, name)
        self.n = len(dataset)
        first, again = self._item(0), self._item(0)
        if any(tensor_bytes(first[key]) != tensor_bytes(again[key]) for key in first):
            raise ValueError(
                f"{name}: item 0 differs between two readings; turn random augmentation off, so "
                "that every step is a function of seed, chain and step"
            )
        self.item_bytes = max(sum(part.nbytes for part in first.values()), 1)
        self._held: Columns | None = None
        self._views: list[Columns] | None = None
        if _plain(dataset) or self.item_bytes * self.n <= CACHE_BYTES:
            self._held = self._read_all(dataset, list(first))
        self.identity = self._hash()

    def _item(self, index: int) -> Columns:
        item = self._dataset[index]
        if isinstance(item, Mapping):
            parts = {str(key): value for key, value in item.items()}
        elif isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
            parts = dict(zip((_INPUT, _TARGET), item, strict=False))
        elif isinstance(item, (Tensor, np.ndarray)):
            parts = {_INPUT: item}
        else:
            raise TypeError(
                f"{self._name}: item {index} is {type(item).__name__}, expected a pair "
                "(input, target), a dict of tensors, or a tensor"
            )
        columns = {key: default_collate([value]) for key, value in parts.items()}
        bad = {key: type(parts[key]).__name__ for key in columns if not _is_tensor(columns[key])}
        if bad or not columns:
            raise TypeError(
                f"{self._name}: item {index} must hold tensors, arrays or numbers, not {bad}"
            )
        return columns

    def _read_all(self, dataset: MapDataset, names: list[str]) -> Columns:
        if _plain(dataset):
            held = dict(zip(names, dataset.tensors, strict=True))  # type: ignore[attr-defined]
        else:
            items = [self._item(i) for i in range(self.n)]
            self._same_length()
            held = _join(items, self._name)
        return {key: part.detach().to(self._device) for key, part in held.items()}

    def _same_length(self) -> None:
        if len(self._dataset) != self.n:
            raise ValueError(
                f"{self._name} had {self.n} items and now has {len(self._dataset)}; a dataset must "
                "not change while it is sampled: pass a finished copy"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256(str(self.n).encode())
        if self._held is not None:
            parts = list(self._held.items())
        else:
            spread = np.linspace(0, self.n - 1, _HASHED_ITEMS).astype(int)
            parts = [part for i in spread for part in self._item(int(i)).items()]
        for key, part in parts:
            if key not in (_INPUT, _TARGET):
                digest.update(key.encode())
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(tensor_bytes(part))
        return digest.hexdigest()[:16]

    @property
    def held(self) -> bool:
        """Whether the data lie in memory, on the device."""
        return self._held is not None

    def take(self, indices: np.ndarray | Tensor) -> tuple[Inputs, Target]:
        """Return the items at ``indices`` as one batch, of the shape of ``indices``.

        Parameters
        ----------
        indices
            Shape ``(batch,)`` or ``(chain, batch)``. Where the data are held, a tensor on their
            device avoids a copy there.
        """
        flat = indices if indices.ndim == 1 else indices.reshape(-1)
        if self._held is not None:
            if isinstance(flat, np.ndarray):
                flat = torch.from_numpy(flat).to(self._device)
            columns = {key: part.index_select(0, flat) for key, part in self._held.items()}
        else:
            self._same_length()
            columns = _join([self._item(int(i)) for i in flat], self._name)
            columns = {key: part.to(self._device) for key, part in columns.items()}
        if indices.ndim > 1:
            shape = tuple(indices.shape)
            columns = {k: part.view(*shape, *part.shape[1:]) for k, part in columns.items()}
        return as_batch(columns)

    def slices(self, rows: int) -> Iterator[tuple[Inputs, Target]]:
        """Iterate over all items in order, ``rows`` at a time.

        Each is a copy: a model may change its input in place, and what is held may be the user's.
        """
        if self._held is None:
            for start in range(0, self.n, rows):
                yield self.take(np.arange(start, min(start + rows, self.n)))
            return
        if self._views is None or len(next(iter(self._views[0].values()))) != min(rows, self.n):
            parts = {key: part.split(rows) for key, part in self._held.items()}
            count = -(-self.n // rows)
            self._views = [{k: p[i] for k, p in parts.items()} for i in range(count)]
        for view in self._views:
            yield as_batch({key: part.clone() for key, part in view.items()})


def check_dataset(dataset: object, name: str) -> None:
    """Raise unless ``dataset`` is map-style and not empty."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} must be a map-style dataset with len() and indexing, "
            f"not {type(dataset).__name__}; wrap tensors in torch.utils.data.TensorDataset"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give at least one (input, target)")


def as_batch(columns: Columns) -> tuple[Inputs, Target]:
    """Return what a model is called with, and the target of its loss.

    Where an item is its own target, that is a copy: the model may change its input in place.
    """
    if _INPUT in columns:
        inputs = columns[_INPUT]
        return inputs, columns[_TARGET] if _TARGET in columns else inputs.clone()
    if LABELS in columns:
        return {key: part for key, part in columns.items() if key != LABELS}, columns[LABELS]
    return columns, {key: part.clone() for key, part in columns.items()}


def fresh(inputs: Any, target: Any) -> tuple[Any, Any]:
    """Return copies of a batch, for a model or a loss that changes what it is given in place.

    They are of the present mode: tensors made in inference mode can have no part in a gradient.
    """
    return _copied(inputs), _copied(target)


def _copied(values: Any) -> Any:
    return {k: v.clone() for k, v in values.items()} if isinstance(values, dict) else values.clone()


def batch_size(batch: tuple[Inputs, Target]) -> int:
    """Return the number of items of a batch (of the first axis)."""
    inputs = batch[0]
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def _join(items: list[Columns], name: str) -> Columns:
    try:
        return {key: torch.cat([item[key] for item in items]) for key in items[0]}
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{name}: its items do not make a batch ({error}); give all of them the same keys and "
            "shapes, for example by padding"
        ) from None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _plain(dataset: MapDataset) -> bool:
    """Say whether the items are the rows of one or two tensors and nothing else."""
    return (
        isinstance(dataset, TensorDataset)
        and type(dataset).__getitem__ is TensorDataset.__getitem__
        and len(dataset.tensors) <= 2
    )
