"""`gram`: the engine's front door, labels in and labels out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from zarr.codecs import Crc32cCodec

from lkarray import engine
from lkarray.arguments import checked, one_of
from lkarray.errors import SchemaError
from lkarray.results import Result, as_array
from lkarray.schema import CHAIN, GRADIENT, LOSS, second

CENTERS = ("pooled", "chain")
PRECISIONS = ("float32", "auto")
_NORMALIZERS = (None, "count", "cosine")


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
        of each chain.
    normalize
        ``None``; ``"count"`` divides by the degrees of freedom (S uncentred, S - 1 pooled,
        S - C with C chains); ``"cosine"`` by both norms, 0 where a norm is 0.
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
        The budget holds no tile.
    NonFiniteError
        On computing: the data hold NaN or infinity.

    Notes
    -----
    Cost: ``n**2 * S`` operations for a symmetric Gram, twice that for two operands; each
    panel is read once where the budget can hold them all.
    """
    x, y = as_tensor(x, "x"), None if y is None else as_tensor(y, "y")
    over, each = _names(over), _names(each)
    one_of("center", center, (None, *CENTERS))
    one_of("normalize", normalize, _NORMALIZERS)
    one_of("precision", precision, PRECISIONS)
    rows = free_dim(x, "x", over, each)
    columns = rows if y is None else free_dim(y, "y", over, each)
    if y is not None:
        check_shared(x, y, (*over, *each))
    degrees = degrees_of_freedom(x, over, center)
    options: dict[str, Any] = {
        "over": over,
        "each": each,
        "center": center,
        "cosine": normalize == "cosine",
    }
    left = engine.Operand(x, rows=rows, **options)
    right = None if y is None else engine.Operand(y, rows=columns, **options)
    plan = engine.make_plan(left, right, memory=memory, sink=engine.WRITTEN_BYTES)
    factor = scale / degrees if normalize == "count" else scale
    contraction = engine.Contraction(left, right, plan, factor).at_precision(precision)
    data = engine.gram_array(contraction)
    out = xr.DataArray(
        data,
        dims=(*each, rows, second(columns) if columns == rows else columns),
        coords=kernel_coords(x, x if y is None else y, each, rows, columns),
        name="gram",
        attrs={
            "over": list(over),
            "center": center or "none",
            "normalize": normalize or "none",
            "contracted": prod(x.sizes[dim] for dim in over),
            "precision": contraction.precision,
        },
    )
    # Plain .to_zarr writes one stored chunk a Dask chunk, checksummed and uncompressed: fast.
    out.encoding = {"compressors": (Crc32cCodec(),)}
    return out


def as_tensor(x: Any, name: str) -> xr.DataArray:
    """Return the tensor that a node or a Dataset holds, or the DataArray itself."""
    return as_array(x, name, prefer=(LOSS.name, GRADIENT.name))


def free_dim(x: xr.DataArray, name: str, over: tuple[str, ...], each: tuple[str, ...]) -> str:
    """Return the one dim of ``x`` that is neither contracted nor kept in step."""
    if not isinstance(x, xr.DataArray):
        raise TypeError(f"{name} must be an xarray.DataArray, not {type(x).__name__}")
    if not over:
        raise SchemaError("over names no dim; name at least one to contract")
    missing = [dim for dim in (*over, *each) if dim not in x.dims]
    if missing:
        raise SchemaError(
            f"{name} has dims {x.dims}, which lack {missing} of over={over}"
            f"{f' and each={each}' * bool(each)}; rename or select"
        )
    if set(over) & set(each):
        raise SchemaError(f"{sorted(set(over) & set(each))} stand in both over and each")
    free = [str(dim) for dim in x.dims if dim not in over and dim not in each]
    if len(free) != 1:
        raise SchemaError(
            f"{name} has dims {x.dims}: contracting {over} leaves {free}, and it must leave one; "
            "put dims into over= or each=, select with .isel, or .stack them into one"
        )
    if x.dtype.kind not in "fiub":
        raise SchemaError(f"{name} is {x.dtype}; a Gram needs real numbers")
    empty = [dim for dim in x.dims if x.sizes[dim] == 0]
    if empty:
        raise SchemaError(f"{name} is empty along {empty}; there is nothing to contract")
    return free[0]


def check_shared(
    x: xr.DataArray,
    y: xr.DataArray,
    dims: tuple[str, ...],
    *,
    names: tuple[str, str] = ("x", "y"),
) -> None:
    """Raise unless two tensors have the same entries along some dims; name the first difference."""
    both = " and ".join(names)
    for dim in dims:
        missing = [name for name, each in zip(names, (x, y), strict=True) if dim not in each.dims]
        if missing:
            raise SchemaError(f"{missing[0]} has no dim {dim!r}, which {both} must share")
        if x.sizes[dim] != y.sizes[dim]:
            raise SchemaError(
                f"{both} have {x.sizes[dim]} and {y.sizes[dim]} entries along {dim!r}; they must "
                f"be the same {dim}s: select with .sel first"
            )
        if dim in x.indexes and dim in y.indexes and not x.indexes[dim].equals(y.indexes[dim]):
            differ = np.asarray(x.indexes[dim] != y.indexes[dim])
            first = int(np.argmax(differ))
            raise SchemaError(
                f"{both} differ along {dim!r}, first at position {first}: "
                f"{x.indexes[dim][first]} and {y.indexes[dim][first]}; align them with "
                "xr.align or .sel first"
            )


def degrees_of_freedom(x: xr.DataArray, over: tuple[str, ...], center: str | None) -> int:
    """Return what a covariance divides by; raise if too few elements are left to centre."""
    count = prod(x.sizes[dim] for dim in over)
    if center is None:
        return count
    means = 1
    if center == "chain":
        if CHAIN not in over:
            raise SchemaError("center='chain' needs the dim 'chain' in over")
        means = x.sizes[CHAIN]
    if count - means < 1:
        raise ValueError(
            f"a covariance needs more than {means} elements along {over}, found {count}; "
            "take more draws"
        )
    return count - means


def nan_for_infinite(x: xr.DataArray) -> xr.DataArray:
    """Return ``x`` with NaN for infinity, so that what follows is NaN without NumPy's warnings."""
    return x.where(abs(x) != np.inf)


def sample_coords(x: xr.DataArray | xr.Dataset, *dims: str) -> dict[Hashable, xr.Variable]:
    """Return the coordinates of ``x`` along ``dims`` alone, and its scalars, each in one chunk."""
    found = {}
    for name, coord in x.coords.items():
        if set(coord.dims) <= set(dims):
            variable = coord.variable.drop_encoding()
            found[name] = variable.chunk(-1) if variable.chunks is not None else variable
    return found


def kernel_coords(
    x: xr.DataArray, y: xr.DataArray, each: tuple[str, ...], rows: str, columns: str
) -> dict[Hashable, xr.Variable]:
    """Return the coordinates of the result: those of x, and those of y's columns, renamed.

    A column coordinate takes the ``_2`` of its dim, or gets one where x has its name too.
    """
    coords = sample_coords(x, *each, rows)
    other = sample_coords(y, *each, columns)
    for name, variable in list(coords.items()):
        if not variable.dims and not (name in other and variable.identical(other[name])):
            del coords[name]  # true of one side only
    taken = set(coords)
    for name, variable in other.items():
        if columns in variable.dims:
            new = second(name) if columns == rows or name in taken else name
            if new in coords:
                raise SchemaError(
                    f"the column coordinate {name!r} would be called {new!r}, which x has already; "
                    f"rename one, for example x.rename({new}=...)"
                )
            dims = [
                second(dim) if columns == rows and dim == columns else dim for dim in variable.dims
            ]
            coords[new] = xr.Variable(dims, variable.data, variable.attrs)
    return coords


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
