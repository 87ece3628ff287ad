"""Estimates of one kernel against a long run: by draws, by seconds, and how many they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

import lkarray as lk

#: Estimates from draws: what each is of, how, and whether with the control.
ESTIMATES = {
    "losses": ("loss", "sample", False),
    "log-odds": ("log_odds", "sample", False),
    "log-odds, controlled": ("log_odds", "sample", True),
    "Gaussian estimate": ("losses", "gaussian", False),
    "Gaussian estimate, controlled": ("losses", "gaussian", True),
}
#: Agreement with the truth of an estimate whose reliability is 0.9.
WANTED = 0.9**0.5


class Pace(NamedTuple):
    """Seconds of a draw, and of what is done once; and both of draws with a control beside them."""

    plain: float
    once: float = 0.0
    controlled: float = float("nan")
    once_controlled: float = 0.0

    def seconds(self, draws: int, *, controlled: bool) -> float:
        """Return what so many draws take."""
        if controlled:
            return self.once_controlled + draws * self.controlled
        return self.once + draws * self.plain


def counts(most: int) -> list[int]:
    """Return numbers to try: 1, 2, 4, ... and the most there are."""
    return [n for n in (2**i for i in range(20)) if n < most] + [most]


def pairs_of(kernel: Any) -> np.ndarray:
    """Return the entries of a kernel over pairs, each once."""
    values = np.asarray(kernel)
    return np.asarray(values[np.triu_indices(len(values), 1)], dtype=float)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two kernels over pairs of inputs."""
    return float(np.corrcoef(a, b)[0, 1])


def estimate(losses: xr.Dataset, name: str, features: xr.Dataset | None = None) -> np.ndarray:
    """Return R over pairs by one of `ESTIMATES`; ``features`` are those of its control."""
    variable, how, controlled = ESTIMATES[name]
    if how == "gaussian":
        control = features if controlled else None
        return pairs_of(lk.correlation(losses, estimator="gaussian", control=control).values)
    if controlled:
        both = losses[[variable, f"{variable}_prediction"]]
        return pairs_of(lk.correlation(both, control=features).values)
    return pairs_of(lk.correlation(losses[variable]).values)


def some(losses: xr.Dataset, count: int) -> xr.Dataset:
    """Return the first draws of few chains, or as many of each: ``count`` together, or more."""
    chains = losses.sizes["chain"]
    each = -(-count // chains)
    return losses.isel(draw=slice(max(each, 2)))


def curves(
    losses: xr.Dataset,
    truth: np.ndarray,
    ceiling: float,
    pace: Pace | None = None,
    features: xr.Dataset | None = None,
) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield what each estimate from draws agrees at with the truth, by the number of draws."""
    for name, (*_, controlled) in ESTIMATES.items():
        if controlled and features is None:
            continue
        points = []
        for count in counts(losses.sizes["chain"] * losses.sizes["draw"])[3:]:
            few = some(losses, count)
            number = few.sizes["chain"] * few.sizes["draw"]
            value = agreement(estimate(few, name, features), truth) / ceiling
            points.append({"draws": number, "agreement": value})
            if pace is not None:
                points[-1]["seconds"] = pace.seconds(number, controlled=controlled)
        yield name, points


def least(points: list[dict[str, float]], what: str) -> float | None:
    """Return the draws, or seconds, from which on agreement is that of reliability 0.9.

    Between two points along the logarithm; ``None`` where it is not reached.
    """
    last = None
    for point in points:
        if point["agreement"] >= WANTED:
            if last is None:
                return point[what]
            share = (WANTED - last["agreement"]) / (point["agreement"] - last["agreement"])
            return float(last[what] * (point[what] / last[what]) ** share)
        last = point
    return None


def same_label(kernel: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Return the share of the k most correlated inputs that have an input's own label."""
    values = np.array(kernel, dtype=float)
    np.fill_diagonal(values, -np.inf)
    near = np.argpartition(-values, k, axis=1)[:, :k]
    return float((labels[near] == labels[:, None]).mean())


def shares(losses: xr.Dataset, gradients: np.ndarray) -> dict[str, float]:
    """Return `same_label` by few draws, by all, by outcomes taken as Gaussian, by gradients."""
    labels = losses["label"].values
    few = some(losses, 80)
    kernels = {
        f"{few.sizes['chain'] * few.sizes['draw']} draws": lk.correlation(few["loss"]),
        "all draws": lk.correlation(losses["loss"]),
        "all draws, Gaussian estimate": lk.correlation(losses, estimator="gaussian"),
        "gradients at w*": gradients,
    }
    return {name: same_label(np.asarray(kernel), labels) for name, kernel in kernels.items()}


def excess(values: np.ndarray) -> np.ndarray:
    """Return the excess kurtosis along the last axis."""
    z = values - values.mean(-1, keepdims=True)
    return np.asarray((z**4).mean(-1) / (z**2).mean(-1) ** 2 - 3)
