"""What a store holds, in words."""

from __future__ import annotations

from collections.abc import Iterator

import xarray as xr
import zarr
from dask.utils import format_bytes
from zarr.storage import FsspecStore

from lkarray import schema
from lkarray.errors import DivergedError
from lkarray.store import (
    describe,
    open_root,
    part_store,
    parts_of,
    read_records,
    stored,
    stored_fingerprint,
)
from lkarray.store.audits import audit_fingerprints, open_audit
from lkarray.store.gradients import gradient_fingerprints, open_gradients
from lkarray.store.layout import recorded
from lkarray.store.location import StoreLike, sizes
from lkarray.store.names import DERIVED
from lkarray.store.reading import open_store
from lkarray.store.results import derived_groups
from lkarray.store.trajectory import open_trajectory, trace_fingerprint


def describe_store(path: StoreLike) -> str:
    """Return a description: groups, sizes, labels, chains, settings. Reads no losses."""
    root = open_root(path)
    lines = [describe(root.store)]
    if not isinstance(root.store, FsspecStore):  # those need a request for each chunk
        size = sum(size for _, size in sizes(root.store, ""))
        lines.append(f"  {format_bytes(size)} stored")
    parts = parts_of(root)
    if parts is not None:
        for label in parts["labels"]:
            inside = describe_store(part_store(root.store, parts["dim"], label)).splitlines()
            lines += ["", f"  {parts['dim']} {label}:", *(f"  {line}" for line in inside[1:])]
        return "\n".join(lines)
    fingerprint = stored_fingerprint(root)
    training = list(_training(root))
    if fingerprint is None:
        training += _derived(open_store(path)) if derived_groups(root) else []
        nothing = "  no losses yet: sampling was stopped before it began"
        return "\n".join([*lines, *(training or [nothing])])
    lines.append("")
    for at, array in recorded(root).items():
        group, name = at.split("/")
        if group != schema.SAMPLE_STATS:
            dims = array.metadata.dimension_names  # type: ignore[union-attr]
            shape = ", ".join(f"{d} {n:,}" for d, n in zip(dims or (), array.shape, strict=True))
            lines.append(f"  /{group}  {name}({shape}), chunks {array.chunks}, {array.dtype}")
    loss = stored(root, schema.LOSSES, schema.LOSS)
    records = read_records(root, slice(loss.shape[0])).values()
    lines.append(f"  draws committed by chain: {[record.draws for record in records]}")
    try:
        tree = open_store(path) if any(record.draws for record in records) else None
    except DivergedError as error:
        tree = None
        lines.append(f"  {error}")
    if tree is not None:
        labels = [name for name in tree["losses"].coords if name not in schema.LOSS.dims]
        lines.append(f"  labels: {', '.join(map(str, labels)) or 'none'}")
        lines += _derived(tree)
    lines += ["", "  made with"]
    lines += [f"    {key}: {value}" for key, value in fingerprint.items()]
    return "\n".join([*lines, *training])


def _derived(tree: xr.DataTree) -> Iterator[str]:
    """Yield lines on the results that a store keeps."""
    derived = tree.children.get(DERIVED)
    for name, node in derived.children.items() if derived is not None else ():
        variables = (f"{v}({', '.join(map(str, a.dims))})" for v, a in node.data_vars.items())
        yield f"  /{DERIVED}/{name}  {', '.join(variables)}"


def _training(root: zarr.Group) -> Iterator[str]:
    """Yield lines on a recorded training run, and on the tensors and audits made from it."""
    mark = trace_fingerprint(root)
    if mark is not None:
        ds = open_trajectory(root)
        yield ""
        yield (
            f"  /{schema.TRAJECTORY}  {ds.sizes['step']:,} steps committed of {mark['optimizer']}, "
            f"{ds.sizes['param']:,} parameters in {ds.sizes['tensor']} tensors, "
            f"every {mark['every']} steps a state"
        )
    for group in gradient_fingerprints(root):
        tensor = next(iter(open_gradients(root, group).data_vars.values()))
        shape = ", ".join(f"{dim} {n:,}" for dim, n in tensor.sizes.items())
        yield f"  /{group}  {tensor.name}({shape}), {tensor.dtype}, {format_bytes(tensor.nbytes)}"
    for group in audit_fingerprints(root):
        influence = open_audit(root, group)["influence"]
        shape = ", ".join(f"{dim} {n:,}" for dim, n in influence.sizes.items())
        yield f"  /{group}  influence({shape}), {influence.dtype}, {format_bytes(influence.nbytes)}"
    if mark is not None:
        yield from ["", "  recorded with"]
        yield from (f"    {key}: {value}" for key, value in mark.items())
