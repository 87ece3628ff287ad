"""Monte-Carlo standard errors of loss gains and kernel entries."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.arguments import checked
from lkarray.engine.jackknife import Blocks, jackknife_array, jackknife_bytes
from lkarray.kernels.coords import kernel_coords
from lkarray.kernels.operands import check_shared, free_dim
from lkarray.schema import CHAIN, DRAW, POSTERIOR, product_units, second, units_of
from lkarray.tensors import Losses, as_losses

_ONE_CHAIN = 10  # blocks that a lone chain is cut into


@checked()
def mcse(
    losses: Losses,
    y: Losses | None = None,
    *,
    blocks: int | None = None,
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return Monte-Carlo standard errors of gains and kernel entries, lazily.

    Draws are correlated, so ``(1 - R**2) / sqrt(S)`` is far too small
    (docs/methods/uncertainty.md).

    Parameters
    ----------
    losses, y
        Loss tensors ``(chain, draw, sample)`` at the same draws; ``y=None`` means ``losses``.
        Entries of a few rows are cheaper as ``mcse(losses.isel(sample=rows), losses)``.
    blocks
        Contiguous blocks of each chain that are left out one at a time. By default whole chains
        are, and a lone chain is cut into 10. With few chains, more blocks make the error itself
        steadier, as long as a block is much longer than the autocorrelation.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``loss_gain(sample)`` in nats: standard deviation over the root of the effective sample
        size of the mean (Vehtari et al. 2021, by ArviZ); the losses at w* are exact.
        ``covariance(sample, sample_2)`` in nats squared and ``correlation(sample, sample_2)``: the
        jackknife over blocks (Efron 1982), pooled. All lazy: compute only what you need.

    Raises
    ------
    ValueError
        There are fewer than two blocks, or blocks of less than one draw.
    SchemaError
        The draws of both differ, or dims are missing.

    Notes
    -----
    Entries cost as many operations as the kernel, and memory for one tile a block; gains cost
    about 0.2 ms a sample. The error of an error from C blocks is about ``1 / sqrt(2 (C - 1))``.

    References
    ----------
    - Vehtari et al. 2021: "Rank-normalization, folding, and localization: an improved R-hat for
      assessing convergence of MCMC", doi:10.1214/20-BA1221.
    - Efron 1982: "The Jackknife, the Bootstrap and Other Resampling Plans",
      doi:10.1137/1.9781611970319.
    - docs/methods/uncertainty.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> noise = np.random.default_rng(0).normal(size=(4, 100, 6))
    >>> losses = xr.DataArray(noise, dims=("chain", "draw", "sample"))
    >>> errors = lk.mcse(losses)
    >>> errors["correlation"].sizes["sample_2"], errors.attrs["blocks"]
    (6, 4)
    >>> bool((errors["covariance"] > 0).all())
    True
    """
    x = as_losses(losses)
    other = None if y is None else as_losses(y, name="y")
    rows = free_dim(x, "losses", POSTERIOR, ())
    cols = rows if other is None else free_dim(other, "y", POSTERIOR, ())
    if other is not None:
        check_shared(x, other, POSTERIOR)
    pieces = _pieces(x, blocks)
    coords = kernel_coords(x, x if other is None else other, (), rows, cols)
    dims = (rows, second(cols) if cols == rows else cols)
    out = {"loss_gain": _of_gain(x)}
    for name, units in (("covariance", product_units(x, other)), ("correlation", "1")):
        c = _contraction(x, other, rows, cols, len(pieces), memory)
        data = jackknife_array(c, Blocks(pieces, name == "correlation"))
        out[name] = xr.DataArray(data, dims=dims, attrs={"units": units})
    return xr.Dataset(out, coords=coords, attrs={"blocks": len(pieces), "over": list(POSTERIOR)})


def _pieces(x: xr.DataArray, blocks: int | None) -> tuple[engine.Piece, ...]:
    chains, draws = x.sizes[CHAIN], x.sizes[DRAW]
    if blocks is None:
        blocks = 1 if chains > 1 else min(_ONE_CHAIN, draws)
    if not 1 <= blocks <= draws:
        raise ValueError(
            f"blocks must be between 1 and {draws}, the draws of a chain, not {blocks}"
        )
    if chains * blocks < 2:
        raise ValueError(
            "leaving one chain out needs two chains; cut the lone one with blocks=10, say"
        )
    cuts = np.linspace(0, draws, blocks + 1).astype(int).tolist()
    return tuple(((c, c + 1), (cuts[b], cuts[b + 1])) for c in range(chains) for b in range(blocks))


def _contraction(
    x: xr.DataArray,
    y: xr.DataArray | None,
    rows: str,
    cols: str,
    blocks: int,
    memory: int | str | None,
) -> engine.Contraction:
    """Return the contraction whose tiles are left-out covariances, planned for all of them."""
    operands = [
        engine.Operand(z, over=POSTERIOR, each=(), rows=dim, center="pooled", cosine=False)
        for z, dim in ((x, rows), (y, cols))
        if z is not None
    ]
    plan = engine.make_plan(*operands, memory=memory, sink=jackknife_bytes(blocks))
    return engine.Contraction(operands[0], operands[1] if len(operands) > 1 else None, plan)


def _of_gain(x: xr.DataArray) -> xr.DataArray:
    whole = x.chunk({CHAIN: -1, DRAW: -1}) if x.chunks is not None else x
    error: xr.DataArray = xr.apply_ufunc(
        _mean_error,
        whole,
        input_core_dims=[list(POSTERIOR)],
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return error.assign_attrs(units=units_of(x) or "1")


def _mean_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last two axes, chain and draw."""
    from arviz_stats.base import array_stats

    values = values.astype(np.float64)
    out = np.zeros(values.shape[:-2])
    varies = np.ptp(values, axis=(-2, -1)) > 0
    if varies.any():
        out[varies] = array_stats.mcse(values[varies], chain_axis=-2, draw_axis=-1, method="mean")
    return out
