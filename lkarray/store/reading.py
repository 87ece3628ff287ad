"""What a user sees of a store: the committed rectangle, lazily."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from zarr.errors import ZarrUserWarning

from lkarray import schema
from lkarray.arguments import checked
from lkarray.errors import DamagedError, DivergedError, LkarrayError, StoreError
from lkarray.store.arrays import stored
from lkarray.store.audits import audit_fingerprints, open_audit
from lkarray.store.chunks import damaged, read, read_whole, require_chunks
from lkarray.store.commit import Record, read_records
from lkarray.store.exact import restored
from lkarray.store.features import feature_fingerprint, open_features
from lkarray.store.gradients import gradient_fingerprints, open_gradients
from lkarray.store.layout import (
    SETTINGS,
    loss_groups,
    recorded_paths,
    recorded_specs,
    run_groups,
    stored_fingerprint,
)
from lkarray.store.location import StoreLike, describe, is_sealed, open_root
from lkarray.store.names import DERIVED, folders
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.parts import part_store, parts_of
from lkarray.store.results import results
from lkarray.store.seals import SEAL, broken_seals, seal_of
from lkarray.store.trajectory import open_trajectory, read_steps, trace_fingerprint
from lkarray.store.typed import dims_of

logger = logging.getLogger("lkarray")

_OBSERVABLES = f"{schema.OBSERVABLES}/"
#: Attribute of a tree of several runs: in what they differ, and the attributes of each.
PARTS = "parts"


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
        optimizer did at each step) and ``gradients`` (``gradient(time, example, param)``), and
        what `lkarray.laplace` made ``features`` (``feature(mode, sample)``).
        Losses are Dask arrays, one Dask chunk per stored chunk; labels are loaded.

        The rectangle shown is the one committed by every chain that has started and has not
        diverged. What it leaves out is logged and kept in the attribute ``hidden``.

    Raises
    ------
    StoreError
        There is no store, it is not lkarray's, or it holds no committed draw.
    DamagedError
        Metadata, labels or losses at w* are missing, cannot be read, or are not those that were
        written; the message names the file. A result under ``derived`` that is damaged is left
        out instead, and said in ``hidden``.
    StoreVersionError
        A newer lkarray wrote it.
    DivergedError
        Every chain diverged.

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> from zarr.storage import MemoryStore
    >>> posterior = lk.LocalPosterior(model, data, nbeta=10.0, gamma=100.0)
    >>> options = {"chains": 2, "draws": 4, "burn_in": 1, "batch_size": 4, "progress": False}
    >>> store = MemoryStore()
    >>> tree = lk.sample(posterior, data, sampler=lk.SGLD(step_size=1e-3), store=store, **options)
    >>> dict(lk.open(store)["losses"]["loss"].sizes)
    {'chain': 2, 'draw': 4, 'sample': 8}
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
        derived, broken = _open_derived(root)
        if not training and not derived and not broken:
            raise StoreError(
                f"{describe(store)} holds no losses: its sampling was stopped before it began. "
                "Run lk.sample on it again"
            )
        groups = {"/": xr.Dataset(attrs=dict(root.attrs))} | training | derived
        tree = xr.DataTree.from_dict(groups, name="lkarray")
        _hide(tree, store, broken)
        return tree
    shown, depth, hidden = _rectangle(root, chains)
    depth = min(depth, draws) if draws is not None else depth
    sampled = _sampled(root)
    stats = sampled[schema.SAMPLE_STATS]
    whole = {dim: np.arange(stats.sizes[dim]) for dim in schema.POSTERIOR}
    select: dict[str, Any] = {schema.CHAIN: shown, schema.DRAW: slice(depth)}
    if shown == list(range(len(shown))):
        select[schema.CHAIN] = slice(len(shown))
    groups = {"/": xr.Dataset(attrs=dict(root.attrs))}
    for group, ds in sampled.items():
        # Growth that was killed leaves some arrays larger than the losses.
        fits = ds.isel({dim: slice(len(index)) for dim, index in whole.items()})
        groups[group] = fits.assign_coords(whole).isel(select)
    derived, broken = _open_derived(root)
    tree = xr.DataTree.from_dict(groups | training | derived, name="lkarray")
    _hide(tree, store, hidden + broken)
    return tree


def _hide(tree: xr.DataTree, store: Any, hidden: list[str]) -> None:
    """Say what a tree leaves out of a store."""
    if hidden:
        logger.warning("%s: %s", describe(store), "; ".join(hidden))
        tree.attrs["hidden"] = [*tree.attrs.get("hidden", []), *hidden]


def _sampled(root: zarr.Group) -> dict[str, xr.Dataset]:
    """Return the groups that chains record; what cannot be put together is damaged."""
    try:
        return _open_sampled(root)
    except (LkarrayError, OSError):
        raise
    except Exception as error:  # xarray and zarr raise many of arrays that do not fit together
        raise damaged(root.store, f"its groups cannot be opened ({error})") from error


def _open_sampled(root: zarr.Group) -> dict[str, xr.Dataset]:
    """Return the groups that chains record, as long as the store's arrays are, checked."""
    where = describe(root.store)
    for group in (schema.SAMPLE_STATS, schema.OBSERVABLES, schema.COMMIT):
        if group in run_groups(root):
            for problem in broken_seals(group_at(root, group), contents=False):
                raise damaged(root.store, f"{problem.path}: {problem.detail}")
    stats = _open_stats(root, stored(root, schema.LOSSES, schema.LOSS).shape)
    schema.validate(stats, schema.STATS, where=f"{where}/{schema.SAMPLE_STATS}")
    sampled = {}
    for group in loss_groups(root):
        sampled[group] = _open_losses(root, group)
        schema.validate(sampled[group], recorded_specs(root), where=f"{where}/{group}")
        _check_sealed(root, group)
    sampled[schema.SAMPLE_STATS] = stats
    observables = [path for path in recorded_paths(root) if path.startswith(_OBSERVABLES)]
    if observables:
        ds = xr.Dataset(
            {path.removeprefix(_OBSERVABLES): _variable(root, path) for path in observables}
        )
        if schema.SAMPLE in ds.dims:
            about = sampled[schema.LOSSES]
            ds = ds.assign_coords(
                {k: v for k, v in about.coords.items() if v.dims == (schema.SAMPLE,)}
            )
        sampled[schema.OBSERVABLES] = ds
    return sampled


def _training_groups(root: zarr.Group) -> dict[str, xr.Dataset]:
    """Return what a store has of a training run: committed steps, finished tensors."""
    groups = {}
    if trace_fingerprint(root) is not None and read_steps(root)[0]:
        groups[schema.TRAJECTORY] = open_trajectory(root)
    for group in gradient_fingerprints(root):
        ds = open_gradients(root, group)
        if ds.sizes[schema.TIME]:
            groups[group] = ds
    for group in feature_fingerprint(root):
        ds = open_features(root)
        if ds.data_vars:
            groups[group] = ds
    for group in audit_fingerprints(root):
        ds = open_audit(root, group)
        if ds.sizes[schema.AUDIT]:
            groups[group] = ds
    return groups


def _open_parts(
    root: zarr.Group, parts: dict[str, Any], chains: int | None, draws: int | None
) -> xr.DataTree:
    """Open several runs as one, along the dim in which they differ."""
    stores = [part_store(root.store, parts["dim"], label) for label in parts["labels"]]
    trees = [open_rectangle(store, chains=chains, draws=draws) for store in stores]
    tree = join_parts(trees, parts["dim"], parts["labels"])
    tree.attrs = dict(root.attrs) | tree.attrs
    derived, broken = _open_derived(root)
    for path, ds in derived.items():
        tree[path] = xr.DataTree(ds)
    _hide(tree, root.store, broken)
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


def _variable(root: zarr.Group, path: str, *, lazy: bool = True) -> xr.Variable:
    """Return a stored array: on Dask, one Dask chunk for each stored one, or read whole."""
    array = stored_at(root, path)
    attrs = {key: value for key, value in array.attrs.items() if key != "coordinates"}
    return xr.Variable(dims_of(array), da.from_zarr(array) if lazy else read_whole(array), attrs)


def _open_losses(root: zarr.Group, group: str) -> xr.Dataset:
    """Open the losses of an observed set; labels and losses at w* are read, without Dask.

    Dask's threads do not survive a fork, after which labels read by them would never come.
    """
    node = group_at(root, group)
    variables, specs = {}, {spec.name: spec for spec in recorded_specs(root)}
    there = set(folders(root.store, group))
    for name in [n for n in specs if n in there] + sorted(there - set(specs)):
        grows = name in specs and schema.DRAW in specs[name].dims
        variables[name] = _variable(root, f"{group}/{name}", lazy=grows)
    shape = variables[schema.LOSS.name].shape if schema.LOSS.name in variables else ()
    attrs = {key: value for key, value in node.attrs.items() if key != SEAL}
    ours = {name: variables.pop(name) for name in specs if name in variables}
    return xr.Dataset(_cut(ours, shape), attrs=attrs).assign_coords(variables)


def _check_sealed(root: zarr.Group, group: str) -> None:
    """Raise unless a group of losses is as it was made: labels, attributes, metadata."""
    node = group_at(root, group)
    for name, known, now in changed_settings(root, node):
        raise DamagedError(
            f"{describe(root.store)} is damaged: attribute {name!r} of {group}/zarr.json is "
            f"{now!r}, but the run was made with {known!r}, as its fingerprint says. Nothing was "
            "touched: lk.repair puts it right; lk.verify lists all faults"
        )
    if is_sealed(root) and seal_of(node) is None:
        raise damaged(root.store, f"{group}/zarr.json has lost its seal")
    for problem in broken_seals(node):
        raise damaged(root.store, f"{problem.path}: {problem.detail}")


def changed_settings(root: zarr.Group, group: zarr.Group) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attributes of a group of losses that differ from the run's fingerprint.

    Each with the fingerprint's value and the one stored.
    """
    fingerprint = stored_fingerprint(root) or {}
    for name in SETTINGS:
        if name in fingerprint and group.attrs.get(name) != fingerprint[name]:
            yield name, fingerprint[name], group.attrs.get(name)


def _open_stats(root: zarr.Group, shape: tuple[int, ...]) -> xr.Dataset:
    """Open the statistics, as long as the losses are."""
    variables = {
        spec.name: _variable(root, f"{schema.SAMPLE_STATS}/{spec.name}") for spec in schema.STATS
    }
    return xr.Dataset(_cut(variables, shape))


def _cut(variables: dict[str, xr.Variable], shape: tuple[int, ...]) -> dict[str, xr.Variable]:
    """Cut variables to the sizes of the losses: growth that was killed leaves them larger."""
    sizes = {dim: slice(n) for dim, n in zip(schema.POSTERIOR, shape, strict=False)}
    return {k: v.isel(sizes, missing_dims="ignore") for k, v in variables.items()}


def _open_derived(root: zarr.Group) -> tuple[dict[str, xr.Dataset], list[str]]:
    """Open the finished results that a store keeps; others are left out, and what they are said."""
    derived, said = {}, []
    for path, problem in results(root):
        if problem is not None and problem.kind == "unfinished":
            said.append(f"{path} is left out: {problem.detail}")
            continue
        try:
            if problem is not None:
                raise damaged(root.store, str(problem))
            derived[path] = restored(_open_result(root, path))
        except Exception as error:  # xarray and every codec raise their own
            reason = (str(error) or repr(error)).splitlines()[0]
            said.append(
                f"{path} is damaged and left out: {reason.removesuffix('.')}; compute it again, "
                "or restore it from a copy"
            )
    return derived, said


def _open_result(root: zarr.Group, path: str) -> xr.Dataset:
    node = group_at(root, path)
    for problem in broken_seals(node, contents=False):
        raise damaged(root.store, f"{problem.path}: {problem.detail}")
    with warnings.catch_warnings():
        # Of what has no metadata, which is an error below.
        warnings.simplefilter("ignore", ZarrUserWarning)
        ds: xr.Dataset = xr.open_zarr(
            root.store, group=path, consolidated=False, chunks={}, zarr_format=3
        )
    for name in folders(root.store, path):
        if name not in ds.variables:
            raise damaged(root.store, f"{path}/{name}/zarr.json is missing")
    for name in map(str, ds.coords):
        require_chunks(stored_at(root, f"{path}/{name}"))
        ds[name].load(scheduler="synchronous")  # in this thread: see _open_losses
    ds = ds[sorted(map(str, ds.data_vars))]
    ds.attrs = {key: value for key, value in ds.attrs.items() if key != SEAL}
    return ds


def _rectangle(root: zarr.Group, limit: int | None) -> tuple[list[int], int, list[str]]:
    """Return the chains and draws that every usable chain has, and what that hides."""
    flags = stored(root, schema.SAMPLE_STATS, schema.DIVERGED)
    chains = stored(root, schema.LOSSES, schema.LOSS).shape[0]
    records = read_records(root, slice(chains if limit is None else min(limit, chains)))
    started = {c: r for c, r in records.items() if r.draws > 0}
    if not started:
        raise StoreError(
            f"{describe(root.store)} holds no committed draw yet; run lk.sample on it again"
        )
    bad = _diverged(flags, {c: r.draws for c, r in started.items()})
    good = {c: r for c, r in started.items() if c not in bad}
    if not good:
        raise DivergedError(
            f"every chain of {describe(root.store)} turned non-finite; sample into a new store "
            "with a smaller step size, or a larger gamma"
        )
    draws = min(record.draws for record in good.values())
    return list(good), draws, _hidden(records, bad, good, draws)


def _diverged(flags: zarr.Array, draws: Mapping[int, int]) -> list[int]:
    """Return the chains that turned non-finite, of those that hold so many draws.

    Such a chain ends there, so its last draw's flag tells; a chunk that is lost says nothing.
    """
    depth = flags.chunks[1]
    require_chunks(
        flags, *((c, block) for c, n in draws.items() for block in range(-(-n // depth)))
    )
    return [chain for chain, count in draws.items() if bool(read(flags, (chain, count - 1)))]


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
