"""Random access to a map-style dataset, as batches of tensors on a device."""

from __future__ import annotations

import hashlib
import multiprocessing
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lkarray import progress as bars
from lkarray.nn.flat import tensor_bytes
from lkarray.nn.losses import IGNORED

#: Datasets up to this size are held in memory; larger ones are read item by item.
CACHE_BYTES = 2 << 30
_HASHED_ITEMS = 64
_COUNTED = 4096  # examples whose targets are looked at together

#: What a model is called with, and what its loss is told beside the output.
Inputs = Tensor | dict[str, Tensor]
Target = Tensor | dict[str, Tensor]
Columns = dict[str, Tensor]

#: Names of the two of a pair: no keyword of a model, so that no key of a dict is taken for one.
_INPUT, _TARGET, LABELS = " input", " target", "labels"


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
    augmentation off, or a resumed run could not repeat the numbers. Batches are a map-style
    dataset themselves, so that what was read can be passed on without being read again.

    Parameters
    ----------
    dataset
        A map-style dataset.
    name
        What to call it in errors and in the bar over its reading (see `lkarray.progress`).
    device
        Where batches go.
    num_workers
        Processes that read items, by torch's ``DataLoader``; 0 reads in this one. The items, and
        so all numbers, are the same. They pay where an item is decoded from a file, and the
        dataset must bear a fork (no open handles of HDF5 or LMDB, say).

    Attributes
    ----------
    n
        Number of items.
    device
        Where batches go.
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

    def __init__(
        self, dataset: MapDataset, *, name: str, device: torch.device, num_workers: int = 0
    ) -> None:
        self._dataset, self._name, self.device = dataset, name, device
        self._workers = num_workers
        self._counts: Callable[[Any], Tensor | None] | None = None
        check_dataset(dataset, name)
        self.n = len(dataset)
        first, again = self._item(0), self._item(0)
        if any(tensor_bytes(first[key]) != tensor_bytes(again[key]) for key in first):
            raise ValueError(
                f"{name}: item 0 differs between two readings; turn random augmentation off, so "
                "that every step is a function of seed, chain and step"
            )
        self.item_bytes = max(sum(tensor.nbytes for tensor in first.values()), 1)
        self._held: Columns | None = None
        self._views: list[Columns] | None = None
        if _plain(dataset) or self.item_bytes * self.n <= CACHE_BYTES:
            self._held = self._read_all(dataset, list(first))
        self.identity = self._hash()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int, /) -> Any:
        return self._dataset[index]

    def subset(self, rows: np.ndarray, name: str) -> Batches:
        """Return some items as batches of their own; those held are not read again."""
        chosen: Any
        if self._held is None:
            whole: Any = self  # a map-style dataset, if not torch's own class
            chosen = Subset(whole, rows.tolist())
        else:
            index = torch.from_numpy(rows).to(self.device)
            chosen = _Held({k: column.index_select(0, index) for k, column in self._held.items()})
        return Batches(chosen, name=name, device=self.device, num_workers=self._workers)

    def refuse_uncounted(self, counts: Callable[[Any], Tensor | None]) -> None:
        """Refuse examples of whose target nothing counts; where not held, when they are read.

        ``counts`` says of a target how many positions of each example count, or ``None``.

        Raises
        ------
        ValueError
            There are such examples; the message has their indices.
        """
        if self._held is None:
            self._counts = counts
            return
        for rows, _, target in self.numbered(_COUNTED):
            self._refuse(counts(target), rows)

    def _refuse(self, counted: Tensor | None, indices: np.ndarray) -> None:
        if counted is None:
            return
        bad = indices[(counted == 0).cpu().numpy()]
        if len(bad):
            more = " and more" if len(bad) > 5 else ""
            raise ValueError(
                f"{self._name}: examples {bad[:5].tolist()}{more} have no loss, since all of their "
                f"targets are {IGNORED}, padding, or neither of two classes; leave them out"
            )

    def _item(self, index: int) -> Columns:
        item = self._dataset[index]
        if isinstance(item, Mapping):
            fields = {str(key): value for key, value in item.items()}
        elif isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
            fields = dict(zip((_INPUT, _TARGET), item, strict=False))
        elif isinstance(item, (Tensor, np.ndarray)):
            fields = {_INPUT: item}
        else:
            raise TypeError(
                f"{self._name}: item {index} is {type(item).__name__}, expected a pair "
                "(input, target), a dict of tensors, or a tensor"
            )
        columns = {key: default_collate([value]) for key, value in fields.items()}
        bad = {key: type(fields[key]).__name__ for key in columns if not _is_tensor(columns[key])}
        if bad or not columns:
            raise TypeError(
                f"{self._name}: item {index} must hold tensors, arrays or numbers, not {bad}"
            )
        return columns

    def _read_all(self, dataset: MapDataset, names: list[str]) -> Columns:
        if _plain(dataset):
            held = dict(zip(names, dataset.tensors, strict=True))  # type: ignore[attr-defined]
        elif isinstance(dataset, _Held):
            held = dataset.columns
        else:
            items = self._shown(range(self.n))
            self._same_length()
            held = _join(items, self._name)
        return {key: column.detach().to(self.device) for key, column in held.items()}

    def _shown(self, indices: Sequence[int]) -> list[Columns]:
        """Return items, read under a bar."""
        items = []
        with bars.bar(f"reading {self._name}", total=len(indices), unit="item") as bar:
            for item in self._items(indices):
                items.append(item)
                bar.update()
        return items

    def _items(self, indices: Iterable[int]) -> Iterator[Columns]:
        """Yield items in order, read by workers where there are any."""
        wanted = [int(i) for i in indices]
        workers = min(self._workers, len(wanted))
        if workers < 1 or multiprocessing.current_process().daemon:  # which can have no children
            yield from (self._item(i) for i in wanted)
            return
        items: Any = _Items(self._item)
        loader: Any = DataLoader(
            items,
            sampler=wanted,
            batch_size=None,
            collate_fn=_same,
            num_workers=workers,
        )
        for item in loader:
            # A copy of its own: each tensor from a worker holds a file open.
            yield {key: tensor.clone() for key, tensor in item.items()}

    def _same_length(self) -> None:
        if len(self._dataset) != self.n:
            raise ValueError(
                f"{self._name} had {self.n} items and now has {len(self._dataset)}; a dataset must "
                "not change while it is sampled: pass a finished copy"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256(str(self.n).encode())
        if self._held is not None:
            tensors = list(self._held.items())
        else:
            spread = np.linspace(0, self.n - 1, _HASHED_ITEMS).astype(int)
            tensors = [entry for item in self._shown(spread.tolist()) for entry in item.items()]
        for key, tensor in tensors:
            # The names of a pair's two are made here: no part of the data.
            if key not in (_INPUT, _TARGET):
                digest.update(key.encode())
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
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
                flat = torch.from_numpy(flat).to(self.device)
            columns = {key: column.index_select(0, flat) for key, column in self._held.items()}
        else:
            self._same_length()
            columns = _join(list(self._items(flat.tolist())), self._name)
            if self._counts is not None:
                self._refuse(self._counts(as_batch(columns)[1]), np.asarray(flat.tolist()))
            columns = {key: column.to(self.device) for key, column in columns.items()}
        if indices.ndim > 1:
            shape = tuple(indices.shape)
            # (chain * batch, ...) to (chain, batch, ...)
            columns = {key: c.view(*shape, *c.shape[1:]) for key, c in columns.items()}
        return as_batch(columns)

    def numbered(
        self, size: int, indices: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Inputs, Target]]:
        """Iterate over items in order, ``size`` at a time, each batch with its indices.

        ``indices`` says of which items; ``None`` takes all.
        """
        chosen = np.arange(self.n) if indices is None else indices
        for start in range(0, len(chosen), size):
            rows = chosen[start : start + size]
            yield rows, *self.take(rows)

    def slices(self, rows: int) -> Iterator[tuple[Inputs, Target]]:
        """Iterate over all items in order, ``rows`` at a time.

        Each is a copy: a model may change its input in place, and what is held may be the user's.
        """
        if self._held is None:
            for _, inputs, target in self.numbered(rows):
                yield inputs, target
            return
        if self._views is None or len(next(iter(self._views[0].values()))) != min(rows, self.n):
            split = {key: column.split(rows) for key, column in self._held.items()}
            count = -(-self.n // rows)
            self._views = [{k: views[i] for k, views in split.items()} for i in range(count)]
        for view in self._views:
            yield as_batch({key: column.clone() for key, column in view.items()})


class _Held:
    """Items that lie in memory, column by column."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int, /) -> Any:
        item = {key: column[index] for key, column in self.columns.items()}
        return tuple(item.values()) if _INPUT in item else item


class _Items:
    """Items by their indices, for a loader's workers."""

    def __init__(self, read: Callable[[int], Columns]) -> None:
        self.read = read

    def __getitem__(self, index: int, /) -> Columns:
        return self.read(index)


def _same(item: Any) -> Any:
    return item


def check_workers(num_workers: int | None) -> int:
    """Return the number of processes that read items; raise unless it is one."""
    try:
        count = operator.index(num_workers or 0)
    except TypeError:
        raise TypeError(
            f"num_workers must be an integer or None, not {type(num_workers).__name__}"
        ) from None
    if count < 0:
        raise ValueError(f"num_workers must be at least 0, not {count}")
    return count


def check_dataset(dataset: object, name: str) -> None:
    """Raise unless ``dataset`` is map-style and not empty."""
    labelled = type(dataset).__module__.startswith("xarray")  # which nn knows nothing of
    others = (Mapping, type, str, bytes)
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    refused = labelled or isinstance(dataset, others) or getattr(dataset, "ndim", 1) == 0
    if not indexed or refused:
        raise TypeError(
            f"{name} must be a map-style dataset with len() and indexing, "
            f"not {type(dataset).__name__}; wrap tensors in torch.utils.data.TensorDataset"
        )
    if len(cast(Sized, dataset)) == 0:
        raise ValueError(f"{name} is empty; give at least one (input, target)")


def as_batch(columns: Columns) -> tuple[Inputs, Target]:
    """Return what a model is called with, and the target of its loss.

    Where an item is its own target, that is a copy: the model may change its input in place.
    """
    if _INPUT in columns:
        inputs = columns[_INPUT]
        return inputs, columns[_TARGET] if _TARGET in columns else inputs.clone()
    if LABELS in columns:
        return {key: c for key, c in columns.items() if key != LABELS}, columns[LABELS]
    return columns, {key: column.clone() for key, column in columns.items()}


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
