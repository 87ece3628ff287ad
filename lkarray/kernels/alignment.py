"""Frobenius products of kernels and centred kernel alignment, without n x n."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, checked
from lkarray.engine import Operand, as_device
from lkarray.engine.devices import Device
from lkarray.engine.passes import Passes
from lkarray.engine.strips import make_strips
from lkarray.kernels.alignment_sums import Pair, Products, gram_step, sum_step
from lkarray.kernels.alignment_tiles import TileProducts
from lkarray.kernels.estimators import estimated
from lkarray.kernels.operands import (
    degrees_of_freedom,
    free_dim,
)
from lkarray.schema import CHAIN, DRAW, POSTERIOR
from lkarray.tensors import Losses, as_losses, contracted

#: What adds up products of kernels of each estimator: in passes over strips, or over tiles.
_OF: dict[str, Any] = {"sample": Products, "gaussian": TileProducts}


@checked()
def frobenius(
    a: Losses,
    b: Losses | None = None,
    *,
    center: str = "pooled",
    normalize: str = "count",
    estimator: str = "sample",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the Frobenius product of two kernels, ``sum_ij K_ij L_ij``, lazily.

    Parameters
    ----------
    a, b
        Loss tensors ``(chain, draw, sample)`` of the same samples; their draws may differ.
        ``b=None`` gives the squared norm of one kernel.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``; see `lkarray.covariance`.
    normalize
        ``"count"`` for covariances, ``"cosine"`` for correlations.
    estimator
        ``"sample"``, or ``"gaussian"`` of both, as for `lkarray.covariance`: then kernels are made
        tile by tile, at the cost of `lkarray.covariance` of each, and never held.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `lkarray.gram`.

    Returns
    -------
    xarray.DataArray
        0-d float64.

    Notes
    -----
    One pass over the data, ``2 n S_a S_b`` operations and ``S_a x S_b`` numbers where n exceeds
    the draws, otherwise n x n numbers.

    References
    ----------
    - docs/methods/kernels.md, "Of losses".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> float(lk.frobenius(losses)) == float((lk.covariance(losses) ** 2).sum())
    True
    """
    tensors = [estimated(a, estimator, name="a")[0]]
    if b is not None:
        tensors.append(estimated(b, estimator, name="b")[0])
    pairs = [(0, len(tensors) - 1)]
    place = as_device(device, device_memory)
    made = _OF[estimator](tensors, center, normalize, memory, place)
    value = made.compute(pairs, None)[0]
    attrs = {"center": center, "normalize": normalize, "estimator": estimator}
    return _scalar(value, tensors, "frobenius", **attrs, **made.made_on)


@checked()
def cka(
    a: Losses,
    b: Losses,
    *,
    debiased: bool | str = False,
    center: str = "pooled",
    normalize: str = "count",
    estimator: str = "sample",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return the centred kernel alignment of two kernels, lazily.

    .. math:: \langle HKH, HLH \rangle_F / (|HKH|_F |HLH|_F), \quad H = I - 11'/n

    Parameters
    ----------
    a, b
        Loss tensors ``(chain, draw, sample)`` of the same samples; their draws may differ.
    debiased
        ``"samples"`` uses the unbiased HSIC_1 of Song et al. (2012), which a small number of
        samples does not inflate. ``"draws"`` takes every product between kernels of different
        chains, each about its own mean, and averages over all pairs of chains: their Monte-Carlo
        errors are independent, so that noise neither lowers the alignment nor, where chains of a
        and b share their random numbers, raises it; it may exceed 1 by noise. What chains differ
        by in the mean is no part of it. (With ``center="draw"``, or of single draws, which have no
        kernel alone, products are between even and odd chains.)
    center, normalize, estimator
        As for `frobenius`.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `lkarray.gram`.

    Returns
    -------
    xarray.DataArray
        ``cka``, 0-d float64. NaN where a kernel is constant.

    Raises
    ------
    SchemaError
        The samples differ (the first difference is named), or dims are missing.
    ValueError
        ``"draws"`` with fewer than two chains, or ``"samples"`` with fewer than four samples.

    Notes
    -----
    Two passes over the data: the mean over samples, which is subtracted before any product, and
    the products, ``2 n S**2`` operations each. Memory: three ``S x S`` float64 arrays a task, or
    n x n where n is smaller than the draws; never n x n otherwise.

    References
    ----------
    - Kornblith et al. 2019: "Similarity of neural network representations revisited",
      arXiv:1905.00414.
    - Adam et al. 2025a, appendix D.3: "The Loss Kernel", arXiv:2509.26537.
    - Song et al. 2012: "Feature selection via dependence maximization", Journal of Machine Learning
      Research 13.
    - docs/methods/kernels.md, "Of losses".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> round(float(lk.cka(losses, 3 * losses)), 6)
    1.0
    """
    if debiased not in (False, "samples", "draws"):
        raise ValueError(f"debiased must be False, 'samples' or 'draws', not {debiased!r}")
    x, y = estimated(a, estimator, name="a")[0], estimated(b, estimator, name="b")[0]
    options: dict[str, Any] = {"center": center, "normalize": normalize, "estimator": estimator}
    options |= {"memory": memory, "place": as_device(device, device_memory)}
    if debiased == "draws":
        parts = [_independent(side, center) for side in (x, y)]
        first, second = map(len, parts)
        norms = (
            list(combinations(range(first), 2)),
            list(combinations(range(first, first + second), 2)),
        )
        # Chains of one number may share their random numbers.
        cross = [(i, first + j) for i in range(first) for j in range(second) if i != j]
        return _align([*parts[0], *parts[1]], (*norms, cross), None, **options)
    if debiased == "samples":
        rows = free_dim(x, "a", contracted(x), ())
        if x.sizes[rows] < 4:
            raise ValueError(f"debiased='samples' needs four samples; there are {x.sizes[rows]}")
    kind = "unbiased" if debiased else "centred"
    one_link = x.attrs.get("link") == y.attrs.get("link")
    if x is y or (x.chunks is not None and x.data is y.data and one_link):
        return _align([x], ([(0, 0)],) * 3, kind, **options)
    return _align([x, y], ([(0, 0)], [(1, 1)], [(0, 1)]), kind, **options)


@checked(draws=COUNT)
def cka_curve(
    losses: Losses,
    draws: int | Iterable[int] = 20,
    *,
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return how the covariance kernel converges: its CKA with the final one, lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    draws
        Draws of each chain to stop at, or how many such numbers, evenly spaced.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``cka(draws)``, float64: the kernel of the first ``draws`` draws of every chain against
        that of all, both pooled; NaN where one does not vary over the samples. Multiply the
        coordinate by the chains for the axis of Adam et al. 2025a, figure 6A.

    Notes
    -----
    One pass for the means over samples and one for the ``S x S`` Gram of the draws, from which
    every point follows; memory is that of a few such arrays in float64.

    References
    ----------
    - Adam et al. 2025a, appendix D.3 and figure 6A: "The Loss Kernel", arXiv:2509.26537.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> noise = np.random.default_rng(0).normal(size=(4, 100, 6))
    >>> losses = xr.DataArray(noise, dims=("chain", "draw", "sample"))
    >>> curve = lk.cka_curve(losses, draws=[10, 50, 100])
    >>> curve["draws"].values.tolist(), round(float(curve[-1]), 6)
    ([10, 50, 100], 1.0)
    """
    x = as_losses(losses).transpose(*POSTERIOR, ...)
    rows = free_dim(x, "losses", POSTERIOR, ())
    degrees_of_freedom(x, POSTERIOR, "pooled")
    chains, length = x.sizes[CHAIN], x.sizes[DRAW]
    first = 1 if chains > 1 else 2
    if isinstance(draws, int):
        points = np.unique(np.linspace(first, length, min(draws, length)).round().astype(int))
    else:
        points = np.asarray(sorted(draws))
    if not len(points) or points[0] < first or points[-1] > length:
        raise ValueError(f"draws must lie between {first} and {length}, the draws of each chain")
    options: dict[str, Any] = {"over": POSTERIOR, "each": (), "center": "pooled", "cosine": False}
    operand = Operand(x, rows=rows, **options)
    size = chains * length
    needs = {"held": 12 * size**2, "alone": 24 * size**2}
    strips = make_strips(operand, memory=memory, rows=True, needs=needs)
    passes = Passes("cka-curve", strips, points)
    sums = passes.total(strips, sum_step)
    gram = passes.total(strips, gram_step, sums, operand.n, ((0, 0),), "centred")
    curve = passes.then(_curve, gram, points, chains, length)
    data = passes.array([curve], (len(points),), np.float64)
    return xr.DataArray(data, dims="draws", coords={"draws": points}, name="cka")


def _curve(
    grams: tuple[np.ndarray, ...], points: np.ndarray, chains: int, length: int
) -> np.ndarray:
    """Return the CKA of the first draws of each chain with all, from the Gram of the draws.

    ``<K_t, K> = |X_t' X|^2`` for the draws ``X_t``, pooled: the rows of the Gram that are theirs,
    centred over them; and ``|K_t|`` is the norm of the Gram centred on both sides.
    """
    (gram,) = grams  # (S, S)
    norm = np.linalg.norm(gram)
    draw = np.tile(np.arange(length), chains)
    out = np.empty(len(points))
    for p, t in enumerate(points):
        first = draw < t
        cross = gram[first] - gram[first].mean(0)
        own = cross[:, first] - cross[:, first].mean(1, keepdims=True)
        scale = np.linalg.norm(own) * norm
        out[p] = (cross**2).sum() / scale if scale > 0 else np.nan
    return out


def _align(
    tensors: Sequence[xr.DataArray],
    pairs: tuple[Sequence[Pair], Sequence[Pair], Sequence[Pair]],
    kind: str | None,
    *,
    center: str,
    normalize: str,
    estimator: str,
    memory: int | str | None,
    place: Device | None,
) -> xr.DataArray:
    """Return the mean product of the last pairs over the norms: means of the first and second."""
    label = "draws" if kind is None else "samples" if kind == "unbiased" else "none"
    made = _OF[estimator](tensors, center, normalize, memory, place)
    products = made.compute([pair for part in pairs for pair in part], kind or "centred")
    one, two = len(pairs[0]), len(pairs[0]) + len(pairs[1])
    first, second = products[:one].mean(), products[one:two].mean()
    # NaN of a constant kernel, as documented, by division by NaN: NumPy warns of one by zero.
    known = (first > 0) & (second > 0)
    value = products[two:].mean() / da.sqrt(da.where(known, first * second, np.nan))
    attrs = {"debiased": label, "center": center, "normalize": normalize, "estimator": estimator}
    return _scalar(value, tensors, "cka", **attrs, **made.made_on)


def _scalar(
    value: da.Array, tensors: Sequence[xr.DataArray], name: str, **attrs: str
) -> xr.DataArray:
    over = list(dict.fromkeys(dim for x in tensors for dim in contracted(x)))
    return xr.DataArray(value, name=name, attrs={"over": over} | attrs)


def _independent(x: xr.DataArray, center: str) -> list[xr.DataArray]:
    """Return parts of the draws whose errors are independent: chains, or halves of them."""
    if contracted(x) != POSTERIOR:
        raise ValueError("debiased='draws' takes losses by chains, and features have none")
    if x.sizes[CHAIN] < 2:
        raise ValueError(
            f"debiased='draws' needs at least two chains; there are {x.sizes[CHAIN]}, take more"
        )
    if center == "draw" or x.sizes[DRAW] < 2:
        return [x.isel({CHAIN: slice(start, None, 2)}) for start in (0, 1)]
    return [x.isel({CHAIN: [chain]}) for chain in range(x.sizes[CHAIN])]
