"""`gram`: the engine's front door, labels in and labels out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import xarray as xr
from zarr.codecs import Crc32cCodec

from lkarray import engine
from lkarray.arguments import checked
from lkarray.kernels.coords import kernel_coords
from lkarray.kernels.estimators import described, series_of
from lkarray.kernels.operands import (
    CENTERS,
    NORMALIZERS,
    PRECISIONS,
    as_tensor,
    check_shared,
    degrees_of_freedom,
    dim_names,
    free_dim,
)
from lkarray.links import Link
from lkarray.results import Result
from lkarray.schema import second
from lkarray.values import one_of


@checked()
def gram(
    x: Result,
    y: Result | None = None,
    *,
    over: str | Iterable[str],
    each: str | Iterable[str] = (),
    center: str | None = None,
    normalize: str | None = None,
    precision: str = "float32",
    scale: float = 1.0,
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Contract two labelled tensors over shared dims, lazily.

    .. math:: G_{ij} = c \sum_s (x_{si} - \bar x_i)(y_{sj} - \bar y_j)

    Parameters
    ----------
    x, y
        Tensors with the dims ``over``, ``each`` and exactly one more, or the Dataset or node that
        holds one. ``y=None`` is the symmetric Gram of ``x``, of which only one triangle is
        computed.
    over
        Dims that are contracted: S elements together.
    each
        Dims that are kept in step: one kernel for each of their entries.
    center
        ``None``; ``"pooled"`` subtracts the mean over all of ``over``; ``"chain"`` the mean
        of each chain; ``"draw"`` the mean over the chains at each draw, which removes what all
        chains go through alike.
    normalize
        ``None``; ``"count"`` divides by the degrees of freedom (S uncentred, S - 1 pooled,
        S - C with C chains, S - T with T draws); ``"cosine"`` by both norms, 0 where a norm is 0.
    precision
        ``"float32"`` multiplies at the operands' own precision; ``"auto"`` in bfloat16 with
        float32 sums, where torch is installed, the operands are float32, and that was
        measured to be faster here. Rounding a row changes it by at most 0.2%, so cosines err
        by 3e-5 rms and 4e-3 at the very most: far below the Monte-Carlo error of a kernel
        from draws (`mcse`). Which was used is the attribute ``precision``.
    scale
        Factor of every entry.
    memory
        Byte budget of a process; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    device
        Where products are made: ``"cuda"`` or ``"cuda:1"``, or ``"cpu"`` for the same code by
        torch on the processor. ``None`` takes ``LKARRAY_DEVICE`` where it is set, and NumPy on the
        cores otherwise. Data are read and standardised on the cores in any case. Products are of
        true float32 there, never TF32, and ``precision="auto"`` means float32; or of float64 for
        float64 input. The device used is the attribute ``device``.
    device_memory
        Bytes of the device's memory to use; by default 0.8 of what is free.

    Returns
    -------
    xarray.DataArray
        ``(*each, row, column)`` on a Dask array whose chunks are tiles. A column dim of the
        row's name gets ``_2``, and so do its coordinates. float32, or float64 for float64
        and wide integer input. Selecting rows or columns computes only their tiles; a few
        rows are cheaper as ``gram(x.isel(sample=rows), x, ...)``.

    Raises
    ------
    TypeError
        An operand is no DataArray, or was persisted on a cluster.
    SchemaError
        Dims are missing or too many, or those contracted differ in size or labels.
    ValueError
        ``center`` or ``normalize`` is unknown, or there are too few elements to centre.
    MemoryBudgetError
        The budget, or that of the device, holds no tile.
    DeviceError
        There is no torch, no CUDA, or no such device.
    NonFiniteError
        On computing: the data hold NaN or infinity.

    Notes
    -----
    Cost: ``n**2 * S`` operations for a symmetric Gram, twice that for two operands; each
    panel is read once where the budget can hold them all.

    References
    ----------
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> x = xr.DataArray([[1.0, 2.0], [0.0, 1.0]], dims=("sample", "feature"))
    >>> kernel = lk.gram(x, over="feature")
    >>> kernel.dims, kernel.values.tolist()
    (('sample', 'sample_2'), [[5.0, 2.0], [2.0, 1.0]])
    >>> lk.gram(x, over="feature", normalize="cosine").values.round(4).tolist()
    [[1.0, 0.8944], [0.8944, 1.0]]
    """
    return contract(
        as_tensor(x, "x"),
        None if y is None else as_tensor(y, "y"),
        over=dim_names(over),
        each=dim_names(each),
        center=center,
        normalize=normalize,
        precision=precision,
        scale=scale,
        memory=memory,
        device=device,
        device_memory=device_memory,
    )


def contract(
    x: xr.DataArray,
    y: xr.DataArray | None,
    *,
    over: tuple[str, ...],
    each: tuple[str, ...] = (),
    center: str | None,
    normalize: str | None,
    precision: str = "float32",
    scale: float = 1.0,
    links: tuple[Link | None, Link | None] = (None, None),
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return what `gram` does, of tensors; with ``links`` of both, the kernel of what they make."""
    one_of("center", center, (None, *CENTERS))
    one_of("normalize", normalize, (None, *NORMALIZERS))
    one_of("precision", precision, PRECISIONS)
    rows = free_dim(x, "x", over, each)
    columns = rows if y is None else free_dim(y, "y", over, each)
    if y is not None:
        check_shared(x, y, (*over, *each))
    degrees = degrees_of_freedom(x, over, center)
    place = engine.as_device(device, device_memory)
    options: dict[str, Any] = {
        "over": over,
        "each": each,
        "center": center,
        "cosine": normalize == "cosine" or links[0] is not None,
        "keeps_moments": links[0] is not None,
    }
    left = engine.Operand(x, rows=rows, **options)
    right = None if y is None else engine.Operand(y, rows=columns, **options)
    series = series_of(*links, degrees, cosine=normalize == "cosine")
    held = 0 if series is None else engine.table_bytes(left, right)
    sinks = {"sink": engine.WRITTEN_BYTES, "device_sink": engine.SERIES_BYTES if series else 0}
    plan = engine.make_plan(left, right, memory=memory, held=held, device=place, **sinks)
    # Apart from the operands, so that kernels which differ by it alone share cached panels.
    factor = scale / degrees if normalize == "count" and series is None else scale
    contraction = engine.Contraction(left, right, plan, factor, series=series)
    contraction = contraction.at_precision(precision)
    attrs = {
        "over": list(over),
        "center": center or "none",
        "normalize": normalize or "none",
        "contracted": prod(x.sizes[dim] for dim in over),
    }
    return labelled(contraction, x, y, each=each, rows=rows, columns=columns, attrs=attrs)


def labelled(
    contraction: engine.Contraction,
    x: xr.DataArray,
    y: xr.DataArray | None,
    *,
    each: tuple[str, ...],
    rows: str,
    columns: str,
    attrs: Mapping[str, Any],
) -> xr.DataArray:
    """Return the lazy kernel of a contraction, with the labels of the tensors it is of."""
    series = contraction.series
    out = xr.DataArray(
        engine.gram_array(contraction),
        dims=(*each, rows, second(columns) if columns == rows else columns),
        coords=kernel_coords(x, x if y is None else y, each, rows, columns),
        name="gram",
        attrs=dict(attrs)
        | {"precision": contraction.precision}
        | (described(series) if series else {})
        | contraction.made_on,
    )
    # Plain .to_zarr writes one stored chunk a Dask chunk, checksummed and uncompressed: fast.
    out.encoding = {"compressors": (Crc32cCodec(),)}
    return out
