"""`observe`: questions after the fact, put to chains that were sampled before.

Everything random is a function of seed, chain and step, so a stored run is replayed from its
settings and the model alone; no weights of draws are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from lkarray.nn.outcomes import Outcome, chosen_outcomes
from lkarray.sampling import checking as checks
from lkarray.sampling.chain import Schedule
from lkarray.sampling.fingerprints import Fingerprint
from lkarray.sampling.job import Job, RunOptions
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.remembering import remembered
from lkarray.sampling.running import run_job
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.stored_samplers import sampler_from, start_from
from lkarray.sampling.target import Observable
from lkarray.store.location import ENTRIES, StoreLike
from lkarray.store.reading import PARTS, join_parts

if TYPE_CHECKING:
    from distributed import Client

#: Statistics that tell chains apart, and cost nothing more than the steps.
_COMPARED = (schema.MINIBATCH_LOSS, schema.GRADIENT_NORM, schema.DISTANCE)
#: Largest relative difference of the statistics of a draw from those of its replay.
_TOLERANCE = 1e-3


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
    outcomes: Sequence[str | Outcome] = ("loss",),
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
    coords, observables, outcomes, autocast, compile, device, client, num_workers, progress
        As in `sample`: ``outcomes=("loss", "log_odds")`` gives the log-odds of a run that stored
        losses alone.

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
    >>> others = TensorDataset(inputs[:3], data.tensors[1][:3])
    >>> again = lk.observe(tree, others, progress=False)
    >>> before = tree["losses"]["loss"].values[..., :3]
    >>> bool(abs(again["losses"]["loss"].values - before).max() < 1e-6)
    True
    """
    asked = _Asked(
        new_set=new_set,
        posterior=posterior,
        sampler=sampler,
        store=store,
        coords=coords,
        observables=observables,
        outcomes=outcomes,
        autocast=autocast,
        compile=compile,
        device=device,
        client=client,
        num_workers=num_workers,
        progress=progress,
    )
    return _observe(tree, asked)


@dataclass(frozen=True)
class _Asked:
    """What `observe` was given beside the tree."""

    new_set: MapDataset | Mapping[str, MapDataset]
    posterior: LocalPosterior | None
    sampler: Sampler | None
    store: StoreLike | None
    coords: Mapping[str, Any] | None
    observables: Mapping[str, Observable] | None
    outcomes: Sequence[str | Outcome]
    autocast: str | None
    compile: bool
    device: torch.device | str | None
    client: Client | None
    num_workers: int | None
    progress: bool


def _observe(tree: xr.DataTree, asked: _Asked) -> xr.DataTree:
    """Replay one run, or each of several."""
    if PARTS in tree.attrs:
        return _observe_parts(tree, asked)
    stored = dict(tree.attrs.get(ENTRIES, {})).get(schema.LOSSES)
    if stored is None:
        raise ValueError(
            "the tree does not say how it was sampled; pass the whole tree that lk.sample returned "
            "or lk.open opened, not a node of it"
        )
    fingerprint = Fingerprint.of(stored)
    stats = tree[schema.SAMPLE_STATS].to_dataset()
    job = _job(fingerprint, asked, draws=int(stats[schema.DRAW].max()) + 1)
    replay = run_job(
        job,
        MemoryStore() if asked.store is None else asked.store,
        RunOptions(
            chains=int(stats[schema.CHAIN].max()) + 1,
            client=asked.client,
            progress=asked.progress,
        ),
        layout=fingerprint.layout.of_chains(),
        same_as=fingerprint,
    )
    # Whole chains are replayed from w*; what was selected of them is shown.
    selected = {dim: stats[dim].values for dim in schema.POSTERIOR}
    for group in list(replay.children):
        if schema.DRAW in replay[group].dims:
            replay[group] = xr.DataTree(replay[group].to_dataset().sel(selected))
    replay.attrs["replay_error"] = _compare(stats, replay[schema.SAMPLE_STATS].to_dataset())
    return replay


def _job(fingerprint: Fingerprint, asked: _Asked, *, draws: int) -> Job:
    """Return the job that takes the run's steps again and observes what is asked for."""
    known = remembered(fingerprint)
    posterior, sampler = asked.posterior, asked.sampler
    if posterior is None and known is not None:
        posterior = known.posterior
    if posterior is None:
        raise ValueError(
            "the model that was sampled is not known in this process; pass posterior=, made of the "
            "same model, weights and training set"
        )
    if sampler is None:
        sampler = known.sampler if known else sampler_from(fingerprint.sampler)
    checks.check_types(posterior, sampler)
    checks.check_options(asked.autocast, "auto", asked.observables, compiled=asked.compile)
    sets = checks.observed_sets(asked.new_set)
    labels = checks.observed_labels(asked.new_set, sets, asked.coords)
    outcomes = chosen_outcomes(posterior.loss, asked.outcomes)
    checks.refuse_taken(outcomes, labels, (*posterior.loss.dims, *(asked.observables or {})))
    return Job(
        posterior=posterior,
        observed=sets,
        coords=labels,
        sampler=sampler,
        schedule=Schedule(draws, fingerprint.burn_in, fingerprint.thin),
        batch_size=fingerprint.batch_size,
        seed=fingerprint.seed,
        device=asked.device,
        autocast=asked.autocast,
        compile=asked.compile,
        observables=dict(asked.observables or {}),
        num_workers=check_workers(asked.num_workers),
        outcomes=outcomes,
        start=start_from(fingerprint.start, sampler),
    )


def _observe_parts(tree: xr.DataTree, asked: _Asked) -> xr.DataTree:
    """Replay each of several runs."""
    parts = tree.attrs[PARTS]
    dim, labels = parts["dim"], parts["labels"]
    place = None if asked.store is None else stores.as_store(asked.store)
    if place is not None:
        stores.create_parts(place, dim, labels)
    replays = []
    for label, attrs in zip(labels, parts["marks"], strict=True):
        part = _select(tree, dim, label)
        part.attrs = dict(attrs)
        posterior = asked.posterior
        # A remembered posterior moves the right parameters already; a given one moves its own.
        if posterior is not None and dim == schema.COMPONENT:
            posterior = posterior.moving(attrs[ENTRIES][schema.LOSSES]["trainable"])
        where = None if place is None else stores.part_store(place, dim, label)
        replays.append(_observe(part, replace(asked, posterior=posterior, store=where)))
    return join_parts(replays, dim, labels)


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
        # (chain, draw); the floor keeps a distance of 0 from making any rounding infinite.
        scale = np.maximum(np.abs(then), 1e-12 * np.abs(then).max(initial=1e-30))
        off = np.abs(now - then) / scale
        off[np.isnan(then) != np.isnan(now)] = np.inf  # a chunk that is lost reads as NaN
        worst = max(worst, float(np.nanmax(off, initial=0.0)))
    if not worst <= _TOLERANCE:  # so that NaN is refused too
        raise FingerprintError(
            f"the replayed chains are not the stored ones: their statistics differ by up to "
            f"{worst:.2g} of their size, so losses would belong to other weights. Replay on the "
            "hardware, with the versions, that the run was made with"
        )
    return worst
