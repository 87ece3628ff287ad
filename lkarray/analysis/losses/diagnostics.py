"""Whether chains have run long enough: R-hat, effective sample sizes, drift, and what to change."""

from __future__ import annotations

from math import prod
from typing import Any

import dask
import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.diagnosed import (
    LEADING,
    Given,
    counted,
    given_by,
    padding_of,
    places,
    spread,
    turned_at,
)
from lkarray.analysis.losses.estimates import of_estimates
from lkarray.analysis.losses.gaussianity import OF_OUTCOMES, moments, of_outcomes
from lkarray.analysis.losses.verdicts import advice, regime, summary, verdicts
from lkarray.arguments import COUNT, NATURAL, checked
from lkarray.engine import Operand
from lkarray.engine.strips import Strips, make_strips
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.operands import free_dim
from lkarray.schema import CHAIN, DRAW, POSTERIOR
from lkarray.tensors import Losses, as_losses
from lkarray.waiting import workers_awaited

_PER_SAMPLE = {*convergence.PER_SAMPLE, *OF_OUTCOMES, "loss_kurtosis"}
_FEW = 8  # samples at once whose deviations are held in float64

#: Units and meaning of every variable of the report.
_MEANING = {
    "rhat": ("", "rank-normalised split R-hat"),
    "ess_bulk": ("", "bulk effective sample size"),
    "ess_tail": ("", "tail effective sample size, of the 5% and 95% quantiles"),
    "mcse": ("nat", "Monte-Carlo standard error of the loss gain"),
    "between_variance": ("nat^2", "between-chain variance: draws times that of the chain means"),
    "within_variance": ("nat^2", "within-chain variance"),
    "pooling_excess": ("", "pooled variance over that centred by chain, minus 1"),
    "transient_excess": ("", "pooled variance over that about the chains' mean at a draw, minus 1"),
    "drift": ("", "z score of the mean loss: second half of a chain minus first"),
    "distance": ("", "mean Euclidean distance from w* over the second half of a chain"),
    "acceptance": ("", "mean probability that a Metropolis test accepts a step"),
    "diverged": ("", "the chain turned non-finite and is left out"),
    "autocorrelation_draws": ("draw", "draws of a chain for each that counts, median of samples"),
    "kernel_ess": ("", "effective sample size of a kernel entry, median over pairs of samples"),
    "kernel_error": ("", "standard error of an entry of the correlation kernel near zero"),
    "outcome_skew": ("", "skew of outcomes over draws, 0 of Gaussian ones"),
    "outcome_skew_error": ("", "standard error of a skew, were outcomes Gaussian"),
    "outcome_kurtosis": ("", "excess kurtosis of outcomes over draws, 0 of Gaussian ones"),
    "outcome_kurtosis_error": ("", "standard error of a kurtosis, were outcomes Gaussian"),
    "loss_kurtosis": ("", "excess kurtosis of losses over draws"),
    "estimators_agree": ("", "correlation over pairs of R by both estimators, noise divided out"),
    "sample_reliability": ("", "reliability of R from losses"),
    "gaussian_reliability": ("", "reliability of R from outcomes taken as Gaussian"),
    "compared": ("", "random samples that both estimators are compared on"),
    "relaxation_steps": ("step", "steps in which a direction without loss forgets where it was"),
}


@workers_awaited("computed")
@checked(pairs=COUNT, seed=NATURAL)
def diagnostics(
    tree: Losses, *, pairs: int = 200, seed: int = 0, memory: int | str | None = None
) -> xr.Dataset:
    r"""Return whether the chains have converged, what their draws are worth, and what to change.

    >>> import numpy as np, xarray as xr
    >>> from lkarray.analysis.losses.diagnostics import diagnostics
    >>> noise = np.random.default_rng(0).normal(size=(4, 200, 5))
    >>> losses = xr.DataArray(noise, dims=("chain", "draw", "sample"), name="loss")
    >>> report = diagnostics(losses)
    >>> print("\n".join(report.attrs["verdicts"]) or report.attrs["summary"])
    all is well: R-hat at most 1.01, entries of R err by about 0.036

    Parameters
    ----------
    tree
        A store's tree; or losses alone, for which ``distance``, ``acceptance`` and ``diverged``
        are not known and left out. Dims ``checkpoint``, ``component`` and ``token`` are kept;
        of tokens that are padding nothing is said (NaN), and they count nowhere.
    pairs
        Random pairs of samples whose product series give ``kernel_ess``; all pairs, where
        there are fewer.
    seed
        Of these pairs.
    memory
        Byte budget of a process; see `gram`.

    Returns
    -------
    xarray.Dataset
        In memory, float64. Per ``sample``:

        - ``rhat``, the rank-normalised split R-hat (Vehtari et al. 2021, eqs. 4 and 14; NaN for
          one chain), ``ess_bulk`` and ``ess_tail`` (section 4; of the 5% and 95% quantiles, where
          `arviz_stats.ess` goes by its ``ci_prob`` unless told ``prob=(0.05, 0.95)``), as ArviZ
          defines them; NaN where a loss does not vary;
        - ``mcse`` in nats, the standard error of `loss_gain`, as that of `mcse`;
        - ``between_variance``, B, and ``within_variance``, W, in nats squared (Gelman and Rubin
          1992, section 2.2): draws times the variance of the chain means (NaN for one chain),
          and the mean variance of a chain. Equal in expectation where draws are independent;
        - ``pooling_excess``, by how much a variance about one mean of all chains
          (``center="pooled"``) exceeds that about each chain's (``"chain"``), relatively;
        - ``transient_excess``, by how much it exceeds that about the chains' mean at the same draw
          (``"draw"``): what all chains go through alike, as after too short a burn-in. NaN for one
          chain;
        - ``loss_kurtosis``, the excess kurtosis of losses over draws, 0 of Gaussian ones;
        - where outcomes stand beside the losses (log-odds, residuals), ``outcome_skew`` and
          ``outcome_kurtosis`` (excess), 0 of Gaussian ones, which ``estimator="gaussian"`` takes
          them for (`covariance`); ``outcome_skew_error`` and ``outcome_kurtosis_error``, the
          standard errors that these would have of Gaussian outcomes with the autocorrelation that
          ``ess_bulk`` tells of (Lobato and Velasco 2004). One pass more over them.

        Per ``chain``:

        - ``drift``, the mean loss over all samples in the second half of the draws minus that in
          the first, over the root of the sum of their squared standard errors (after Geweke
          1992; the errors are ArviZ's, about a straight line in each half, so that a trend does
          not pass for autocorrelation). NaN with fewer than 8 draws. Standard normal where a half
          holds ten autocorrelation times or more, wider where it holds fewer;
        - ``distance``, the mean distance from w* over the second half of the draws;
        - ``acceptance``, the mean over the draws where it was measured;
        - ``diverged``, whether ``sample_stats`` flags the chain: all else leaves it out, and what
          is said of the chain itself is NaN. (`open` shows no such chain; the verdicts name those
          that it hid.)

        0-d:

        - ``kernel_ess``, the median over pairs of the effective sample size of the mean of
          :math:`(\ell_i - \mu_i)(\ell_j - \mu_j)`, which is an entry of the kernel, and
          ``kernel_error``, one over its root: about the standard error of an entry of R near 0;
        - ``autocorrelation_draws``, the median over samples of draws over ``ess_bulk``;
        - ``relaxation_steps``, the steps in which a direction without loss forgets where it was:
          ``2 / (step_size * gamma)`` for `SGLD` (others: see Notes), with the step size of the
          last draw. NaN where gamma is 0 or unknown;
        - where outcomes stand beside the losses, ``sample_reliability`` and
          ``gaussian_reliability`` of R by both estimators (`reliability`), and
          ``estimators_agree``, the correlation of the two over pairs, from different halves of the
          chains and divided by the root of what halves of each agree by, so that noise does not
          lower it (Spearman 1904). Of ``compared`` random samples: all, up to 300, or as many as
          the budget holds. NaN where a half's kernel is noise.

        The attribute ``verdicts`` lists the problems, each with its number, what
        it means, and the setting to change. It is empty when all is well. The attribute
        ``summary`` says so in one line. ``regime`` says which estimate the draws call for, and
        ``advice`` why, in a line (docs/noise.md): ``"linear"``, losses are Gaussian, so that
        gradients (`laplace`) give their kernel; ``"bent"``, outcomes are, so that
        ``estimator="gaussian"`` does; ``"far"``, neither, so that only long chains do;
        ``"unknown"``, losses are not, and there are no outcomes.

    Raises
    ------
    ValueError
        A chain has fewer than 4 draws, or ``pairs`` is not positive.
    SchemaError
        Dims are missing, or ``sample_stats`` has other chains or draws than the losses.
    NonFiniteError
        A loss of a chain that is not flagged is NaN or infinite; the message says where.
    DivergedError
        Every chain is flagged.
    MemoryBudgetError
        The budget holds no block of samples; the message says what would.

    Notes
    -----
    One pass over the losses, in blocks of samples that fit ``memory``, which the cores, or the
    workers of a Dask client, share. For 4 chains of 500 draws it costs 2 ms a sample
    on one core, 5 ms for slowly drifting chains: ArviZ's own time.
    A few thousand samples tell as much as a million:
    ``diagnostics(tree.isel(sample=slice(None, None, 100)))``.

    The relaxation time follows from the force of a step, ``gamma (w - w*)`` alone: for
    `RMSpropSGLD` it is ``damping`` times that of `SGLD`, as the preconditioner is one over the
    damping where there is no gradient; for `SGHMC` with friction a it is one over the real part
    of ``(a - sqrt(a^2 - 2 eps gamma)) / 2``, the slower root of its damped oscillation; for
    `InformedLangevin` it is ``2 / eps``.

    References
    ----------
    - Vehtari et al. 2021, eqs. 4 and 14, section 4: "Rank-normalization, folding, and localization:
      an improved R-hat for assessing convergence of MCMC", doi:10.1214/20-BA1221.
    - Gelman and Rubin 1992, section 2.2: "Inference from iterative simulation using multiple
      sequences", doi:10.1214/ss/1177011136.
    - Lobato and Velasco 2004: "A simple test of normality for time series",
      doi:10.1017/S0266466604204030.
    - Spearman 1904: "The proof and measurement of association between two things",
      doi:10.2307/1412159.
    - Geweke 1992: "Evaluating the accuracy of sampling-based approaches to the calculation of
      posterior moments", Bayesian Statistics 4.
    """
    given = given_by(tree)
    x = given.losses
    leading = [dim for dim in LEADING if dim in x.dims]
    rows = [str(dim) for dim in x.dims if dim not in (*leading, *POSTERIOR)]
    turned = turned_at(given.stats, x, leading)
    each = []
    for place in places(x, leading):
        usable = (turned.isel(place) < 0).values
        losses = x.isel(place) if usable.all() else x.isel(place).isel({CHAIN: usable})
        padding = padding_of(given.center, losses, place)
        flat = counted(losses, padding)
        entry = _entry(flat, pairs, seed, memory)
        if given.outcomes is not None:
            outcomes = counted(given.outcomes.isel(place).isel({CHAIN: usable}), padding)
            entry |= of_outcomes(flat, outcomes, entry["ess_bulk"], memory)
            entry |= of_estimates(flat, outcomes, seed, memory)
        if padding is not None:
            entry |= {name: spread(entry[name], padding) for name in _PER_SAMPLE & set(entry)}
        whole = np.full(len(usable), np.nan)
        whole[usable] = entry["drift"]
        each.append(entry | {"drift": whole})
    out = xr.Dataset(coords=sample_coords(x, *leading, CHAIN, *rows))
    for name in each[0]:
        own = rows if name in _PER_SAMPLE else [CHAIN] if name == "drift" else []
        shape = [x.sizes[dim] for dim in (*leading, *own)]
        out[name] = ((*leading, *own), np.stack([entry[name] for entry in each]).reshape(shape))
    out["kernel_error"] = 1 / np.sqrt(out["kernel_ess"])
    out = out.assign(_of_stats(given, turned >= 0))
    of_x = {"nat": schema.units_of(x), "nat^2": schema.product_units(x)}
    for variable in out.data_vars:
        units, meaning = _MEANING[str(variable)]
        units = of_x.get(units, units)
        out[variable].attrs = {"long_name": meaning} | ({"units": units} if units else {})
    lines = verdicts(out, given.run, turned, list(places(x, leading)))
    return out.assign_attrs(
        over=list(POSTERIOR),
        draws=x.sizes[DRAW],
        pairs=pairs,
        seed=seed,
        summary=summary(out, lines),
        verdicts=lines,
        regime=regime(out),
        advice=advice(out),
    )


def _entry(
    x: xr.DataArray, pairs: int, seed: int, memory: int | str | None
) -> dict[str, np.ndarray]:
    """Return what the losses ``(chain, draw, rows)`` alone tell."""
    rows = free_dim(as_losses(x), "losses", POSTERIOR, ())
    operand = Operand(x, over=POSTERIOR, each=(), rows=rows, center=None, cosine=False)
    chosen = convergence.random_pairs(operand.n, pairs, seed)
    wanted = np.unique(chosen)
    draws = prod(operand.shape)
    kept = len(wanted) * draws * operand.dtype.itemsize
    working = convergence.working_bytes(draws)
    needs = {"held": working, "kept": kept, "alone": 2 * kept + working}
    strips = make_strips(operand, memory=memory, rows=True, needs=needs)
    node = dask.delayed(strips, traverse=False)
    tasks = [dask.delayed(_blocks)(node, part, wanted) for part in strips.shares]
    blocks = dask.compute(*tasks)
    stats, sums, series = zip(*blocks, strict=True)
    names = (*convergence.PER_SAMPLE, "loss_kurtosis")
    columns = dict(zip(names, np.concatenate(stats).T, strict=True))
    mean = np.sum(sums, axis=0).reshape(operand.shape) / operand.n
    products = np.concatenate(series).reshape(-1, *operand.shape)
    known = columns["ess_bulk"][~np.isnan(columns["ess_bulk"])]
    return columns | {
        "drift": convergence.drift(mean),
        "kernel_ess": convergence.kernel_ess(products, np.searchsorted(wanted, chosen)),
        "autocorrelation_draws": np.median(draws / known) if len(known) else np.nan,
    }


def _blocks(
    strips: Strips, blocks: range, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the figures of some blocks of samples, the sum over these, and the series of a few."""
    stats, series, total = [], [], np.zeros(strips.short)
    for k in blocks:
        (panel,), span = strips.blocks(k), strips.spans[k]
        figures = convergence.per_sample(panel.T.reshape(-1, *strips.operands[0].shape))
        few = [moments(panel[:, i : i + _FEW])[1] for i in range(0, panel.shape[1], _FEW)]
        stats.append(np.column_stack([figures, np.concatenate(few)]))
        series.append(panel.T[wanted[(wanted >= span.start) & (wanted < span.stop)] - span.start])
        total += panel.sum(axis=1, dtype=np.float64)
    return np.concatenate(stats), total, np.concatenate(series)


def _of_stats(given: Given, bad: xr.DataArray) -> dict[str, Any]:
    """Return what the statistics of the draws tell."""
    stats, run = given.stats.astype(np.float64), given.run
    out: dict[str, Any] = {}
    if schema.DISTANCE.name in stats:
        late = stats[schema.DISTANCE.name].isel({DRAW: slice(given.losses.sizes[DRAW] // 2, None)})
        out["distance"] = late.mean(DRAW, skipna=False).where(~bad)
    if schema.ACCEPTANCE.name in stats:
        out["acceptance"] = stats[schema.ACCEPTANCE.name].mean(DRAW, skipna=True).where(~bad)
    if schema.DIVERGED.name in stats:
        out["diverged"] = bad
    size: Any = run.step_size
    if schema.STEP_SIZE.name in stats:
        # The same in all chains; those that diverged have none at the last draw.
        size = stats[schema.STEP_SIZE.name].isel({DRAW: -1}, drop=True).where(~bad).max(CHAIN)
    steps = convergence.relaxation_steps(size, run.gamma, run.sampler)
    return out | {"relaxation_steps": steps}
