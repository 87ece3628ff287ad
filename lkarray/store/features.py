"""Where features are stored, and when a block of samples counts.

Features are sums over draws of the weights, two of them (over even and odd draws) where there are
several, so that more draws can be added. A block of samples is written whole, to the slot that its
record does not name; that is flushed, and only then the record is replaced. A record has the
block's draws, slot and number and a checksum of its chunks' checksums, which tells chunks, and
records, in each other's places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.errors import FingerprintError
from lkarray.schema import MODE, SAMPLE, VariableSpec
from lkarray.store.arrays import create_array, create_coord, require_space
from lkarray.store.chunks import (
    chunk_key,
    chunk_keys,
    damaged,
    flush,
    flush_tree,
    read,
    require_chunks,
    stored_numbers,
)
from lkarray.store.committed import lazily, require_seals
from lkarray.store.fingerprints import group_made_with, refuse_changes
from lkarray.store.location import (
    StoreLike,
    as_store,
    create_root,
    describe,
    enter,
    entries_of,
    writing,
)
from lkarray.store.names import make_group
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import described, seal
from lkarray.store.trace_digests import chain
from lkarray.store.typed import attributes_of
from lkarray.store.variables import variables

GROUP = schema.FEATURES
HALF = "half"
_ROWS, _COLUMNS = 128, 16384
TOTAL = VariableSpec("total", ("slot", HALF, SAMPLE, MODE), "float32", "", "sum over draws")
TAKEN = VariableSpec(
    "taken", ("block", "field"), "int64", "", "draws in a block's sums; slot; block; checksum"
)
_FIELDS = 4


@dataclass(frozen=True)
class FeatureLayout:
    """Features to be stored.

    Attributes
    ----------
    samples, modes
        Sizes.
    halves
        1 of gradients at w*, 2 of means over draws.
    rows
        Samples of a block.
    dtype
        Of the sums.
    coords
        Labels of the samples.
    attrs
        Of the group: what a resume keeps to.
    """

    samples: int
    modes: int
    halves: int
    rows: int
    dtype: str
    coords: Mapping[str, np.ndarray]
    attrs: Mapping[str, Any]

    @property
    def slots(self) -> int:
        """Places of a block's sums: two where a block is written again and again."""
        return self.halves

    @property
    def bytes(self) -> int:
        """Bytes of all sums."""
        each = np.dtype(self.dtype).itemsize
        return self.slots * self.halves * self.samples * self.modes * each


def feature_fingerprint(root: zarr.Group) -> dict[str, Any]:
    """Return the group of a store's features, and what they were made with; empty if none."""
    return dict(entries_of(root).get(GROUP, {}))


def stored_features(path: StoreLike, fingerprint: Mapping[str, Any]) -> zarr.Group | None:
    """Return the root of a store in which these features were begun, if they were.

    Raises
    ------
    FingerprintError
        The store holds others.
    """
    return group_made_with(path, GROUP, fingerprint, feature_fingerprint)


class FeatureWriter:
    """Features being written; begins them, or goes on with those that are there.

    Raises
    ------
    FingerprintError
        The store holds others.
    DamagedError
        Something of them is missing, or was changed.
    """

    def __init__(self, path: Any, layout: FeatureLayout, fingerprint: Mapping[str, Any]) -> None:
        self.root = create_root(as_store(path))
        before = feature_fingerprint(self.root).get(GROUP)
        if before is None:
            self._create(layout, dict(fingerprint))
        else:
            where = f"{describe(self.root.store)}, group {GROUP!r},"
            refuse_changes(before, fingerprint, where, remedy="use another path")
            require_seals(self.root, GROUP)
        self._total = stored_at(self.root, f"{GROUP}/{TOTAL.name}")
        self._taken = stored_at(self.root, f"{GROUP}/{TAKEN.name}")
        self._records = taken(self.root)
        self.rows = rows_of(self.root)

    def _create(self, layout: FeatureLayout, fingerprint: dict[str, Any]) -> None:
        root = self.root
        require_space(root.store, layout.bytes)
        with writing(root.store):
            ours = {TOTAL.name, TAKEN.name} | set(layout.coords)
            group = make_group(root, GROUP, ours=ours, attributes=dict(layout.attrs))
            shape = (layout.slots, layout.halves, layout.samples, layout.modes)
            chunks = (1, 1, min(layout.rows, _ROWS), min(layout.modes, _COLUMNS))
            extra = {"rows": layout.rows}
            create_array(group, TOTAL, shape, chunks, dtype=layout.dtype, attrs=extra)
            blocks = -(-layout.samples // layout.rows)
            records = np.zeros((blocks, _FIELDS), np.int64)
            records[:, 2] = np.arange(blocks)
            create_array(group, TAKEN, records.shape, (1, _FIELDS))[:] = records
            for name, values in layout.coords.items():
                create_coord(group, name, values, SAMPLE)
            seal(group, filling=[TOTAL.name, TAKEN.name])
            flush_tree(root.store, GROUP)
            enter(root, **{GROUP: {GROUP: fingerprint}})

    @property
    def blocks(self) -> list[slice]:
        """Samples of each block."""
        n = self._total.shape[2]
        return [slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows)]

    @property
    def draws(self) -> np.ndarray:
        """Draws that each block has."""
        return self._records[:, 0]

    def sums(self, block: int) -> np.ndarray:
        """Return the sums of a block, ``(half, sample, mode)``: zeros where it has no draws."""
        rows = self.blocks[block]
        draws, slot = self._records[block, :2].tolist()
        if draws == 0:
            shape = (self._total.shape[1], rows.stop - rows.start, self._total.shape[3])
            return np.zeros(shape, self._total.dtype)
        stored = StoredBlock(self._total, rows, self._records[block])
        for at in stored.leading:
            require_chunks(self._total, at)
        if not stored.is_sound():
            raise damaged(
                self.root.store,
                f"{self._total.path}: chunks of block {block} are not those that were committed",
            )
        return read(self._total, (slot, slice(None), rows))

    def commit(self, block: int, sums: np.ndarray, draws: int) -> None:
        """Make the sums of a block count, as those of the first ``draws`` draws."""
        before, slot = self._records[block, :2].tolist()
        if before and self._total.shape[0] > 1:
            slot = 1 - slot
        record = np.array([draws, slot, block, 0])[: self._records.shape[1]]
        written = StoredBlock(self._total, self.blocks[block], record)
        with writing(self.root.store, safe="Blocks that were committed are kept"):
            self._total[slot, :, written.samples] = sums
            flush(self.root.store, written.keys)
            if len(record) == _FIELDS:
                record[3] = written.checksum()
            self._taken[block] = record
            flush(self.root.store, chunk_keys(self._taken, (block,)))
        self._records[block] = record


@dataclass(frozen=True)
class StoredBlock:
    """Some samples of the sums, and the record that makes them count."""

    array: zarr.Array
    samples: slice
    record: np.ndarray

    @property
    def number(self) -> int:
        """Its place among the blocks."""
        return int(self.record[2])

    @property
    def leading(self) -> list[tuple[int, ...]]:
        """First indices of its chunks."""
        return list(_chunks(self.array, int(self.record[1]), self.samples))

    @property
    def keys(self) -> list[str]:
        """Keys of its chunks."""
        return [key for at in self.leading for key in chunk_keys(self.array, at)]

    def checksum(self) -> int:
        """Return the checksum of the chunks that are stored."""
        return chain(stored_numbers(self.array, self.keys))

    def is_sound(self) -> bool:
        """Say whether the chunks are those that were committed, as far as the record can tell."""
        return len(self.record) < _FIELDS or self.checksum() == self.record[3]


def _chunks(array: zarr.Array, slot: int, rows: slice) -> Iterator[tuple[int, ...]]:
    """Yield the first indices of the chunks in which some rows of a slot lie."""
    step = array.chunks[2]
    for half in range(array.shape[1]):
        for block in range(rows.start // step, -(-rows.stop // step)):
            yield slot, half, block


def taken(root: zarr.Group) -> np.ndarray:
    """Return the records of the blocks, ``(block, field)``: draws, slot, block, checksum.

    Raises
    ------
    DamagedError
        A record is missing, cannot be read, or is of another block.
    """
    array = stored_at(root, f"{GROUP}/{TAKEN.name}")
    require_chunks(array)
    records = read(array, ...)
    if records.shape[1] == _FIELDS:  # the first ones had no more than draws and slot
        for block in np.flatnonzero(records[:, 2] != np.arange(len(records))).tolist():
            key = chunk_key(array, (block, 0))
            raise damaged(root.store, f"{key} is the record of another block")
    return records


def rows_of(root: zarr.Group) -> int:
    """Return the samples of a block."""
    return int(attributes_of(stored_at(root, f"{GROUP}/{TOTAL.name}"))["rows"])


def whole(root: zarr.Group, draws: int) -> bool:
    """Say whether every block has the draws asked for.

    Raises
    ------
    FingerprintError
        A block has more: sums of fewer are not kept.
    """
    have = taken(root)[:, 0]
    if have.max() > draws:
        raise FingerprintError(
            f"{describe(root.store)} holds features of {have.max()} draws, and sums of fewer are "
            f"not kept: pass smooth={have.max()} or more, or use another path"
        )
    return bool((have == draws).all())


def committed_blocks(root: zarr.Group) -> Iterator[StoredBlock]:
    """Yield the blocks of stored features that count."""
    total, rows = stored_at(root, f"{GROUP}/{TOTAL.name}"), rows_of(root)
    for block, record in enumerate(taken(root)):
        if record[0]:
            stop = min((block + 1) * rows, total.shape[2])
            yield StoredBlock(total, slice(block * rows, stop), record)


def open_features(root: zarr.Group) -> xr.Dataset:
    """Open stored features lazily, those of which every block has as many draws.

    Returns
    -------
    xarray.Dataset
        ``feature(mode, sample)``, and of means over draws ``feature_half(half, mode, sample)``;
        without variables where some blocks lack draws.

    Raises
    ------
    DamagedError
        Something of them is missing or cannot be read.
    """
    require_seals(root, GROUP)
    known = variables(root, GROUP, lazy=(), skip={TOTAL.name, TAKEN.name})
    ds = xr.Dataset(coords=known, attrs=described(group_at(root, GROUP)))
    array, rows, records = stored_at(root, f"{GROUP}/{TOTAL.name}"), rows_of(root), taken(root)
    draws = int(records[0, 0])
    if not draws or (records[:, 0] != draws).any():
        return ds
    lazy = lazily(array)  # (slot, half, sample, mode)
    spans = [slice(i * rows, (i + 1) * rows) for i in range(len(records))]
    parts = [lazy[slot, :, span] for slot, span in zip(records[:, 1].tolist(), spans, strict=True)]
    sums = da.concatenate(parts, axis=1)  # (half, sample, mode)
    spec = schema.FEATURE
    dims = (HALF, SAMPLE, MODE)
    mean = xr.Variable(dims[1:], sums.sum(0) / draws if len(sums) > 1 else sums[0], spec.attrs())
    ds[spec.name] = mean.transpose(*spec.dims)
    if len(sums) > 1:
        counts = np.array([(draws + 1) // 2, draws // 2], array.dtype)
        halves = xr.Variable(dims, sums / counts[:, None, None], spec.attrs())
        ds[f"{spec.name}_half"] = halves.transpose(HALF, *spec.dims)
    ds.attrs["draws"] = draws if len(sums) > 1 else 0
    return ds
