"""`sample`: from a posterior to a store, resumable at any moment."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray import store as stores
from lkarray.errors import NonFiniteError, StoreError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import MapDataset
from lkarray.sampling import checks
from lkarray.sampling.chain import Schedule, Target, run_chain
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.randomness import MAX_CHAINS, MAX_STEPS, ChainRandomness
from lkarray.sampling.samplers import SGLD
from lkarray.store.location import StoreLike, exists
from lkarray.store.reading import open_rectangle

logger = logging.getLogger("lkarray")


def sample(
    posterior: LocalPosterior,
    observed: MapDataset,
    *,
    sampler: SGLD,
    store: StoreLike,
    chains: int = 4,
    draws: int = 100,
    burn_in: int = 10,
    thin: int = 1,
    batch_size: int | None = 256,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """Sample the local posterior and stream per-sample losses to a store.

    The chains run one after another on one device. Each draw evaluates every observed sample
    under ``inference_mode``, in eval mode, and its losses go to the store while sampling goes
    on; memory does not grow with the number of draws.

    A process may be killed at any moment: the same call continues from the last commit and
    gives the same numbers, bit for bit, on the same kind of device. A store that is already
    complete is opened as it is. ``chains`` and ``draws`` may grow from call to call.

    Parameters
    ----------
    posterior
        What to sample.
    observed
        Map-style dataset of ``(input, target)`` whose losses are recorded: n samples.
    sampler
        How a step moves, for example ``lk.SGLD(step_size=5e-5)``.
    store
        Folder, URL or Zarr store to write.
    chains, draws
        Chains, each started at w*, and draws of each.
    burn_in, thin
        Counted in steps: a draw follows each ``thin``-th step after the first ``burn_in``.
    batch_size
        Training items per step, drawn without replacement; ``None`` takes all of them.
    coords
        Labels of the observed samples, each of length n; ``sample`` sets the index.
    seed
        Noise and minibatches are pure functions of seed, chain and step.
    resume
        Whether an existing store may be continued; ``False`` refuses one.
    device
        Where to run; ``None`` takes what the store was made on, or CUDA where there is one.
    progress
        Whether to show a progress bar when it takes longer than two seconds.

    Returns
    -------
    xarray.DataTree
        As `lkarray.open`, limited to the ``chains`` and ``draws`` asked for.

    Raises
    ------
    ValueError, TypeError
        An argument is bad; nothing was written.
    NonFiniteError
        A loss at w* is NaN or infinite; nothing was written.
    FingerprintError
        The store holds a run with other settings, weights or data, which are named.
    StoreError
        The store cannot be written; draws committed before are safe.
    LockedError
        Another process is writing to the store.
    DivergedError
        Every chain turned non-finite.

    Notes
    -----
    Step counts are limited to 2**24 a chain, and chains to 256, within which no two steps
    share their noise. The dataset's items must not change between readings.
    """
    checks.check_types(posterior, sampler)
    chains, draws = checks.at_least("chains", chains, 1), checks.at_least("draws", draws, 1)
    thin, burn_in = checks.at_least("thin", thin, 1), checks.at_least("burn_in", burn_in, 0)
    seed = checks.at_least("seed", seed, 0)
    if batch_size is not None:
        batch_size = checks.at_least("batch_size", batch_size, 1)
    schedule = Schedule(draws, burn_in, thin)
    if schedule.steps > MAX_STEPS or chains > MAX_CHAINS:
        raise ValueError(
            f"{chains} chains of {schedule.steps} steps are too many: at most {MAX_CHAINS} chains "
            f"of {MAX_STEPS} steps have noise that never repeats; take fewer, or another seed"
        )
    place = stores.as_store(store)
    before = _existing(place, resume)
    target, labels = _target(posterior, observed, coords, device, before)
    fingerprint = checks.make_fingerprint(
        posterior,
        target,
        sampler,
        schedule,
        batch_size=batch_size,
        seed=seed,
        labels=labels,
        threads=int((before or {}).get("threads", torch.get_num_threads())),
    )
    with checks.numerics(fingerprint["threads"]):
        center_loss = _finite(target.observe()) if before is None else None
        with stores.writer_lock(place):
            # Another process may have written since: what counts is read under the lock.
            before = _existing(place, resume)
            if before is None:
                center_loss = _finite(target.observe()) if center_loss is None else center_loss
                root = _create(place, target, center_loss, labels, fingerprint, chains, draws)
            else:
                remedy = "use another path, or the stored settings"
                stores.refuse_changes(before, fingerprint, stores.describe(place), remedy=remedy)
                root = stores.open_root(place, mode="r+")
            todo = _unfinished(root, chains, draws)
            if todo:
                if before is not None:
                    kept = stores.stored(root, schema.LOSSES, schema.CENTER_LOSS)[:]
                    checks.check_center(np.asarray(kept), target.observe(), stores.describe(place))
                stores.grow(root, chains=chains, draws=draws)
                _run(root, target, sampler, schedule, seed, batch_size, todo, progress)
                stores.finish(root)
            else:
                logger.info(
                    "%s already holds %d chains of %d draws made with these settings; reused",
                    stores.describe(place),
                    chains,
                    draws,
                )
    return open_rectangle(place, chains=chains, draws=draws)


def _target(
    posterior: LocalPosterior,
    observed: MapDataset,
    coords: Mapping[str, Any] | None,
    device: torch.device | str | None,
    before: Mapping[str, Any] | None,
) -> tuple[Target, dict[str, np.ndarray]]:
    """Read the data and copy the model to the device, checked; and the observed samples' labels."""
    where = checks.choose_device(device, before)
    train = Batches(posterior.train_set, name="train_set", device=where)
    same = observed is posterior.train_set
    seen = train if same else Batches(observed, name="observed", device=where)
    labels = schema.sample_coords(coords, seen.n)
    flat = FlatModel(posterior.model, trainable=posterior.trainable, device=where)
    checks.check_loss(posterior, flat, train, "train_set", gradient=True)
    checks.check_loss(posterior, flat, seen, "observed", gradient=False)
    target = Target(
        flat=flat,
        center=flat.theta.clone(),
        train=train,
        observed=seen,
        loss=posterior.loss,
        nbeta=posterior.nbeta,
        gamma=posterior.gamma,
        eval_rows=int((before or {}).get("eval_rows", seen.eval_rows())),
    )
    return target, labels


def _finite(center_loss: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(center_loss))
    if len(bad):
        raise NonFiniteError(
            f"the loss at w* is not finite for {len(bad)} of {len(center_loss)} observed samples, "
            f"first {bad[:5].tolist()}; check those inputs and targets. Nothing was written"
        )
    return center_loss


def _run(
    root: zarr.Group,
    target: Target,
    sampler: SGLD,
    schedule: Schedule,
    seed: int,
    batch_size: int | None,
    todo: list[int],
    progress: bool,
) -> None:
    done = sum(stores.read_record(root, chain).step for chain in todo)
    total = len(todo) * schedule.steps
    with (
        ThreadPoolExecutor(1, thread_name_prefix="lkarray-writer") as writer,
        progress_bars.bar("sampling", total=total, done=done, show=progress) as bar,
    ):
        for chain in todo:
            region = stores.ChainRegion(root, chain, writer)
            random = ChainRandomness(
                seed, chain, n=target.train.n, batch_size=batch_size, like=target.center
            )
            if not run_chain(target, sampler, schedule, region, random, bar.update):
                logger.warning(
                    "chain %d turned non-finite at draw %d and was stopped; it is flagged and "
                    "left out. Reduce the step size",
                    chain,
                    region.draws - 1,
                )


def _create(
    store: Any,
    target: Target,
    center_loss: np.ndarray,
    labels: Mapping[str, np.ndarray],
    fingerprint: Mapping[str, Any],
    chains: int,
    draws: int,
) -> zarr.Group:
    if exists(store):
        stores.drop_unfinished(stores.open_root(store, mode="r+"))
    return stores.create_losses(
        store,
        chains=chains,
        draws=draws,
        coords=labels,
        center_loss=center_loss,
        state_size=target.center.numel(),
        state_dtype=str(target.center.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        attrs=_attributes(fingerprint, target),
    )


def _unfinished(root: zarr.Group, chains: int, draws: int) -> list[int]:
    """Return the chains that still have draws to take."""
    flags = stores.stored(root, schema.SAMPLE_STATS, schema.DIVERGED)
    known = stores.stored(root, schema.LOSSES, schema.LOSS).shape[0]
    todo = list(range(known, chains))
    for chain in range(min(chains, known)):
        taken = stores.read_record(root, chain).draws
        if taken < draws and not (taken and bool(flags[chain, taken - 1])):
            todo.append(chain)
    return sorted(todo)


def _existing(store: Any, resume: bool) -> dict[str, Any] | None:
    """Return the fingerprint of the losses already stored, if there are any."""
    if not exists(store):
        return None
    root = stores.open_root(store)
    found = stores.stored_fingerprint(root)
    if found is not None and not resume:
        raise StoreError(
            f"{stores.describe(store)} exists and resume=False; nothing was touched. Choose "
            "another path, delete it, or pass resume=True to continue it"
        )
    return found


def _attributes(fingerprint: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return what kernels need to know of the posterior, kept with the losses."""
    keys = ("loss", "nbeta", "gamma", "sampler", "burn_in", "thin", "batch_size", "seed")
    return {key: fingerprint[key] for key in keys} | {
        "n_train": target.train.n,
        "observed_is_train": fingerprint["observed_data"] == fingerprint["train_data"],
    }
