"""Taxonomic lift: how much more often neighbours share ancestors than chance would have it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import sparse

from lkarray.analysis.hierarchy import graph
from lkarray.analysis.hierarchy.intervals import interval, jackknife, ratio, resampled, spread
from lkarray.analysis.hierarchy.pairs import (
    as_table,
    constant_rows,
    count_pairs,
    labels_of,
    table_rows,
)
from lkarray.analysis.hierarchy.taxonomy import Taxonomy, require_taxonomy
from lkarray.arguments import COUNT, NATURAL, SHARE, Limits, checked
from lkarray.kernels.estimators import estimated
from lkarray.kernels.groups import with_labels
from lkarray.kernels.kinds import verdict_of
from lkarray.kernels.neighbors import neighbors as find_neighbors
from lkarray.labels import coded
from lkarray.schema import CHAIN
from lkarray.tensors import Losses, contracted
from lkarray.values import one_of
from lkarray.waiting import workers_awaited

BASES = ("matched", "dataset")
_BLOCK = 2**22  # pairs of labels in memory, at a time


@dataclass(frozen=True)
class Tree:
    """What of a taxonomy the labels of a data set need.

    Parameters
    ----------
    sizes
        Samples of each label, shape ``(label,)``.
    group
        Number of each label's own depth among ``query_depth``, shape ``(label,)``.
    query_depth
        The depths that labels have, sorted.
    members
        For each depth, which labels descend from which nodes there.
    """

    sizes: np.ndarray
    group: np.ndarray
    query_depth: np.ndarray
    members: list[sparse.csr_array]


@dataclass(frozen=True)
class Sums:
    """Weighted numbers of pairs; ``b`` sets of weights, ``q`` query depths, ``d`` depths."""

    shared: np.ndarray  # (b, q, d): pairs of the table that share an ancestor at d
    pairs: np.ndarray  # (b, q)
    base_shared: np.ndarray  # (b, q, d): the same of all pairs of other labels
    base_pairs: np.ndarray  # (b, q)

    def rates(self, base: str) -> tuple[np.ndarray, np.ndarray]:
        """Return how often pairs share, in the table and by chance: ``(b, q, d)`` each."""
        above, below = self.base_shared, self.base_pairs
        if base == "dataset":
            above = np.broadcast_to(above.sum(axis=1, keepdims=True), above.shape)
            below = np.broadcast_to(below.sum(axis=1, keepdims=True), below.shape)
        return ratio(self.shared, self.pairs[..., None]), ratio(above, below[..., None])

    def lift(self, base: str) -> np.ndarray:
        """Return Lift(d, d') of Adam et al. 2025a, D.2, ``(b, q, d)``; NaN where chance is 0."""
        return ratio(*self.rates(base))

    def pooled(self, base: str) -> np.ndarray:
        """Return shared pairs of all queries over those that chance would give, ``(b, d)``."""
        _, chance = self.rates(base)
        expected = (self.pairs[..., None] * np.nan_to_num(chance)).sum(axis=1)
        return ratio(self.shared.sum(axis=1), expected)


@workers_awaited("computed")
@checked(level=SHARE, replicates=Limits(least=0, most=100_000), k=COUNT, seed=NATURAL)
def taxonomic_lift(
    neighbors: xr.DataTree | xr.Dataset | Losses,
    taxonomy: Taxonomy,
    label: Hashable | Any = "label",
    base: str = "matched",
    *,
    depth: str = "shortest",
    k: int = 30,
    largest: bool = True,
    estimator: str = "sample",
    delete_chains: bool = True,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
    keep_replicates: bool = False,
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return how much more often neighbours share an ancestor than pairs at large.

    Lift(d, d') of Adam et al. 2025a, D.2: among queries whose label is at depth d, the share of
    neighbours that have a common ancestor with the query at depth d', over the share of all
    pairs that do. Pairs of one label count in neither, pairs weigh equally, and a label is its
    own ancestor.

    Parameters
    ----------
    neighbors
        What `lkarray.neighbors` returns, of any kernel or distance, in memory or lazy. Or losses
        ``(chain, draw, sample)``: neighbours of other labels are then searched here.
    taxonomy
        Has every label of the samples.
    label
        Coordinate of the samples, or one label for each sample, as for `lkarray.group_mean`.
    base
        ``"matched"`` divides by the share among pairs whose query is at depth d too, so that
        random neighbours give 1. ``"dataset"`` divides by the share among all pairs, as the
        formula is printed: random neighbours then give other values than 1, from 0.35 to 2.7 on
        WordNet's glosses.
    depth
        Where a node has several paths to a root: ``"shortest"``, ``"longest"`` or
        ``"first_path"``.
    k, largest, estimator, memory
        Of the search, where losses are given; ``largest=False`` takes the least correlated, and
        ``estimator="gaussian"`` the kernel of outcomes as Gaussian (`lkarray.neighbors`).
    delete_chains
        Whether, of losses of several chains, the search is repeated without each chain in turn,
        for the error that is due to the sampling: as many searches more as there are chains.
    replicates
        Resamplings of the labels, for the error that is due to which labels there are.
    level, seed
        Of the intervals, and of the resamplings.
    keep_replicates
        Whether to return the resampled curves. The same seed and labels resample alike, so that
        differences between two kernels can be taken replicate by replicate.

    Returns
    -------
    xarray.Dataset
        Computed. Over ``(query_depth, depth)``: ``lift``; its interval ``low``, ``high``;
        ``standard_error_labels``, and of losses ``standard_error_chains``; ``rate`` and
        ``base_rate``, whose ratio it is; ``shared``, the pairs of the table that share an
        ancestor. Over ``query_depth``: ``pairs`` of the table, ``queries`` (samples) and
        ``labels`` at that depth. Over ``depth``: ``pooled_lift``, the shared pairs of all queries
        over the number that chance would give, with ``pooled_low`` and ``pooled_high``. Lift is
        NaN where no pair of the data could share, or where there are no pairs. Samples whose
        losses do not vary have no neighbours (see `lkarray.neighbors`): neither the table nor the
        base rate counts them, the attribute ``constant_samples`` says how many there are.

    Raises
    ------
    ValueError
        Labels are not in the taxonomy (listed), ``base`` or ``depth`` is unknown, or, of losses,
        fewer than ``k`` samples of other labels are left to a query.
    SchemaError
        There is no such coordinate, or a neighbour is not among the samples.

    Notes
    -----
    Intervals are of both errors together, by Student's t with Satterthwaite's degrees of freedom:
    one less than the labels, and than the chains. Labels are resampled with replacement, and a
    pair weighs the product of the weights of its two labels, in the table and in the base rate
    (the "pigeonhole" bootstrap of Owen 2007, which errs towards wide intervals).

    Costs one pass over the table, and for L labels and D depths ``2 L**2 D replicates``
    multiplications; memory for a block of pairs of labels, or L^2 counts if few.

    References
    ----------
    - Adam et al. 2025a, appendix D.2: "The Loss Kernel", arXiv:2509.26537.
    - Owen 2007: "The pigeonhole bootstrap", doi:10.1214/07-AOAS122.
    - Satterthwaite 1946: "An approximate distribution of estimates of variance components",
      doi:10.2307/3002019.
    - Efron 1982: "The Jackknife, the Bootstrap and Other Resampling Plans",
      doi:10.1137/1.9781611970319.
    - docs/methods/base_rates.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> animals = lk.Taxonomy.from_parents(
    ...     {"dog": "mammal", "cat": "mammal", "trout": "fish", "eel": "fish"}
    ...     | {"mammal": "animal", "fish": "animal"}
    ... )
    >>> labels = np.repeat(["dog", "cat", "trout", "eel"], 2)
    >>> near = [[2], [3], [0], [1], [6], [7], [4], [5]]
    >>> table = xr.Dataset(
    ...     {"neighbor": (("sample", "rank"), near)},
    ...     coords={"sample": np.arange(8), "label": ("sample", labels)},
    ... )
    >>> lift = lk.taxonomic_lift(table, animals)["lift"].sel(query_depth=2)
    >>> lift.values.round(4).tolist()
    [1.0, 3.0, nan]
    """
    one_of("base", base, BASES)
    one_of("depth", depth, graph.DEPTHS)
    require_taxonomy(taxonomy)
    neighbors = as_table(neighbors)
    if isinstance(neighbors, xr.Dataset) and "neighbor" in neighbors:
        deleted: list[xr.Dataset] = []
        table, label = with_labels(neighbors, table_rows(neighbors), label, what="label")
    else:
        neighbors, _ = estimated(neighbors, estimator, name="neighbors")
        own = next(str(dim) for dim in neighbors.dims if dim not in contracted(neighbors))
        neighbors, label = with_labels(neighbors, own, label, what="label")
        options = {"largest": largest, "estimator": estimator, "memory": memory}
        table, deleted = _searched(neighbors, label, k, delete_chains, options)
    rows = table_rows(table)
    values, codes = coded(labels_of(table, rows, label), what=repr(label))
    constant = constant_rows(table, rows)
    sizes = np.bincount(codes[~constant], minlength=len(values))
    tree = make_tree(taxonomy, values, sizes, depth)
    weights = resampled(len(values), replicates, seed)
    counts, facts = _other_labels(table, rows, codes, len(values))
    sums = add_up(counts, tree, np.concatenate([np.ones((1, len(values))), weights]))
    without = [
        add_up(_other_labels(near, rows, codes, len(values))[0], tree, np.ones((1, len(values))))
        for near in deleted
    ]
    facts |= {
        "base": base,
        "depth": depth,
        "label": label,
        "k": int(table.attrs.get("k", table.sizes["rank"])),
        "largest": int(table.attrs.get("largest", 1)),
        "estimator": str(table.attrs.get("estimator", "unknown")),
        "replicates": replicates,
        "level": level,
        "seed": seed,
        "chains_deleted": len(deleted),
        "constant_samples": int(constant.sum()),
    } | verdict_of(table)
    return _dataset(sums, without, tree, base, level, facts, keep_replicates)


def _searched(
    x: xr.DataArray, label: str, k: int, delete_chains: bool, options: dict[str, Any]
) -> tuple[xr.Dataset, list[xr.Dataset]]:
    """Return the neighbours of other labels, and those without each chain, lazily."""
    rows = next(str(dim) for dim in x.dims if dim not in contracted(x))
    near = find_neighbors(x, k, exclude=label, **options)
    values, sizes = np.unique(labels_of(near, rows, label), return_counts=True)
    most = int(sizes.argmax())
    if (left := int(sizes.sum() - sizes[most])) < k:
        raise ValueError(
            f"k={k}, but samples labelled {values[most]!r} have only {left} others of another "
            "label; take a smaller k"
        )
    chains = x.sizes.get(CHAIN, 0)  # none of features
    if not delete_chains or chains < 3:
        return near, []
    subsets = [x.isel({CHAIN: [c for c in range(chains) if c != gone]}) for gone in range(chains)]
    return near, [find_neighbors(subset, k, exclude=label, **options) for subset in subsets]


def _other_labels(
    table: xr.Dataset, rows: str, codes: np.ndarray, size: int
) -> tuple[sparse.csr_array, dict[str, Any]]:
    """Return the pairs of different labels, and what was left out."""
    counts, missing = count_pairs(table, rows, codes, codes, (size, size))
    same = counts.diagonal()
    out = (counts - sparse.diags_array(same, dtype=counts.dtype)).tocsr()
    out.eliminate_zeros()
    return out, {"same_label_pairs_left_out": int(same.sum()), "missing_pairs": missing}


def make_tree(taxonomy: Taxonomy, values: np.ndarray, sizes: np.ndarray, depth: str) -> Tree:
    """Return what the labels of a data set need of the taxonomy."""
    positions = taxonomy.positions(values.tolist())
    depths = taxonomy.depths(depth)
    query_depth, group = np.unique(depths[positions], return_inverse=True)
    members = graph.shared_at(taxonomy.ancestry(positions), depths)
    return Tree(sizes.astype(float), group, query_depth, members)


def add_up(counts: sparse.csr_array, tree: Tree, weights: np.ndarray) -> Sums:
    """Return the numbers of pairs under some sets of weights of the labels, ``(b, label)``."""
    b, size = weights.shape
    groups, depths = len(tree.query_depth), len(tree.members)
    shared, base_shared = np.zeros((2, b, groups, depths))
    pairs, base_pairs = np.zeros((2, b, groups))
    heavy = weights * tree.sizes
    step = max(1, _BLOCK // size)
    transposed = [member.T.tocsc() for member in tree.members]
    for start in range(0, size, step):
        stop = min(start + step, size)
        own = np.arange(stop - start), np.arange(start, stop)
        member_of = np.zeros((stop - start, groups))
        member_of[own[0], tree.group[start:stop]] = 1
        block = counts[start:stop].toarray().astype(float)
        w, h = weights[:, start:stop], heavy[:, start:stop]
        pairs += (w * (weights @ block.T)) @ member_of
        base_pairs += (h * (heavy.sum(axis=1, keepdims=True) - h)) @ member_of
        for d, member in enumerate(tree.members):
            share = (member[start:stop] @ transposed[d]).toarray() > 0
            share[own] = False
            shared[..., d] += (w * (weights @ np.where(share, block, 0).T)) @ member_of
            base_shared[..., d] += (h * (heavy @ share.T.astype(float))) @ member_of
    return Sums(shared, pairs, base_shared, base_pairs)


def _dataset(
    sums: Sums,
    without: list[Sums],
    tree: Tree,
    base: str,
    level: float,
    facts: dict[str, Any],
    keep: bool,
) -> xr.Dataset:
    both, query_only = ("query_depth", "depth"), ("query_depth",)
    rate, base_rate = sums.rates(base)
    out: dict[str, Any] = {}
    for name, dims, values, deleted in (
        ("", both, sums.lift(base), [fewer.lift(base)[0] for fewer in without]),
        ("pooled_", ("depth",), sums.pooled(base), [fewer.pooled(base)[0] for fewer in without]),
    ):
        errors = {"labels": (spread(values[1:]), max(len(tree.group) - 1, 1))}
        if deleted:
            errors["chains"] = (jackknife(deleted), len(deleted) - 1)
        low, high = interval(values[0], list(errors.values()), level)
        out[f"{name}lift"] = (dims, values[0], {"long_name": f"lift under the {base} base rate"})
        out[f"{name}low"], out[f"{name}high"] = (dims, np.maximum(low, 0)), (dims, high)
        for source, (error, _) in errors.items():
            out[f"{name}standard_error_{source}"] = (dims, error)
        if keep:
            out[f"{name}replicate"] = (("replicate", *dims), values[1:])
    out["rate"] = (both, rate[0], {"long_name": "share of neighbours with a common ancestor"})
    out["base_rate"] = (both, base_rate[0], {"long_name": "the same by chance"})
    out["shared"] = (both, sums.shared[0].round().astype(np.int64))
    out["pairs"] = (query_only, sums.pairs[0].round().astype(np.int64))
    per_group = np.bincount(tree.group, tree.sizes, minlength=len(tree.query_depth))
    out["queries"] = (query_only, per_group.round().astype(np.int64))
    out["labels"] = (query_only, np.bincount(tree.group, minlength=len(tree.query_depth)))
    coords = {"query_depth": tree.query_depth, "depth": np.arange(len(tree.members))}
    return xr.Dataset(out, coords=coords, attrs=facts)
