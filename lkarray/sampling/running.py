"""A job run into a store, or continued there, in this process or on workers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import xarray as xr
import zarr

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray import store as stores
from lkarray.errors import StoreError
from lkarray.sampling import workers
from lkarray.sampling.devices import numerics
from lkarray.sampling.fingerprints import Fingerprint, Layout
from lkarray.sampling.groups import run_group
from lkarray.sampling.job import Job, Prepared, RunOptions
from lkarray.sampling.preparing import check_center, prepare
from lkarray.sampling.remembering import remember
from lkarray.sampling.target import Target
from lkarray.store.chunks import read
from lkarray.store.layout import SETTINGS
from lkarray.store.location import StoreLike, exists
from lkarray.store.reading import open_rectangle

logger = logging.getLogger("lkarray")


def run_job(
    job: Job,
    store: StoreLike,
    options: RunOptions,
    *,
    layout: Layout | None = None,
    same_as: Fingerprint | None = None,
) -> xr.DataTree:
    """Run a job into a store, or continue it there; see `sample`.

    A new store keeps to ``layout``, and the chains must be those of ``same_as``: both are of a run
    that is replayed.
    """
    place = stores.as_store(store)
    chains, draws, client = options.chains, job.schedule.draws, options.client
    if client is not None:
        workers.check_place(place)
    with progress_bars.showing(options.progress):
        before = _existing(place, options.resume)
        if before is not None:
            layout = Fingerprint.of(before).layout
        # On workers there is no target here: the data are read, and the model copied, there alone.
        target: Target | None = None
        if client is None:
            prepared, target = prepare(
                job, chains=chains, chains_per_device=options.chains_per_device, layout=layout
            )
        else:
            with progress_bars.busy("preparing on a worker"):
                prepared = workers.prepare_on(
                    client,
                    job,
                    chains=chains,
                    chains_per_device=options.chains_per_device,
                    layout=layout,
                )
        if same_as is not None:
            stores.refuse_changes(
                same_as.of_chains(),
                prepared.fingerprint.of_chains(),
                "the tree",
                remedy="pass the posterior and the sampler that it was made with",
            )
        if before is not None and not _unfinished(place, prepared, chains, draws):
            # Nothing is written, so no lock is needed: a read-only disk has none.
            logger.info(
                "%s already holds %d chains of %d draws made with these settings; reused",
                stores.describe(place),
                chains,
                draws,
            )
        else:
            with stores.writer_lock(place):
                _fill(place, job, prepared, target, options)
    remember(prepared.fingerprint, job)
    return open_rectangle(place, chains=chains, draws=draws)


def _existing(store: Any, resume: bool) -> dict[str, Any] | None:
    """Return the fingerprint of the losses already stored, if there are any."""
    if not exists(store):
        return None
    root = stores.open_root(store)
    parts = stores.parts_of(root)
    if parts is not None:
        raise StoreError(
            f"{stores.describe(store)} holds several runs, by {parts['dim']}; nothing was "
            "touched. Sample it with the same components or checkpoints, or choose another path"
        )
    fingerprint = stores.stored_fingerprint(root)
    if fingerprint is not None and not resume:
        raise StoreError(
            f"{stores.describe(store)} exists and resume=False; nothing was touched. Choose "
            "another path, delete it, or pass resume=True to continue it"
        )
    return fingerprint


def _fill(
    place: Any, job: Job, prepared: Prepared, target: Target | None, options: RunOptions
) -> None:
    """Take the draws that are missing; the caller holds the lock."""
    # Another process may have written since: what counts is read under the lock.
    fresh = _existing(place, options.resume) is None
    chains, draws = options.chains, job.schedule.draws
    root = _create(place, job, prepared, chains) if fresh else stores.open_root(place, mode="r+")
    unfinished = _unfinished(place, prepared, chains, draws)
    if not unfinished:
        return
    stores.require_sound(root, unfinished)
    stores.grow(root, chains=chains, draws=draws)
    groups = _grouped(unfinished, prepared.fingerprint.chains_per_device)
    # Workers check it themselves, each on its own device.
    if target is not None and not fresh:
        with numerics(prepared.fingerprint.threads):
            check_center(root, target)
    total = len(unfinished) * job.schedule.steps
    done = sum(stores.read_record(root, chain).step for chain in unfinished)
    with progress_bars.bar("sampling", total=total, done=done) as bar:
        if options.client is not None:
            diverged = workers.run_on(options.client, root, job, prepared, groups, bar)
        else:
            assert target is not None
            with numerics(prepared.fingerprint.threads):
                each = [run_group(root, job, target, group, bar.update) for group in groups]
            diverged = [stop for stops in each for stop in stops]
    for chain, draw in diverged:
        logger.warning(
            "chain %d turned non-finite at draw %d and was stopped; it is flagged and left out. "
            "Reduce the step size",
            chain,
            draw,
        )
    stores.finish(root)


def _grouped(chains: Iterable[int], width: int) -> list[list[int]]:
    """Return the chains that share a stack: a chain's group does not depend on which others run."""
    groups: dict[int, list[int]] = {}
    for chain in chains:
        groups.setdefault(chain // width, []).append(chain)
    return [groups[number] for number in sorted(groups)]


def _unfinished(place: Any, prepared: Prepared, chains: int, draws: int) -> list[int]:
    """Return the chains of a store that still have draws to take; refuse other settings."""
    root = stores.open_root(place)
    stores.refuse_changes(
        stores.stored_fingerprint(root) or {},
        prepared.fingerprint.stored(),
        stores.describe(place),
        remedy="use another path, or the stored settings",
    )
    flags = stores.stored(root, schema.SAMPLE_STATS, schema.DIVERGED)
    known = stores.stored(root, schema.LOSSES, schema.LOSS).shape[0]
    unfinished = list(range(known, chains))
    for chain, record in stores.read_records(root, slice(min(chains, known))).items():
        taken = record.draws
        # One that diverged is at its end: its last draw is flagged.
        if taken < draws and not (taken and bool(read(flags, (chain, taken - 1)))):
            unfinished.append(chain)
    return sorted(unfinished)


def _create(store: Any, job: Job, prepared: Prepared, chains: int) -> zarr.Group:
    if not prepared.center:
        raise StoreError(
            f"{stores.describe(store)} was removed while its data were read; run again"
        )
    if exists(store):  # what was begun there, and has no fingerprint, does not count
        stores.drop_unfinished(stores.open_root(store, mode="r+"))
    fingerprint = prepared.fingerprint
    stored = fingerprint.stored()
    attrs = {key: stored[key] for key in SETTINGS if key in stored} | {"n_train": prepared.n_train}
    return stores.create_run(
        store,
        chains=chains,
        draws=job.schedule.draws,
        sets=[
            stores.LossSet(
                group,
                job.coords[group],
                prepared.center[f"{group}/{schema.LOSS.name}"],
                job.posterior.loss.dims,
                attrs | {"observed_is_train": identity == fingerprint.train_data},
                {
                    name: stores.OutcomeSet(
                        schema.outcome(name, of.units), of.link, prepared.center[f"{group}/{name}"]
                    )
                    for name, of in fingerprint.outcomes.items()
                },
                _predictions(fingerprint, identity),
            )
            for group, identity in fingerprint.observed_data.items()
        ],
        observables={n: tuple(o.shape) for n, o in fingerprint.observables.items()},
        state=dict.fromkeys(fingerprint.state, prepared.n_parameters),
        state_dtype=fingerprint.precision,
        fingerprint=stored,
    )


def _predictions(
    fingerprint: Fingerprint, observed: str
) -> dict[str, tuple[schema.VariableSpec, dict[str, Any]]]:
    """Return the spec and attributes of what the control predicts of an observed set, by name.

    By the attributes a kernel knows the features whose inner products are its covariance.
    """
    control = fingerprint.control
    if control is None:
        return {}
    spec = schema.prediction(control["outcome"])
    known = {"nbeta": fingerprint.nbeta, "gamma": fingerprint.gamma, "observed_data": observed}
    return {spec.name: (spec, dict(control) | known | {"weights": fingerprint.weights})}
