"""Scores of how hard an input is, from its similarities to training examples.

See Anonymous 2026, 6.2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, NATURAL, Limits, checked
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.gram import gram
from lkarray.kernels.groups import group_codes
from lkarray.kernels.kinds import require_kernel
from lkarray.kernels.operands import free_dim, nan_for_infinite
from lkarray.labels import as_columns
from lkarray.results import Result, as_array, opened
from lkarray.schema import EXAMPLE
from lkarray.values import mapping, real_array

_CLASS = "lkarray_class"
_MEASURES = ("auroc", "aupr", "spearman")
_LEVEL = 0.95  # of intervals


@checked()
def ips_scores(
    similarity: Result, train_labels: Hashable | Any, predicted: Hashable | Any
) -> xr.Dataset:
    """Return the norm and the class margin of examples' similarities, lazily.

    Parameters
    ----------
    similarity
        Similarity of the examples asked about (rows) to training examples (columns), as
        ``lk.ips(test_G, train_G)``.
    train_labels
        Class of each training example: a coordinate of the columns (``"label_2"``), or labels, as
        for `lkarray.group_mean`.
    predicted
        Class that the model predicts for each row: likewise.

    Returns
    -------
    xarray.Dataset
        ``norm(example)``, the l2 norm of a row; ``margin(example)``, the mean similarity to
        training examples of the predicted class minus the highest mean to those of another.
        float64. Compute both at once: each tile of the similarity is then made once.

    Raises
    ------
    ValueError
        ``similarity`` is an influence operator.
    SchemaError
        It is no matrix, labels do not fit it, there are fewer than two classes, or no training
        example is of a predicted class.

    References
    ----------
    - Anonymous 2026, section 6.2: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> values = [[0.9, 0.1, 0.2], [0.1, 0.7, 0.5]]
    >>> similarity = xr.DataArray(values, dims=("example", "example_2"))
    >>> scores = lk.ips_scores(similarity, np.array([0, 1, 1]), predicted=np.array([0, 0]))
    >>> scores["margin"].values.round(4).tolist()
    [0.75, -0.5]
    """
    similarity = as_array(similarity, "similarity")
    require_kernel(similarity, "ips_scores")
    if similarity.ndim != 2:
        raise SchemaError(
            f"similarity has dims {similarity.dims}; expected rows and columns, as "
            "lk.ips(test_G, train_G) returns"
        )
    rows, columns = map(str, similarity.dims)
    _, classes, codes = group_codes(similarity, columns, train_labels, what="train_labels")
    own = _predicted(similarity, rows, predicted, classes)
    if len(classes) < 2:
        raise SchemaError(
            f"a margin needs at least two classes of training examples, not {classes.tolist()}"
        )
    member = np.zeros((len(codes), len(classes)), np.result_type(similarity.dtype, np.float32))
    member[np.arange(len(codes)), codes] = 1
    bare = nan_for_infinite(similarity.drop_vars(list(similarity.coords)))
    # A sum by group: one thin product a tile.
    sums = xr.dot(bare, xr.DataArray(member, dims=(columns, _CLASS)), dim=columns)
    means = sums.astype(np.float64) / xr.DataArray(np.bincount(codes), dims=_CLASS)
    chosen = xr.DataArray(own[:, None] == np.arange(len(classes)), dims=(rows, _CLASS))
    margin = means.where(chosen).sum(_CLASS) - means.where(~chosen).max(_CLASS)
    norm = (bare.astype(np.float64) ** 2).sum(columns, skipna=False) ** 0.5
    scores = xr.Dataset({"norm": norm, "margin": margin}).drop_attrs()
    return scores.assign_coords(sample_coords(similarity, rows))


@checked(k=COUNT)
def hidden_similarity(
    test_activations: Result,
    train_activations: Result,
    train_labels: Hashable | Any,
    predicted: Hashable | Any,
    *,
    k: int = 10,
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return the mean cosine to the nearest training examples of the predicted class, lazily.

    The hidden-state baseline of Anonymous 2026, section 6.2.

    Parameters
    ----------
    test_activations, train_activations
        ``(example, unit)``, activations of a hidden layer.
    train_labels
        Class of each training example: a coordinate of ``train_activations``, or labels, as for
        `lkarray.group_mean`.
    predicted
        Class that the model predicts for each test example, likewise.
    k
        Neighbours; all of a class that has fewer.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``hidden_similarity(example)``, float64.

    Raises
    ------
    ValueError
        ``k`` is below 1.
    SchemaError
        Dims or labels do not fit, or no training example is of a predicted class.

    Notes
    -----
    A `lkarray.gram` for each class: only pairs of a test example and its predicted class.

    References
    ----------
    - Anonymous 2026, section 6.2: "Path-Integrated Loss-Gradient Kernels".
    """
    test_activations = as_array(test_activations, "test_activations")
    train_activations = as_array(train_activations, "train_activations")
    unit = free_dim(test_activations, "test_activations", (EXAMPLE,), ())
    free_dim(train_activations, "train_activations", (EXAMPLE,), ())
    _, classes, codes = group_codes(train_activations, EXAMPLE, train_labels, what="train_labels")
    own = _predicted(test_activations, EXAMPLE, predicted, classes)
    test, train = (x.drop_vars(list(x.coords)) for x in (test_activations, train_activations))
    means, order = [], []
    for each in np.unique(own):
        rows, columns = np.flatnonzero(own == each), np.flatnonzero(codes == each)
        cosine = gram(
            test.isel({EXAMPLE: rows}),
            train.isel({EXAMPLE: columns}),
            over=unit,
            normalize="cosine",
            memory=memory,
        )
        nearest = da.topk(cosine.data, min(k, len(columns)), axis=1)
        means.append(nearest.mean(axis=1, dtype=np.float64))
        order.append(rows)
    back = np.argsort(np.concatenate(order))
    return xr.DataArray(
        da.concatenate(means)[back],
        dims=EXAMPLE,
        coords=sample_coords(test_activations, EXAMPLE),
        name="hidden_similarity",
        attrs={"k": k, "units": "1"},
    )


@checked(replicates=Limits(least=0, most=1_000_000), seed=NATURAL)
def difficulty_table(
    scores: xr.DataTree | xr.Dataset | Mapping[Hashable, xr.DataArray | np.ndarray],
    wrong: xr.DataArray | np.ndarray,
    loss: xr.DataArray | np.ndarray,
    *,
    replicates: int = 0,
    seed: int = 0,
) -> xr.Dataset:
    """Return how well scores find misclassified inputs and rank losses.

    Parameters
    ----------
    scores
        One score of each example for each name; a low one is suspicious.
    wrong
        Whether each example is misclassified.
    loss
        Of each example, in nats. What of these has an index (a DataArray, a Series) is brought
        into one order by it.
    replicates, seed
        Resamplings of the examples for intervals, and their seed; none by default.

    Returns
    -------
    xarray.Dataset
        Over ``score``, the names: ``auroc`` and ``aupr`` (average precision) of finding wrong
        examples by a low score, and ``spearman``, the rank correlation of the score with minus
        the loss (NaN of a constant score). Chance is 0.5, the attribute ``share_wrong``, and 0.
        With replicates also 95% intervals, ``auroc_low``, ``auroc_high`` and so on.

    Raises
    ------
    ValueError
        Lengths or indexes differ, a number is missing, examples are all right or all wrong, or
        ``replicates`` is negative.

    Notes
    -----
    Percentile bootstrap over examples, the same ones for all scores (Efron and Tibshirani 1993,
    chapter 13). A resampling whose examples are all right or all wrong is drawn again. It is of
    the examples alone: the training run, and the training examples behind a score, stay as they
    are.

    References
    ----------
    - Anonymous 2026, table 1: "Path-Integrated Loss-Gradient Kernels".
    - Efron and Tibshirani 1993: "An Introduction to the Bootstrap", Chapman and Hall.
    """
    table = opened(scores, "scores")
    table = table if isinstance(table, xr.Dataset) else mapping("scores", table)
    given = {str(name): score for name, score in table.items()}
    for name, score in ({"wrong": wrong} | given | {"loss": loss}).items():
        real_array(name if name in ("wrong", "loss") else f"scores[{name!r}]", score)
    for name, score in (given | {"loss": loss}).items():
        if np.shape(score) != np.shape(wrong) or np.ndim(wrong) != 1:
            raise ValueError(
                f"{name!r} has shape {np.shape(score)} and wrong {np.shape(wrong)}; expected one "
                "number for each example"
            )
    columns = as_columns({"wrong": wrong} | given | {"loss": loss}, dim=EXAMPLE)
    missed = columns.pop("wrong").astype(bool)
    named = {name: values.astype(np.float64) for name, values in columns.items()}
    for name, values in named.items():
        if np.isnan(values).any():
            raise ValueError(
                f"{name!r} is NaN for {int(np.isnan(values).sum())} examples; drop them"
            )
    losses = named.pop("loss")
    if not named or missed.all() or not missed.any():
        raise ValueError(
            f"a table needs scores, and examples both right and wrong; there are {len(named)} "
            f"scores, and {int(missed.sum())} of {len(missed)} examples are wrong"
        )
    values = np.stack(list(named.values()))
    measured = dict(zip(_MEASURES, _measures(values, missed, losses).T, strict=True))
    attrs = {"examples": len(missed), "share_wrong": float(missed.mean())}
    if replicates:
        rng = np.random.default_rng(seed)
        replicated = np.stack(
            [
                _measures(values[:, drawn], missed[drawn], losses[drawn])
                for drawn in (_resampled(missed, rng) for _ in range(replicates))
            ]
        )
        for column, name in enumerate(_MEASURES):
            ends = [_interval(replicated[:, row, column]) for row in range(len(values))]
            measured |= {f"{name}_low": np.array(ends)[:, 0], f"{name}_high": np.array(ends)[:, 1]}
        attrs |= {"replicates": replicates, "seed": seed, "level": _LEVEL}
    return xr.Dataset(
        {name: ("score", column) for name, column in measured.items()},
        coords={"score": list(named)},
        attrs=attrs,
    )


def _measures(scores: np.ndarray, wrong: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return ``(score, measure)``: AUROC and AUPR of wrong examples, Spearman with -loss."""
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score, roc_auc_score

    def rank(score: np.ndarray) -> float:
        varied = np.ptp(score) and np.ptp(loss)
        return float(spearmanr(score, -loss).statistic) if varied else np.nan

    return np.array(
        [
            [roc_auc_score(wrong, -score), average_precision_score(wrong, -score), rank(score)]
            for score in scores
        ]
    )


def _resampled(wrong: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a resampling of examples that has both right and wrong ones."""
    while True:
        drawn = rng.integers(0, len(wrong), len(wrong))
        if 0 < wrong[drawn].sum() < len(wrong):
            return drawn


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the percentile interval; resamplings without a number do not count."""
    known = values[~np.isnan(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _predicted(
    x: xr.DataArray, rows: str, predicted: Hashable | Any, classes: np.ndarray
) -> np.ndarray:
    """Return the position of each row's predicted class among those of the training examples."""
    _, values, codes = group_codes(x, rows, predicted, what="predicted")
    unknown = values[~np.isin(values, classes)]
    if len(unknown):
        raise SchemaError(
            f"no training example is of the predicted classes {unknown[:5].tolist()}; pass "
            "similarities to examples of all classes"
        )
    return np.searchsorted(classes, values).take(codes)
