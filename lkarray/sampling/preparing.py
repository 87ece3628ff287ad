"""A job made ready on whatever process runs it: data read, model copied, both checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zarr

from lkarray import progress as bars
from lkarray import schema
from lkarray import store as stores
from lkarray._version import __version__
from lkarray.errors import NonFiniteError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import MapDataset
from lkarray.nn.flat import hash_weights
from lkarray.nn.losses import identity
from lkarray.sampling import checking as checks
from lkarray.sampling import stacking
from lkarray.sampling.control import STATE, Control, make_control
from lkarray.sampling.devices import choose_device, numerics
from lkarray.sampling.fingerprints import Fingerprint, Layout, RecordedObservable, RecordedOutcome
from lkarray.sampling.job import Job, Prepared
from lkarray.sampling.laplace_law import LaplaceLaw, laplace_law
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.stored_samplers import LAW
from lkarray.sampling.target import ObservedSet, Target
from lkarray.store.chunks import read_whole
from lkarray.store.fingerprints import hash_labels
from lkarray.store.layout import center_path
from lkarray.store.nodes import stored_at


def prepare(
    job: Job, *, chains: int, chains_per_device: int | str = "auto", layout: Layout | None = None
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
    layout
        Of the run that is continued or replayed. Losses at w* are computed unless it has the
        observed sets, of which they are stored then.
    """
    layout = layout or Layout()
    threads = layout.threads or torch.get_num_threads()
    device = choose_device(job.device, layout.device)
    with numerics(threads):
        data = _read(job, device)
        target = stacking.choose_target(
            _width(job, chains_per_device, layout),
            chains,
            _TargetMaker(job, data, device, layout),
            stacking.Pace(job.sampler, job.schedule, job.batch_size),
        )
        target.start()
        # One value of each observable, (chain, *shape), by its path in the store.
        shapes = {path.split("/")[1]: list(t.shape[1:]) for path, t in target.measure().items()}
        fingerprint = make_fingerprint(job, target, shapes=shapes, threads=threads)
        center = {} if layout.eval_rows else center_values(target)
    return Prepared(fingerprint, target.train.n, target.center.numel(), center), target


def _width(job: Job, asked: int | str, layout: Layout) -> int | str:
    """Return how many chains to stack: as stored, as asked, or ``"auto"``."""
    width = layout.chains_per_device or asked
    if job.sampler.independent and width == "auto":
        width = 1  # a draw is one forward pass: there are no steps to stack
    if not job.compile:
        return width
    if width not in ("auto", 1):
        raise ValueError("the run's chains are stacked, which cannot be compiled: compile=False")
    return 1


def _read(job: Job, device: torch.device) -> dict[str, Batches]:
    """Return the training set, as ``""``, and the observed sets by group; each is read once."""

    # Pilots read once and sample often: what was read already is handed on as it is.
    def read(dataset: MapDataset, name: str) -> Batches:
        if isinstance(dataset, Batches) and dataset.device == device:
            return dataset
        return Batches(dataset, name=name, device=device, num_workers=job.num_workers)

    train = read(job.posterior.train_set, "train_set")
    data = {"": train}
    for group, dataset in job.observed.items():
        name = "observed" + group.removeprefix(schema.LOSSES)
        data[group] = train if dataset is job.posterior.train_set else read(dataset, name)
    return data


class _TargetMaker:
    """Makes the target of a job for a width; what depends on the data alone is chosen once."""

    def __init__(
        self, job: Job, data: Mapping[str, Batches], device: torch.device, layout: Layout
    ) -> None:
        self._job, self._data, self._device, self._layout = job, data, device, layout
        self._tried = False
        self._law: LaplaceLaw | None = None
        self._control: Control | None = None

    def __call__(self, width: int) -> Target:
        job, data, posterior = self._job, self._data, self._job.posterior
        flat = FlatModel(
            posterior.model, trainable=posterior.trainable, device=self._device, width=width
        )
        if not self._tried and width == 1:
            with bars.busy("trying the model"):
                _check(posterior, flat, data)
                for group, batches in data.items():
                    if group and job.outcomes:
                        checks.check_outcomes(job.outcomes, posterior, flat, batches)
        self._tried = True
        rows = {"": self._layout.train_rows, **self._layout.eval_rows}
        # A stored number is kept: last bits depend on how many items go through at once.
        chosen = {
            group: rows.get(group) or stacking.evaluation_rows(flat, batches)
            for group, batches in data.items()
        }
        wanted = job.sampler.law or job.start
        if self._law is None and wanted is not None:
            assert width == 1, "whatever width is asked for, one chain alone is made before"
            self._law = laplace_law(
                posterior,
                flat,
                data[""],
                # Of one chain, whatever the stack: last bits of the law depend on it.
                stacking.evaluation_rows(flat, data[""]),
                rank=wanted.rank,
                step_size=wanted.step_size,
                seed=job.seed,
            )
        if self._control is None and job.control is not None:
            assert self._law is not None, "it is that of the control"
            sets = [batches for group, batches in data.items() if group]
            self._control = make_control(self._law, posterior.loss, job.outcomes, flat, sets)
        return Target(
            flat=flat,
            center=flat.theta[0].clone(),
            train=data[""],
            train_rows=chosen[""],
            observed=tuple(ObservedSet(g, d, chosen[g]) for g, d in data.items() if g),
            loss=posterior.loss,
            nbeta=posterior.nbeta,
            gamma=posterior.gamma,
            autocast=checks.AUTOCAST[job.autocast] if job.autocast else None,
            compiled=job.compile,
            observables=job.observables,
            outcomes=job.outcomes,
            law=self._law,
            starts=None if job.start is None else self._law,
            control=self._control,
        )


def _check(posterior: LocalPosterior, flat: FlatModel, data: Mapping[str, Batches]) -> None:
    checks.check_loss(posterior, flat, data[""], "train_set", gradient=True)
    for group, observed in data.items():
        if group and observed is not data[""]:
            name = "observed" + group.removeprefix(schema.LOSSES)
            checks.check_loss(posterior, flat, observed, name, gradient=False)
    if posterior.loss.counts is not None:
        for batches in dict.fromkeys(data.values()):
            batches.refuse_uncounted(posterior.loss.counts)


def center_values(target: Target) -> dict[str, np.ndarray]:
    """Return losses and outcomes at w* by path, as `Target.observe`, float32, ``(sample, ...)``.

    Raises
    ------
    NonFiniteError
        One is NaN or infinite.
    """
    target.start()
    with bars.bar("losses at w*", total=target.slices, unit="batch") as bar:
        now = target.observe(bar.update)
    # All chains stand at w*: the first one's losses are everyone's.
    center = {path: values[0].cpu().numpy() for path, values in now.items()}
    for path, values in center.items():
        group, name = path.split("/")
        flat = values.reshape(len(values), -1)
        # Of tokens NaN is padding, but there must be one that counts.
        sound = ~np.isinf(flat) & ~np.isnan(flat).all(1, keepdims=True)
        bad = np.flatnonzero(~sound.all(axis=1))
        if len(bad):
            only = "" if name == schema.LOSS.name else " (are all classes but one masked?)"
            raise NonFiniteError(
                f"{group}: the {name} at w* is not finite for {len(bad)} of {len(values)} observed "
                f"samples, first {bad[:5].tolist()}; check those inputs and targets{only}. Nothing "
                "was written"
            )
    return center


def check_center(root: zarr.Group, target: Target) -> None:
    """Raise unless losses and outcomes at w* are those stored."""
    for path, now in center_values(target).items():
        group, name = path.split("/")
        stored = read_whole(stored_at(root, center_path(path)))
        checks.refuse_other_center(stored, now, f"{stores.describe(root.store)}/{group}", name)


def make_fingerprint(
    job: Job, target: Target, *, shapes: Mapping[str, list[int]], threads: int
) -> Fingerprint:
    """Return what must be equal for a resume to give the same numbers.

    ``shapes`` are those of the observables at one draw.
    """
    posterior, sampler, schedule = job.posterior, job.sampler, job.schedule
    device, n = target.flat.device, target.train.n
    law = {} if target.law is None else {LAW: target.law.identity}
    # Of independent draws the offset from w* is that of the linear chain.
    carried = [] if job.control is None or sampler.independent else [STATE]
    return Fingerprint(
        lkarray=__version__,
        torch=torch.__version__,
        weights=hash_weights(posterior.model),
        train_data=target.train.identity,
        observed_data={observed.group: observed.data.identity for observed in target.observed},
        coords={group: hash_labels(labels) for group, labels in job.coords.items()},
        observables={
            name: RecordedObservable(identity(function), shapes[name])
            for name, function in job.observables.items()
        },
        loss=posterior.loss.name,
        nbeta=posterior.nbeta,
        gamma=posterior.gamma,
        trainable=posterior.trainable,
        sampler=sampler.settings() | ({} if sampler.law is None else law),
        state=[schema.PARAMETERS.name, *sampler.carries, *carried],
        burn_in=schedule.burn_in,
        thin=schedule.thin,
        batch_size=n if job.batch_size is None else min(job.batch_size, n),
        seed=job.seed,
        device=str(device),
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=str(target.center.dtype).removeprefix("torch."),
        autocast=job.autocast,
        compile=job.compile,
        matmul_precision=torch.get_float32_matmul_precision(),
        chains_per_device=target.flat.width,
        eval_rows={observed.group: observed.rows for observed in target.observed},
        train_rows=target.train_rows,
        threads=threads,
        # By name: the order in which they are asked for makes no other run.
        outcomes={
            outcome.name: RecordedOutcome(**outcome.recorded)
            for outcome in sorted(job.outcomes, key=lambda outcome: outcome.name)
        },
        start=None if job.start is None else {"rank": job.start.rank} | law,
        control=_recorded_control(job, target),
    )


def _recorded_control(job: Job, target: Target) -> dict[str, Any] | None:
    """Return what a fingerprint has of the control, if there is one."""
    if job.control is None:
        return None
    assert target.control is not None
    assert target.law is not None
    known = {"rank": job.control.rank, "step_size": job.control.step_size}
    return known | {LAW: target.law.identity, "outcome": target.control.outcome}
