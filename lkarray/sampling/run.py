"""`sample`: from a posterior to a store, resumable at any moment."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
import zarr

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray import store as stores
from lkarray.arguments import checked
from lkarray.errors import StoreError
from lkarray.nn.batches import MapDataset, check_workers
from lkarray.sampling import checking as checks
from lkarray.sampling import parts, workers
from lkarray.sampling.chain import Schedule
from lkarray.sampling.job import Job, Prepared, check_center, prepare, run_group
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.randomness import MAX_CHAINS, MAX_STEPS
from lkarray.sampling.replay import remember
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.target import Observable, Target
from lkarray.store.chunks import read
from lkarray.store.layout import SETTINGS
from lkarray.store.location import StoreLike, exists
from lkarray.store.reading import open_rectangle

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("lkarray")


@checked()
def sample(
    posterior: LocalPosterior,
    observed: MapDataset | Mapping[str, MapDataset],
    *,
    sampler: Sampler,
    store: StoreLike,
    chains: int = 4,
    draws: int = 100,
    burn_in: int = 10,
    thin: int = 1,
    batch_size: int | None = 256,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    observables: Mapping[str, Observable] | None = None,
    components: Mapping[str, Any] | None = None,
    checkpoints: Mapping[Any, Any] | list[Any] | None = None,
    chains_per_device: int | str = "auto",
    autocast: str | None = None,
    compile: bool = False,  # noqa: A002
    resume: bool = True,
    device: torch.device | str | None = None,
    client: Client | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """Sample the local posterior and stream per-sample losses to a store.

    Each draw evaluates every observed sample under ``inference_mode``, in eval mode. Its losses
    leave the device and go to the store while sampling goes on; memory does not grow with the
    number of draws.

    A process may be killed at any moment: the same call continues from the last commit and
    gives the same numbers, bit for bit, on the same kind of device. Ctrl-C and SIGTERM commit
    first, so nothing is taken again. A store that is already complete is opened as it is, on a
    read-only disk too. ``chains`` and ``draws`` may grow from call to call.

    Parameters
    ----------
    posterior
        What to sample.
    observed
        Map-style dataset whose losses are recorded: n samples. Or several by name: the first
        goes to the group ``losses``, each further one to ``losses_<name>``.
    sampler
        How a step moves: ``lk.SGLD(step_size=5e-5)``, ``lk.RMSpropSGLD``, ``lk.SGHMC``.
    store
        Folder, URL or Zarr store to write.
    chains, draws
        Chains, each started at w*, and draws of each.
    burn_in, thin
        Counted in steps: a draw follows each ``thin``-th step after the first ``burn_in``.
    batch_size
        Training items per step, drawn without replacement; ``None`` takes all of them.
    coords
        Labels of the observed samples, each of length n; ``sample`` sets the index. With several
        observed sets, a mapping of these by the sets' names.
    seed
        Noise and minibatches are pure functions of seed, chain and step.
    observables
        Functions of the model (the module, with the weights of the draw) that return a number or
        a small tensor, by name: recorded at each draw as float32 in the group ``observables``. A
        tensor of length n is taken to be about the first observed set.
    components
        Parameters that move (as ``trainable``), by name: each is sampled on its own, and the
        results share a dim ``component``: refined learning coefficients, kernels of heads.
    checkpoints
        Weights (modules, state dicts or files of them) by label, or a list: the posterior is
        sampled around each, and the results share a dim ``checkpoint``.
    chains_per_device
        How many chains are stacked with ``torch.func`` and stepped as one. ``"auto"`` stacks
        where the run takes long enough to matter, the model allows it and it was measured to be
        decisively faster; the choice is kept in the store, and a resume keeps to it. Last bits
        depend on it, so give a number where two runs must agree in them.
    autocast
        ``"bfloat16"`` or ``"float16"`` runs the observed forward passes in that precision; steps
        and losses stay float32.
    compile
        Whether to ``torch.compile`` the forward passes of draws, and the passes of the steps of
        chains that are not stacked (needs a C++ compiler on CPUs; seconds to a minute at first).
    resume
        Whether an existing store may be continued; ``False`` refuses one.
    device
        Where to run; ``None`` takes what the store was made on, or CUDA where there is one.
    client
        A Dask client: the stacks of chains are spread over its workers, one at a time on each
        thread, or on each unit of the workers' resource ``GPU`` where they have one. Workers must
        see the store's path.
    num_workers
        Processes that read the data sets' items, by torch's ``DataLoader``: for items that are
        decoded from files. ``None`` and 0 read in the sampling process. The numbers are the same;
        the datasets must bear a fork (no open handles of HDF5 or LMDB, say).
    progress
        Whether to show progress bars, of each stage that takes longer than two seconds.

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
        The store cannot be written, was deleted meanwhile, or would not fit on the disk; the
        message says what is safe.
    LockedError
        Another process is writing to the store.
    DivergedError
        Every chain turned non-finite.
    ClusterError
        No worker of the client is left and none came, or its scheduler is gone: the draws committed
        are safe, and the same call goes on.

    Notes
    -----
    Step counts are limited to 2**24 a chain, and chains to 256, within which no two steps
    share their noise. The dataset's items must not change between readings.
    """
    checks.check_types(posterior, sampler)
    checks.check_options(autocast, chains_per_device, observables, compiled=compile)
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
    sets = checks.observed_sets(observed)
    place = stores.as_store(store)
    if not exists(place):  # before anything of that size is read or made
        stores.require_space(place, 4 * chains * draws * sum(map(len, sets.values())))
    labels = checks.observed_labels(observed, sets, coords)
    job = Job(
        posterior=posterior,
        observed=sets,
        coords=labels,
        sampler=sampler,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        device=device,
        autocast=autocast,
        compile=compile,
        observables=dict(observables or {}),
        num_workers=check_workers(num_workers),
    )
    options: dict[str, Any] = {
        "chains": chains,
        "chains_per_device": chains_per_device,
        "resume": resume,
        "client": client,
        "progress": progress,
    }
    if components is not None or checkpoints is not None:
        return parts.sample_parts(
            job, store, components=components, checkpoints=checkpoints, run=run_job, **options
        )
    return run_job(job, store, **options)


def run_job(
    job: Job,
    store: StoreLike,
    *,
    chains: int,
    chains_per_device: int | str = "auto",
    resume: bool = True,
    client: Client | None = None,
    progress: bool = True,
    fixed: Mapping[str, Any] | None = None,
    same_as: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Run a job into a store, or continue it there; see `sample`.

    ``fixed`` holds the layout that a new store must keep to, and ``same_as`` what of the
    fingerprint must agree with a run that is replayed.
    """
    place = stores.as_store(store)
    if client is not None:
        workers.check_place(place)
    with progress_bars.showing(progress):
        before = _existing(place, resume)
        target: Target | None = None
        request: dict[str, Any] = {
            "chains": chains,
            "chains_per_device": chains_per_device,
            "fixed": before or fixed,
        }
        if client is None:
            known, target = prepare(job, **request)
        else:
            with progress_bars.busy("preparing on a worker"):
                known = workers.prepare_on(client, job, **request)
        if same_as is not None:
            now = {name: known.fingerprint[name] for name in same_as}
            remedy = "pass the posterior and the sampler that it was made with"
            stores.refuse_changes(same_as, now, "the tree", remedy=remedy)
        if before is not None and not _todo(place, known, chains, job.schedule.draws):
            # Nothing is written, so no lock is needed: a read-only disk has none.
            logger.info(
                "%s already holds %d chains of %d draws made with these settings; reused",
                stores.describe(place),
                chains,
                job.schedule.draws,
            )
        else:
            with stores.writer_lock(place):
                _fill(place, job, known, target, chains, resume=resume, client=client)
    remember(known.fingerprint, job)
    return open_rectangle(place, chains=chains, draws=job.schedule.draws)


def _todo(place: Any, known: Prepared, chains: int, draws: int) -> list[int]:
    """Return the chains of a store that still have draws to take; refuse other settings."""
    root = stores.open_root(place)
    now = stores.stored_fingerprint(root) or {}
    remedy = "use another path, or the stored settings"
    stores.refuse_changes(now, known.fingerprint, stores.describe(place), remedy=remedy)
    return _unfinished(root, chains, draws)


def _fill(
    place: Any,
    job: Job,
    known: Prepared,
    target: Target | None,
    chains: int,
    *,
    resume: bool,
    client: Client | None,
) -> None:
    """Take the draws that are missing; the caller holds the lock."""
    # Another process may have written since: what counts is read under the lock.
    fresh = _existing(place, resume) is None
    root = _create(place, job, known, chains) if fresh else stores.open_root(place, mode="r+")
    draws, steps = job.schedule.draws, job.schedule.steps
    todo = _todo(place, known, chains, draws)
    if not todo:
        return
    stores.require_sound(root, todo)
    stores.grow(root, chains=chains, draws=draws)
    width = known.fingerprint["chains_per_device"]
    groups = [
        [chain for chain in todo if chain // width == group]
        for group in sorted({chain // width for chain in todo})
    ]
    if target is not None and not fresh:
        with checks.numerics(known.fingerprint["threads"]):
            check_center(root, target)
    done = sum(stores.read_record(root, chain).step for chain in todo)
    with progress_bars.bar("sampling", total=len(todo) * steps, done=done) as bar:
        if client is not None:
            diverged = workers.run_on(client, root, job, known, groups, bar)
        else:
            assert target is not None
            with checks.numerics(known.fingerprint["threads"]):
                diverged = [
                    found for g in groups for found in run_group(root, job, target, g, bar.update)
                ]
    for chain, draw in diverged:
        logger.warning(
            "chain %d turned non-finite at draw %d and was stopped; it is flagged and left out. "
            "Reduce the step size",
            chain,
            draw,
        )
    stores.finish(root)


def _create(store: Any, job: Job, known: Prepared, chains: int) -> zarr.Group:
    if not known.center_losses:
        raise StoreError(
            f"{stores.describe(store)} was removed while its data were read; run again"
        )
    if exists(store):
        stores.drop_unfinished(stores.open_root(store, mode="r+"))
    fingerprint = known.fingerprint
    attrs = {key: fingerprint[key] for key in SETTINGS} | {"n_train": known.n_train}
    return stores.create_run(
        store,
        chains=chains,
        draws=job.schedule.draws,
        sets=[
            stores.LossSet(
                group,
                job.coords[group],
                losses,
                job.posterior.loss.dims,
                attrs | {"observed_is_train": identity == fingerprint["train_data"]},
            )
            for (group, losses), identity in zip(
                known.center_losses.items(), fingerprint["observed_data"].values(), strict=True
            )
        ],
        observables={n: tuple(o["shape"]) for n, o in fingerprint["observables"].items()},
        state=dict.fromkeys(fingerprint["state"], known.n_parameters),
        state_dtype=fingerprint["precision"],
        fingerprint=fingerprint,
    )


def _unfinished(root: zarr.Group, chains: int, draws: int) -> list[int]:
    """Return the chains that still have draws to take."""
    flags = stores.stored(root, schema.SAMPLE_STATS, schema.DIVERGED)
    known = stores.stored(root, schema.LOSSES, schema.LOSS).shape[0]
    todo = list(range(known, chains))
    for chain in range(min(chains, known)):
        taken = stores.read_record(root, chain).draws
        if taken < draws and not (taken and bool(read(flags, (chain, taken - 1)))):
            todo.append(chain)
    return sorted(todo)


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
    found = stores.stored_fingerprint(root)
    if found is not None and not resume:
        raise StoreError(
            f"{stores.describe(store)} exists and resume=False; nothing was touched. Choose "
            "another path, delete it, or pass resume=True to continue it"
        )
    return found
