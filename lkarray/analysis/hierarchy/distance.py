"""Kernels against distance in the hierarchy, through means over labels and never n x n."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import xarray as xr

from lkarray.analysis.hierarchy import graph
from lkarray.analysis.hierarchy.intervals import interval, jackknife, ratio, resampled, spread
from lkarray.analysis.hierarchy.taxonomy import Taxonomy, require_taxonomy
from lkarray.arguments import NATURAL, SHARE, Limits, checked
from lkarray.kernels.groups import group_mean, with_labels
from lkarray.schema import CHAIN, POSTERIOR, Losses, as_losses, second
from lkarray.values import several
from lkarray.waiting import workers_awaited


@checked()
def taxonomy_distance(taxonomy: Taxonomy, labels: Iterable[Hashable] | None = None) -> xr.DataArray:
    """Return the fewest edges between labels by way of a common ancestor (loss-kernel figure 1B).

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
    """
    require_taxonomy(taxonomy)
    if within is not None:
        taxonomy.require(within, "within")
    x = as_losses(losses)
    rows = next(str(dim) for dim in x.dims if dim not in POSTERIOR)
    x, label = with_labels(x, rows, label, what="label")
    options: dict[str, Any] = {
        "kernel": kernel,
        "center": center,
        "self_pairs": False,
        "memory": memory,
    }
    means = group_mean(x, label, **options)
    labels = means[label].values
    taxonomy.positions(labels.tolist())
    order = [taxonomy.node(name) for name in taxonomy.subset(labels.tolist()).order()]
    place = {node: at for at, node in enumerate(order)}
    chosen = [at for at in range(len(labels)) if _is_within(taxonomy, labels[at], within)]
    if len(chosen) < 3:
        raise ValueError(
            f"only {len(chosen)} of the labels of the samples lie below {within!r}; at least 3 do "
            "in a useful comparison"
        )
    chosen.sort(key=lambda at: (place[taxonomy.node(labels.item(at))], at))
    labels = np.asarray(labels)[chosen]
    parts = [means.values[np.ix_(chosen, chosen)]]
    chains = x.sizes[CHAIN]
    for gone in range(chains if chains > 2 else 0):
        kept = [chain for chain in range(chains) if chain != gone]
        mean = group_mean(x.isel({CHAIN: kept}), label, **options)
        parts.append(mean.values[np.ix_(chosen, chosen)])
    values, sizes = np.unique(x[label].values, return_counts=True)
    sizes = sizes[np.searchsorted(values, labels)].astype(float)
    far = taxonomy_distance(taxonomy, labels.tolist()).values
    curve = _Curve(far, sizes)
    weights = np.concatenate([np.ones((1, len(labels))), resampled(len(labels), replicates, seed)])
    boot = np.stack([curve.mean(parts[0], w) for w in weights])
    ranks = np.array([_rank(parts[0], far, w) for w in weights])
    out: dict[str, Any] = {}
    for name, dims, resamplings, deleted in (
        ("", ("distance",), boot, [curve.mean(part, weights[0]) for part in parts[1:]]),
        ("rank_", (), ranks, [np.array(_rank(part, far, weights[0])) for part in parts[1:]]),
    ):
        errors = {"labels": spread(resamplings[1:])} | (
            {"chains": jackknife(deleted)} if deleted else {}
        )
        low, high = interval(resamplings[0], list(errors.values()), level)
        out[name + ("correlation" if name else kernel)] = (dims, resamplings[0])
        out[f"{name}low"], out[f"{name}high"] = (dims, low), (dims, high)
        for source, error in errors.items():
            out[f"{name}standard_error_{source}"] = (dims, error)
    out["pairs"] = ("distance", curve.pairs(weights[0]).round().astype(np.int64))
    square = ("label", second("label"))
    out |= {"label_mean": (square, parts[0]), "label_distance": (square, far)}
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
            "chains_deleted": len(parts) - 1,
        },
    )


def _is_within(taxonomy: Taxonomy, label: Any, within: Hashable | None) -> bool:
    return within is None or taxonomy.node(within) in taxonomy.ancestors(label)


class _Curve:
    """Means over pairs of inputs by the distance of their labels."""

    def __init__(self, far: np.ndarray, sizes: np.ndarray) -> None:
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
