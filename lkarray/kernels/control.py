r"""Kernels with a control: of what a linear chain predicts the covariance is known exactly.

With outcomes o, predictions p of covariance K1, and a coefficient b of each sample,

.. math:: K_{ij} = S^{oo}_{ij} + b_i b_j (K1_{ij} - S^{pp}_{ij}),

S the covariances over the draws: the expectation is that of :math:`S^{oo}`, whatever b is, as long
as b comes from other draws. So each half of the chains has the coefficients of the other, and the
two halves' estimates are averaged. All of it is one Gram, over draws of both and over modes of
features, of which the last part is subtracted.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.engine import Operand, Piece, Series
from lkarray.engine.numbers import reciprocal
from lkarray.engine.plan import memory_budget
from lkarray.engine.series import Table
from lkarray.errors import SchemaError, UnreliableWarning
from lkarray.kernels.estimators import estimated
from lkarray.kernels.operands import check_shared, free_dim
from lkarray.links import Link
from lkarray.schema import CHAIN, DRAW, FEATURE, MODE, POSTERIOR
from lkarray.tensors import Losses, as_losses, is_prediction, losses_node

TERM = "term"
#: What features and predictions must share for the kernel of the ones to be that of the others.
_SAME = ("law", "step_size", "nbeta", "gamma", "outcome", "weights", "observed_data")
_FEW = 8  # draws of a half, below which no coefficient is fitted
_NOTHING = 0.1  # share of the variance, below which a control is said to do nothing
_CHUNK = 256  # samples of a chunk of what lies in memory


@dataclass(frozen=True)
class Control:
    """Outcomes, what is predicted of them, and features whose Gram is the predictions' covariance.

    Attributes
    ----------
    x, predicted
        Dims ``(chain, draw)`` and ``rows``.
    features
        Dims ``mode`` and ``rows``.
    rows
        The dim of samples.
    link
        What makes losses of outcomes, where they are taken as Gaussian.
    center
        ``"pooled"`` or ``"chain"``.
    """

    x: xr.DataArray
    predicted: xr.DataArray
    features: xr.DataArray
    rows: str
    link: Link | None
    center: str

    @property
    def folds(self) -> list[np.ndarray]:
        """Chains whose coefficients come from the other entry; of one chain that alone."""
        chains = np.arange(self.x.sizes[CHAIN])
        return [chains] if len(chains) < 2 else [chains[::2], chains[1::2]]

    @property
    def fitted(self) -> bool:
        """Whether coefficients are fitted; else they are 1."""
        folds = self.folds
        return len(folds) > 1 and len(folds[-1]) * self.x.sizes[DRAW] >= _FEW

    def degrees(self, fold: np.ndarray) -> int:
        """Return the degrees of freedom of a fold."""
        draws = self.x.sizes[DRAW]
        return len(fold) * (draws - 1) if self.center == "chain" else len(fold) * draws - 1


@dataclass(frozen=True)
class Moments:
    """What is known of each sample, all float64 ``(sample,)``, or ``(fold, sample)``.

    Attributes
    ----------
    coefficient
        Of the predictions in each fold, from the other one.
    mean, variance
        Of the outcome; ``fallen`` says where the variance is that of the draws alone, since the
        controlled one is not above 0.
    explained
        Share of the variance over draws that the predictions take out.
    centers
        Means of outcomes and of predictions that deviations are from, ``(chain, sample)``.
    """

    coefficient: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    fallen: np.ndarray
    explained: np.ndarray
    centers: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class KnownSeries(Series):
    """A series of rows whose means and standard deviations are given, by their positions."""

    mean: np.ndarray
    sd: np.ndarray

    def table(
        self,
        x: Operand,
        expansion: engine.series.Expansion,
        entry: tuple[int, ...],
        rows: slice,
        pieces: tuple[Piece, ...],
        dtype: np.dtype,
    ) -> Table:
        """Return the table of a panel's rows."""
        return Table.of(*expansion.coefficients(self.mean[rows], self.sd[rows]), dtype)


def as_control(losses: Losses, control: xr.Dataset, *, center: str, estimator: str) -> Control:
    """Return what a kernel with a control is made from, checked.

    Parameters
    ----------
    losses
        A node or Dataset that has, beside losses or an outcome, what a control predicts.
    control
        What `lkarray.laplace` returned.
    center, estimator
        As for `lkarray.covariance`.

    Raises
    ------
    TypeError, SchemaError
        Something of it is not there.
    ValueError
        Features and predictions are not of one law, or the draws are too few.
    """
    predicted = _predictions(losses)
    x, link = estimated(losses, estimator)
    rows = free_dim(x, "losses", POSTERIOR, ())
    features = _features(control, predicted)
    check_shared(x, predicted, (*POSTERIOR, rows), names=("losses", "predictions"))
    if features.sizes.get(rows) is None:
        raise SchemaError(f"control: the features have dims {features.dims}, without {rows!r}")
    check_shared(x, features, (rows,), names=("losses", "control"))
    if center not in ("pooled", "chain"):
        raise ValueError(f'control= takes center="pooled" or "chain", not {center!r}')
    made = Control(x, predicted, features, rows, link, center)
    if min(made.degrees(fold) for fold in made.folds) < 1:
        raise ValueError("control= needs two draws of each half of the chains; take more")
    if not made.fitted and predicted.attrs["outcome"] != x.name:
        raise ValueError(
            f"control: {x.name!r} is not what is predicted, {predicted.attrs['outcome']!r}, and "
            f"there are too few draws to fit one to the other: take {_FEW} or more in each of two "
            "halves of the chains"
        )
    return made


def _predictions(losses: Losses) -> xr.DataArray:
    if isinstance(losses, xr.DataTree):
        losses = losses_node(losses).to_dataset()
    if isinstance(losses, xr.DataArray):
        name = losses.name or "loss"
        raise SchemaError(
            "losses: a DataArray has no predictions beside it; with control= give the Dataset that "
            f'has both: tree["losses"].to_dataset()[["{name}", "{name}_prediction"]]'
        )
    if not isinstance(losses, xr.Dataset):
        as_losses(losses)  # raises: it is nothing labelled
    here = [name for name in losses.data_vars if is_prediction(losses[name])]
    if len(here) != 1:
        raise SchemaError(
            f"losses: control= needs what a control predicts of each draw, of one law, and there "
            f"is {here or 'none'} among {sorted(map(str, losses.data_vars))}; record it by "
            'lk.sample(..., control="laplace"), and open one component or checkpoint by itself'
        )
    return losses[here[0]]


def _features(control: Any, predicted: xr.DataArray) -> xr.DataArray:
    if not isinstance(control, xr.Dataset) or FEATURE.name not in control:
        raise TypeError(
            "control must be the Dataset that lk.laplace returned, with the attributes that say "
            f"of which law its features are, not {type(control).__name__}"
        )
    step = predicted.attrs["step_size"]
    make = (
        f"lk.laplace(posterior, observed, outcome={predicted.attrs['outcome']!r}, "
        f"rank={predicted.attrs['rank']}, step_size={step:g}, sketch=None, seed=..., smooth=0), "
        "with the seed of the run, on the same device, with as many threads"
    )
    if control.attrs.get("sketch") != "none" or control.attrs.get("draws", 0):
        raise ValueError(
            "control: features that are sketched or averaged over draws have another Gram than the "
            f"predictions have a covariance; make them by {make}"
        )
    differ = [
        f"{name} {control.attrs.get(name)!r} where the predictions have {predicted.attrs[name]!r}"
        for name in _SAME
        if control.attrs.get(name) != predicted.attrs[name]
    ]
    if differ:
        raise ValueError(
            f"control: the features are not of the law of the predictions ({'; '.join(differ)}); "
            f"make them by {make}"
        )
    return control[FEATURE.name]


def moments_of(control: Control, memory: int | str | None) -> Moments:
    """Return what is known of each sample: one pass over draws and features, a block at a time."""
    x, n = control.x, control.x.sizes[control.rows]
    each = 8 * (4 * x.sizes[CHAIN] * x.sizes[DRAW] + 2 * control.features.sizes[MODE])
    step = max(1, memory_budget(memory) // 8 // each)
    parts = [_block(control, slice(a, min(a + step, n))) for a in range(0, n, step)]
    joined = [np.concatenate(values, axis=-1) for values in zip(*parts, strict=True)]
    coefficient, mean, variance, fallen, explained, outcome, predicted = joined
    centers = (outcome, predicted)
    return Moments(coefficient, mean, variance, fallen, explained, centers)


def _block(control: Control, rows: slice) -> tuple[np.ndarray, ...]:
    """Return the moments of some samples, then the means that deviations are from."""
    pick: dict[Hashable, Any] = {control.rows: rows}
    dims = (*POSTERIOR, control.rows)
    o, p = (
        v.isel(pick).transpose(*dims).values.astype(np.float64)
        for v in (control.x, control.predicted)
    )
    g = control.features.isel(pick).transpose(MODE, control.rows).values
    k1 = np.einsum("ms,ms->s", g, g, dtype=np.float64)
    folds, axes = control.folds, (0, 1)
    centers = np.empty((2, len(o), o.shape[2]))
    sums = np.empty((5, len(folds), o.shape[2]))  # S_oo, S_op, S_pp, and both means
    for f, fold in enumerate(folds):
        mine, theirs = o[fold], p[fold]
        means = mine.mean(axes), theirs.mean(axes)
        at = (mine.mean(1), theirs.mean(1)) if control.center == "chain" else means
        centers[0][fold], centers[1][fold] = at
        a, b = (v - np.expand_dims(c, -2) for v, c in zip((mine, theirs), at, strict=True))
        products = [(u * v).sum(axes) / control.degrees(fold) for u, v in ((a, a), (a, b), (b, b))]
        sums[:, f] = *products, *means
    soo, sop, spp, mean_o, mean_p = sums
    coefficient = sop * reciprocal(spp) if control.fitted else (spp > 0) * 1.0
    coefficient = coefficient[::-1]  # of the other half
    weight = np.array([len(fold) for fold in folds]) / len(o)
    plain = weight @ soo
    variance = plain + weight @ (coefficient**2 * (k1 - spp))
    fallen = (variance <= 0) & (plain > 0)
    left = weight @ (soo - 2 * coefficient * sop + coefficient**2 * spp)
    explained = 1 - left * reciprocal(plain)
    explained[plain == 0] = np.nan
    mean = weight @ (mean_o - coefficient * mean_p)
    still = plain == 0
    coefficient = np.where(still, 0, coefficient)
    variance = np.where(fallen | still, plain, variance)
    return coefficient, mean, variance, fallen, explained, centers[0], centers[1]


def terms_of(control: Control, moments: Moments, scale: np.ndarray) -> tuple[xr.DataArray, int]:
    """Return what the Gram is of, ``(term, sample)``, and the term from which on it is subtracted.

    Rows are multiplied by ``scale``.
    """
    rows, kept = control.rows, {control.rows: _CHUNK}
    x, predicted, features = (
        v.variable if v.chunks is not None else v.variable.chunk(kept)
        for v in (control.x, control.predicted, control.features)
    )
    dtype = np.result_type(x.dtype, np.float32)
    plus: list[xr.Variable] = []
    minus: list[xr.Variable] = []
    for f, fold in enumerate(control.folds):
        b = scale * moments.coefficient[f]
        weight = np.sqrt(len(fold) / control.x.sizes[CHAIN])
        root = weight / np.sqrt(control.degrees(fold))
        for parts, values, center, factor in (
            (plus, x, moments.centers[0], scale * root),
            (minus, predicted, moments.centers[1], b * root),
        ):
            mine = values.isel({CHAIN: fold}).transpose(*POSTERIOR, rows).astype(np.float64)
            about = xr.Variable((CHAIN, rows), center[fold])
            away = ((mine - about) * xr.Variable((rows,), factor)).astype(dtype)
            parts.append(away.transpose(*POSTERIOR, rows).stack({TERM: POSTERIOR}))
        factor = xr.Variable((rows,), (b * weight).astype(dtype))
        modes = (features * factor).transpose(MODE, rows).astype(dtype)
        plus.append(xr.Variable((TERM, rows), modes.data))
    plus, minus = ([part.transpose(TERM, rows) for part in parts] for parts in (plus, minus))
    joined = xr.Variable.concat([*plus, *minus], dim=TERM)
    named = xr.DataArray(joined, name=control.x.name)
    return named, sum(part.sizes[TERM] for part in plus)


def controlled_operand(
    control: Control, kernel: str, memory: int | str | None
) -> tuple[Operand, Series | None, dict[str, Any]]:
    """Return the operand of a kernel with a control, its series, and the attributes of a result.

    Warns where the control takes next to nothing out.
    """
    moments = moments_of(control, memory)
    cosine, sd = kernel == "correlation", np.sqrt(moments.variance)
    unit = cosine or control.link is not None
    scale = reciprocal(sd) if unit else np.ones_like(sd)
    terms, minus = terms_of(control, moments, scale)
    options: dict[str, Any] = {"over": (TERM,), "each": (), "rows": control.rows}
    operand = Operand(terms, center=None, cosine=unit, minus=minus, **options)
    series = None
    if control.link is not None:
        series = KnownSeries(control.link, control.link, 1, cosine, moments.mean, sd)
    known = moments.explained[~np.isnan(moments.explained)]
    removed = float(np.median(known)) if len(known) else 0.0
    attrs = {
        "control": str(control.predicted.name),
        "control_removed": removed,
        "control_coefficient": "fitted to the other half" if control.fitted else "1",
        "control_fallback": int(moments.fallen.sum()),
    }
    if removed < _NOTHING:
        warnings.warn(
            f"the control takes {max(removed, 0):.0%} of the variance out (median of samples), so "
            "the kernel degrades to the plain estimate: predictions are of log-odds or residuals "
            'where these are recorded, and serve their kernel and estimator="gaussian", near w*',
            UnreliableWarning,
            stacklevel=4,
        )
    return operand, series, attrs
