"""Kernels against distance in the hierarchy, through means over labels and never n x n."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lkarray.analysis.hierarchy import graph
from lkarray.analysis.hierarchy.intervals import interval, jackknife, ratio, resampled, spread
from lkarray.analysis.hierarchy.taxonomy import Taxonomy, require_taxonomy
from lkarray.arguments import NATURAL, SHARE, Limits, checked
from lkarray.kernels.groups import group_mean, with_labels
from lkarray.schema import CHAIN, second
from lkarray.tensors import Losses, as_losses, contracted
from lkarray.values import several
from lkarray.waiting import workers_awaited


@checked()
def taxonomy_distance(taxonomy: Taxonomy, labels: Iterable[Hashable] | None = None) -> xr.DataArray:
    """Return the fewest edges between labels by way of a common ancestor.

    Parameters
    ----------
    taxonomy
        The hierarchy.
    labels
        Labels or nodes, in the order wanted; by default all labels of the taxonomy.

    Returns
    -------
    xarray.DataArray
        ``distance(label, label_2)``, float32 edges; infinite without a common ancestor.

    References
    ----------
    - Adam et al. 2025a, figure 1B: "The Loss Kernel", arXiv:2509.26537.

    Examples
    --------
    >>> import lkarray as lk
    >>> animals = lk.Taxonomy.from_edges(
    ...     [("animal", "mammal"), ("animal", "fish"), ("mammal", "dog"), ("fish", "trout")]
    ... )
    >>> lk.taxonomy_distance(animals).values.tolist()
    [[0.0, 4.0], [4.0, 0.0]]
    """
    require_taxonomy(taxonomy)
    chosen = list(taxonomy.labels if labels is None else several("labels", labels))
    lines = taxonomy.ancestry(taxonomy.positions(chosen))
    names = np.array(chosen, dtype=None if len({*map(type, chosen)}) == 1 else object)
    return xr.DataArray(
        graph.distances(lines),
        dims=("label", second("label")),
        coords={"label": names, second("label"): names},
        name="distance",
        attrs={"units": "edges", "long_name": "distance in the hierarchy"},
    )


@workers_awaited("computed")
@checked(level=SHARE, replicates=Limits(least=0, most=100_000), seed=NATURAL)
def correlation_by_distance(
    losses: Losses,
    taxonomy: Taxonomy,
    label: Hashable | Any = "label",
    *,
    within: Hashable | None = None,
    kernel: str = "correlation",
    center: str = "pooled",
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return the mean kernel between inputs by how far apart their labels are.

    Loss-kernel figure 6C, with the kernel's mean over each pair of labels beside it.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    taxonomy
        Has every label of the samples.
    label
        Coordinate of the samples, or one label for each sample, as for `lkarray.group_mean`.
    within
        A node: only samples with labels below it count, such as ``"animal.n.01"``.
    kernel, center, memory
        As for `lkarray.group_mean`.
    replicates, level, seed
        Resamplings of the labels, and the level of the intervals.

    Returns
    -------
    xarray.Dataset
        Computed. Over ``distance`` in edges (0 is pairs of one label): ``correlation`` (or
        ``covariance``), the mean over pairs of inputs; its interval ``low``, ``high``;
        ``standard_error_labels``, ``standard_error_chains``; and ``pairs``, ordered pairs of
        inputs. Over ``(label, label_2)``, in the taxonomy's order: ``label_mean`` and
        ``label_distance``. And ``rank_correlation`` of these two over pairs of different labels
        (Spearman; negative where near labels correlate), with ``rank_low`` and ``rank_high``.

    Raises
    ------
    ValueError
        Labels are not in the taxonomy (listed), or fewer than 3 lie within.
    SchemaError
        There is no such coordinate.

    Notes
    -----
    Labels are resampled as for `taxonomic_lift`, and chains deleted one at a time. One pass over
    the losses a chain, ``2 n S L`` operations each for L labels; each resampling ranks the pairs
    of labels (0.1 s at 1,000 labels).

    References
    ----------
    - Adam et al. 2025a, figure 6C: "The Loss Kernel", arXiv:2509.26537.
    """
    require_taxonomy(taxonomy)
    if within is not None:
        taxonomy.require(within, "within")
    x = as_losses(losses, features=True)
    rows = next(str(dim) for dim in x.dims if dim not in contracted(x))
    x, label = with_labels(x, rows, label, what="label")
    mean = partial(group_mean, kernel=kernel, center=center, self_pairs=False, memory=memory)
    means = mean(x, label)
    labels = means[label].values
    chosen = _in_order(taxonomy, labels, within)
    labels = np.asarray(labels)[chosen]
    square = np.ix_(chosen, chosen)
    whole, deleted = means.values[square], []
    chains = x.sizes.get(CHAIN, 0)  # none of features
    for gone in range(chains if chains > 2 else 0):
        kept = [chain for chain in range(chains) if chain != gone]
        deleted.append(mean(x.isel({CHAIN: kept}), label).values[square])
    values, sizes = np.unique(x[label].values, return_counts=True)
    sizes = sizes[np.searchsorted(values, labels)].astype(float)
    far = taxonomy_distance(taxonomy, labels.tolist()).values
    curve = _Curve(far, sizes)
    # The first weights are those of the labels as they are; the others resample them.
    weights = np.concatenate([np.ones((1, len(labels))), resampled(len(labels), replicates, seed)])
    out = _by_distance(curve, weights, whole, deleted, kernel, level)
    dims = ("label", second("label"))
    out |= {"label_mean": (dims, whole), "label_distance": (dims, far)}
    names = xr.Variable(("label",), labels)
    return xr.Dataset(
        out,
        coords={
            "distance": curve.steps,
            "label": names,
            second("label"): (second("label"), labels),
            "title": ("label", [taxonomy.title(name) for name in labels]),
        },
        attrs={
            "kernel": kernel,
            "within": str(within or "all"),
            "samples": x.sizes[rows],
            "replicates": replicates,
            "level": level,
            "seed": seed,
            "chains_deleted": len(deleted),
        },
    )


def _in_order(taxonomy: Taxonomy, labels: np.ndarray, within: Hashable | None) -> list[int]:
    """Return the positions of the labels that lie within, in the taxonomy's order."""
    taxonomy.positions(labels.tolist())
    order = [taxonomy.node(name) for name in taxonomy.subset(labels.tolist()).order()]
    place = {node: number for number, node in enumerate(order)}
    chosen = [i for i in range(len(labels)) if _is_within(taxonomy, labels[i], within)]
    if len(chosen) < 3:
        raise ValueError(
            f"only {len(chosen)} of the labels of the samples lie below within={within!r}; at "
            "least 3 do in a useful comparison"
        )
    return sorted(chosen, key=lambda i: (place[taxonomy.node(labels.item(i))], i))


def _by_distance(
    curve: _Curve,
    weights: np.ndarray,
    whole: np.ndarray,
    deleted: list[np.ndarray],
    kernel: str,
    level: float,
) -> dict[str, Any]:
    """Return the curve and the rank correlation, each with its errors and interval.

    Of means over labels, those with all chains and those without each; ``(label, label)``.
    """
    boot = np.stack([curve.mean(whole, w) for w in weights])
    ranks = np.array([_rank(whole, curve.far, w) for w in weights])
    out: dict[str, Any] = {}
    for name, dims, resamplings, without in (
        ("", ("distance",), boot, [curve.mean(means, weights[0]) for means in deleted]),
        ("rank_", (), ranks, [np.array(_rank(m, curve.far, weights[0])) for m in deleted]),
    ):
        errors = {"labels": (spread(resamplings[1:]), len(whole) - 1)}
        if without:
            errors["chains"] = (jackknife(without), len(without) - 1)
        low, high = interval(resamplings[0], list(errors.values()), level)
        out[name + ("correlation" if name else kernel)] = (dims, resamplings[0])
        out[f"{name}low"], out[f"{name}high"] = (dims, low), (dims, high)
        for source, (error, _) in errors.items():
            out[f"{name}standard_error_{source}"] = (dims, error)
    out["pairs"] = ("distance", curve.pairs(weights[0]).round().astype(np.int64))
    return out


def _is_within(taxonomy: Taxonomy, label: Any, within: Hashable | None) -> bool:
    return within is None or taxonomy.node(within) in taxonomy.ancestors(label)


class _Curve:
    """Means over pairs of inputs by the distance of their labels."""

    def __init__(self, far: np.ndarray, sizes: np.ndarray) -> None:
        self.far = far
        self.steps, codes = np.unique(far[np.isfinite(far)], return_inverse=True)
        self.steps = self.steps.astype(np.int64)
        self.codes = np.full(far.shape, len(self.steps))
        self.codes[np.isfinite(far)] = codes
        self.number = np.outer(sizes, sizes)
        np.fill_diagonal(self.number, sizes * (sizes - 1))

    def _by_distance(self, values: np.ndarray) -> np.ndarray:
        count = len(self.steps)
        return np.bincount(self.codes.ravel(), values.ravel(), minlength=count)[:count]

    def _weights(self, weights: np.ndarray) -> np.ndarray:
        both = np.outer(weights, weights)
        np.fill_diagonal(both, weights)
        return both * self.number

    def pairs(self, weights: np.ndarray) -> np.ndarray:
        return self._by_distance(self._weights(weights))

    def mean(self, means: np.ndarray, weights: np.ndarray) -> np.ndarray:
        number = np.where(np.isfinite(means), self._weights(weights), 0)
        above = self._by_distance(np.nan_to_num(means) * number)
        return ratio(above, self._by_distance(number))


def _rank(means: np.ndarray, far: np.ndarray, weights: np.ndarray) -> float:
    """Spearman's correlation over pairs of different labels; resampled ones are repeated."""
    drawn = np.repeat(np.arange(len(weights)), weights.astype(int))
    i, j = np.triu_indices(len(drawn), 1)
    i, j = drawn[i], drawn[j]
    kept = (i != j) & np.isfinite(far[i, j])
    a, b = means[i, j][kept], far[i, j][kept]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)
