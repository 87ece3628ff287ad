"""`suggest`: short pilot chains over a grid of settings."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.utils.data import Subset
from zarr.storage import MemoryStore

from lkarray import progress as progress_bars
from lkarray import schema
from lkarray.arguments import checked
from lkarray.errors import DivergedError
from lkarray.nn.batches import Batches, MapDataset, check_dataset, check_workers
from lkarray.sampling import checking as checks
from lkarray.sampling.devices import choose_device
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.remembering import forgetting
from lkarray.sampling.run import sample
from lkarray.sampling.samplers import SGLD, Sampler

STEP_SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
#: A step whose Metropolis test accepts less than this distorts the posterior.
ACCEPTABLE = 0.6


@checked()
def suggest(
    posterior: LocalPosterior,
    observed: MapDataset,
    *,
    sampler: Sampler | None = None,
    step_sizes: Sequence[float] = STEP_SIZES,
    gammas: Sequence[float] | None = None,
    nbetas: Sequence[float] | None = None,
    chains: int = 2,
    draws: int = 100,
    burn_in: int = 0,
    thin: int = 1,
    batch_size: int | None = 256,
    samples: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Try settings on short pilot chains, and say which mix best without distortion.

    Parameters
    ----------
    posterior
        What to sample; its gamma and nbeta are used where no others are asked for.
    observed
        Map-style dataset, of which ``samples`` random items are observed.
    sampler
        Its other settings are kept; ``SGLD`` by default.
    step_sizes, gammas, nbetas
        The grid.
    chains, draws, burn_in, thin, batch_size, seed, device
        As in `sample`, for each cell of the grid.
    samples
        Observed items, at most.
    num_workers
        Processes that read the data sets' items, as in `sample`.
    progress
        Whether to show bars over reading and the grid.

    Returns
    -------
    xarray.Dataset
        Dims (nbeta, gamma, step_size): ``loss_gain`` in nats, its mean over samples;
        ``diverged``, chains that turned non-finite; ``acceptance``, mean probability that a
        Metropolis test accepts a step; ``ess``, median bulk effective sample size of the samples'
        losses; ``ess_per_second`` on this machine. Attributes: ``best``, the settings with the
        most effective draws a second among those where no chain diverged and at least 60% of the
        steps would be accepted (where that can be tested), and ``verdict``, a line on it.

    Raises
    ------
    ValueError, TypeError
        The grid is empty or holds a number that is not positive, or as `sample` raises.

    Notes
    -----
    Pilot chains are short, so the effective sizes are rough: they rank settings, no more.
    Cost: ``chains * (burn_in + draws * thin)`` steps for each cell. The data are read once (a
    training set beyond 2 GiB item by item, as steps need it).
    """
    check_dataset(observed, "observed")
    sampler = SGLD(step_size=1.0) if sampler is None else sampler
    checks.check_types(posterior, sampler)
    if sampler.independent:
        raise ValueError(
            f"independent draws of {type(sampler).__name__} have no step size to choose; give the "
            "sampler whose steps are to be tuned, lk.SGLD(step_size=...) say"
        )
    axes = {
        "nbeta": [float(v) for v in ([posterior.nbeta] if nbetas is None else nbetas)],
        "gamma": [float(v) for v in ([posterior.gamma] if gammas is None else gammas)],
        "step_size": [float(v) for v in step_sizes],
    }
    for name, values in axes.items():
        if not values or min(values) < 0 or not all(map(np.isfinite, values)):
            raise ValueError(f"{name}s must be a list of finite numbers of at least 0: {values}")
    count = min(checks.at_least("samples", samples, 1), len(observed))
    rows = np.sort(np.random.default_rng(seed).choice(len(observed), count, replace=False))
    workers = check_workers(num_workers)
    options: dict[str, Any] = {"chains": chains, "draws": draws, "burn_in": burn_in, "thin": thin}
    options |= {"batch_size": batch_size, "seed": seed}
    # The first run of a process pays for imports and first calls, which are no cell's own.
    warm = options | {"chains": 1, "draws": 4, "burn_in": 0, "thin": 1}
    with _no_warnings(), forgetting():
        with progress_bars.showing(progress):
            posterior, few = _read(posterior, observed, rows, device, workers)
            with progress_bars.busy("first pilot"):
                _pilot(posterior, few, replace(sampler, step_size=1e-12), warm, device)
        pilot = partial(_pilot, observed=few, options=options, device=device)
        grid = _grid(posterior, sampler, axes, pilot, show=progress)
    grid = grid.assign_attrs(options)
    grid["loss_gain"].attrs["units"] = "nat"
    return grid.assign_attrs(_verdict(grid))


def _grid(
    posterior: LocalPosterior,
    sampler: Sampler,
    axes: Mapping[str, list[float]],
    pilot: Callable[..., dict[str, float]],
    *,
    show: bool,
) -> xr.Dataset:
    """Return what pilots say of each cell of a grid, dims as ``axes``."""
    shape = tuple(map(len, axes.values()))
    names = ("loss_gain", "diverged", "acceptance", "ess")
    grid = {name: np.full(shape, np.nan) for name in names}
    cells = list(product(*(range(n) for n in shape)))
    seconds: list[float] = []
    with progress_bars.bar("pilots", total=len(cells), unit="cell", show=show) as bar:
        for cell in cells:
            nbeta, gamma, size = (values[i] for values, i in zip(axes.values(), cell, strict=True))
            tempered = posterior.tempered(nbeta=nbeta, gamma=gamma)
            began = time.perf_counter()
            measured = pilot(posterior=tempered, sampler=replace(sampler, step_size=size))
            seconds.append(time.perf_counter() - began)
            for name, value in measured.items():
                grid[name][cell] = value
            bar.update()
    # No setting changes what a step costs, so the seconds of all cells are one measurement.
    grid["ess_per_second"] = grid["ess"] / np.median(seconds)
    return xr.Dataset({name: (tuple(axes), values) for name, values in grid.items()}, coords=axes)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Let a chain that diverges be an answer, and no warning, in this thread."""
    logger, own = logging.getLogger("lkarray"), threading.get_ident()

    def shown(record: logging.LogRecord) -> bool:
        return record.thread != own or record.levelno >= logging.ERROR

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def _read(
    posterior: LocalPosterior,
    observed: MapDataset,
    rows: np.ndarray,
    device: torch.device | str | None,
    workers: int,
) -> tuple[LocalPosterior, Batches]:
    """Read the data once for all pilots; return the posterior on them and what is observed."""
    chosen = choose_device(device, None)
    options: dict[str, Any] = {"device": chosen, "num_workers": workers}
    train = Batches(posterior.train_set, name="train_set", **options)
    if observed is posterior.train_set:
        few = train.subset(rows, "observed")
    else:
        subset: Any = Subset(observed, rows.tolist())  # type: ignore[arg-type]
        few = Batches(subset, name="observed", **options)
    posterior = copy.copy(posterior)
    posterior.train_set = train
    return posterior, few


def _pilot(
    posterior: LocalPosterior,
    observed: MapDataset,
    sampler: Sampler,
    options: dict[str, Any],
    device: torch.device | str | None,
) -> dict[str, float]:
    from arviz_stats.base import array_stats

    try:
        tree = sample(
            posterior,
            observed,
            sampler=sampler,
            store=MemoryStore(),
            chains_per_device=1,
            device=device,
            progress=False,
            **options,
        )
    except DivergedError:
        return {"diverged": options["chains"]}
    losses = tree[schema.LOSSES].to_dataset()
    if schema.TOKEN in losses.dims:
        losses = losses.mean(schema.TOKEN)  # padding is NaN, and left out
    values = np.asarray(losses[schema.LOSS.name]).astype(np.float64)
    varies = np.ptp(values, axis=(0, 1)) > 0
    acceptance = np.asarray(tree[schema.SAMPLE_STATS][schema.ACCEPTANCE.name])
    center = np.asarray(losses[schema.CENTER_LOSS.name]).mean(dtype=np.float64)
    out = {
        "diverged": options["chains"] - len(values),
        "loss_gain": float(values.mean() - center),
        "acceptance": float(np.nanmean(acceptance)) if np.isfinite(acceptance).any() else np.nan,
    }
    if varies.any() and values.shape[1] >= 4:
        ess = array_stats.ess(values[..., varies], chain_axis=0, draw_axis=1, method="bulk")
        out["ess"] = float(np.median(ess))
    return out


def _verdict(grid: xr.Dataset) -> dict[str, Any]:
    fine = (grid["diverged"] == 0) & ~(grid["acceptance"] < ACCEPTABLE)
    score = grid["ess_per_second"].where(fine)
    if not bool(score.notnull().any()):
        return {
            "best": {},
            "verdict": "every setting diverged or would be rejected: try smaller step sizes",
        }
    place = score.argmax(...)
    best = {name: float(grid[name][place[name]]) for name in score.dims}
    cell = {name: float(grid[name].isel(place)) for name in ("ess", "loss_gain", "acceptance")}
    said = ", ".join(f"{name}={value:g}" for name, value in best.items())
    edge = place["step_size"] == grid.sizes["step_size"] - 1
    return {
        "best": best,
        "verdict": (
            f"{said}: {cell['ess']:.0f} effective draws, loss gain {cell['loss_gain']:.3g} nat, "
            f"{cell['acceptance']:.0%} of steps acceptable"
            + ("; the largest step size tried is the best, so try larger ones" if edge else "")
        ),
    }
