"""What a user sees of a store: the committed rectangle, lazily."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.checking import checked
from lkarray.errors import DivergedError, StoreError
from lkarray.store.audits import audit_marks, open_audit
from lkarray.store.commit import Record, read_record
from lkarray.store.gradients import gradient_marks, open_gradients
from lkarray.store.layout import (
    loss_groups,
    part_store,
    parts_of,
    stored,
    stored_fingerprint,
)
from lkarray.store.location import StoreLike, describe, open_root
from lkarray.store.trajectory import open_trajectory, read_steps, trace_fingerprint

logger = logging.getLogger("lkarray")

DERIVED = "derived"
#: Attribute of a tree of several runs: in what they differ, and the attributes of each.
PARTS = "parts"
HIDDEN = "."  # begins the names of derived groups that are being written


@checked()
def open_store(path: StoreLike) -> xr.DataTree:
    """Open a store: every draw that counts, lazily, with its labels.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store.

    Returns
    -------
    xarray.DataTree
        Groups ``losses`` (``loss(chain, draw, sample)`` in nats, ``center_loss(sample)``),
        ``sample_stats`` (per ``chain, draw``) and, where there are any, ``derived/...``.
        A recorded training run has ``trajectory`` (``parameters(step, param)`` and what the
        optimizer did at each step) and ``gradients`` (``gradient(time, example, param)``).
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
    parts = parts_of(root)
    if parts is not None:
        return _open_parts(root, parts, chains, draws)
    training = _training_groups(root)
    if stored_fingerprint(root) is None:
        derived = derived_groups(root)
        if not training and not derived:
            raise StoreError(
                f"{describe(store)} holds no losses: its sampling was stopped before it began. "
                "Run lk.sample on it again"
            )
        groups = {"/": xr.Dataset(attrs=dict(root.attrs))} | training
        groups |= {path: _open_group(store, path) for path in derived}
        return xr.DataTree.from_dict(groups, name="lkarray")
    shown, depth, hidden = _rectangle(root, chains)
    depth = min(depth, draws) if draws is not None else depth
    stats = _open_stats(store, stored(root, schema.LOSSES, schema.LOSS).shape)
    schema.validate(stats, schema.STATS, where=f"{describe(store)}/sample_stats")
    sampled = {group: _open_group(store, group) for group in loss_groups(root)}
    for group, losses in sampled.items():
        specs = schema.GROUPS[schema.LOSSES]
        schema.validate(losses, specs, where=f"{describe(store)}/{group}")
    sampled[schema.SAMPLE_STATS] = stats
    if schema.OBSERVABLES in root:
        sampled[schema.OBSERVABLES] = _open_group(store, schema.OBSERVABLES)
        about = sampled[schema.LOSSES]
        if schema.SAMPLE in sampled[schema.OBSERVABLES].dims:
            labels = {k: v for k, v in about.coords.items() if v.dims == (schema.SAMPLE,)}
            sampled[schema.OBSERVABLES] = sampled[schema.OBSERVABLES].assign_coords(labels)
    whole = {dim: np.arange(stats.sizes[dim]) for dim in schema.POSTERIOR}
    select: dict[str, Any] = {schema.CHAIN: shown, schema.DRAW: slice(depth)}
    if shown == list(range(len(shown))):
        select[schema.CHAIN] = slice(len(shown))
    groups = {"/": xr.Dataset(attrs=dict(root.attrs))}
    for group, ds in sampled.items():
        # Growth that was killed leaves some arrays larger than the losses.
        fits = ds.isel({dim: slice(len(index)) for dim, index in whole.items()})
        groups[group] = fits.assign_coords(whole).isel(select)
    groups |= training | {path: _open_group(store, path) for path in derived_groups(root)}
    tree = xr.DataTree.from_dict(groups, name="lkarray")
    if hidden:
        logger.warning("%s: %s", describe(store), "; ".join(hidden))
        tree.attrs["hidden"] = hidden
    return tree


def _training_groups(root: zarr.Group) -> dict[str, xr.Dataset]:
    """Return what a store has of a training run: committed steps, finished tensors."""
    found = {}
    if trace_fingerprint(root) is not None and read_steps(root)[0]:
        found[schema.TRAJECTORY] = open_trajectory(root)
    for group in gradient_marks(root):
        ds = open_gradients(root, group)
        if ds.sizes[schema.TIME]:
            found[group] = ds
    for group in audit_marks(root):
        ds = open_audit(root, group)
        if ds.sizes[schema.AUDIT]:
            found[group] = ds
    return found


def _open_parts(
    root: zarr.Group, parts: dict[str, Any], chains: int | None, draws: int | None
) -> xr.DataTree:
    """Open several runs as one, along the dim in which they differ."""
    stores = [part_store(root.store, parts["dim"], label) for label in parts["labels"]]
    trees = [open_rectangle(store, chains=chains, draws=draws) for store in stores]
    tree = join_parts(trees, parts["dim"], parts["labels"])
    tree.attrs = dict(root.attrs) | tree.attrs
    for path in derived_groups(root):
        tree[path] = xr.DataTree(_open_group(root.store, path))
    return tree


def join_parts(trees: list[xr.DataTree], dim: str, labels: list[Any]) -> xr.DataTree:
    """Return trees of several runs as one, lazily; chains and draws are those that all have."""
    groups = {}
    for name in trees[0].children:
        if name == DERIVED:
            continue
        joined = xr.concat(
            [tree[name].to_dataset() for tree in trees],
            dim=xr.DataArray(labels, dims=dim, name=dim),
            data_vars="all",
            coords="minimal",
            compat="override",
            join="inner",
            combine_attrs="drop_conflicts",
        )
        groups[str(name)] = joined
    tree = xr.DataTree.from_dict({"/": xr.Dataset(), **groups}, name="lkarray")
    tree.attrs[PARTS] = {"dim": dim, "labels": labels, "marks": [t.attrs for t in trees]}
    hidden = [line for t in trees for line in t.attrs.get("hidden", [])]
    if hidden:
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
    of = schema.LOSSES if group.startswith(schema.LOSSES) else group
    first = [spec.name for spec in schema.GROUPS.get(of, ()) if spec.name in ds]
    ds = ds[[*first, *sorted(set(map(str, ds.data_vars)) - set(first))]]
    if schema.CENTER_LOSS.name in ds:
        ds[schema.CENTER_LOSS.name].load()
    return ds


def _open_stats(store: Any, shape: tuple[int, ...]) -> xr.Dataset:
    """Open the statistics, cut to the sizes of the losses: growth may have been killed."""
    names = [spec.name for spec in schema.STATS]
    parts = [_open_group(store, schema.SAMPLE_STATS, only=name) for name in names]
    sizes = {dim: slice(n) for dim, n in zip(schema.POSTERIOR, shape, strict=False)}
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
