"""Lift of any discrete attribute, and groups of images by their mean colour."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import sparse

from lkarray.analysis.hierarchy.intervals import interval, jackknife, ratio
from lkarray.analysis.hierarchy.pairs import (
    as_table,
    constant_rows,
    count_pairs,
    labels_of,
    table_rows,
)
from lkarray.arguments import COUNT, NATURAL, SHARE, Limits, checked
from lkarray.kernels.groups import group_codes, with_labels
from lkarray.labels import coded
from lkarray.schema import SAMPLE, second
from lkarray.values import real_array, several
from lkarray.waiting import workers_awaited

_CHANNELS = ("red", "green", "blue")


@workers_awaited("computed")
@checked(blocks=Limits(least=2, most=100_000), level=SHARE, seed=NATURAL)
def attribute_lift(
    neighbors: xr.Dataset | xr.DataTree,
    attribute: Hashable | Any,
    *,
    exclude: Hashable | Any | None = None,
    blocks: int = 50,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Return how much more often neighbours share an attribute than pairs at large.

    See Adam et al. 2025a, figures 6D and 9 do for colour groups.

    Parameters
    ----------
    neighbors
        What `lkarray.neighbors` returns, nearest or (``largest=False``) farthest ones.
    attribute
        A coordinate of the samples, or one value for each sample, as for `lkarray.group_mean`: any
        discrete attribute.
    exclude
        The coordinate, or the labels, whose pairs were left out of the search, so that chance
        leaves them out too. By default what the table says, if it names one.
    blocks
        Parts that the queries are divided into, and left out one at a time, for the errors;
        samples that share ``exclude`` stay together.
    level, seed
        Of the intervals, and of the division.

    Returns
    -------
    xarray.Dataset
        Computed; dims are named after the attribute, ``color`` say. ``transition(color,
        color_2)``: the share of the neighbours of inputs of the first that are of the second,
        with its ``base_rate`` (of random other inputs). ``lift(color)``: the ratio on the
        diagonal, with ``low``, ``high``, ``standard_error``. ``pooled_lift``: matching pairs
        over the number that chance would give, with the same. ``pairs(color)`` and
        ``queries(color)``. Samples whose losses do not vary take no part (see
        `lkarray.neighbors`); the attribute ``constant_samples`` counts them.

    Raises
    ------
    SchemaError
        There is no such coordinate, a value is missing, or a neighbour is not among the samples.
    ValueError
        There are fewer than two blocks.

    Notes
    -----
    One pass over the table. Queries are left out, not candidates, so errors do not include
    which inputs were there to search.

    References
    ----------
    - Adam et al. 2025a, figures 6D and 9, appendix D.6: "The Loss Kernel", arXiv:2509.26537.
    - docs/methods/base_rates.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> near = (("sample", "rank"), [[1], [0], [3], [2]])
    >>> table = xr.Dataset({"neighbor": near}, coords={"sample": np.arange(4)})
    >>> lift = lk.attribute_lift(table, np.array(["red", "red", "blue", "blue"]))
    >>> lift["lift"].values.round(4).tolist()
    [3.0, 3.0]
    """
    near: xr.Dataset = as_table(neighbors)
    rows = table_rows(near)
    name, values, codes = group_codes(near["neighbor"], rows, attribute, what="attribute")
    stated = near.attrs.get("exclude", "none")
    if exclude is None and stated in near.coords:
        exclude = stated
    n, count = len(codes), len(values)
    apart, excluded = np.arange(n), "none"
    if exclude is not None:
        near, excluded = with_labels(near, rows, exclude, what="exclude")
        apart = coded(labels_of(near, rows, excluded, "exclude"), what=repr(excluded))[1]
    block = np.random.default_rng(seed).integers(0, blocks, apart.max() + 1)[apart]
    table, missing = count_pairs(near, rows, block * count + codes, codes, (blocks * count, count))
    counts = table.toarray().reshape(blocks, count, count).astype(float)
    known = ~constant_rows(near, rows)
    chance = _other_pairs(codes[known], apart[known], block[known], (blocks, count))
    out: dict[str, Any] = {}
    dims = (name, second(name))
    total, base = counts.sum(axis=0), chance.sum(axis=0)
    out["transition"] = (dims, ratio(total, total.sum(axis=1, keepdims=True)))
    out["base_rate"] = (dims, ratio(base, base.sum(axis=1, keepdims=True)))
    kept = [(total - f, base - c) for f, c in zip(counts, chance, strict=True)]
    for prefix, of, shape in (("", _lift, (name,)), ("pooled_", _pooled, ())):
        value, error = of(total, base), jackknife([of(*numbers) for numbers in kept])
        low, high = interval(value, [(error, blocks - 1)], level)
        out[f"{prefix}lift"] = (shape, value)
        out[f"{prefix}low"], out[f"{prefix}high"] = (shape, np.maximum(low, 0)), (shape, high)
        out[f"{prefix}standard_error"] = (shape, error)
    out["pairs"] = ((name,), total.sum(axis=1).astype(np.int64))
    out["queries"] = ((name,), np.bincount(codes[known], minlength=count))
    return xr.Dataset(
        out,
        coords={name: values, second(name): values},
        attrs={
            "exclude": excluded,
            "largest": int(near.attrs.get("largest", 1)),
            "missing_pairs": missing,
            "constant_samples": int((~known).sum()),
            "blocks": blocks,
            "level": level,
            "seed": seed,
        },
    )


def _other_pairs(
    codes: np.ndarray, apart: np.ndarray, block: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Count all pairs that a search could return: ``(block, attribute, attribute)``."""
    blocks, count = shape
    every = np.bincount(codes, minlength=count)
    queries = np.bincount(block * count + codes, minlength=blocks * count)
    out: np.ndarray = queries.reshape(blocks, count, 1) * every.astype(float)
    # Pairs within one excluded value (or of a sample with itself), which share a block.
    ones = np.ones(len(codes))
    inside = sparse.csr_array((ones, (apart, codes)), shape=(apart.max() + 1, count))
    inside.sum_duplicates()
    of = np.empty(apart.max() + 1, np.int64)
    of[apart] = block
    for number in range(blocks):
        members = inside[np.flatnonzero(of == number)]
        out[number] -= (members.T @ members).toarray()
    return out


def _lift(counts: np.ndarray, chance: np.ndarray) -> np.ndarray:
    rate = ratio(np.diagonal(counts), counts.sum(axis=1))
    return ratio(rate, ratio(np.diagonal(chance), chance.sum(axis=1)))


def _pooled(counts: np.ndarray, chance: np.ndarray) -> np.ndarray:
    base = np.nan_to_num(ratio(np.diagonal(chance), chance.sum(axis=1)))
    expected = (counts.sum(axis=1) * base).sum()
    return ratio(np.asarray(np.trace(counts)), np.asarray(expected))


@checked(k=COUNT)
def color_groups(images: Any, k: int = 8) -> xr.DataArray:
    """Return the group of each image by its mean colour.

    Parameters
    ----------
    images
        ``(sample, height, width, 3)`` or ``(sample, 3, height, width)``, red, green and blue:
        an array, or an iterable of images of any sizes. A DataArray's or Series' index is that of
        the result.
    k
        Groups. Their centres are images' mean colours, each the farthest from those before it
        (farthest point sampling; Gonzalez 1985), beginning with the one farthest from the mean
        of all.

    Returns
    -------
    xarray.DataArray
        ``color(sample)``, group numbers from 0, each image's nearest centre; with the coordinates
        ``red``, ``green`` and ``blue`` of the samples, and the centres as the attribute ``centers``
        (k lists of 3).

    Raises
    ------
    ValueError
        Images have no three channels, or fewer than ``k`` mean colours differ.

    References
    ----------
    - Adam et al. 2025a, appendix D.6: "The Loss Kernel", arXiv:2509.26537.
    - Gonzalez 1985: "Clustering to minimize the maximum intercluster distance",
      doi:10.1016/0304-3975(85)90224-5.

    Examples
    --------
    >>> import numpy as np, lkarray as lk
    >>> images = np.zeros((4, 2, 2, 3), np.uint8)
    >>> images[:2, ..., 0] = 255
    >>> lk.color_groups(images, k=2).values.tolist()
    [0, 0, 1, 1]
    """
    index = images.index if isinstance(images, pd.Series) else None
    if isinstance(images, xr.DataArray) and images.ndim:
        index = images.indexes.get(images.dims[0])
    each = [_mean_color(image, at) for at, image in enumerate(several("images", images))]
    if not each:
        raise ValueError("images is empty; there are no colours to group")
    mean = np.stack(each)
    if not 1 <= k <= (distinct := len(np.unique(mean, axis=0))):
        raise ValueError(f"k must be between 1 and {distinct}, the mean colours there are, not {k}")
    centers = [int(_squares(mean, mean.mean(axis=0)).argmax())]
    nearest = _squares(mean, mean[centers[0]])
    group = np.zeros(len(mean), np.int64)
    while len(centers) < k:
        centers.append(int(nearest.argmax()))
        away = _squares(mean, mean[centers[-1]])
        group[away < nearest] = len(centers) - 1
        nearest = np.minimum(nearest, away)
    channels = {name: (SAMPLE, mean[:, at]) for at, name in enumerate(_CHANNELS)}
    return xr.DataArray(
        group,
        dims=SAMPLE,
        coords={SAMPLE: np.arange(len(mean)) if index is None else index, **channels},
        name="color",
        attrs={"centers": mean[centers].tolist(), "long_name": "group of the mean colour"},
    )


def _mean_color(given: Any, at: int) -> np.ndarray:
    image = real_array(f"images[{at}]", given)
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]):
        raise ValueError(
            f"images: image {at} has shape {image.shape}; expected (height, width, 3) or "
            "(3, height, width)"
        )
    if not image.size or not np.isfinite(image).all():
        raise ValueError(f"images: image {at} is empty, or holds NaN or infinity")
    axes = (0, 1) if image.shape[-1] == 3 else (1, 2)
    return np.asarray(image.mean(axis=axes, dtype=np.float64))


def _squares(points: np.ndarray, center: np.ndarray) -> np.ndarray:
    return np.asarray(((points - center) ** 2).sum(axis=1))
