"""A panel of a stored audit: its results, its record, and the state that its pass goes on from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from lkarray.schema import AUDIT
from lkarray.store.arrays import CODECS
from lkarray.store.audit_layout import FIELDS, INFLUENCE, RECORD, RESULTS, STATE, AuditLayout
from lkarray.store.checksums import crc, json_digest
from lkarray.store.chunks import (
    chunk_key,
    chunk_keys,
    damaged,
    flush,
    flush_tree,
    read,
    read_whole,
    stored_numbers,
)
from lkarray.store.committed import array_names
from lkarray.store.location import writing
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.trace_digests import chain

#: A panel's state is kept every so many seconds, and after so many times what keeping it takes.
_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0
#: Name in the state: checksums of the influence written so far.
_WRITTEN = "written"


class PanelWriter:
    """One panel of an audit: its results, and the state that its pass can go on from."""

    def __init__(self, root: zarr.Group, layout: AuditLayout, panel: int) -> None:
        self._root, self._layout, self.panel = root, layout, panel
        self.audits = layout.panels[panel]
        self._record = stored_at(root, f"{layout.group}/{RECORD.name}")
        self._influence = stored_at(root, f"{layout.group}/{INFLUENCE.name}")
        first, _, *rest = self._influence.cdata_shape
        self._written = np.zeros((first, *rest), np.uint32)
        self._keys: list[str] = []
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def _folder(self) -> str:
        return f"{self._layout.group}/{STATE}/{self.panel}"

    def resume(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Return the stretches left and the state, of a pass that was cut off.

        Raises
        ------
        DamagedError
            The state is not the one that was left.
        """
        record = self._own_record()
        left, slot = int(record[0]), int(record[1])
        if left <= 0:
            return None
        state = read_pass(self._root, f"{self._folder}/{slot}")
        if has_checksums(self._record):
            if pass_digest(left, self.panel, state) != record[3]:
                raise damaged(
                    self._root.store, f"{self._folder}/{slot} is not the state that was left"
                )
            self._written = state.pop(_WRITTEN)
        return left, state

    def _own_record(self) -> np.ndarray:
        return np.asarray(read_records(self._root, self._layout.group)[self.panel])

    def due(self) -> bool:
        """Say whether it is time to commit."""
        pause = max(_COMMIT_SECONDS, _COMMIT_SHARE * self._cost)
        return time.monotonic() - self._last >= pause

    def commit(self, left: int, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state, with ``left`` stretches to go."""
        began = time.monotonic()
        slot = 1 - max(int(self._own_record()[1]), 0)
        root = self._root
        checked = has_checksums(self._record)
        kept = {**state, _WRITTEN: self._written} if checked else dict(state)
        with writing(root.store, safe="What was committed before is kept"):
            group = root.create_group(f"{self._folder}/{slot}", overwrite=True)
            for name, values in kept.items():
                array = group.create_array(
                    name,
                    shape=values.shape,
                    chunks=_state_chunks(values),
                    dtype=values.dtype,
                    compressors=CODECS,
                    config={"write_empty_chunks": True},
                )
                array[...] = values
            flush_tree(root.store, f"{self._folder}/{slot}")
            digest = pass_digest(left, self.panel, kept) if checked else 0
            self._count(left, slot, {STATE: digest})
        self._last = time.monotonic()
        self._cost = self._last - began

    def write(self, values: np.ndarray, window: int | None) -> None:
        """Write influence of the panel, ``(example or group, audit, ...)``, of one window."""
        place: tuple[Any, ...] = (slice(None), self.audits)
        if window is not None:
            place = (*place, *[slice(None)] * (values.ndim - 2), window)
        with writing(self._root.store, safe="What was committed before is kept"):
            self._influence[place] = values
        array = self._influence
        chunks = [
            chunk
            for chunk in np.ndindex(*array.cdata_shape)
            if chunk[1] == self.panel and (window is None or chunk[-1] == window)
        ]
        keys = [chunk_key(array, chunk) for chunk in chunks]
        for chunk, checksum in zip(chunks, stored_numbers(array, keys), strict=True):
            self._written[(chunk[0], *chunk[2:])] = checksum
        self._keys += keys

    def finish(self, sums: Mapping[str, np.ndarray]) -> None:
        """Write the sums, and let the panel count."""
        checksums = {INFLUENCE.name: chain(self._written.reshape(-1))}
        with writing(self._root.store, safe="What was committed before is kept"):
            for name, spec in self._layout.specs().items():
                array = stored_at(self._root, f"{self._layout.group}/{name}")
                place = tuple(self.audits if dim == AUDIT else slice(None) for dim in spec.dims)
                array[place] = sums[name]
                keys = panel_keys(array, self.panel)
                checksums[name] = chain(stored_numbers(array, keys))
                self._keys += keys
            self._count(0, 0, checksums)
            sync(self._root.store.delete_dir(self._folder))

    def _count(self, left: int, slot: int, checksums: Mapping[str, int]) -> None:
        flush(self._root.store, self._keys)
        self._keys = []
        record = [left, slot]
        if has_checksums(self._record):
            record += [self.panel, *(checksums.get(name, 0) for name in FIELDS[3:])]
        self._record[self.panel] = record
        flush(self._root.store, chunk_keys(self._record, (self.panel,)))


def read_records(root: zarr.Group, group: str) -> np.ndarray:
    """Return the records of an audit's panels, ``(panel, field)``.

    Raises
    ------
    DamagedError
        One is missing, cannot be read, or is of another panel.
    """
    array = stored_at(root, f"{group}/{RECORD.name}")
    if not has_checksums(array):  # of lkarray 0.1.0, where a panel that was not begun had none
        return read(array, ...)
    records = read_whole(array)
    for panel in np.flatnonzero(records[:, 2] != np.arange(len(records))).tolist():
        raise damaged(root.store, f"{chunk_key(array, (panel, 0))} is the record of another panel")
    return records


def panels_left(root: zarr.Group, group: str) -> list[int]:
    """Return the panels that do not count yet."""
    return np.flatnonzero(read_records(root, group)[:, 0] != 0).tolist()


def committed_panels(root: zarr.Group, group: str) -> Iterator[tuple[zarr.Array, int, int | None]]:
    """Yield a stored audit's arrays, each with a panel that counts, and its checksum if it has one.

    What a panel has of an array is at `panel_leading`.
    """
    record = read_records(root, group)
    arrays = [stored_at(root, f"{group}/{name}") for name in RESULTS]
    checked = record.shape[1] == len(FIELDS)  # those of lkarray 0.1.0 have no checksums
    for panel in np.flatnonzero(record[:, 0] == 0).tolist():
        for array in arrays:
            field = FIELDS.index(array.basename)
            yield array, panel, int(record[panel, field]) if checked else None


def has_checksums(record: zarr.Array) -> bool:
    """Say whether records have checksums; those of lkarray 0.1.0 have none."""
    return bool(record.shape[1] == len(FIELDS))


def panel_leading(array: zarr.Array, panel: int) -> list[tuple[int, ...]]:
    """Return the first indices of the chunks that a panel has of an array."""
    if (array.metadata.dimension_names or ("",))[0] == AUDIT:  # type: ignore[union-attr]
        return [(panel,)]
    return [(block, panel) for block in range(array.cdata_shape[0])]


def panel_keys(array: zarr.Array, panel: int) -> list[str]:
    """Return the keys of the chunks that a panel has of an array, in order."""
    return [key for first in panel_leading(array, panel) for key in chunk_keys(array, first)]


def read_pass(root: zarr.Group, path: str) -> dict[str, np.ndarray]:
    """Return the state that a pass left to go on from.

    Raises
    ------
    DamagedError
        Something of it is missing or cannot be read.
    """
    names = array_names(group_at(root, path))
    return {name: read_whole(stored_at(root, f"{path}/{name}")) for name in names}


def pass_digest(left: int, panel: int, state: Mapping[str, np.ndarray]) -> int:
    """Return a checksum of a state, and of whose it is."""
    arrays = [
        [name, values.dtype.str, list(values.shape), crc(_bytes(values))]
        for name, values in sorted(state.items())
    ]
    return json_digest([left, panel, arrays])


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _state_chunks(values: np.ndarray) -> tuple[int, ...]:
    """Return chunks of some 64 MiB."""
    if not values.ndim:
        return ()
    first = max(values[:1].nbytes, 1)
    return (min(max((64 << 20) // first, 1), max(len(values), 1)), *map(int, values.shape[1:]))
