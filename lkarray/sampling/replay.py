"""`observe`: questions after the fact, put to chains that were sampled before.

Everything random is a function of seed, chain and step, so a stored run is replayed from its
settings and the model alone; no weights of draws are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from zarr.storage import MemoryStore

from lkarray import schema
from lkarray import store as stores
from lkarray.arguments import checked
from lkarray.errors import FingerprintError
from lkarray.nn.batches import MapDataset, check_workers
from lkarray.sampling import checking as checks
from lkarray.sampling.chain import Schedule
from lkarray.sampling.job import Job
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.samplers import Sampler, sampler_from
from lkarray.sampling.target import Observable
from lkarray.store.location import ENTRIES, StoreLike
from lkarray.store.reading import PARTS, join_parts

if TYPE_CHECKING:
    from distributed import Client

#: What a replay must share with the run it replays.
_SHARED = (
    "lkarray",
    "torch",
    "weights",
    "train_data",
    "loss",
    "nbeta",
    "gamma",
    "trainable",
    "sampler",
    "burn_in",
    "thin",
    "batch_size",
    "seed",
    "precision",
    "matmul_precision",
    "chains_per_device",
    "train_rows",
)
_COMPARED = (schema.MINIBATCH_LOSS, schema.GRADIENT_NORM, schema.DISTANCE)
#: Largest relative difference of the statistics of a draw from those of its replay.
_TOLERANCE = 1e-3

_remembered: dict[str, Job] = {}
_REMEMBERED = 32  # two of each run
_OBSERVED = ("observed_data", "observables")


@contextmanager
def forgetting() -> Iterator[None]:
    """Forget the runs inside, as those of pilots, which would crowd out others."""
    before = dict(_remembered)
    try:
        yield
    finally:
        _remembered.clear()
        _remembered.update(before)


def remember(fingerprint: Mapping[str, Any], job: Job) -> None:
    """Keep the posterior and sampler of a run of this process, for `observe` and `repair`."""
    for key in (_key(fingerprint), _key(fingerprint, _OBSERVED)):
        _remembered.pop(key, None)
        _remembered[key] = job
    while len(_remembered) > _REMEMBERED:
        del _remembered[next(iter(_remembered))]


def remembered(fingerprint: Mapping[str, Any], *, observed: bool = False) -> Job | None:
    """Return the job of this process that such a run was made by, if there was one.

    With ``observed``, one that observed the same too.
    """
    return _remembered.get(_key(fingerprint, _OBSERVED if observed else ()))


def _key(fingerprint: Mapping[str, Any], more: tuple[str, ...] = ()) -> str:
    names = (*_SHARED, *more)
    return json.dumps([fingerprint.get(name) for name in names], sort_keys=True, default=str)


@checked()
def observe(
    tree: xr.DataTree,
    new_set: MapDataset | Mapping[str, MapDataset],
    *,
    posterior: LocalPosterior | None = None,
    sampler: Sampler | None = None,
    store: StoreLike | None = None,
    coords: Mapping[str, Any] | None = None,
    observables: Mapping[str, Observable] | None = None,
    autocast: str | None = None,
    compile: bool = False,  # noqa: A002
    device: torch.device | str | None = None,
    client: Client | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """Replay stored chains and record their losses on other inputs.

    The chains take the same steps again, so this costs the steps of the run once more, and the
    forward passes over the new set. Each draw's statistics are compared with those stored.

    Parameters
    ----------
    tree
        What `sample` returned or `lkarray.open` opened; chains and draws may be selected.
    new_set
        Map-style dataset to observe, or several by name, as in `sample`.
    posterior
        The posterior that was sampled: the same model, weights and training set. Needed in a
        process other than the one that sampled; there, it is remembered.
    sampler
        The sampler, if its schedule is a function of your own, which a store cannot hold.
    store
        Where to write; resumable there. ``None`` keeps the losses in memory.
    coords, observables, autocast, compile, device, client, num_workers, progress
        As in `sample`.

    Returns
    -------
    xarray.DataTree
        ``losses`` of the new set at the same chains and draws, so that
        ``lk.influence(tree["losses"], replay["losses"])`` is the influence of the one set on the
        other. Attribute ``replay_error``: the largest relative difference of the statistics.

    Raises
    ------
    ValueError
        The posterior is not known in this process, or the tree comes from no run.
    FingerprintError
        The posterior is not the one that was sampled, or the replayed chains are not the stored
        ones, on other hardware perhaps.
    """
    if PARTS in tree.attrs:
        return _observe_parts(tree, new_set, posterior=posterior, store=store, **_rest(locals()))
    fingerprint = dict(tree.attrs.get(ENTRIES, {})).get(schema.LOSSES)
    if fingerprint is None:
        raise ValueError(
            "the tree does not say how it was sampled; pass the whole tree that lk.sample returned "
            "or lk.open opened, not a node of it"
        )
    known = remembered(fingerprint)
    if known is None and posterior is None:
        raise ValueError(
            "the model that was sampled is not known in this process; pass posterior=, made of the "
            "same model, weights and training set"
        )
    if posterior is None:
        assert known is not None
        posterior = known.posterior
    if sampler is None:
        sampler = known.sampler if known else sampler_from(fingerprint["sampler"])
    checks.check_types(posterior, sampler)
    checks.check_options(autocast, "auto", observables, compiled=compile)
    sets = checks.observed_sets(new_set)
    labels = checks.observed_labels(new_set, sets, coords)
    stats = tree[schema.SAMPLE_STATS].to_dataset()
    draws = int(stats[schema.DRAW].max()) + 1
    chains = int(stats[schema.CHAIN].max()) + 1
    job = Job(
        posterior=posterior,
        observed=sets,
        coords=labels,
        sampler=sampler,
        schedule=Schedule(draws, fingerprint["burn_in"], fingerprint["thin"]),
        batch_size=fingerprint["batch_size"],
        seed=fingerprint["seed"],
        device=device,
        autocast=autocast,
        compile=compile,
        observables=dict(observables or {}),
        num_workers=check_workers(num_workers),
    )
    fixed = {
        name: fingerprint[name] for name in ("device", "threads", "chains_per_device", "train_rows")
    }
    from lkarray.sampling.run import run_job

    out = run_job(
        job,
        MemoryStore() if store is None else store,
        chains=chains,
        client=client,
        progress=progress,
        fixed=fixed,
        same_as={name: fingerprint[name] for name in _SHARED},
    )
    at = {dim: stats[dim].values for dim in schema.POSTERIOR}
    for group in list(out.children):
        if schema.DRAW in out[group].dims:
            out[group] = xr.DataTree(out[group].to_dataset().sel(at))
    out.attrs["replay_error"] = _compare(stats, out[schema.SAMPLE_STATS].to_dataset())
    return out


def _rest(names: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("sampler", "coords", "observables", "autocast", "compile")
    return {key: names[key] for key in (*keys, "device", "client", "num_workers", "progress")}


def _observe_parts(
    tree: xr.DataTree,
    new_set: MapDataset | Mapping[str, MapDataset],
    *,
    posterior: LocalPosterior | None,
    store: StoreLike | None,
    **options: Any,
) -> xr.DataTree:
    """Replay each of several runs."""
    parts = tree.attrs[PARTS]
    dim, labels = parts["dim"], parts["labels"]
    if store is not None:
        place = stores.as_store(store)
        stores.create_parts(place, dim, labels)
    found = []
    for label, attrs in zip(labels, parts["marks"], strict=True):
        part = _select(tree, dim, label)
        part.attrs = dict(attrs)
        own = posterior
        if posterior is not None and dim == schema.COMPONENT:
            own = posterior.moving(attrs[ENTRIES][schema.LOSSES]["trainable"])
        where = None if store is None else stores.part_store(place, dim, label)
        found.append(observe(part, new_set, posterior=own, store=where, **options))
    return join_parts(found, dim, labels)


def _select(tree: xr.DataTree, dim: str, label: Any) -> xr.DataTree:
    groups = {
        name: node.to_dataset().sel({dim: label}) if dim in node.dims else node.to_dataset()
        for name, node in tree.children.items()
        if name != "derived"
    }
    return xr.DataTree.from_dict({"/": xr.Dataset(), **groups})


def _compare(stored: xr.Dataset, replayed: xr.Dataset) -> float:
    """Return the largest relative difference of the statistics of draws; refuse a large one."""
    worst = 0.0
    for spec in _COMPARED:
        then, now = stored[spec.name].values, replayed[spec.name].values
        scale = np.maximum(np.abs(then), 1e-12 * np.abs(then).max(initial=1e-30))
        off = np.abs(now - then) / scale
        off[np.isnan(then) != np.isnan(now)] = np.inf  # a chunk that is lost reads as NaN
        worst = max(worst, float(np.nanmax(off, initial=0.0)))
    if not worst <= _TOLERANCE:
        raise FingerprintError(
            f"the replayed chains are not the stored ones: their statistics differ by up to "
            f"{worst:.2g} of their size, so losses would belong to other weights. Replay on the "
            "hardware, with the versions, that the run was made with"
        )
    return worst
