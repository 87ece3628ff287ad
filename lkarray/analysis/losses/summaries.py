"""Summaries of a posterior: per sample and whole, with standard errors; linear in n."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.schema import CHAIN, DRAW, POSTERIOR, STACKED, TOKEN
from lkarray.tensors import Losses, as_losses, losses_node
from lkarray.values import number, require_real

_BLOCK = "block"
_ONE_CHAIN = 10  # blocks that a lone chain is cut into
_ANY = (*STACKED, TOKEN)
ERROR = "standard_error"


@checked()
def loss_gain(tree: Losses) -> xr.DataArray:
    """Return the posterior loss gain of each sample.

    ``E_w[loss(x; w)] - loss(x; w*)``: how much a sample's loss rises, on average, when the
    weights are perturbed.

    Parameters
    ----------
    tree
        A store's tree, or its ``losses``, with ``loss`` and ``center_loss``.

    Returns
    -------
    xarray.DataArray
        ``loss_gain(sample)`` in nats, float64, lazy, with any dims ``checkpoint``, ``component``
        and ``token`` that the losses have; one pass over them. NaN draws give NaN, and so does
        padding among tokens: ``.mean("token")`` leaves it out. Coordinate
        ``standard_error``: that of the mean, from leaving chains out one at a time (Efron 1982;
        tenths of a lone chain), NaN of a single draw. `mcse` is steadier with few chains, but
        costs more.

    Raises
    ------
    SchemaError
        ``center_loss`` is missing.

    References
    ----------
    - Adam et al. 2025b, eq. 4: "Studying Data Complexity ... with Bayesian Probes".
    - Efron 1982: "The Jackknife, the Bootstrap and Other Resampling Plans",
      doi:10.1137/1.9781611970319.
    - docs/methods/uncertainty.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> both = xr.Dataset({"loss": losses, "center_loss": ("sample", [0.5, 3.0, 3.0])})
    >>> lk.loss_gain(both).values.tolist()
    [0.5, 0.0, 0.0]
    """
    node = _dataset(tree)
    if schema.CENTER_LOSS.name not in node:
        raise SchemaError(
            "a loss gain needs 'center_loss', the losses at w*, beside 'loss'; pass the tree or "
            "tree['losses'], not the DataArray alone"
        )
    losses = as_losses(node, name="tree", extra=_ANY)
    require_real("tree: center_loss", node[schema.CENTER_LOSS.name])
    count, mean, _ = _moments(losses)
    whole = (mean * count).sum(_BLOCK, skipna=False) / count.sum()
    gain = whole - node[schema.CENTER_LOSS.name].astype(np.float64)
    out = _named(gain, "loss_gain", units="nat")
    return out.assign_coords({ERROR: _error_of_mean(mean)})


@checked()
def loss_variance(tree: Losses) -> xr.DataArray:
    """Return each sample's loss variance, the diagonal of K.

    Parameters
    ----------
    tree
        Losses, or what holds them.

    Returns
    -------
    xarray.DataArray
        ``loss_variance(sample)`` in nats squared, float64, lazy, divided by CT - 1; linear in
        n, unlike taking the diagonal of the kernel. Dims ``checkpoint``, ``component`` and
        ``token`` are kept; NaN of padding.

    Raises
    ------
    ValueError
        There are fewer than two draws.

    References
    ----------
    - Adam et al. 2025a, section 2.3: "The Loss Kernel", arXiv:2509.26537.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.loss_variance(losses).values.tolist()
    [1.0, 4.0, 1.0]
    """
    losses = as_losses(tree, name="tree", extra=_ANY)
    _enough(losses)
    variance = losses.astype(np.float64).var(POSTERIOR, ddof=1, skipna=False)
    return _named(variance, "loss_variance", units=schema.product_units(losses), center="pooled")


@checked()
def singular_fluctuation(tree: Losses, *, nbeta: float | None = None) -> xr.DataArray:
    """Return the singular fluctuation, ``(nbeta / 2) mean_i K_ii``.

    Meant for losses observed on the training set (Adam et al. 2025a, A.1.3). Losses of tokens are
    averaged over each sequence's tokens first, padding left out, and then over sequences.

    Parameters
    ----------
    tree
        Losses, or what holds them.
    nbeta
        The posterior's; read from the store's attributes by default.

    Returns
    -------
    xarray.DataArray
        Dimensionless, 0-d (or by ``checkpoint`` and ``component``), lazy, with the coordinate
        ``standard_error`` from leaving chains out one at a time (see `loss_gain`).

    References
    ----------
    - Adam et al. 2025a, appendix A.1.3: "The Loss Kernel", arXiv:2509.26537.
    - Adam et al. 2025b, eqs. 13 and 14: "Studying Data Complexity ... with Bayesian Probes".
    - docs/methods/laplace.md, "Scales".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> float(lk.singular_fluctuation(losses, nbeta=10.0))
    10.0
    """
    losses = as_losses(tree, name="tree", extra=_ANY)
    scale = _nbeta(tree, nbeta) / 2
    _enough(losses)
    count, mean, square = _moments(losses)
    counted = _counted(tree, losses)
    whole = _average(_pooled(count, mean, square), counted) * scale
    blocks = range(mean.sizes[_BLOCK])
    left = [
        _pooled(*(part.drop_isel({_BLOCK: b}) for part in (count, mean, square))) for b in blocks
    ]
    without = xr.concat([_average(part, counted) * scale for part in left], _BLOCK)
    spread = without.var(_BLOCK, ddof=0, skipna=False) * (len(blocks) - 1)
    error = np.sqrt(spread) if len(blocks) > 1 else whole * np.nan
    out = _named(whole, "singular_fluctuation", nbeta=2 * scale)
    return out.assign_coords({ERROR: error})


@checked()
def llc(tree: Losses, *, nbeta: float | None = None) -> xr.DataArray:
    """Return the local learning coefficient, ``nbeta * mean_i loss_gain_i``.

    Meant for losses observed on the training set. The papers' printed formulas are n times
    too large for an nbeta that multiplies the mean loss (docs/methods/laplace.md).

    Losses of tokens are averaged as the posterior's steps average them: over each sequence's
    tokens, padding left out, and then over sequences. So ``"next_token"`` and
    ``"next_token_mean"`` give the same number.

    Parameters
    ----------
    tree
        A store's tree, or its ``losses``, with ``loss`` and ``center_loss``.
    nbeta
        The posterior's; read from the store's attributes by default.

    Returns
    -------
    xarray.DataArray
        Dimensionless, 0-d (or by ``checkpoint`` and ``component``), lazy, with the coordinate
        ``standard_error`` from leaving chains out one at a time (see `loss_gain`). Burn-in is
        never stored, so only draws count.

    References
    ----------
    - Lau et al. 2023: "The local learning coefficient: a singularity-aware complexity measure",
      arXiv:2308.12108.
    - Adam et al. 2025b, appendix B.1: "Studying Data Complexity ... with Bayesian Probes".
    - docs/methods/laplace.md, "Scales".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> both = xr.Dataset({"loss": losses, "center_loss": ("sample", [0.5, 2.5, 2.5])})
    >>> float(lk.llc(both, nbeta=10.0))
    5.0
    """
    gain = loss_gain(tree)
    scale = _nbeta(tree, nbeta)
    losses = as_losses(_dataset(tree), extra=_ANY)
    counted = _counted(tree, losses)
    _, mean, _ = _moments(losses)
    out = _named(_average(gain.drop_vars(ERROR), counted) * scale, "llc", nbeta=scale)
    return out.assign_coords({ERROR: _error_of_mean(_average(mean, counted)) * scale})


def _counted(tree: Losses, losses: xr.DataArray) -> xr.DataArray | None:
    """Return which tokens are no padding; ``None`` of losses of whole samples.

    Padding is NaN at w* and at every draw, so that a draw that is NaN is not taken for it.
    """
    if TOKEN not in losses.dims:
        return None
    node = _dataset(tree)
    known = node.get(schema.CENTER_LOSS.name)
    if known is not None and TOKEN in known.dims:
        return known.notnull().drop_vars(list(known.coords))
    return losses.notnull().any(POSTERIOR).drop_vars(list(losses.coords), errors="ignore")


def _average(x: xr.DataArray, counted: xr.DataArray | None) -> xr.DataArray:
    """Return the mean over tokens that count, then over the samples that have any.

    NaN among these gives NaN.
    """
    if counted is None:
        dims = [dim for dim in x.dims if dim not in (*STACKED, _BLOCK)]
        return x.mean(dims, skipna=False)
    tokens = counted.sum(TOKEN)
    means = x.where(counted, 0).sum(TOKEN, skipna=False) / tokens.where(tokens > 0, 1)
    dims = [dim for dim in means.dims if dim not in (*STACKED, _BLOCK)]
    return means.sum(dims, skipna=False) / (tokens > 0).sum(dims)


def _moments(losses: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Return count, mean and sum of squares about it, of each block of draws, in float64.

    A block is a chain, or a tenth of a lone one.
    """
    x = losses.astype(np.float64)
    draws = x.sizes[DRAW]
    if x.sizes[CHAIN] > 1:
        blocks = [x.rename({CHAIN: _BLOCK}).drop_vars(_BLOCK, errors="ignore")]
    else:
        cuts = np.linspace(0, draws, min(_ONE_CHAIN, draws) + 1).astype(int)
        lone = x.isel({CHAIN: 0}, drop=True)
        pairs = itertools.pairwise(cuts)
        blocks = [lone.isel({DRAW: slice(a, b)}).expand_dims(_BLOCK) for a, b in pairs]
    counts = xr.DataArray(
        np.concatenate([np.full(b.sizes[_BLOCK], b.sizes[DRAW], float) for b in blocks]),
        dims=_BLOCK,
    )
    means = xr.concat([b.mean(DRAW, skipna=False) for b in blocks], _BLOCK)
    squares = [b.var(DRAW, ddof=0, skipna=False) * b.sizes[DRAW] for b in blocks]
    return counts, means, xr.concat(squares, _BLOCK)


def _pooled(count: xr.DataArray, mean: xr.DataArray, square: xr.DataArray) -> xr.DataArray:
    """Return the variance about one mean, from the moments of blocks (Chan et al. 1979)."""
    total = count.sum(_BLOCK)
    center = (mean * count).sum(_BLOCK, skipna=False) / total
    between = (count * (mean - center) ** 2).sum(_BLOCK, skipna=False)
    return (square.sum(_BLOCK, skipna=False) + between) / (total - 1)


def _error_of_mean(mean: xr.DataArray) -> xr.DataArray:
    """Return the standard error of the mean over blocks of one size."""
    blocks = mean.sizes[_BLOCK]
    if blocks < 2:
        return mean.isel({_BLOCK: 0}, drop=True) * np.nan
    return mean.std(_BLOCK, ddof=1, skipna=False) / math.sqrt(blocks)


def _named(x: xr.DataArray, name: str, **attrs: Any) -> xr.DataArray:
    return x.rename(name).drop_attrs().assign_attrs(over=list(POSTERIOR), **attrs)


def _enough(losses: xr.DataArray) -> None:
    draws = losses.sizes[CHAIN] * losses.sizes[DRAW]
    if draws < 2:
        raise ValueError(f"a variance needs at least two draws, not {draws}; take more")


def _dataset(tree: Losses) -> xr.Dataset:
    if isinstance(tree, xr.DataTree):
        return losses_node(tree).to_dataset()
    if isinstance(tree, xr.DataArray):
        return tree.to_dataset(name=tree.name or schema.LOSS.name)
    return tree


def attributes(tree: Losses) -> dict[Any, Any]:
    """Return the attributes of the losses in ``tree``."""
    return losses_node(tree).attrs if isinstance(tree, xr.DataTree) else tree.attrs


def _nbeta(tree: Losses, given: float | None) -> float:
    nbeta = given if given is not None else attributes(tree).get("nbeta")
    if nbeta is None:
        raise ValueError("nbeta is not among the attributes of the losses; pass nbeta=...")
    return number("nbeta", nbeta)
