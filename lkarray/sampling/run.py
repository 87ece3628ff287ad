"""`sample`: from a posterior to a store, resumable at any moment. Checks, then `running`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from lkarray import store as stores
from lkarray.arguments import checked
from lkarray.nn.batches import MapDataset, check_workers
from lkarray.nn.outcomes import Outcome, chosen_outcomes
from lkarray.sampling import checking as checks
from lkarray.sampling.chain import Schedule
from lkarray.sampling.independent import Laplace
from lkarray.sampling.job import Job, RunOptions
from lkarray.sampling.parts import sample_parts
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.randomness import MAX_CHAINS, MAX_STEPS
from lkarray.sampling.running import run_job
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.starting import CENTER, chosen_laws
from lkarray.sampling.target import Observable
from lkarray.store.location import StoreLike, exists

if TYPE_CHECKING:
    from distributed import Client


#: Steps before the first draw where none are given.
BURN_IN = 10


@checked()
def sample(
    posterior: LocalPosterior,
    observed: MapDataset | Mapping[str, MapDataset],
    *,
    sampler: Sampler,
    store: StoreLike,
    chains: int = 4,
    draws: int = 100,
    burn_in: int | None = None,
    thin: int = 1,
    start: str | Laplace | None = None,
    control: str | Laplace | None = None,
    batch_size: int | None = 256,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    observables: Mapping[str, Observable] | None = None,
    outcomes: Sequence[str | Outcome] = ("loss",),
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
        How a step moves: ``lk.SGLD(step_size=5e-5)``, ``lk.RMSpropSGLD``, ``lk.SGHMC``,
        ``lk.InformedLangevin(step_size=1.0)``; or ``lk.Laplace(rank=100)``, independent draws of a
        Gaussian.
    store
        Folder, URL or Zarr store to write.
    chains, draws
        Chains, and draws of each.
    burn_in, thin
        Counted in steps: a draw follows each ``thin``-th step after the first ``burn_in``; by
        default 10; 0 where chains start in their law, and of independent draws (`Laplace`), which
        allow no other.
    start
        ``"center"``, which is meant by ``None``, starts every chain at w*. ``"laplace"``, or
        ``lk.Laplace(rank=...)``, starts each at a draw of the law that SGLD has, at the sampler's
        step size, where the loss is quadratic (see `Laplace` for its cost): near there the burn-in
        is spared. Elsewhere it is shorter, so give one. Only for ``lk.SGLD`` without a schedule.
    control
        ``"laplace"``, or ``lk.Laplace(rank=...)``, runs beside each chain the linear chain that it
        would be if the loss were quadratic, with the same noise, from the same start (so it implies
        that ``start``), and stores at each draw what that predicts of each sample's outcome: the
        variable ``log_odds_prediction`` (or ``residual_prediction``, or ``loss_prediction`` where
        neither outcome is recorded). ``lk.correlation(losses, control=lk.laplace(...))`` takes the
        part of a kernel's noise out that this predicts. For ``lk.SGLD`` without a schedule, and for
        ``lk.Laplace``, whose own law it is then. A step costs ``4 rank P`` operations more, a draw
        about two passes over what is observed, and the state a vector.
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
    outcomes
        What is stored of each observed sample, in the same group with the same dims, from the same
        forward pass: ``"loss"``, always and first; ``"log_odds"`` of losses ``"cross_entropy"``,
        ``"next_token"`` and ``"binary_cross_entropy"``; ``"residual"`` of ``"mse"`` of one output;
        `lkarray.Outcome` of your own. Its attribute ``link`` says what makes the loss of it.
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
    >>> dict(tree["losses"]["loss"].sizes)
    {'chain': 2, 'draw': 4, 'sample': 8}
    """
    checks.check_types(posterior, sampler)
    checks.check_options(autocast, chains_per_device, observables, compiled=compile)
    chains = checks.at_least("chains", chains, 1)
    settled = sampler.independent or control is not None or start not in (None, CENTER)
    burn_in = (0 if settled else BURN_IN) if burn_in is None else burn_in
    schedule = _schedule(sampler, chains, draws, burn_in, thin)
    seed = checks.at_least("seed", seed, 0)
    if batch_size is not None:
        batch_size = checks.at_least("batch_size", batch_size, 1)
    laws = chosen_laws(start, control, sampler, steps=schedule.steps)
    sets = checks.observed_sets(observed)
    chosen = chosen_outcomes(posterior.loss, outcomes)
    place = stores.as_store(store)
    if not exists(place):  # before anything of that size is read or made
        values = (1 + len(chosen) + (control is not None)) * sum(map(len, sets.values()))
        stores.require_space(place, 4 * chains * draws * values)
    labels = checks.observed_labels(observed, sets, coords)
    others = (*posterior.loss.dims, *(observables or {}))
    checks.refuse_taken(chosen, labels, others, predicted=control is not None)
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
        outcomes=chosen,
        start=laws[0],
        control=laws[1],
    )
    options = RunOptions(
        chains=chains,
        chains_per_device=chains_per_device,
        resume=resume,
        client=client,
        progress=progress,
    )
    if components is None and checkpoints is None:
        return run_job(job, store, options)
    return sample_parts(job, store, options, components=components, checkpoints=checkpoints)


def _schedule(sampler: Sampler, chains: int, draws: int, burn_in: int, thin: int) -> Schedule:
    draws = checks.at_least("draws", draws, 1)
    thin, burn_in = checks.at_least("thin", thin, 1), checks.at_least("burn_in", burn_in, 0)
    checks.check_independent(sampler, burn_in, thin)
    schedule = Schedule(draws, burn_in, thin)
    if schedule.steps > MAX_STEPS or chains > MAX_CHAINS:
        raise ValueError(
            f"chains={chains} of {schedule.steps} steps (burn_in and draws, each times thin) are "
            f"too many: at most {MAX_CHAINS} chains of {MAX_STEPS} steps have noise that never "
            "repeats; take fewer, or another seed"
        )
    return schedule
