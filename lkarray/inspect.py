"""What a store holds, in words."""

from __future__ import annotations

from dask.utils import format_bytes

from lkarray import schema
from lkarray.errors import DivergedError
from lkarray.store import (
    describe,
    open_root,
    part_store,
    parts_of,
    read_record,
    stored,
    stored_fingerprint,
)
from lkarray.store.layout import recorded
from lkarray.store.location import StoreLike, local_path
from lkarray.store.reading import DERIVED, open_store


def describe_store(path: StoreLike) -> str:
    """Return a description: groups, sizes, labels, chains, settings. Reads no losses."""
    root = open_root(path)
    lines = [describe(root.store)]
    folder = local_path(root.store)
    if folder is not None:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        lines.append(f"  {format_bytes(size)} on disk")
    parts = parts_of(root)
    if parts is not None:
        for label in parts["labels"]:
            inside = describe_store(part_store(root.store, parts["dim"], label)).splitlines()
            lines += ["", f"  {parts['dim']} {label}:", *(f"  {line}" for line in inside[1:])]
        return "\n".join(lines)
    fingerprint = stored_fingerprint(root)
    if fingerprint is None:
        return "\n".join([*lines, "  no losses yet: sampling was stopped before it began"])
    lines.append("")
    for at, array in recorded(root).items():
        group, name = at.split("/")
        if group != schema.SAMPLE_STATS:
            dims = array.metadata.dimension_names  # type: ignore[union-attr]
            sizes = ", ".join(f"{d} {n:,}" for d, n in zip(dims or (), array.shape, strict=True))
            lines.append(f"  /{group}  {name}({sizes}), chunks {array.chunks}, {array.dtype}")
    loss = stored(root, schema.LOSSES, schema.LOSS)
    records = [read_record(root, chain) for chain in range(loss.shape[0])]
    lines.append(f"  draws committed by chain: {[record.draws for record in records]}")
    try:
        tree = open_store(path) if any(record.draws for record in records) else None
    except DivergedError as error:
        tree = None
        lines.append(f"  {error}")
    if tree is not None:
        labels = [name for name in tree["losses"].coords if name not in schema.LOSS.dims]
        lines.append(f"  labels: {', '.join(map(str, labels)) or 'none'}")
        derived = tree.children.get(DERIVED)
        for name, node in derived.children.items() if derived is not None else ():
            variables = (f"{v}({', '.join(map(str, a.dims))})" for v, a in node.data_vars.items())
            lines.append(f"  /{DERIVED}/{name}  {', '.join(variables)}")
    lines += ["", "  made with"]
    lines += [f"    {key}: {value}" for key, value in fingerprint.items()]
    return "\n".join(lines)
