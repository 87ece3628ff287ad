"""Where audits are stored, and when a panel of audited examples counts.

An audit is made by panels: some audited examples, every training example. A panel's pass through
the run leaves its state in one of two slots from time to time; all of it is flushed, and only then
the panel's record ``[stretches left, slot, panel, checksums ...]`` is replaced. A record of no
stretches left makes the panel count. Its checksums bind the record to the state it goes on from,
or to the chunks of the panel: one of another panel, or chunks of one, are noticed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.core.sync import sync

from lkarray.schema import AUDIT, EPOCH
from lkarray.store.arrays import CODECS, create_array, create_coord, require_space
from lkarray.store.audit_layout import FIELDS, INFLUENCE, RECORD, RESULTS, STATE, AuditLayout
from lkarray.store.checksums import crc, json_digest
from lkarray.store.chunks import (
    chunk_key,
    chunk_keys,
    damaged,
    flush,
    flush_tree,
    missing,
    read,
    read_whole,
    require_chunks,
    stored_digests,
)
from lkarray.store.committed import array_names, reading, require_seals
from lkarray.store.fingerprints import group_made_with, refuse_other_group
from lkarray.store.location import (
    as_store,
    create_root,
    enter,
    entries_of,
    local_path,
    writing,
)
from lkarray.store.names import check_name, make_group
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import add_to_seal, described, seal
from lkarray.store.trace_digests import chain
from lkarray.store.typed import attributes_of
from lkarray.store.variables import variables

_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0
_WRITTEN = "written"  # in the state: checksums of the influence written so far


def audit_group(name: str | None) -> str:
    """Return the group of an audit: ``audit``, or ``audit_<name>``."""
    return "audit" if name is None else f"audit_{check_name(name, 'name')}"


def audit_fingerprints(root: zarr.Group) -> dict[str, Any]:
    """Return the groups of a store's audits, and what each was made with."""
    return dict(entries_of(root).get("audits", {}))


def begin_audit(path: Any, layout: AuditLayout, fingerprint: Mapping[str, Any]) -> zarr.Group:
    """Begin an audit, or find the one that is there; return the root.

    Raises
    ------
    FingerprintError
        The group holds another audit.
    StoreError
        The disk lacks the space; nothing was written.
    DamagedError
        Something of it that was committed is missing, or its metadata were changed.
    """
    root = create_root(as_store(path))
    before = audit_fingerprints(root).get(layout.group)
    if before is not None:
        refuse_other_group(root, layout.group, before, fingerprint)
        _require_committed(root, layout.group)
        return root
    item = np.dtype(layout.dtype).itemsize
    require_space(root.store, prod(layout.sizes.values()) * item + 2 * layout.state)
    with writing(root.store):
        ours = {INFLUENCE.name, RECORD.name, EPOCH, STATE, *layout.coords, *layout.specs()}
        group = make_group(root, layout.group, ours=ours, attributes=layout.attrs)
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
        shape = (len(layout.panels), len(FIELDS))
        fields = {"fields": list(FIELDS)}
        record = create_array(group, RECORD, shape, (1, len(FIELDS)), fill=-1, attrs=fields)
        create_coord(group, EPOCH, layout.epochs, EPOCH)
        for name, (dim, values) in layout.coords.items():
            create_coord(group, name, values, dim)
        seal(group, filling=[*RESULTS, RECORD.name])
        flush_tree(root.store, layout.group)
        # Written, so that a missing one is a fault.
        record[:] = [[-1, 0, panel, *(0,) * (len(FIELDS) - 3)] for panel in range(shape[0])]
        flush(root.store, chunk_keys(record))
        made = audit_fingerprints(root) | {layout.group: dict(fingerprint)}
        enter(root, audits=made)
    return root


def whole_audit(path: Any, group: str, fingerprint: Mapping[str, Any]) -> zarr.Group | None:
    """Return the root of a store that has the whole audit already, if it has; writes nothing.

    Raises
    ------
    FingerprintError
        The group holds another audit.
    """
    root = group_made_with(path, group, fingerprint, audit_fingerprints)
    if root is None:
        return None
    described = "closure" in root[group].attrs  # the last thing that is written
    return root if described and not panels_left(root, group) else None


def stored_rows(path: Any, group: str) -> int | None:
    """Return the audited examples of a panel of the audit that is stored, if there is one."""
    root = create_root(as_store(path))
    if group not in audit_fingerprints(root):
        return None
    return _panel_rows(stored_at(root, f"{group}/{INFLUENCE.name}"))


def _panel_rows(influence: zarr.Array) -> int:
    with reading(influence.store, f"{influence.path}/zarr.json"):
        return int(attributes_of(influence)["rows"])


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
    found = read_whole(array)
    for panel in np.flatnonzero(found[:, 2] != np.arange(len(found))).tolist():
        raise damaged(root.store, f"{chunk_key(array, (panel, 0))} is the record of another panel")
    return found


def has_checksums(record: zarr.Array) -> bool:
    """Say whether records have checksums; those of lkarray 0.1.0 have none."""
    return bool(record.shape[1] == len(FIELDS))


def panels_left(root: zarr.Group, group: str) -> list[int]:
    """Return the panels that do not count yet."""
    return np.flatnonzero(read_records(root, group)[:, 0] != 0).tolist()


class PanelWriter:
    """One panel of an audit: its results, and the state that its pass can go on from."""

    def __init__(self, root: zarr.Group, layout: AuditLayout, panel: int) -> None:
        self._root, self._layout, self.panel = root, layout, panel
        self.rows = layout.panels[panel]
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
                    chunks=_pieces(values),
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
        """Write influence of the panel's rows, ``(example or group, row, ...)``, of one window."""
        place: tuple[Any, ...] = (slice(None), self.rows)
        if window is not None:
            place = (*place, *[slice(None)] * (values.ndim - 2), window)
        with writing(self._root.store, safe="What was committed before is kept"):
            self._influence[place] = values
        array = self._influence
        places = [
            at
            for at in np.ndindex(*array.cdata_shape)
            if at[1] == self.panel and (window is None or at[-1] == window)
        ]
        keys = [chunk_key(array, at) for at in places]
        for at, found in zip(places, numbers(array, keys), strict=True):
            self._written[(at[0], *at[2:])] = found
        self._keys += keys

    def finish(self, sums: Mapping[str, np.ndarray]) -> None:
        """Write the sums, and let the panel count."""
        found = {INFLUENCE.name: chain(self._written.reshape(-1))}
        with writing(self._root.store, safe="What was committed before is kept"):
            for name, spec in self._layout.specs().items():
                array = stored_at(self._root, f"{self._layout.group}/{name}")
                place = tuple(self.rows if dim == AUDIT else slice(None) for dim in spec.dims)
                array[place] = sums[name]
                keys = panel_keys(array, self.panel)
                found[name] = chain(numbers(array, keys))
                self._keys += keys
            self._count(0, 0, found)
            sync(self._root.store.delete_dir(self._folder))

    def _count(self, left: int, slot: int, checksums: Mapping[str, int]) -> None:
        flush(self._root.store, self._keys)
        self._keys = []
        row = [left, slot]
        if has_checksums(self._record):
            row += [self.panel, *(checksums.get(name, 0) for name in FIELDS[3:])]
        self._record[self.panel] = row
        flush(self._root.store, chunk_keys(self._record, (self.panel,)))


def numbers(array: zarr.Array, keys: list[str]) -> list[int]:
    """Return the checksums of stored chunks as numbers, 0 for one that is missing."""
    tails = stored_digests(array, keys)
    return [0 if tail is None else int.from_bytes(tail, "little") for tail in tails]


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
    parts = [
        [name, values.dtype.str, list(values.shape), crc(_bytes(values))]
        for name, values in sorted(state.items())
    ]
    return json_digest([left, panel, parts])


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def panel_leading(array: zarr.Array, panel: int) -> list[tuple[int, ...]]:
    """Return the first indices of the chunks that a panel has of an array."""
    if (array.metadata.dimension_names or ("",))[0] == AUDIT:  # type: ignore[union-attr]
        return [(panel,)]
    return [(block, panel) for block in range(array.cdata_shape[0])]


def panel_keys(array: zarr.Array, panel: int) -> list[str]:
    """Return the keys of the chunks that a panel has of an array, in order."""
    return [key for at in panel_leading(array, panel) for key in chunk_keys(array, at)]


def drop_states(root: zarr.Group, group: str) -> None:
    """Remove what passes could go on from, when no panel is left."""
    if folder := local_path(root.store):
        shutil.rmtree(folder / group / STATE, ignore_errors=True)
    else:
        sync(root.store.delete_dir(f"{group}/{STATE}"))


def describe_audit(root: zarr.Group, group: str, attrs: Mapping[str, Any]) -> None:
    """Add attributes to a stored audit."""
    add_to_seal(group_at(root, group), attrs)
    flush(root.store, [f"{group}/zarr.json"])


def open_audit(root: zarr.Group, group: str) -> xr.Dataset:
    """Open a stored audit lazily: the audited examples of which the pass is whole.

    Raises
    ------
    DamagedError
        Something of it is missing or cannot be read.
    """
    record = read_records(root, group)
    panels = np.flatnonzero(record[:, 0] == 0).tolist()
    rows = _panel_rows(stored_at(root, f"{group}/{INFLUENCE.name}"))

    def read_results(array: zarr.Array) -> np.ndarray:
        if array.basename not in RESULTS:
            return read_whole(array)
        for panel in panels:
            for at in panel_leading(array, panel):
                require_chunks(array, at)
        return read(array, ...)

    found = variables(root, group, lazy={INFLUENCE.name}, skip={RECORD.name}, read=read_results)
    with reading(root.store, group):
        for variable in found.values():
            variable.attrs.pop("coordinates", None)
        found[INFLUENCE.name].attrs.pop("rows", None)
        ds = xr.Dataset(found, attrs=described(group_at(root, group)))
        ds = ds.set_coords(set(found) - set(RESULTS))
        whole = np.repeat(record[:, 0] == 0, rows)[: ds.sizes[AUDIT]]
        return ds if whole.all() else ds.isel({AUDIT: whole})


def committed_panels(root: zarr.Group, group: str) -> Iterator[tuple[zarr.Array, int, int | None]]:
    """Yield a stored audit's arrays, each with a panel that counts, and its checksum if it has one.

    What a panel has of an array is at `panel_leading`.
    """
    record = read_records(root, group)
    arrays = [stored_at(root, f"{group}/{name}") for name in RESULTS]
    checked = record.shape[1] == len(FIELDS)
    for panel in np.flatnonzero(record[:, 0] == 0).tolist():
        for array in arrays:
            at = FIELDS.index(array.basename)
            yield array, panel, int(record[panel, at]) if checked else None


def _require_committed(root: zarr.Group, group: str) -> None:
    """Raise `DamagedError` unless all that counts of an audit is there."""
    require_seals(root, group)
    panels = list(committed_panels(root, group))
    lost = missing(root.store, (key for of, at, _ in panels for key in panel_keys(of, at)))
    if lost:
        raise damaged(root.store, f"{lost[0]} was committed, but is missing or empty")


def _pieces(values: np.ndarray) -> tuple[int, ...]:
    """Return chunks of some 64 MiB."""
    if not values.ndim:
        return ()
    row = max(values[:1].nbytes, 1)
    return (min(max((64 << 20) // row, 1), max(len(values), 1)), *map(int, values.shape[1:]))
