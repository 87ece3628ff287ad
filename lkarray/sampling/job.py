"""One sampling run as a plain value, and its making on whatever process runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zarr

from lkarray import progress as bars
from lkarray import schema
from lkarray import store as stores
from lkarray.errors import NonFiniteError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import MapDataset
from lkarray.sampling import checking as checks
from lkarray.sampling import stacking as layout
from lkarray.sampling.chain import Schedule, Seat, Stack
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.target import Observable, ObservedSet, Target
from lkarray.store.chunks import read_whole
from lkarray.store.nodes import stored_at

logger = logging.getLogger("lkarray")


@dataclass(frozen=True)
class Job:
    """What is sampled, observed and recorded; can be sent to another process."""

    posterior: LocalPosterior
    observed: Mapping[str, MapDataset]
    coords: Mapping[str, Mapping[str, np.ndarray]]
    sampler: Sampler
    schedule: Schedule
    batch_size: int | None
    seed: int
    device: torch.device | str | None = None
    autocast: str | None = None
    compile: bool = False
    observables: Mapping[str, Observable] = field(default_factory=dict)
    num_workers: int = 0


@dataclass(frozen=True)
class Prepared:
    """What is known of a job once its data were read and its model tried."""

    fingerprint: dict[str, Any]
    n_train: int
    n_parameters: int
    center_losses: dict[str, np.ndarray]


def prepare(
    job: Job, *, chains: int, chains_per_device: int | str, fixed: Mapping[str, Any] | None
) -> tuple[Prepared, Target]:
    """Read the data, copy the model to the device, and check both; write nothing.

    Parameters
    ----------
    job
        What to sample.
    chains
        Chains of the run.
    chains_per_device
        As in `lkarray.sample`; a stored layout overrides it.
    fixed
        Fingerprint of the run that is continued or replayed: device, threads and layout are
        taken from it, and no losses at w* are computed.
    """
    fixed = fixed or {}
    threads = int(fixed.get("threads", torch.get_num_threads()))
    device = checks.choose_device(job.device, fixed or None)
    with checks.numerics(threads):
        data = _read(job, device)
        made: list[Target] = []

        def make(width: int) -> Target:
            made.append(_target(job, data, device, width, fixed, like=made[0] if made else None))
            return made[-1]

        asked = fixed.get("chains_per_device", chains_per_device)
        if job.compile and asked == "auto":
            asked = 1
        elif job.compile and asked != 1:
            raise ValueError(
                "the run's chains are stacked, which cannot be compiled: compile=False"
            )
        target = layout.choose_target(
            asked, chains, make, job.sampler, job.schedule, batch_size=job.batch_size
        )
        target.start()
        shapes = {name: tuple(t.shape[1:]) for name, t in _named(target.measure()).items()}
        fingerprint = checks.make_fingerprint(job, target, shapes=shapes, threads=threads)
        center = {} if "observed_data" in fixed else center_losses(target)
    return Prepared(fingerprint, target.train.n, target.center.numel(), center), target


def _named(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {path.split("/")[1]: part for path, part in parts.items()}


def _read(job: Job, device: torch.device) -> dict[str, Batches]:
    """Return the training set, as ``""``, and the observed sets by group; each is read once."""

    def read(dataset: MapDataset, name: str) -> Batches:
        if isinstance(dataset, Batches) and dataset.device == device:
            return dataset
        return Batches(dataset, name=name, device=device, num_workers=job.num_workers)

    train = read(job.posterior.train_set, "train_set")
    found = {"": train}
    for group, dataset in job.observed.items():
        name = "observed" + group.removeprefix(schema.LOSSES)
        found[group] = train if dataset is job.posterior.train_set else read(dataset, name)
    return found


def _target(
    job: Job,
    data: Mapping[str, Batches],
    device: torch.device,
    width: int,
    fixed: Mapping[str, Any],
    like: Target | None,
) -> Target:
    posterior = job.posterior
    flat = FlatModel(posterior.model, trainable=posterior.trainable, device=device, width=width)
    if like is None and width == 1:
        with bars.busy("trying the model"):
            _check(posterior, flat, data)
    rows = dict(fixed.get("eval_rows", {})) | {"": fixed.get("train_rows")}
    for group, observed in data.items():
        rows[group] = rows.get(group) or layout.evaluation_rows(flat, observed)
    return Target(
        flat=flat,
        center=flat.theta[0].clone(),
        train=data[""],
        train_rows=int(rows[""]),
        observed=tuple(ObservedSet(g, d, int(rows[g])) for g, d in data.items() if g),
        loss=posterior.loss,
        nbeta=posterior.nbeta,
        gamma=posterior.gamma,
        autocast=checks.AUTOCAST[job.autocast] if job.autocast else None,
        compiled=job.compile,
        observables=job.observables,
    )


def _check(posterior: LocalPosterior, flat: FlatModel, data: Mapping[str, Batches]) -> None:
    checks.check_loss(posterior, flat, data[""], "train_set", gradient=True)
    for group, observed in data.items():
        if group and observed is not data[""]:
            name = "observed" + group.removeprefix(schema.LOSSES)
            checks.check_loss(posterior, flat, observed, name, gradient=False)
    if posterior.loss.counts is not None:
        for found in dict.fromkeys(data.values()):
            found.refuse_uncounted(posterior.loss.counts)


def center_losses(target: Target) -> dict[str, np.ndarray]:
    """Return the losses at w* by group, float32, shape ``(sample, ...)``.

    Raises
    ------
    NonFiniteError
        One is NaN or infinite.
    """
    target.start()
    with bars.bar("losses at w*", total=target.slices, unit="batch") as bar:
        now = target.observe(bar.update)
    found = {path.split("/")[0]: losses[0].cpu().numpy() for path, losses in now.items()}
    for group, losses in found.items():
        flat = losses.reshape(len(losses), -1)
        # Of tokens NaN is padding, but there must be one that counts.
        sound = ~np.isinf(flat) & ~np.isnan(flat).all(1, keepdims=True)
        bad = np.flatnonzero(~sound.all(axis=1))
        if len(bad):
            raise NonFiniteError(
                f"{group}: the loss at w* is not finite for {len(bad)} of {len(losses)} observed "
                f"samples, first {bad[:5].tolist()}; check those inputs and targets. Nothing was "
                "written"
            )
    return found


def run_group(
    root: zarr.Group,
    job: Job,
    target: Target,
    chains: list[int],
    tick: Callable[[int], object],
) -> list[tuple[int, int]]:
    """Run chains that share a stack to the end of the schedule; return which diverged, and where.

    The caller has set the numerics and holds the store's writer lock; this one takes the lock of
    the group's own region.
    """
    width = target.flat.width
    with (
        stores.region_lock(root.store, f"{chains[0] // width * width}"),
        ThreadPoolExecutor(1, thread_name_prefix="lkarray-writer") as writer,
    ):
        seats = []
        for chain in chains:
            region = stores.ChainRegion(root, chain, writer)
            random = ChainRandomness(
                job.seed, chain, n=target.train.n, batch_size=job.batch_size, like=target.center
            )
            # Finished: by a worker that was given up before it could say so.
            if not region.diverged() and region.record.step < job.schedule.steps:
                seats.append(Seat(chain % width, chain, region, random))
        stack = Stack(target, job.sampler, job.schedule, seats, tick)
        stack.run()
    return stack.diverged


def check_center(root: zarr.Group, target: Target) -> None:
    """Raise unless the losses at w* are those stored."""
    for group, now in center_losses(target).items():
        kept = read_whole(stored_at(root, f"{group}/{schema.CENTER_LOSS.name}"))
        checks.check_center(kept, now, f"{stores.describe(root.store)}/{group}")
