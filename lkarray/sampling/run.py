"""`sample`: from a posterior to a store, resumable at any moment."""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray import store as stores
from lkarray._version import __version__
from lkarray.errors import FingerprintError, NonFiniteError, StoreError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import MapDataset
from lkarray.nn.flat import hash_weights
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
    _check_types(posterior, sampler)
    counts = {"chains": chains, "draws": draws, "thin": thin, "burn_in": burn_in, "seed": seed}
    for name, value in counts.items():
        _at_least(name, value, 1 if name in ("chains", "draws", "thin") else 0)
    if batch_size is not None:
        _at_least("batch_size", batch_size, 1)
    schedule = Schedule(draws, burn_in, thin)
    if schedule.steps > MAX_STEPS or chains > MAX_CHAINS:
        raise ValueError(
            f"{chains} chains of {schedule.steps} steps are too many: at most {MAX_CHAINS} chains "
            f"of {MAX_STEPS} steps have noise that never repeats; take fewer, or another seed"
        )
    target_store = stores.as_store(store)
    before = _existing(target_store, resume)
    where = _device(device, before)
    train = Batches(posterior.train_set, name="train_set", device=where)
    seen = (
        train
        if observed is posterior.train_set
        else Batches(observed, name="observed", device=where)
    )
    labels = schema.sample_coords(coords, seen.n)
    flat = FlatModel(posterior.model, trainable=posterior.trainable, device=where)
    _check_loss(posterior, flat, train, "train_set")
    _check_loss(posterior, flat, seen, "observed")
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
    fingerprint = _fingerprint(posterior, target, sampler, schedule, batch_size, seed, labels)
    fingerprint["threads"] = (before or {}).get("threads", torch.get_num_threads())
    if before is not None:
        _compare(before, fingerprint, stores.describe(target_store))
    with stores.writer_lock(target_store), _threads(fingerprint["threads"]):
        root = _open_or_create(
            target_store, target, labels, fingerprint, chains, draws, before is not None
        )
        todo = _unfinished(root, chains, draws)
        if todo:
            _run(root, target, sampler, schedule, seed, batch_size, todo, progress)
            stores.finish(root)
        else:
            logger.info(
                "%s already holds %d chains of %d draws made with these settings; reused",
                stores.describe(target_store),
                chains,
                draws,
            )
    return open_rectangle(target_store, chains=chains, draws=draws)


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


def _open_or_create(
    store: Any,
    target: Target,
    labels: Mapping[str, np.ndarray],
    fingerprint: Mapping[str, Any],
    chains: int,
    draws: int,
    resuming: bool,
) -> zarr.Group:
    if resuming:
        root = stores.open_root(store, mode="r+")
        stores.grow(root, chains=chains, draws=draws)
        return root
    center_loss = target.observe()
    bad = np.flatnonzero(~np.isfinite(center_loss))
    if len(bad):
        raise NonFiniteError(
            f"the loss at w* is not finite for {len(bad)} of {len(center_loss)} observed samples, "
            f"first {bad[:5].tolist()}; check those inputs and targets. Nothing was written"
        )
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
    todo = []
    for chain in range(chains):
        taken = stores.read_record(root, chain).draws
        if taken < draws and not (taken and bool(flags[chain, taken - 1])):
            todo.append(chain)
    return todo


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


def _fingerprint(
    posterior: LocalPosterior,
    target: Target,
    sampler: SGLD,
    schedule: Schedule,
    batch_size: int | None,
    seed: int,
    labels: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return what must be equal for a resume to give the same numbers."""
    n = target.train.n
    digest = hashlib.sha256()
    for name, values in sorted(labels.items()):
        digest.update(repr((name, values.tolist())).encode())
    return {
        "lkarray": __version__,
        "weights": hash_weights(posterior.model),
        "train_data": target.train.identity,
        "observed_data": target.observed.identity,
        "coords": digest.hexdigest()[:16],
        "loss": posterior.loss.name,
        "nbeta": posterior.nbeta,
        "gamma": posterior.gamma,
        "trainable": posterior.trainable,
        "sampler": {"name": type(sampler).__name__} | asdict(sampler),
        "burn_in": schedule.burn_in,
        "thin": schedule.thin,
        "batch_size": n if batch_size is None else min(batch_size, n),
        "seed": seed,
        "device": str(target.flat.device),
        "precision": str(target.center.dtype).removeprefix("torch."),
        "stacking": "one chain at a time",
        "eval_rows": target.eval_rows,
    }


def _attributes(fingerprint: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return what kernels need to know of the posterior, kept with the losses."""
    keys = ("loss", "nbeta", "gamma", "sampler", "burn_in", "thin", "batch_size", "seed")
    return {key: fingerprint[key] for key in keys} | {
        "n_train": target.train.n,
        "observed_is_train": fingerprint["observed_data"] == fingerprint["train_data"],
    }


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        lines = "; ".join(f"{k}: stored {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise FingerprintError(
            f"{where} holds a run made with other settings ({lines}). Nothing was touched: use "
            "another path, or the stored settings"
        )


def _check_types(posterior: object, sampler: object) -> None:
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(f"posterior must be lk.LocalPosterior, not {type(posterior).__name__}")
    if not isinstance(sampler, SGLD):
        raise TypeError(f"sampler must be lk.SGLD(step_size=...), not {type(sampler).__name__}")


def _at_least(name: str, value: object, least: int) -> None:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")


def _check_loss(posterior: LocalPosterior, flat: FlatModel, data: Batches, name: str) -> None:
    """Try the loss on the first two items, before any work."""
    inputs, target = data.take(np.arange(min(2, data.n)))
    with torch.no_grad():
        try:
            output = flat(inputs)
        except Exception as error:
            raise ValueError(
                f"the model failed on the first items of {name}, inputs of shape "
                f"{tuple(inputs.shape)}: {error}"
            ) from error
        posterior.loss.check(output, target)


def _device(asked: torch.device | str | None, before: Mapping[str, Any] | None) -> torch.device:
    if asked is not None:
        chosen = torch.device(asked)
    elif before is not None:
        chosen = torch.device(before["device"])
    else:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {chosen} was asked for or stored, but CUDA is not available")
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with the stored number of threads: sums depend on it to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
