"""Kernels and summaries of loss tensors ``loss(chain, draw, sample)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.errors import SchemaError
from lkarray.kernels.gram import CENTERS, free_dim, gram, one_of
from lkarray.kernels.shrinkage import ledoit_wolf, shrunk
from lkarray.schema import POSTERIOR, Losses, as_losses, losses_node


def covariance(
    losses: Losses,
    y: Losses | None = None,
    *,
    center: str = "pooled",
    shrinkage: str | float | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return the loss kernel K, the covariance of per-sample losses (loss-kernel eq. 2).

    Parameters
    ----------
    losses, y
        Loss tensors ``(chain, draw, sample)``, or what holds one; ``y=None`` means ``losses``.
    center
        ``"pooled"`` subtracts one mean over all chains and divides by CT - 1, as the papers
        do; ``"chain"`` subtracts each chain's mean and divides by C(T - 1).
    shrinkage
        ``"ledoit-wolf"`` (see `ledoit_wolf`) or a share d in [0, 1] returns
        ``(1 - d) K + d mean(diag K) I``, whose error is smaller when draws are few.
    precision
        ``"float32"`` or ``"auto"``; see `gram`.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``covariance(sample, sample_2)`` in nats squared, lazy; see `gram` for cost, memory
        and errors.
    """
    out = _kernel(
        "covariance",
        losses,
        y,
        center=center,
        normalize="count",
        precision=precision,
        memory=memory,
    )
    if shrinkage is None:
        return out
    if y is not None:
        raise ValueError("shrinkage is for the covariance of one tensor with itself, without y")
    if shrinkage == "ledoit-wolf":
        share: xr.DataArray | float = ledoit_wolf(losses, center=center, memory=memory)
    elif isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be 'ledoit-wolf' or in [0, 1], not {shrinkage!r}")
    else:
        share = float(shrinkage)
    if center == "chain":
        raise ValueError("shrinkage is for pooled covariances")
    level = loss_variance(losses).mean(skipna=False)
    return shrunk(out, share, level).assign_attrs(shrinkage=shrinkage)


def correlation(
    losses: Losses,
    y: Losses | None = None,
    *,
    center: str = "pooled",
    precision: str = "float32",
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return the loss correlation kernel R (loss-kernel section 2.3).

    ``R = K(x, x') / sqrt(K(x, x) K(x', x'))``, and 0 where a sample's loss does not vary.
    Its Monte-Carlo error is about one over the root of the *effective* number of draws.

    Parameters
    ----------
    losses, y, center, precision, memory
        As for `covariance`.

    Returns
    -------
    xarray.DataArray
        ``correlation(sample, sample_2)`` between -1 and 1, lazy; see `gram`.
    """
    return _kernel(
        "correlation",
        losses,
        y,
        center=center,
        normalize="cosine",
        precision=precision,
        memory=memory,
    )


def influence(
    losses: Losses,
    query: Losses,
    *,
    precision: str = "float32",
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return the Bayesian influence of training samples on queries (loss-kernel eq. 6).

    ``-Cov(train loss, query loss)``, pooled. The derivative of a query's posterior mean loss
    with respect to a training sample's weight in the mean loss's sum is this times the
    attribute ``derivative_scale = nbeta / n`` (design section 6), where nbeta is known.

    Parameters
    ----------
    losses
        Losses of training samples, ``(chain, draw, sample)``.
    query
        Losses of other inputs at the same draws.
    precision
        ``"float32"`` or ``"auto"``; see `gram`.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``influence(sample, query)`` in nats squared, lazy; see `gram`.
    """
    asked = as_losses(query, name="query")
    dim = free_dim(asked, "query", POSTERIOR, ())
    names = {
        name: f"{schema.QUERY}_{name}" for name, coord in asked.coords.items() if dim in coord.dims
    }
    query = asked.rename(names | {dim: schema.QUERY})
    out = _kernel(
        "influence",
        losses,
        query,
        center="pooled",
        normalize="count",
        precision=precision,
        scale=-1.0,
        memory=memory,
    )
    attrs = _attributes(losses)
    if "nbeta" in attrs and "n_train" in attrs:
        out.attrs["derivative_scale"] = attrs["nbeta"] / attrs["n_train"]
    return out


def loss_gain(tree: Losses) -> xr.DataArray:
    """Return the posterior loss gain of each sample (Bayesian-probes eq. 4).

    ``E_w[loss(x; w)] - loss(x; w*)``: how much a sample's loss rises, on average, when the
    weights are perturbed.

    Parameters
    ----------
    tree
        A store's tree, or its ``losses``, with ``loss`` and ``center_loss``.

    Returns
    -------
    xarray.DataArray
        ``loss_gain(sample)`` in nats, float64, lazy; one pass over the losses. NaN draws
        give NaN.

    Raises
    ------
    SchemaError
        ``center_loss`` is missing.
    """
    node = _dataset(tree)
    if schema.CENTER_LOSS.name not in node:
        raise SchemaError(
            "a loss gain needs 'center_loss', the losses at w*, beside 'loss'; pass the tree or "
            "tree['losses'], not the DataArray alone"
        )
    mean = as_losses(node).mean(POSTERIOR, dtype=np.float64, skipna=False)
    gain = mean - node[schema.CENTER_LOSS.name].astype(np.float64)
    return gain.rename("loss_gain").assign_attrs(units="nat", over=list(POSTERIOR))


def loss_variance(tree: Losses) -> xr.DataArray:
    """Return each sample's loss variance, the diagonal of K (loss-kernel section 2.3).

    Parameters
    ----------
    tree
        Losses, or what holds them.

    Returns
    -------
    xarray.DataArray
        ``loss_variance(sample)`` in nats squared, float64, lazy, divided by CT - 1; linear in
        n, unlike taking the diagonal of the kernel.

    Raises
    ------
    ValueError
        There are fewer than two draws.
    """
    losses = as_losses(tree)
    draws = losses.sizes[schema.CHAIN] * losses.sizes[schema.DRAW]
    if draws < 2:
        raise ValueError(f"a variance needs at least two draws, found {draws}; take more")
    variance = losses.astype(np.float64).var(POSTERIOR, ddof=1, skipna=False)
    return variance.rename("loss_variance").assign_attrs(
        units="nat^2", over=list(POSTERIOR), center="pooled"
    )


def singular_fluctuation(tree: Losses, *, nbeta: float | None = None) -> xr.DataArray:
    """Return the singular fluctuation, ``(nbeta / 2) mean_i K_ii`` (design section 6).

    Meant for losses observed on the training set (loss-kernel A.1.3).

    Parameters
    ----------
    tree
        Losses, or what holds them.
    nbeta
        The posterior's; read from the store's attributes by default.

    Returns
    -------
    xarray.DataArray
        0-d, dimensionless, lazy.
    """
    scale = _nbeta(tree, nbeta) / 2
    out: xr.DataArray = loss_variance(tree).mean(skipna=False) * scale
    return out.rename("singular_fluctuation").assign_attrs(nbeta=2 * scale, over=list(POSTERIOR))


def llc(tree: Losses, *, nbeta: float | None = None) -> xr.DataArray:
    """Return the local learning coefficient, ``nbeta * mean_i loss_gain_i``.

    Meant for losses observed on the training set. The papers' printed formulas are n times
    too large for an nbeta that multiplies the mean loss (design section 6).

    Parameters
    ----------
    tree
        A store's tree, or its ``losses``, with ``loss`` and ``center_loss``.
    nbeta
        The posterior's; read from the store's attributes by default.

    Returns
    -------
    xarray.DataArray
        0-d, dimensionless, lazy.
    """
    scale = _nbeta(tree, nbeta)
    out: xr.DataArray = loss_gain(tree).mean(skipna=False) * scale
    return out.rename("llc").assign_attrs(nbeta=scale, over=list(POSTERIOR))


def _kernel(
    name: str,
    losses: Losses,
    y: Losses | None,
    *,
    center: str,
    normalize: str,
    memory: int | str | None,
    precision: str = "float32",
    scale: float = 1.0,
) -> xr.DataArray:
    one_of("center", center, CENTERS)
    out = gram(
        as_losses(losses),
        None if y is None else as_losses(y, name="y"),
        over=POSTERIOR,
        center=center,
        normalize=normalize,
        precision=precision,
        scale=scale,
        memory=memory,
    )
    out.attrs["units"] = "nat^2" if normalize == "count" else "1"
    return out.rename(name)


def _dataset(tree: Losses) -> xr.Dataset:
    if isinstance(tree, xr.DataTree):
        return losses_node(tree).to_dataset()
    if isinstance(tree, xr.DataArray):
        return tree.to_dataset(name=tree.name or schema.LOSS.name)
    return tree


def _attributes(tree: Losses) -> dict[Any, Any]:
    return losses_node(tree).attrs if isinstance(tree, xr.DataTree) else tree.attrs


def _nbeta(tree: Losses, given: float | None) -> float:
    found = given if given is not None else _attributes(tree).get("nbeta")
    if found is None:
        raise ValueError("nbeta is not among the attributes of the losses; pass nbeta=...")
    return float(found)
