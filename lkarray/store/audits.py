"""Where audits are stored, and when a panel of audited examples counts.

An audit is made by panels: some audited examples, every training example. A panel's pass through
the run leaves its state in one of two slots from time to time; all of it is flushed, and only then
the panel's record ``[stretches left, slot]`` is replaced. A record of no stretches left makes the
panel count.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.core.sync import sync

from lkarray.checking import group_name
from lkarray.schema import AUDIT, EPOCH, EXAMPLE, OUTPUT, VariableSpec
from lkarray.store.commit import chunk_keys, flush
from lkarray.store.fingerprints import refuse_changes
from lkarray.store.layout import create_array, create_coord, require_space, stored_at
from lkarray.store.location import (
    MARK,
    as_store,
    create_root,
    describe,
    local_path,
    update_mark,
    writing,
)
from lkarray.store.variables import variables

_CHUNK_BYTES = 8 << 20
_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0
STATE = "state"

RECORD = VariableSpec("record", ("panel", "field"), "int64", "", "stretches left, slot of state")
INFLUENCE = VariableSpec(
    "influence", (EXAMPLE, AUDIT), "float32", "", "contribution of a training example to a change"
)
RESIDUAL = VariableSpec(
    "residual", (AUDIT,), "float64", "", "contribution of weight decay and of inherited momentum"
)
CHANGE = VariableSpec(
    "change", (AUDIT,), "float64", "", "change of what is audited, from end to end"
)
TOTAL = VariableSpec(
    "total", (AUDIT,), "float64", "", "influence, summed over all that it is split by"
)
PATH = VariableSpec(
    "path", (AUDIT,), "float64", "", "sum over steps of the mean gradient times the step"
)
LENGTH = VariableSpec(
    "length", (AUDIT,), "float64", "", "sum of the same terms without their signs"
)
RECONSTRUCTION = VariableSpec(
    "reconstruction", (EPOCH, AUDIT), "float64", "", "what the path adds up to, by each epoch's end"
)
EPOCH_CHANGE = VariableSpec(
    "epoch_change", (EPOCH, AUDIT), "float64", "", "change of what is audited, by each epoch's end"
)
_SUMS = (RESIDUAL, CHANGE, TOTAL, PATH, LENGTH, RECONSTRUCTION, EPOCH_CHANGE)


@dataclass(frozen=True)
class AuditLayout:
    """An audit to be stored.

    Attributes
    ----------
    group
        Of the store.
    rows
        Audited examples in a panel.
    sizes
        Of every dim of ``influence``, in order.
    windows
        The dim of time that influence is split by, if it is.
    split
        Whether the residual is split by it too.
    epochs
        Numbers of the epochs audited.
    dtype
        Of the influence.
    coords
        Labels: name to dim and values.
    units
        Of what is audited.
    state
        Bytes that a panel's state takes.
    """

    group: str
    rows: int
    sizes: Mapping[str, int]
    windows: str | None
    split: bool
    epochs: np.ndarray
    dtype: str
    coords: Mapping[str, tuple[str, np.ndarray]]
    attrs: Mapping[str, Any]
    units: str
    state: int

    @property
    def audited(self) -> int:
        """Number of audited examples."""
        return self.sizes[AUDIT]

    @property
    def panels(self) -> list[slice]:
        """Audited examples of each panel."""
        n = self.audited
        return [slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows)]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of the influence: a panel wide, near 8 MiB."""
        item = np.dtype(self.dtype).itemsize
        first, *rest = self.sizes
        wide = {AUDIT: self.rows, OUTPUT: self.sizes.get(OUTPUT, 1)}
        tail = tuple(min(self.sizes[dim], wide.get(dim, 1)) for dim in rest)
        return min(self.sizes[first], max(_CHUNK_BYTES // (item * prod(tail)), 1)), *tail

    def specs(self) -> dict[str, VariableSpec]:
        """Return the specs of the sums, with the dims that they have here."""
        found = {}
        for spec in _SUMS:
            dims = spec.dims + ((OUTPUT,) if OUTPUT in self.sizes else ())
            if spec is RESIDUAL and self.split and self.windows is not None:
                dims = (*dims, self.windows)
            found[spec.name] = replace(spec, dims=dims, units=self.units)
        return found

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """Return the sizes of some dims."""
        sizes = dict(self.sizes) | {EPOCH: len(self.epochs)}
        return tuple(sizes[dim] for dim in dims)


def audit_group(name: str | None) -> str:
    """Return the group of an audit: ``audit``, or ``audit_<name>``."""
    return "audit" if name is None else f"audit_{group_name(name)}"


def audit_marks(root: zarr.Group) -> dict[str, Any]:
    """Return the groups of a store's audits, and what each was made with."""
    found: Any = dict(root.attrs[MARK]).get("audits", {})  # type: ignore[arg-type]
    return dict(found)


def begin_audit(path: Any, layout: AuditLayout, fingerprint: Mapping[str, Any]) -> zarr.Group:
    """Begin an audit, or find the one that is there; return the root.

    Raises
    ------
    FingerprintError
        The group holds another audit.
    StoreError
        The disk lacks the space; nothing was written.
    """
    root = create_root(as_store(path))
    before = audit_marks(root).get(layout.group)
    if before is not None:
        where = f"{describe(root.store)}, group {layout.group!r},"
        refuse_changes(before, fingerprint, where, remedy="give it a name= of its own")
        return root
    item = np.dtype(layout.dtype).itemsize
    require_space(root.store, prod(layout.sizes.values()) * item + 2 * layout.state)
    with writing(root.store):
        group = root.create_group(layout.group, overwrite=True, attributes=dict(layout.attrs))
        sizes = layout.sizes
        labels = {
            dim: " ".join(n for n, (d, _) in layout.coords.items() if d == dim != n)
            for dim in sizes
        }
        both = " ".join(filter(None, labels.values()))
        spec = replace(INFLUENCE, dims=tuple(sizes), dtype=layout.dtype, units=layout.units)
        extra: dict[str, Any] = {"coordinates": both} if both else {}
        extra |= {"rows": layout.rows, "kernel": layout.attrs["kernel"]}
        create_array(group, spec, tuple(sizes.values()), layout.chunks, attrs=extra)
        for spec in layout.specs().values():
            shape = layout.shape(spec.dims)
            wide = {AUDIT: layout.rows}
            chunks = tuple(
                min(n, wide.get(dim, n)) for dim, n in zip(spec.dims, shape, strict=True)
            )
            create_array(group, spec, shape, chunks)
        create_array(group, RECORD, (len(layout.panels), 2), (1, 2), fill=-1)
        create_coord(group, EPOCH, layout.epochs, EPOCH)
        for name, (dim, values) in layout.coords.items():
            create_coord(group, name, values, dim)
        marks = audit_marks(root) | {layout.group: dict(fingerprint)}
        update_mark(root, audits=marks)
    return root


def stored_rows(path: Any, group: str) -> int | None:
    """Return the audited examples of a panel of the audit that is stored, if there is one."""
    root = create_root(as_store(path))
    if group not in audit_marks(root):
        return None
    return int(stored_at(root, f"{group}/{INFLUENCE.name}").attrs["rows"])  # type: ignore[arg-type]


def panels_left(root: zarr.Group, group: str) -> list[int]:
    """Return the panels that do not count yet."""
    record = np.asarray(stored_at(root, f"{group}/{RECORD.name}")[:])
    return np.flatnonzero(record[:, 0] != 0).tolist()


class PanelWriter:
    """One panel of an audit: its results, and the state that its pass can go on from."""

    def __init__(self, root: zarr.Group, layout: AuditLayout, panel: int) -> None:
        self._root, self._layout, self.panel = root, layout, panel
        self.rows = layout.panels[panel]
        self._record = stored_at(root, f"{layout.group}/{RECORD.name}")
        self._influence = stored_at(root, f"{layout.group}/{INFLUENCE.name}")
        self._keys: list[str] = []
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def _folder(self) -> str:
        return f"{self._layout.group}/{STATE}/{self.panel}"

    def resume(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Return the stretches left and the state, of a pass that was cut off."""
        left, slot = np.asarray(self._record[self.panel]).tolist()
        if left <= 0:
            return None
        group = self._root[f"{self._folder}/{slot}"]
        assert isinstance(group, zarr.Group)
        return int(left), {name: np.asarray(array[...]) for name, array in group.arrays()}

    def due(self) -> bool:
        """Say whether it is time to commit."""
        pause = max(_COMMIT_SECONDS, _COMMIT_SHARE * self._cost)
        return time.monotonic() - self._last >= pause

    def commit(self, left: int, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state, with ``left`` stretches to go."""
        began = time.monotonic()
        slot = 1 - max(int(np.asarray(self._record[self.panel])[1]), 0)
        root = self._root
        with writing(root.store, safe="What was committed before is kept"):
            group = root.create_group(f"{self._folder}/{slot}", overwrite=True)
            for name, values in state.items():
                array = group.create_array(
                    name, shape=values.shape, chunks=_pieces(values), dtype=values.dtype,
                    compressors=None, config={"write_empty_chunks": True},
                )  # fmt: skip
                array[...] = values
                self._keys += chunk_keys(array, ())
            self._count(left, slot)
        self._last = time.monotonic()
        self._cost = self._last - began

    def write(self, values: np.ndarray, window: int | None) -> None:
        """Write influence of the panel's rows, ``(example or group, row, ...)``, of one window."""
        place: tuple[Any, ...] = (slice(None), self.rows)
        if window is not None:
            place = (*place, *[slice(None)] * (values.ndim - 2), window)
        with writing(self._root.store, safe="What was committed before is kept"):
            self._influence[place] = values
        array = self._influence
        for at in np.ndindex(*array.cdata_shape):
            if at[1] == self.panel and (window is None or at[-1] == window):
                self._keys.append(f"{array.path}/{array.metadata.encode_chunk_key(at)}")

    def finish(self, sums: Mapping[str, np.ndarray]) -> None:
        """Write the sums, and let the panel count."""
        with writing(self._root.store, safe="What was committed before is kept"):
            for name, spec in self._layout.specs().items():
                array = stored_at(self._root, f"{self._layout.group}/{name}")
                place = tuple(self.rows if dim == AUDIT else slice(None) for dim in spec.dims)
                array[place] = sums[name]
                self._keys += chunk_keys(array, ())
            self._count(0, 0)
            sync(self._root.store.delete_dir(self._folder))

    def _count(self, left: int, slot: int) -> None:
        flush(self._root.store, self._keys)
        self._keys = []
        self._record[self.panel] = [left, slot]
        flush(self._root.store, chunk_keys(self._record, (self.panel,)))


def drop_states(root: zarr.Group, group: str) -> None:
    """Remove what passes could go on from, when no panel is left."""
    if folder := local_path(root.store):
        shutil.rmtree(folder / group / STATE, ignore_errors=True)
    else:
        sync(root.store.delete_dir(f"{group}/{STATE}"))


def describe_audit(root: zarr.Group, group: str, attrs: Mapping[str, Any]) -> None:
    """Add attributes to a stored audit."""
    node = root[group]
    assert isinstance(node, zarr.Group)
    node.update_attributes(dict(attrs))


def open_audit(root: zarr.Group, group: str) -> xr.Dataset:
    """Open a stored audit lazily: the audited examples of which the pass is whole."""
    node = root[group]
    assert isinstance(node, zarr.Group)
    found = variables(root, group, lazy={INFLUENCE.name}, skip={STATE})
    record = np.asarray(found.pop(RECORD.name))
    rows = int(found[INFLUENCE.name].attrs.pop("rows"))
    for variable in found.values():
        variable.attrs.pop("coordinates", None)
    values = {INFLUENCE.name, *(spec.name for spec in _SUMS)}
    ds = xr.Dataset(found, attrs=dict(node.attrs)).set_coords(set(found) - values)
    whole = np.repeat(record[:, 0] == 0, rows)[: ds.sizes[AUDIT]]
    return ds if whole.all() else ds.isel({AUDIT: whole})


def committed_panels(root: zarr.Group, group: str) -> Iterator[tuple[zarr.Array, tuple[int, ...]]]:
    """Yield a stored audit's arrays with the first indices of the chunks that must be there."""
    record = np.asarray(stored_at(root, f"{group}/{RECORD.name}")[:, 0])
    array = stored_at(root, f"{group}/{INFLUENCE.name}")
    for panel in np.flatnonzero(record == 0).tolist():
        yield from ((array, (block, panel)) for block in range(array.cdata_shape[0]))
        for spec in _SUMS:
            sums = stored_at(root, f"{group}/{spec.name}")
            if spec.dims[0] == AUDIT:
                yield sums, (panel,)
            else:
                yield from ((sums, (block, panel)) for block in range(sums.cdata_shape[0]))


def _pieces(values: np.ndarray) -> tuple[int, ...]:
    """Return chunks of some 64 MiB."""
    if not values.ndim:
        return ()
    row = max(values[:1].nbytes, 1)
    return (min(max((64 << 20) // row, 1), max(len(values), 1)), *map(int, values.shape[1:]))
