"""The group that `lkarray.save` fills: made, gone on with, and marked as complete last.

Its attribute `SAVED` says from the start whose kernel it is and that it is not complete. Labels
and the array of NaN follow, then the tiles. When all of it is on the disk, the group is marked as
complete and sealed. What is not complete is hidden from `lkarray.open`, and a rerun goes on with
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
from dask.base import tokenize
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray.errors import DamagedError, GroupError, StoreError
from lkarray.store.arrays import CODECS, finish
from lkarray.store.checksums import crc
from lkarray.store.chunks import chunk_key, missing
from lkarray.store.exact import checked_attrs, plain_attrs, require_exact, restored, storable
from lkarray.store.location import create_root, describe, exists, open_root, sizes
from lkarray.store.names import SAVED, names_in
from lkarray.store.results import COMPLETE, complete, is_unfinished, wanted_chunks
from lkarray.store.seals import broken_seals, content_digest, seal_of, stored_metadata
from lkarray.store.typed import attributes_of

Index = tuple[int, ...]
_CRC_BYTES = 4


@dataclass(frozen=True)
class SavedKernel:
    """A kernel as it is to be stored, all but its tiles.

    Attributes
    ----------
    group
        Where in the store.
    name, dims, shape, chunks, dtype, attrs
        Of the array.
    given, labels
        The coordinates as they were given, and as they are stored.
    encoding
        To store them with.
    fingerprint
        What a resumed save must share with the one that began.
    """

    group: str
    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    attrs: Mapping[str, Any]
    given: xr.Dataset
    labels: xr.Dataset
    encoding: Mapping[str, Any]
    fingerprint: Mapping[str, Any]

    @classmethod
    def of(cls, kernel: xr.DataArray, group: str, upper: bool) -> Self:
        """Describe a kernel.

        Raises
        ------
        SchemaError
            A label or an attribute cannot be stored as it is.
        """
        name, dims = str(kernel.name), tuple(map(str, kernel.dims))
        given = kernel.coords.to_dataset().reset_coords(drop=False)
        given = given.set_coords(list(given.variables)).compute()
        labels, encoding = storable(given)
        attrs = checked_attrs(kernel.attrs, name)
        beside = " ".join(str(c) for c in kernel.coords if c not in kernel.dims)
        fingerprint = {
            "name": name,
            "dims": list(dims),
            "shape": list(kernel.shape),
            "dtype": str(kernel.dtype),
            "attributes": _told(plain_attrs(kernel.attrs, repr(name))),
            "coordinates": {str(n): tokenize(np.asarray(c)) for n, c in given.coords.items()},
            "upper": upper,
        }
        attrs |= {"coordinates": beside} | ({"triangle": "upper"} if upper else {})
        shape, chunks, dtype = kernel.shape, kernel.data.chunksize, kernel.dtype
        return cls(
            group, name, dims, shape, chunks, dtype, attrs, given, labels, encoding, fingerprint
        )

    def open(self, store: Store) -> zarr.Array:
        """Return the array to fill, made if it is missing.

        Raises
        ------
        GroupError
            Something else is in the group, or above it.
        StoreError
            Another kernel is; or it was changed since it was saved. Nothing was touched.
        """
        root = create_root(store)
        node = _saved_group(root, self.group)
        if node is None:
            parent, _, _ = self.group.rpartition("/")
            if parent:
                root.require_group(parent)
            begun = {SAVED: {**self.fingerprint, COMPLETE: False}}
            node = root.create_group(self.group, attributes=begun)
        self._require_same(node)
        array = self._make(node) if is_unfinished(node) else self._finished(node)
        return array.with_config({"write_empty_chunks": True})

    def stored(self, store: Store) -> zarr.Array | None:
        """Return the array of this kernel if it is complete in a store; writes nothing."""
        node = open_root(store).get(self.group) if exists(store) else None
        if not isinstance(node, zarr.Group) or is_unfinished(node):
            return None
        before = attributes_of(node).get(SAVED)
        if not isinstance(before, dict) or not before.get(COMPLETE):
            return None
        if any(_differ(value, before.get(key)) for key, value in self.fingerprint.items()):
            return None
        return self._finished(node)

    @property
    def upper(self) -> bool:
        """Whether only the tiles on and above the diagonal are stored."""
        return bool(self.fingerprint["upper"])

    def _require_same(self, node: zarr.Group) -> None:
        before = attributes_of(node)[SAVED]
        differ = sorted(
            key for key in self.fingerprint if _differ(self.fingerprint[key], before.get(key))
        )
        if differ:
            raise StoreError(
                f"group {self.group!r} of {describe(node.store)} holds another kernel (they differ "
                f"in {differ}); nothing was touched. Choose another group="
            )

    def _finished(self, node: zarr.Group) -> zarr.Array:
        """Return the array of a kernel that was complete, whose metadata must be as they were."""
        array = node.get(self.name)
        # Its tiles are looked at one by one.
        faults = [p for p in broken_seals(node) if p.path != f"{self.group}/{self.name}"]
        if faults or not isinstance(array, zarr.Array):
            raise DamagedError(
                f"group {self.group!r} of {describe(node.store)} was changed since it was saved "
                f"({faults[0] if faults else 'its array is gone'}); nothing was touched. Restore "
                "it from a copy, or save to another group="
            )
        return array

    def _make(self, node: zarr.Group) -> zarr.Array:
        """Write the labels, and make the array of NaN unless it is there."""
        for name in map(str, self.labels.variables):
            if name in node:
                del node[name]
        kept = {key: value for key, value in node.attrs.items() if key != "coordinates"}
        self.labels.assign_attrs(kept).to_zarr(
            node.store,
            group=self.group,
            mode="a",
            consolidated=False,
            zarr_format=3,
            encoding=self.encoding,
            write_empty_chunks=True,
        )
        stored = xr.open_zarr(node.store, group=self.group, consolidated=False, chunks=None)
        require_exact(restored(stored), self.given)
        array = node.get(self.name)
        fill = self.dtype.type(np.nan if self.dtype.kind in "fc" else 0)
        if array is None:
            return node.create_array(
                self.name,
                shape=self.shape,
                chunks=self.chunks,
                dtype=self.dtype,
                fill_value=fill,
                compressors=CODECS,
                dimension_names=self.dims,
                attributes=dict(self.attrs),
            )
        same = (
            isinstance(array, zarr.Array)
            and (array.shape, array.dtype) == (self.shape, self.dtype)
            and np.array_equal(array.fill_value, fill, equal_nan=True)
            and not _differ(_told(dict(array.attrs)), _told(dict(self.attrs)))
        )
        if not same:
            raise DamagedError(
                f"the metadata of {self.group}/{self.name} in {describe(node.store)} were changed "
                "since saving it began; nothing was touched. Choose another group="
            )
        assert isinstance(array, zarr.Array)
        return array

    def resealed(self, store: Store, array: zarr.Array) -> bool:
        """Say whether the kernel was complete before, with other tiles than it has now."""
        known = seal_of(_group(store, self.group))
        return known is not None and known["arrays"][self.name]["content"] != content_digest(array)

    def finish(self, store: Store) -> None:
        """Mark the kernel as complete and seal it.

        Raises
        ------
        StoreError
            A tile is not there.
        """
        node = _group(store, self.group)
        array = node[self.name]
        assert isinstance(array, zarr.Array)
        if lost := missing(store, wanted_chunks(array)):
            raise StoreError(
                f"{lost[0]} of {describe(store)} was computed, but is not there ({len(lost)} such "
                "tiles); give a folder that all workers share, under the same name"
            )
        complete(node)
        root = _group(store, "")
        if stored_metadata(root).get("consolidated_metadata"):
            finish(root)  # plain readers rely on it

    def read(self, store: Store) -> xr.DataArray:
        """Return the stored kernel, lazily."""
        return restored(xr.open_zarr(store, group=self.group, chunks={}, consolidated=False))[
            self.name
        ]


def _group(store: Store, path: str) -> zarr.Group:
    return zarr.open_group(store, path=path, mode="r+", zarr_format=3, use_consolidated=False)


def _saved_group(root: zarr.Group, group: str) -> zarr.Group | None:
    """Return the group if a kernel is being saved there, ``None`` if there is nothing."""
    above = ""
    for part in group.split("/")[:-1]:
        above = f"{above}/{part}".lstrip("/")
        node = root.get(above)
        if isinstance(node, zarr.Array) or (node is not None and SAVED in node.attrs):
            kind = "an array" if isinstance(node, zarr.Array) else "a saved kernel"
            raise _taken(root, group, f"lies in {above!r}, which is {kind}")
    node = root.get(group)
    if isinstance(node, zarr.Array):
        raise _taken(root, group, "is an array")
    if node is None:
        if names_in(root.store, group):
            raise _taken(root, group, "holds files without metadata")
        return None
    if not isinstance(node.attrs.get(SAVED), dict):
        raise _taken(root, group, "holds something that save did not write")
    if held := sorted(node.group_keys()):
        raise _taken(root, group, f"holds groups of its own, {held[:3]}")
    return node


def _taken(root: zarr.Group, group: str, why: str) -> GroupError:
    return GroupError(
        f"group {group!r} of {describe(root.store)} {why}; nothing was touched. Choose another "
        "group="
    )


def _told(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes without an estimator that kernels saved before did not name."""
    return {k: v for k, v in attrs.items() if (k, v) != ("estimator", "sample")}


def _differ(a: Any, b: Any) -> bool:
    """Say whether two values differ as JSON, where NaN equals itself."""
    return json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True)


def stored_indices(array: zarr.Array) -> list[Index]:
    """Return the chunks of an array of which something is stored."""
    folder = f"{array.path}/c/"
    indices = []
    for key, _ in sizes(array.store, folder):
        parts = key.removeprefix(folder).split("/")
        if len(parts) == array.ndim and all(part.isdecimal() for part in parts):
            indices.append(tuple(map(int, parts)))
    return sorted(indices)


def sound_chunks(array: zarr.Array, indices: Iterable[Index]) -> list[Index]:
    """Return those of some chunks that have their full size and their checksum; all are read."""
    size = int(np.prod(array.chunks)) * array.dtype.itemsize + _CRC_BYTES
    return [at for at in indices if _is_sound(array, at, size)]


def _is_sound(array: zarr.Array, at: Index, size: int) -> bool:
    key = chunk_key(array, at)
    buffer = sync(array.store.get(key, default_buffer_prototype()))
    if buffer is None or len(buffer) != size:
        return False
    content = np.frombuffer(buffer.to_bytes(), np.uint8)
    return crc(content[:-_CRC_BYTES]) == int.from_bytes(content[-_CRC_BYTES:].tobytes(), "little")
