"""Mean kernels between groups of samples, without n x n."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.engine import (
    SERIES_BYTES,
    Contraction,
    Operand,
    Series,
    as_device,
    make_plan,
    table_bytes,
)
from lkarray.engine.blocks import like, squares, wide
from lkarray.engine.devices import Device, made_on
from lkarray.engine.passes import Passes
from lkarray.engine.strips import make_strips
from lkarray.engine.tile_sums import GROUPED_BYTES, Groups, added_bytes, group_sums_array
from lkarray.errors import SchemaError
from lkarray.kernels.estimators import described
from lkarray.kernels.kinds import verdict_of
from lkarray.kernels.operands import estimated_operand
from lkarray.labels import coded, one_each
from lkarray.schema import RESERVED, second
from lkarray.tensors import Losses, contracted

Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)


def group_codes(
    x: xr.DataArray, rows: str, groups: Hashable | Any, *, what: str = "groups"
) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the name of a grouping, its values in order, and each sample's number in them.

    Labels with an index of their own are brought into the samples' order (`lkarray.labels`).

    Raises
    ------
    TypeError
        Labels are a table.
    SchemaError
        There is no such coordinate, there is not one label for each sample, one is missing, or
        their index is not that of the samples.
    """
    if isinstance(groups, str):
        if groups not in x.coords or x.coords[groups].dims != (rows,):
            labels = sorted(str(name) for name, c in x.coords.items() if c.dims == (rows,))
            raise SchemaError(
                f"{what}: {groups!r} is no coordinate of {rows!r}; there are {labels}"
            )
        name, labels_ = groups, np.asarray(x.coords[groups].values)
    else:
        name = str(getattr(groups, "name", None) or "group")
        labels_ = one_each(groups, x, rows, what=what)
    values, codes = coded(labels_, what=f"{what}: {name!r}")
    return name, values, codes


def with_labels(
    x: Labelled, rows: str, labels: Hashable | Any, *, what: str
) -> tuple[Labelled, str]:
    """Return ``x`` with labels of its samples among its coordinates, and their name.

    Parameters
    ----------
    x
        Whose samples are along ``rows``.
    labels
        The name of a coordinate, or one label for each sample, which is added under its own name
        or as ``what``.

    Raises
    ------
    TypeError, SchemaError
        As for `group_codes`; or there is another coordinate of that name.
    """
    if isinstance(labels, str):
        return x, labels
    values = one_each(labels, x, rows, what=what)
    name = str(getattr(labels, "name", None) or what)
    name = what if name in x.dims or name in RESERVED else name
    if name in x.coords and not np.array_equal(x.coords[name].values, values):
        raise SchemaError(
            f"{what}: there is a coordinate {name!r} with other values already; rename one of them"
        )
    return x.assign_coords({name: (rows, values)}), name


@checked()
def group_mean(
    losses: Losses,
    groups: Hashable | Any,
    *,
    kernel: str = "correlation",
    self_pairs: bool = True,
    center: str = "pooled",
    estimator: str = "sample",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the mean kernel between groups of samples, lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    groups
        A coordinate of the samples, such as ``"label"``, or one label for each sample: an array in
        their order, or a DataArray or Series with their index in any order.
    kernel
        ``"correlation"`` or ``"covariance"``.
    self_pairs
        Whether a sample's entry with itself counts (1 in a correlation).
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``.
    estimator
        ``"sample"`` or ``"gaussian"``, as for `lkarray.covariance`; the latter costs what the
        kernel does, whose tiles are made.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `lkarray.gram`.

    Returns
    -------
    xarray.DataArray
        ``KERNEL(label, label_2)`` (named after the coordinate; ``group`` for a bare array),
        float64, with the groups' values, sorted. Without self pairs, a group of one sample
        has NaN with itself.

    Raises
    ------
    SchemaError
        There is no such coordinate, or not one label for each sample, or it is missing for some.

    Notes
    -----
    Samples are averaged within groups first, so it costs one pass over the data and ``2 n S g``
    operations for g groups, and ``S x g`` numbers; never n x n unless n is below S.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.group_mean(losses, ["cat", "cat", "dog"]).values.round(6).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    x, operand, scale, series = estimated_operand(losses, kernel, center, estimator)
    name, values, codes = group_codes(x, operand.rows, groups)
    counts = np.bincount(codes, minlength=len(values))
    place = as_device(device, device_memory)
    if series is None:
        mean = _of_strips(operand, codes, counts, scale, self_pairs, memory, place)
    else:
        mean = _of_tiles(operand, series, codes, counts, self_pairs, memory, place)
    return xr.DataArray(
        mean,
        dims=(name, second(name)),
        coords={name: values, second(name): values},
        name=kernel,
        attrs={
            "over": list(contracted(x)),
            "center": operand.center or "none",
            "self_pairs": int(self_pairs),
        }
        | described(series)
        | verdict_of(x)
        | made_on(place, operand.dtype),
    )


def _of_strips(
    operand: Operand,
    codes: np.ndarray,
    counts: np.ndarray,
    scale: float,
    self_pairs: bool,
    memory: int | str | None,
    place: Device | None,
) -> da.Array:
    """Return the means from those of the groups' rows, in one pass."""
    size, groups = int(np.prod(operand.shape)), len(counts)
    held = 8 * groups * (min(size, operand.n) + groups)
    needs = {"held": held, "alone": 2 * held}
    strips = make_strips(operand, memory=memory, needs=needs, device=place)
    passes = Passes("group-mean", strips, codes, scale, self_pairs)
    step = _group_rows if strips.rows else _group_draws
    sums = passes.total(strips, step, passes.hold(codes), counts)
    mean = passes.then(_group_finish, sums, counts, strips.rows, scale, self_pairs)
    return passes.array([mean], (groups, groups), np.float64)


def _of_tiles(
    operand: Operand,
    series: Series,
    codes: np.ndarray,
    counts: np.ndarray,
    self_pairs: bool,
    memory: int | str | None,
    place: Device | None,
) -> da.Array:
    """Return the means from the sums of all tiles: entries that are no product of rows."""
    groups = len(counts)
    held = table_bytes(operand) + added_bytes(groups * (groups + 1))
    needs: dict[str, Any] = {"sink": GROUPED_BYTES, "device_sink": SERIES_BYTES, "held": held}
    plan = make_plan(operand, memory=memory, device=place, **needs)
    sums = group_sums_array(Contraction(operand, None, plan, series=series), Groups(codes, groups))
    pairs = counts[:, None] * counts.astype(np.float64)
    totals, own = sums[:, :-1], np.diag(np.ones(groups))
    if not self_pairs:
        totals, pairs = totals - own * sums[:, -1:], pairs - np.diag(counts)
    # NaN where a group of one has no pairs, without a warning of NumPy's.
    return totals / np.where(pairs > 0, pairs, np.nan)


def _group_rows(
    blocks: tuple[np.ndarray, ...], span: slice, codes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the rows of each group, and the sums of their squared norms."""
    (b,) = blocks
    own = codes[span]
    member = np.zeros((len(own), len(counts)))  # (strip, group)
    member[np.arange(len(own)), own] = 1 / counts[own]
    return b @ like(b, member), np.bincount(own, squares(b, 0), minlength=len(counts))


def _group_draws(
    blocks: tuple[np.ndarray, ...], span: slice, codes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Products of the group means over a piece of the draws, and the same sums."""
    (b,) = blocks
    member = np.zeros((len(counts), len(codes)))
    member[codes, np.arange(len(codes))] = 1 / counts[codes]
    mean = wide(like(b, member) @ b)  # (group, stretch of the draws)
    return mean @ mean.T, np.bincount(codes, squares(b, 1), minlength=len(counts))


def _group_finish(
    sums: tuple[np.ndarray, np.ndarray],
    counts: np.ndarray,
    rows: bool,
    scale: float,
    self_pairs: bool,
) -> np.ndarray:
    mean, norms = sums
    out = mean.T @ mean if rows else mean.copy()
    if not self_pairs:
        # Within a group: the sum over all pairs, less each sample's squared norm.
        pairs = counts * (counts - 1.0)
        own = np.diagonal(out) * counts**2 - norms
        np.fill_diagonal(out, np.divide(own, pairs, out=np.full(len(own), np.nan), where=pairs > 0))
    return out * scale
