"""Where audits are stored, and when a panel of audited examples counts.

An audit is made by panels: some audited examples, every training example. A panel's pass through
the run leaves its state in one of two slots from time to time; all of it is flushed, and only then
the panel's record ``[stretches left, slot, panel, checksums ...]`` is replaced. A record of no
stretches left makes the panel count. Its checksums bind the record to the state it goes on from,
or to the chunks of the panel: one of another panel, or chunks of one, are noticed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.core.sync import sync

from lkarray.schema import AUDIT, EPOCH
from lkarray.store.arrays import create_array, create_coord, require_space
from lkarray.store.audit_layout import FIELDS, INFLUENCE, RECORD, RESULTS, STATE, AuditLayout
from lkarray.store.audit_panels import (
    committed_panels,
    panel_keys,
    panel_leading,
    panels_left,
    read_records,
)
from lkarray.store.chunks import (
    chunk_keys,
    damaged,
    flush,
    flush_tree,
    missing,
    read,
    read_whole,
    require_chunks,
)
from lkarray.store.committed import reading, require_seals
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
from lkarray.store.typed import attributes_of
from lkarray.store.variables import variables


def audit_group(name: str | None) -> str:
    """Return the group of an audit: ``audit``, or ``audit_<name>``."""
    return "audit" if name is None else f"audit_{check_name(name, 'name')}"


def audit_fingerprints(root: zarr.Group) -> dict[str, Any]:
    """Return the groups of a store's audits, and what each was made with."""
    return dict(entries_of(root).get("audits", {}))


def begin_audit(path: Any, layout: AuditLayout, fingerprint: Mapping[str, Any]) -> zarr.Group:
    """Begin an audit, or take up the one that is there; return the root.

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
    # Both slots of a state beside the influence, of which a panel has a share only.
    require_space(root.store, prod(layout.sizes.values()) * item + 2 * layout.state)
    with writing(root.store):
        record = _create(root, layout)
        # Written, so that a missing one is a fault.
        record[:] = [[-1, 0, panel, *[0] * (len(FIELDS) - 3)] for panel in range(record.shape[0])]
        flush(root.store, chunk_keys(record))
        # Last: only now is there an audit.
        made = audit_fingerprints(root) | {layout.group: dict(fingerprint)}
        enter(root, audits=made)
    return root


def _create(root: zarr.Group, layout: AuditLayout) -> zarr.Array:
    """Create an audit's group with its arrays, sealed; return the panels' records, empty."""
    ours = {INFLUENCE.name, RECORD.name, EPOCH, STATE, *layout.coords, *layout.specs()}
    group = make_group(root, layout.group, ours=ours, attributes=layout.attrs)
    sizes = layout.sizes
    labels = {
        dim: " ".join(n for n, (d, _) in layout.coords.items() if d == dim != n) for dim in sizes
    }
    of_influence = " ".join(filter(None, labels.values()))
    spec = replace(INFLUENCE, dims=tuple(sizes), dtype=layout.dtype, units=layout.units)
    extra: dict[str, Any] = {"coordinates": of_influence} if of_influence else {}
    extra |= {"rows": layout.per_panel, "kernel": layout.attrs["kernel"]}
    create_array(group, spec, tuple(sizes.values()), layout.chunks, attrs=extra)
    for spec in layout.specs().values():
        shape = layout.shape(spec.dims)
        wide = {AUDIT: layout.per_panel}
        chunks = tuple(min(n, wide.get(dim, n)) for dim, n in zip(spec.dims, shape, strict=True))
        create_array(group, spec, shape, chunks)
    shape = (len(layout.panels), len(FIELDS))
    fields = {"fields": list(FIELDS)}
    record = create_array(group, RECORD, shape, (1, len(FIELDS)), fill=-1, attrs=fields)
    create_coord(group, EPOCH, layout.epochs, EPOCH)
    for name, (dim, values) in layout.coords.items():
        create_coord(group, name, values, dim)
    seal(group, filling=[*RESULTS, RECORD.name])
    flush_tree(root.store, layout.group)
    return record


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


def stored_panel_size(path: Any, group: str) -> int | None:
    """Return the audited examples of a panel of the audit that is stored, if there is one."""
    root = create_root(as_store(path))
    if group not in audit_fingerprints(root):
        return None
    return _stored_size(stored_at(root, f"{group}/{INFLUENCE.name}"))


def _stored_size(influence: zarr.Array) -> int:
    with reading(influence.store, f"{influence.path}/zarr.json"):
        return int(attributes_of(influence)["rows"])


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
    per_panel = _stored_size(stored_at(root, f"{group}/{INFLUENCE.name}"))

    def read_results(array: zarr.Array) -> np.ndarray:
        if array.basename not in RESULTS:
            return read_whole(array)
        for panel in panels:
            for leading in panel_leading(array, panel):
                require_chunks(array, leading)
        return read(array, ...)

    stored = variables(root, group, lazy={INFLUENCE.name}, skip={RECORD.name}, read=read_results)
    with reading(root.store, group):
        for variable in stored.values():
            variable.attrs.pop("coordinates", None)
        stored[INFLUENCE.name].attrs.pop("rows", None)
        ds = xr.Dataset(stored, attrs=described(group_at(root, group)))
        ds = ds.set_coords(set(stored) - set(RESULTS))
        whole = np.repeat(record[:, 0] == 0, per_panel)[: ds.sizes[AUDIT]]
        return ds if whole.all() else ds.isel({AUDIT: whole})


def _require_committed(root: zarr.Group, group: str) -> None:
    """Raise `DamagedError` unless all that counts of an audit is there."""
    require_seals(root, group)
    panels = list(committed_panels(root, group))
    lost = missing(
        root.store, (key for array, panel, _ in panels for key in panel_keys(array, panel))
    )
    if lost:
        raise damaged(root.store, f"{lost[0]} was committed, but is missing or empty")
