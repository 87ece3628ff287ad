"""What diagnostics mean: one plain line for each problem, with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.analysis.losses.convergence import transient_noise

_RHAT = 1.05  # above which a sample's chains disagree
_SOME = 0.01  # of the samples: fewer exceed a threshold by chance
_DRIFT = 4.0  # standard errors
_HALF = 10  # draws of a half of a chain, from which its standard error can be trusted
_KERNEL_ESS = 100  # below which entries of R carry an error above 0.1
_LOW, _HIGH = 0.5, 0.999  # acceptance below and above which the step size is off
_WORTH = 0.1  # effective draws for each draw, below which larger steps would pay
_RESOLUTION = 1e-6  # nats: float32 losses that deviate less are moved by rounding alone
_HUGE = 100.0  # R-hat, or excess of a variance, above which its number says nothing more
_ALL = 1e12  # an excess that rounding makes of chains that do not move
_JUMPS = 3.0  # times the variance of an estimated variance that losses have over outcomes
_GAUSSIAN = 1.0  # excess kurtosis of what passes for Gaussian
_SAME = 0.8  # agreement of two estimates beyond noise, below which they are not of one kernel
_EXCESS = 0.1  # of a pooled variance over one centred by chain, or by draw
_SURE = 3.0  # standard deviations of chance that such an excess must be above


@dataclass(frozen=True)
class Run:
    """The settings of a run that its verdicts speak of; ``None`` where they are not known."""

    draws: int
    chains: tuple[Any, ...]
    burn_in: int | None = None
    thin: int | None = None
    gamma: float | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] | None = None
    hidden: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        losses: xr.DataArray,
        attrs: Mapping[Any, Any],
        hidden: list[str],
    ) -> Run:
        """Return the settings that losses carry, and what their store left out."""
        return cls(
            draws=losses.sizes[schema.DRAW],
            chains=tuple(losses[schema.CHAIN].values.tolist()),
            burn_in=attrs.get("burn_in"),
            thin=attrs.get("thin"),
            gamma=attrs.get("gamma"),
            sampler=attrs.get("sampler") or {},
            start=attrs.get("start"),
            hidden=tuple(hidden),
        )

    @property
    def step_size(self) -> float:
        """The step size that was set; NaN where it is not known."""
        return float(self.sampler.get("step_size", np.nan))

    def now(self, name: str) -> str:
        """Return a setting's name with its present value, where that is known."""
        value = self.step_size if name == "step_size" else getattr(self, name)
        known = value is not None and isfinite(value)
        return f"{name} (now {value:g})" if known else name


def verdicts(
    report: xr.Dataset, run: Run, turned: xr.DataArray, places: list[dict[str, int]]
) -> list[str]:
    """Return a line for each problem of a report.

    Parameters
    ----------
    report
        The figures of `diagnostics`.
    run
        The settings of the run.
    turned
        The draw at which each chain turned non-finite, or -1.
    places
        Entries along the leading dims of the report, each judged by itself; lines that several
        share are given once.
    """
    shared: dict[str, list[str]] = {}
    for place in places:
        entry = report.isel(place)
        for line in _of_one(entry, run, turned.isel(place).values):
            label = ", ".join(f"{dim} {entry[dim].item()}" for dim in place)
            shared.setdefault(line, []).append(label)
    lines = list(_left_out(run))
    for line, labels in shared.items():
        lines.append(f"{'; '.join(labels)}: {line}" if labels[0] else line)
    return lines


def summary(report: xr.Dataset, lines: list[str]) -> str:
    """Return one line on a report: how many problems there are, or how well it stands."""
    if lines:
        return f"{len(lines)} problem{'s' * (len(lines) > 1)}: see the attribute verdicts"
    worst, error = float(report["rhat"].max()), float(report["kernel_error"].max())
    entries = f", entries of R err by about {error:.2g}" if isfinite(error) else ""
    return f"all is well: R-hat at most {worst:.2f}{entries}"


def _left_out(run: Run) -> Iterator[str]:
    """Yield a line for whatever of the run is not among the losses."""
    smaller = f"reduce {run.now('step_size')} or raise {run.now('gamma')}"
    for line in run.hidden:
        if "diverged" in line:
            yield f"{line}: {smaller}, and sample into a new store"
        else:
            yield f"{line}: run lk.sample on the store again to take the rest"
    said = any("chains" in line for line in run.hidden)
    if all(isinstance(chain, int) for chain in run.chains) and not said:
        gaps = sorted(set(range(max(run.chains))) - set(run.chains))
        if gaps:
            yield f"chains {gaps} are not among the losses: if they diverged, {smaller}"


def _of_one(report: xr.Dataset, run: Run, turned: np.ndarray) -> Iterator[str]:
    """Yield the lines of a report without leading dims."""
    for chain, draw in zip(run.chains, turned, strict=True):
        if draw >= 0:
            yield (
                f"chain {chain} turned non-finite at draw {draw} and is left out: reduce "
                f"{run.now('step_size')} or raise {run.now('gamma')}"
            )
    chains = int((turned < 0).sum())
    if chains == 1:
        yield (
            "there is only one chain, so nothing tells whether another would agree (no R-hat): "
            "set chains=4"
        )
    if not bool((report["within_variance"] > 0).any() | (report["between_variance"] > 0).any()):
        yield (
            "no loss varies over the draws, so every kernel is zero: raise "
            f"{run.now('step_size')}, or let other parameters move (trainable=)"
        )
        return
    moved = report["within_variance"] + report["between_variance"]
    still, known = int((moved < _RESOLUTION**2).sum()), int(moved.count())
    if still > _SOME * known:
        yield (
            f"the losses of {still} of {known} samples do not move beyond rounding, so their R and "
            "their neighbours mean nothing: leave these samples out of statistics of neighbours, "
            "or observe inputs that the model is less certain of"
        )
    longer = f"raise {run.now('burn_in')}, take more draws (now {run.draws} a chain)"
    bad, n = int((report["rhat"] > _RHAT).sum()), int(report["rhat"].count())
    apart = bad > _SOME * n
    if apart:
        yield (
            f"R-hat is above {_RHAT} for {bad} of {n} samples (up to "
            f"{_up_to(float(report['rhat'].max()))}), so their chains do not agree yet: {longer}, "
            f"or raise {run.now('thin')}"
        )
    total = run.draws * chains
    yield from _of_settings(report, run, total, apart=apart)
    drift = report["drift"].values
    drifting = np.abs(np.nan_to_num(drift)) > _DRIFT
    if drifting.any() and run.draws // 2 >= _HALF:
        worst = drift[np.argmax(np.where(drifting, np.abs(drift), 0))]
        way = "rises" if worst > 0 else "falls"
        yield (
            f"the mean loss {way} during {drifting.sum()} of {chains} chains (drift z = "
            f"{worst:.1f}), so chains have not settled, or wander slowly: {longer}"
        )
    yield from _of_kernel(report, run, chains, longer, apart=apart)
    if "outcome_kurtosis" in report:
        yield from _of_outcomes(report)


def _of_outcomes(report: xr.Dataset) -> Iterator[str]:
    """Yield where R of losses is much poorer than R of their outcomes taken as Gaussian.

    Measured on halves of the chains; where these are noise, told by kurtosis: the variance of a
    sample variance is (2 + excess kurtosis) over the effective draws.
    """
    agree = float(report["estimators_agree"])
    plain, other = float(report["sample_reliability"]), float(report["gaussian_reliability"])
    times = other * (1 - plain) / (plain * (1 - other)) if isfinite(agree) else np.nan
    advised = 'use estimator="gaussian" for kernels and neighbours'
    if isfinite(times):
        if times > _JUMPS and agree > _SAME:
            yield (
                f"R of losses has reliability {plain:.2f}, of outcomes taken as Gaussian "
                f"{other:.2f}, as if from {times:.0f} times the draws (they agree at {agree:.2f} "
                f"beyond noise, on {report['compared']:.0f} samples): {advised}"
            )
        return
    losses, outcomes = _median(report["loss_kurtosis"]), _median(report["outcome_kurtosis"])
    times = (2 + losses) / (2 + outcomes)
    if times > _JUMPS and abs(outcomes) < _GAUSSIAN:
        yield (
            f"losses jump (excess kurtosis {losses:.3g}, median of samples; of their outcomes "
            f"{outcomes:.2g}), so their kernel needs about {times:.0f} times the draws that those "
            f"taken as Gaussian need: {advised}"
        )


def regime(report: xr.Dataset) -> str:
    """Return what the draws call for: ``"linear"``, ``"bent"``, ``"far"`` or ``"unknown"``."""
    if abs(_median(report["loss_kurtosis"])) < _GAUSSIAN:
        return "linear"
    if "outcome_kurtosis" not in report:
        return "unknown"
    gaussian = abs(_median(report["outcome_kurtosis"])) < _GAUSSIAN
    return "bent" if gaussian and not _median(report["estimators_agree"]) < _SAME else "far"


def advice(report: xr.Dataset) -> str:
    """Return a line on which estimate of the kernel to take, and why."""
    losses = f"excess kurtosis over draws {_median(report['loss_kurtosis']):.2g}"
    kind = regime(report)
    if kind == "linear":
        return (
            f"losses are nearly Gaussian ({losses}), as where they are linear in the weights: "
            "lk.laplace gives their kernel from one backward pass an input"
        )
    if kind == "unknown":
        return (
            f"losses bend or jump ({losses}), and nothing tells whether outcomes do: record them "
            'by lk.sample(..., outcomes=("loss", "log_odds")), or pass lk.log_odds(tree)'
        )
    outcomes = f"of outcomes {_median(report['outcome_kurtosis']):.2g}"
    if kind == "bent":
        return (
            f"losses bend ({losses}, {outcomes}), and outcomes are nearly Gaussian: take "
            'estimator="gaussian", and draws of sampler=lk.Laplace() where their mean loss gain is '
            "that of these"
        )
    return (
        f"neither losses nor outcomes are Gaussian ({losses}, {outcomes}, or their kernels differ "
        "beyond noise): only long chains and the plain estimate tell"
    )


def _of_kernel(
    report: xr.Dataset, run: Run, chains: int, longer: str, *, apart: bool
) -> Iterator[str]:
    """Yield what the entries of a kernel suffer from: few draws, and chains that differ."""
    total = run.draws * chains
    ess = min(float(report["kernel_ess"]), total)
    if ess < _KERNEL_ESS:
        more = _KERNEL_ESS / max(ess, 1)
        yield (
            f"entries of R carry an error of about {1 / np.sqrt(ess):.2g}"
            f"{' or more' if apart else ''} (effective sample size "
            f"{_worth(ess, total, apart=apart)}): take about {more:.1f} times as "
            f"many draws or chains for 0.1, for example draws={ceil(run.draws * more)}"
        )
    excess = _median(report["pooling_excess"])
    if chains > 1 and excess > _EXCESS:
        yield (
            f"differences between chains {_add(excess)} a typical loss variance, so "
            f'pooled kernels mix in which chain a draw is from: {longer}, or use center="chain"'
        )
    shared = _median(report["transient_excess"])
    each = max(_median(report["ess_bulk"]) / chains, 1)
    if chains > 1 and shared > max(_EXCESS, _SURE * transient_noise(each, chains)):
        yield (
            f"what all chains go through at the same draw adds {100 * shared:.0f}% to a typical "
            "loss variance, and to every entry of pooled kernels, as a transient after too short a "
            f'burn-in does: {longer}, or use center="draw"'
        )


def _up_to(rhat: float) -> str:
    """Return the largest R-hat as one reads it: of chains that stand still apart it is huge."""
    if rhat < _HUGE:
        return f"{rhat:.2f}"
    return f"more than {_HUGE:g}, as of chains that stand still, each at its own value"


def _worth(ess: float, total: int, *, apart: bool) -> str:
    """Return an effective sample size in words; where chains disagree it is an upper bound."""
    if apart:
        return f"at most {ess:.0f} of {total} draws, fewer as long as the chains disagree"
    return f"{ess:.0f} of {total} draws"


def _add(excess: float) -> str:
    """Return by how much a pooled variance exceeds one centred by chain, in words."""
    if excess < _HUGE:
        return f"add {100 * excess:.0f}% to"
    return "are all that there is of" if excess > _ALL else "are nearly all of"


def _of_settings(report: xr.Dataset, run: Run, total: int, *, apart: bool) -> Iterator[str]:
    """Yield what burn-in and step size are told by; ``total`` draws were used."""
    relaxation = float(report["relaxation_steps"])
    # The step size is stored in float32: do not let its rounding ask for a step more.
    steps = ceil(relaxation * (1 - 1e-6)) if isfinite(relaxation) else 0
    # Chains that start in their law have relaxed along what is flat.
    if run.burn_in is not None and run.burn_in < steps and run.start is None:
        yield (
            f"burn_in of {run.burn_in} steps is shorter than the relaxation time of flat "
            f"directions, {steps} steps, so chains begin too near w*: raise burn_in to {steps}, "
            f"or {run.now('step_size')} or {run.now('gamma')}"
        )
    accepted = report["acceptance"].values if "acceptance" in report else np.empty(0)
    accepted = accepted[np.isfinite(accepted)]
    if not len(accepted):
        return
    rate = float(accepted.mean())
    ess = _median(report["ess_bulk"])
    if rate < _LOW:
        yield (
            f"a Metropolis test would accept only {rate:.2g} of the steps, so discretisation "
            f"biases the draws: reduce {run.now('step_size')}"
        )
    elif rate > _HIGH and ess < _WORTH * total:
        at_most = "at most " if apart else ""
        yield (
            f"a Metropolis test would accept {rate:.5g} of the steps while {total} draws are worth "
            f"{at_most}{ess:.0f}: {run.now('step_size')} could grow, or raise {run.now('thin')}"
        )


def _median(values: xr.DataArray) -> float:
    """Return the median of the values that are not NaN, or NaN."""
    known = values.values[~np.isnan(values.values)]
    return float(np.median(known)) if len(known) else float("nan")
