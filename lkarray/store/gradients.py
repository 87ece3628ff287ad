"""Where gradient tensors are stored, and when a shard of one counts.

A tensor is written by shards: one time, some hundred examples, all parameters, as whole chunks.
Shards are marked in ``done(time, shard)`` after their chunks were flushed; what is not marked is
computed again.
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
from lkarray.checking import checked, group_name
from lkarray.schema import OUTPUT, TIME, VariableSpec
from lkarray.store.commit import chunk_keys, flush
from lkarray.store.discarding import discard
from lkarray.store.fingerprints import refuse_changes
from lkarray.store.layout import (
    create_array,
    create_coord,
    require_space,
    stored_at,
)
from lkarray.store.location import (
    MARK,
    StoreLike,
    as_store,
    create_root,
    describe,
    update_mark,
    writing,
)
from lkarray.store.variables import variables

_ROWS, _COLUMNS = 128, 16384
DONE = VariableSpec("done", (TIME, "shard"), "int8", "", "shards that are stored whole")


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

    @property
    def shards(self) -> list[slice]:
        """Examples of each shard."""
        n, rows = self.examples, self.rows
        return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]


def gradient_group(name: str | None) -> str:
    """Return the group of a gradient tensor: ``gradients``, or ``gradients_<name>``."""
    return schema.GRADIENTS if name is None else f"{schema.GRADIENTS}_{group_name(name)}"


def gradient_marks(root: zarr.Group) -> dict[str, Any]:
    """Return the groups of a store's gradient tensors, and what each was made with."""
    found: Any = dict(root.attrs[MARK]).get(schema.GRADIENTS, {})  # type: ignore[arg-type]
    return dict(found)


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
    siblings = gradient_group("")
    discard(
        path,
        lambda name: name == schema.GRADIENTS or name.startswith(siblings),
        **{schema.GRADIENTS: {}},
    )


class TensorWriter:
    """A gradient tensor being written; begins it, or goes on with the one that is there.

    Raises
    ------
    FingerprintError
        The group holds another tensor.
    """

    def __init__(self, path: Any, layout: TensorLayout, fingerprint: Mapping[str, Any]) -> None:
        self.layout = layout
        self.root = create_root(as_store(path))
        before = gradient_marks(self.root).get(layout.group)
        if before is None:
            self._create(dict(fingerprint))
        else:
            where = f"{describe(self.root.store)}, group {layout.group!r},"
            remedy = "give it a name= of its own"
            refuse_changes(before, fingerprint, where, remedy=remedy)
        self.array = stored_at(self.root, f"{layout.group}/{layout.variable.name}")
        # Shards are those it was begun with, whatever the budget is now.
        self.layout = replace(layout, rows=int(self.array.attrs["rows"]))  # type: ignore[arg-type]
        self._done = stored_at(self.root, f"{layout.group}/{DONE.name}")
        self.done = np.asarray(self._done[:]).astype(bool)
        self._keys: list[str] = []
        self._marked: list[tuple[int, int]] = []

    def _create(self, fingerprint: dict[str, Any]) -> None:
        layout, root = self.layout, self.root
        require_space(root.store, prod(layout.shape) * np.dtype(layout.dtype).itemsize)
        with writing(root.store):
            group = root.create_group(layout.group, overwrite=True, attributes=dict(layout.attrs))
            labels = " ".join(
                n for n, (dim, _) in layout.coords.items() if n != dim and dim in layout.dims
            )
            spec = replace(layout.variable, dims=layout.dims, dtype=layout.dtype)
            extra: dict[str, Any] = {"coordinates": labels} if labels else {}
            extra["rows"] = layout.rows
            create_array(group, spec, layout.shape, layout.chunks, attrs=extra)
            shape = (len(layout.times), len(layout.shards))
            create_array(group, DONE, shape, shape)
            create_coord(group, TIME, layout.times, TIME)
            create_coord(group, schema.LEARNING_RATE.name, layout.rates, TIME)
            for name, (dim, values) in layout.coords.items():
                create_coord(group, name, values, dim)
            marks = gradient_marks(root) | {layout.group: fingerprint}
            update_mark(root, **{schema.GRADIENTS: marks})

    def write(self, time: int, shard: int, values: np.ndarray) -> None:
        """Write a shard; it counts after the next `commit`."""
        rows = self.layout.shards[shard]
        with writing(self.root.store, safe="Shards that were committed are kept"):
            self.array[time, rows] = values
        for block in _blocks(self.array, rows):
            self._keys += chunk_keys(self.array, (time, block))
        self._marked.append((time, shard))

    def commit(self) -> None:
        """Make the shards written so far count."""
        if not self._marked:
            return
        with writing(self.root.store, safe="Shards that were committed are kept"):
            flush(self.root.store, self._keys)
            for place in self._marked:
                self.done[place] = True
            self._done[:] = self.done.astype(np.int8)
            flush(self.root.store, chunk_keys(self._done, ()))
        self._keys, self._marked = [], []


def open_gradients(root: zarr.Group, group: str) -> xr.Dataset:
    """Open a stored tensor lazily: the times of which every shard is done."""
    name = _variable(root, group)
    found = variables(root, group, lazy={name})
    whole = np.asarray(found.pop(DONE.name)).all(1)
    for labels in ("coordinates", "rows"):
        found[name].attrs.pop(labels, None)
    ds = xr.Dataset(found, attrs=dict(root[group].attrs)).set_coords(set(found) - {name})
    return ds if whole.all() else ds.isel({TIME: whole})


def committed_shards(root: zarr.Group, group: str) -> Iterator[tuple[zarr.Array, tuple[int, ...]]]:
    """Yield a stored tensor with the first indices of the chunks that must be there."""
    array = stored_at(root, f"{group}/{_variable(root, group)}")
    done = np.asarray(stored_at(root, f"{group}/{DONE.name}")[:])
    rows = int(array.attrs["rows"])  # type: ignore[arg-type]
    for t, shard in np.argwhere(done).tolist():
        examples = slice(shard * rows, min((shard + 1) * rows, array.shape[1]))
        yield from ((array, (t, block)) for block in _blocks(array, examples))


def _variable(root: zarr.Group, group: str) -> str:
    """Return the name of what a group holds: gradients, or their factors."""
    return next(s.name for s in (schema.GRADIENT, schema.FACTOR) if f"{group}/{s.name}" in root)


def _blocks(array: zarr.Array, rows: slice) -> range:
    """Return the chunks along ``example`` that some rows lie in."""
    step = array.chunks[1]
    return range(rows.start // step, -(-rows.stop // step))
