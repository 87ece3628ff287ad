"""What a user sees of a store: the committed rectangle, lazily."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.errors import DivergedError, StoreError
from lkarray.store.commit import Record, read_record
from lkarray.store.layout import stored, stored_fingerprint
from lkarray.store.location import StoreLike, describe, open_root

logger = logging.getLogger("lkarray")

DERIVED = "derived"
HIDDEN = "."  # begins the names of derived groups that are being written


def open_store(path: StoreLike) -> xr.DataTree:
    """Open a store: every draw that counts, lazily, with its labels.

    Parameters
    ----------
    path
        A folder, a URL that fsspec understands, or a Zarr store.

    Returns
    -------
    xarray.DataTree
        Groups ``losses`` (``loss(chain, draw, sample)`` in nats, ``center_loss(sample)``),
        ``sample_stats`` (per ``chain, draw``) and, where there are any, ``derived/...``.
        Losses are Dask arrays, one Dask chunk per stored chunk; labels are loaded.

        The rectangle shown is the one committed by every chain that has started and has not
        diverged. What it leaves out is logged and kept in the attribute ``hidden``.

    Raises
    ------
    StoreError
        There is no store, it is not lkarray's, or it holds no committed draw.
    StoreVersionError
        A newer lkarray wrote it.
    DivergedError
        Every chain diverged.
    """
    return open_rectangle(path)


def open_rectangle(
    path: StoreLike, *, chains: int | None = None, draws: int | None = None
) -> xr.DataTree:
    """Open a store as `open_store` does, limited to the first ``chains`` and ``draws``."""
    root = open_root(path)
    store = root.store
    if stored_fingerprint(root) is None:
        raise StoreError(
            f"{describe(store)} holds no losses: its sampling was stopped before it began. "
            "Run lk.sample on it again"
        )
    shown, depth, hidden = _rectangle(root, chains)
    depth = min(depth, draws) if draws is not None else depth
    losses = _open_group(store, schema.LOSSES)
    stats = _open_stats(store, losses)
    schema.validate(losses, schema.GROUPS[schema.LOSSES], where=f"{describe(store)}/losses")
    schema.validate(stats, schema.STATS, where=f"{describe(store)}/sample_stats")
    whole = {schema.CHAIN: np.arange(stats.sizes[schema.CHAIN])}
    whole[schema.DRAW] = np.arange(stats.sizes[schema.DRAW])
    select: dict[str, Any] = {schema.CHAIN: shown, schema.DRAW: slice(depth)}
    if shown == list(range(len(shown))):
        select[schema.CHAIN] = slice(len(shown))
    groups = {
        "/": xr.Dataset(attrs=dict(root.attrs)),
        schema.LOSSES: losses.assign_coords(whole).isel(select),
        schema.SAMPLE_STATS: stats.assign_coords(whole).isel(select),
    }
    groups |= {path: _open_group(store, path) for path in derived_groups(root)}
    tree = xr.DataTree.from_dict(groups, name="lkarray")
    if hidden:
        logger.warning("%s: %s", describe(store), "; ".join(hidden))
        tree.attrs["hidden"] = hidden
    return tree


def _open_group(store: Any, group: str, *, only: str | None = None) -> xr.Dataset:
    others = [s.name for s in schema.GROUPS.get(group, ()) if only is not None and s.name != only]
    ds: xr.Dataset = xr.open_zarr(
        store, group=group, consolidated=False, chunks={}, zarr_format=3, drop_variables=others
    )
    for name in ds.coords:
        ds[name].load()
    # Zarr lists arrays in any order; the schema's own comes first, so that dims do too.
    first = [spec.name for spec in schema.GROUPS.get(group, ()) if spec.name in ds]
    ds = ds[[*first, *sorted(set(map(str, ds.data_vars)) - set(first))]]
    if schema.CENTER_LOSS.name in ds:
        ds[schema.CENTER_LOSS.name].load()
    return ds


def _open_stats(store: Any, losses: xr.Dataset) -> xr.Dataset:
    """Open the statistics, cut to the sizes of the losses: growth may have been killed."""
    names = [spec.name for spec in schema.STATS]
    parts = [_open_group(store, schema.SAMPLE_STATS, only=name) for name in names]
    sizes = {dim: slice(losses.sizes[dim]) for dim in schema.POSTERIOR}
    return xr.merge([part.isel(sizes, missing_dims="ignore") for part in parts], join="exact")


def derived_groups(root: zarr.Group) -> list[str]:
    """Return the paths of the finished results in the store."""
    if DERIVED not in root:
        return []
    group = root[DERIVED]
    assert isinstance(group, zarr.Group)
    names = sorted(name for name in group.group_keys() if not name.startswith(HIDDEN))
    return [f"{DERIVED}/{name}" for name in names]


def _rectangle(root: zarr.Group, limit: int | None) -> tuple[list[int], int, list[str]]:
    """Return the chains and draws that every usable chain has, and what that hides."""
    flags = stored(root, schema.SAMPLE_STATS, schema.DIVERGED)
    chains = stored(root, schema.LOSSES, schema.LOSS).shape[0]
    records = {c: read_record(root, c) for c in range(chains)[:limit]}
    started = {c: r for c, r in records.items() if r.draws > 0}
    if not started:
        raise StoreError(
            f"{describe(root.store)} holds no committed draw yet; run lk.sample on it again"
        )
    bad = [c for c, r in started.items() if bool(np.any(flags[c, : r.draws]))]
    good = {c: r for c, r in started.items() if c not in bad}
    if not good:
        raise DivergedError(
            f"every chain of {describe(root.store)} turned non-finite; sample into a new store "
            "with a smaller step size, or a larger gamma"
        )
    draws = min(record.draws for record in good.values())
    return list(good), draws, _hidden(records, bad, good, draws)


def _hidden(
    records: dict[int, Record], bad: list[int], good: dict[int, Record], draws: int
) -> list[str]:
    said = []
    waiting = [c for c, record in records.items() if record.draws == 0]
    if bad:
        said.append(f"chains {bad} diverged and are left out")
    if waiting:
        said.append(f"chains {waiting} have no draws yet")
    if any(record.draws > draws for record in good.values()):
        said.append(f"only the first {draws} draws are shown, which every started chain has")
    return said
