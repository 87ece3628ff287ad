"""Where gradient tensors are stored, and when a shard of one counts.

A tensor is written by shards: one time, some hundred examples, all parameters, as whole chunks.
Shards are marked in ``done(time, shard)`` after their chunks, and checksums of these kept apart,
were flushed; what is not marked is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.arguments import checked
from lkarray.schema import OUTPUT, TIME, VariableSpec
from lkarray.store.arrays import create_array, create_coord, require_space
from lkarray.store.chunks import (
    chunk_keys,
    damaged,
    digests,
    flush,
    flush_tree,
    missing,
    read,
    require_chunks,
)
from lkarray.store.committed import reading, require_seals
from lkarray.store.discarding import discard
from lkarray.store.fingerprints import group_made_with, refuse_other_group
from lkarray.store.location import (
    StoreLike,
    as_store,
    create_root,
    enter,
    entries_of,
    writing,
)
from lkarray.store.names import check_name, make_group
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import described, seal
from lkarray.store.typed import attributes_of
from lkarray.store.variables import variables

_ROWS, _COLUMNS = 128, 16384
DONE = VariableSpec("done", (TIME, "shard"), "int8", "", "shards that are stored whole")
DIGEST = VariableSpec("digest", (TIME,), "uint32", "", "checksums of the chunks")


@dataclass(frozen=True)
class TensorLayout:
    """A gradient tensor to be stored.

    Attributes
    ----------
    group
        Of the store.
    times, rates
        Step of each time, and its learning rate.
    examples, outputs, params
        Sizes; ``outputs=None`` where there is no such dim.
    rows
        Examples of a shard.
    dtype
        Of the gradient.
    coords
        Labels: name to dim and values.
    attrs
        Of the group.
    variable
        What is stored: gradients, or their factors.
    """

    group: str
    times: np.ndarray
    rates: np.ndarray
    examples: int
    outputs: int | None
    params: int
    rows: int
    dtype: str
    coords: Mapping[str, tuple[str, np.ndarray]]
    attrs: Mapping[str, Any]
    variable: VariableSpec = schema.GRADIENT

    @property
    def dims(self) -> tuple[str, ...]:
        """Dims of the gradient."""
        *first, last = self.variable.dims
        return (*first, last) if self.outputs is None else (*first, OUTPUT, last)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the gradient."""
        middle = () if self.outputs is None else (self.outputs,)
        return (len(self.times), self.examples, *middle, self.params)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of the gradient: near 8 MiB."""
        rows = min(_ROWS, self.rows, self.examples)
        columns = min(_COLUMNS, self.params)
        if self.outputs is None:
            return 1, rows, columns
        return 1, max(rows // self.outputs, 1), self.outputs, columns

    def aligned(self) -> TensorLayout:
        """Return the layout with shards of whole chunks, so that a chunk belongs to one of them."""
        whole = self.rows - self.rows % self.chunks[1]
        return self if self.rows >= self.examples else replace(self, rows=whole)

    @property
    def shards(self) -> list[slice]:
        """Examples of each shard."""
        n, rows = self.examples, self.rows
        return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]


def gradient_group(name: str | None) -> str:
    """Return the group of a gradient tensor: ``gradients``, or ``gradients_<name>``."""
    return schema.GRADIENTS if name is None else f"{schema.GRADIENTS}_{check_name(name, 'name')}"


def gradient_fingerprints(root: zarr.Group) -> dict[str, Any]:
    """Return the groups of a store's gradient tensors, and what each was made with."""
    return dict(entries_of(root).get(schema.GRADIENTS, {}))


@checked()
def discard_gradients(path: StoreLike) -> None:
    """Delete a store's gradient tensors and factors; what was computed from them stays.

    Killed halfway, the same call deletes the rest.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store.

    Raises
    ------
    StoreError
        There is no store of lkarray's.
    LockedError
        It is being written to.
    """
    siblings = f"{schema.GRADIENTS}_"
    discard(
        path,
        lambda name: name == schema.GRADIENTS or name.startswith(siblings),
        **{schema.GRADIENTS: {}},
    )


def whole_gradients(
    path: StoreLike, group: str, fingerprint: Mapping[str, Any]
) -> zarr.Group | None:
    """Return the root of a store that has the whole tensor already, if it has; writes nothing.

    Raises
    ------
    FingerprintError
        The group holds another tensor.
    """
    root = group_made_with(path, group, fingerprint, gradient_fingerprints)
    if root is None:
        return None
    return root if np.asarray(stored_at(root, f"{group}/{DONE.name}")[:]).all() else None


class TensorWriter:
    """A gradient tensor being written; begins it, or goes on with the one that is there.

    Raises
    ------
    FingerprintError
        The group holds another tensor.
    DamagedError
        Something of it that was committed is missing, or its metadata were changed.
    """

    def __init__(self, path: Any, layout: TensorLayout, fingerprint: Mapping[str, Any]) -> None:
        self.layout = layout.aligned()
        self.root = create_root(as_store(path))
        before = gradient_fingerprints(self.root).get(layout.group)
        if before is None:
            self._create(dict(fingerprint))
        else:
            refuse_other_group(self.root, layout.group, before, fingerprint)
            _require_committed(self.root, layout.group)
        self.array = stored_at(self.root, f"{layout.group}/{layout.variable.name}")
        # Shards are those it was begun with, whatever the budget is now.
        self.layout = replace(layout, rows=int(attributes_of(self.array)["rows"]))
        self._done = stored_at(self.root, f"{layout.group}/{DONE.name}")
        self._digests = digests_of(self.root, layout.group)
        self.done = read_done(self.root, layout.group)
        self._rows: dict[int, np.ndarray] = {}  # of the checksums, that the next commit writes
        self._keys: list[str] = []
        self._whole: list[tuple[int, int]] = []

    def _create(self, fingerprint: dict[str, Any]) -> None:
        layout, root = self.layout, self.root
        require_space(root.store, prod(layout.shape) * np.dtype(layout.dtype).itemsize)
        with writing(root.store):
            ours = {layout.variable.name, DONE.name, DIGEST.name, TIME, schema.LEARNING_RATE.name}
            group = make_group(
                root, layout.group, ours=ours | set(layout.coords), attributes=layout.attrs
            )
            labels = " ".join(
                n for n, (dim, _) in layout.coords.items() if n != dim and dim in layout.dims
            )
            spec = replace(layout.variable, dims=layout.dims, dtype=layout.dtype)
            extra: dict[str, Any] = {"coordinates": labels} if labels else {}
            extra["rows"] = layout.rows
            array = create_array(group, spec, layout.shape, layout.chunks, attrs=extra)
            blocks = replace(DIGEST, dims=(TIME, *(f"{dim}_block" for dim in layout.dims[1:])))
            create_array(group, blocks, array.cdata_shape, (1, *array.cdata_shape[1:]))
            shape = (len(layout.times), len(layout.shards))
            create_array(group, DONE, shape, shape)[:] = 0  # so that a missing one is a fault
            create_coord(group, TIME, layout.times, TIME)
            create_coord(group, schema.LEARNING_RATE.name, layout.rates, TIME)
            for name, (dim, values) in layout.coords.items():
                create_coord(group, name, values, dim)
            seal(group, filling=[spec.name, DIGEST.name, DONE.name])
            flush_tree(root.store, layout.group)
            made = gradient_fingerprints(root) | {layout.group: fingerprint}
            enter(root, **{schema.GRADIENTS: made})

    def write(self, time: int, shard: int, values: np.ndarray) -> None:
        """Write a shard; it counts after the next `commit`."""
        rows = self.layout.shards[shard]
        with writing(self.root.store, safe="Shards that were committed are kept"):
            self.array[time, rows] = values
        for block in _blocks(self.array, rows):
            self._keys += chunk_keys(self.array, (time, block))
            self._keep_digests(time, block, values, rows.start)
        self._whole.append((time, shard))

    def _keep_digests(self, time: int, block: int, values: np.ndarray, start: int) -> None:
        """Note the checksums of the chunks of some rows, of which ``values`` begin at ``start``."""
        if self._digests is None:  # a tensor of lkarray 0.1.0
            return
        if time not in self._rows:
            known = bool(self.done[time].any())
            shape = self._digests.shape[1:]
            self._rows[time] = read(self._digests, time) if known else np.zeros(shape, np.uint32)
        step = self.array.chunks[1]
        part = values[block * step - start : (block + 1) * step - start]
        checksums = digests(self.array, (time, block), part)
        self._rows[time][block] = checksums.reshape(self._rows[time].shape[1:])

    def commit(self) -> None:
        """Make the shards written so far count."""
        if not self._whole:
            return
        with writing(self.root.store, safe="Shards that were committed are kept"):
            for time, row in self._rows.items():
                assert self._digests is not None
                self._digests[time] = row
                self._keys += chunk_keys(self._digests, (time,))
            flush(self.root.store, self._keys)
            for place in self._whole:
                self.done[place] = True
            self._done[:] = self.done.astype(np.int8)
            flush(self.root.store, chunk_keys(self._done, ()))
        self._keys, self._whole, self._rows = [], [], {}


def read_done(root: zarr.Group, group: str) -> np.ndarray:
    """Return which shards of a tensor count, ``(time, shard)``.

    Raises
    ------
    DamagedError
        The record of it is missing or cannot be read.
    """
    array = stored_at(root, f"{group}/{DONE.name}")
    # lkarray 0.1.0 wrote it with the first shards only, and zeros is what a missing one reads as.
    if digests_of(root, group) is not None:
        require_chunks(array)
    return read(array, ...).astype(bool)


def digests_of(root: zarr.Group, group: str) -> zarr.Array | None:
    """Return the checksums of a tensor's chunks; lkarray 0.1.0 stored none."""
    path = f"{group}/{DIGEST.name}"
    with reading(root.store, path):
        return stored_at(root, path) if path in root else None


def _require_committed(root: zarr.Group, group: str) -> None:
    """Raise `DamagedError` unless all that is committed of a tensor is there."""
    require_seals(root, group)
    keys = [key for array, at in committed_shards(root, group) for key in chunk_keys(array, at)]
    sums = digests_of(root, group)
    if sums is not None:
        times = np.flatnonzero(read_done(root, group).any(1)).tolist()
        keys += [key for time in times for key in chunk_keys(sums, (time,))]
    lost = missing(root.store, keys)
    if lost:
        raise damaged(root.store, f"{lost[0]} was committed, but is missing or empty")


def open_gradients(root: zarr.Group, group: str) -> xr.Dataset:
    """Open a stored tensor lazily: the times of which every shard is done.

    Raises
    ------
    DamagedError
        Something of it is missing or cannot be read.
    """
    name = tensor_name(root, group)
    arrays = variables(root, group, lazy={name}, skip={DONE.name, DIGEST.name})
    whole = read_done(root, group).all(1)
    with reading(root.store, group):
        for labels in ("coordinates", "rows"):
            arrays[name].attrs.pop(labels, None)
        ds = xr.Dataset(arrays, attrs=described(group_at(root, group)))
        ds = ds.set_coords(set(arrays) - {name})
        return ds if whole.all() else ds.isel({TIME: whole})


def committed_shards(root: zarr.Group, group: str) -> Iterator[tuple[zarr.Array, tuple[int, ...]]]:
    """Yield a stored tensor with the first indices of the chunks that must be there."""
    array = stored_at(root, f"{group}/{tensor_name(root, group)}")
    with reading(root.store, f"{array.path}/zarr.json"):
        rows = int(attributes_of(array)["rows"])
    for t, shard in np.argwhere(read_done(root, group)).tolist():
        examples = slice(shard * rows, min((shard + 1) * rows, array.shape[1]))
        yield from ((array, (t, block)) for block in _blocks(array, examples))


def tensor_name(root: zarr.Group, group: str) -> str:
    """Return the name of what a group holds: gradients, or their factors."""
    names = [spec.name for spec in (schema.GRADIENT, schema.FACTOR)]
    with reading(root.store, group):
        held = [name for name in names if f"{group}/{name}" in root]
    if not held:
        raise damaged(root.store, f"{group} holds neither of {names}")
    return held[0]


def _blocks(array: zarr.Array, rows: slice) -> range:
    """Return the chunks along ``example`` that some rows lie in."""
    step = array.chunks[1]
    return range(rows.start // step, -(-rows.stop // step))
