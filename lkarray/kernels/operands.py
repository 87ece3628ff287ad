"""A labelled tensor before it is multiplied: dims, checks, degrees of freedom, the operand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import xarray as xr

from lkarray.engine import Operand, Series
from lkarray.errors import SchemaError
from lkarray.kernels.estimators import estimated, refuse_by_draw
from lkarray.results import as_array
from lkarray.schema import CHAIN, DRAW, FEATURE, GRADIENT, LOSS, POSTERIOR
from lkarray.tensors import Losses, contracted
from lkarray.values import one_of

CENTERS = ("pooled", "chain", "draw")
KERNELS = ("correlation", "covariance")
NORMALIZERS = ("count", "cosine")
PRECISIONS = ("float32", "auto")


def as_tensor(x: Any, name: str) -> xr.DataArray:
    """Return the tensor that a node or a Dataset holds, or the DataArray itself."""
    return as_array(x, name, prefer=(LOSS.name, GRADIENT.name, FEATURE.name))


def dim_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


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
    if center == "draw":
        if set(over) != set(POSTERIOR):
            raise SchemaError(f"center='draw' needs over={POSTERIOR}, not {over}")
        means = x.sizes[DRAW]
        if x.sizes[CHAIN] < 2:
            raise ValueError(
                "center='draw' is about the chains' mean at each draw, and there is one chain; "
                "take more, or center='pooled'"
            )
    if count - means < 1:
        raise ValueError(
            f"a covariance needs more than {means} elements along {over}; there are {count}, "
            "take more draws"
        )
    return count - means


def centring(x: xr.DataArray, center: str) -> str | None:
    """Return where means of a tensor are taken: as asked, and of features nowhere."""
    return center if contracted(x) == POSTERIOR else None


def kernel_divisor(x: xr.DataArray, center: str) -> int:
    """Return what a covariance of losses divides by; 1 of features, whose kernel is the product."""
    over = contracted(x)
    return degrees_of_freedom(x, over, center) if over == POSTERIOR else 1


def kernel_operand(losses: Losses, kernel: str, center: str) -> tuple[xr.DataArray, Operand, float]:
    """Return the tensor, its operand, and the factor of every entry of one of `KERNELS`."""
    x, operand, scale, _ = estimated_operand(losses, kernel, center, "sample")
    return x, operand, scale


def estimated_operand(
    losses: Losses, kernel: str, center: str, estimator: str, *, name: str = "losses"
) -> tuple[xr.DataArray, Operand, float, Series | None]:
    """Return the same, and what makes a kernel of losses of the correlations of outcomes."""
    one_of("kernel", kernel, KERNELS)
    one_of("center", center, CENTERS)
    x, link = estimated(losses, estimator, name=name)
    refuse_by_draw(link, center)
    over = contracted(x)
    rows = free_dim(x, name, over, ())
    degrees = kernel_divisor(x, center)
    cosine = kernel == "correlation"
    series = None if link is None else Series(link, link, degrees, cosine)
    options: dict[str, Any] = {"over": over, "each": (), "rows": rows}
    options |= {"center": centring(x, center), "cosine": cosine or link is not None}
    scale = 1.0 if cosine or link is not None else 1 / degrees
    return x, Operand(x, **options, keeps_moments=link is not None), scale, series


def shared_operands(
    tensors: Sequence[xr.DataArray], center: str, normalize: str, estimator: str
) -> list[tuple[xr.DataArray, Operand, float, Series | None]]:
    """Return `estimated_operand` of tensors whose kernels are multiplied: of the same samples."""
    one_of("normalize", normalize, NORMALIZERS)
    kernel = "correlation" if normalize == "cosine" else "covariance"
    made = [
        estimated_operand(x, kernel, center, estimator, name="b" if i else "a")
        for i, x in enumerate(tensors)
    ]
    first, rows = made[0][0], made[0][1].rows
    for x, operand, *_ in made:
        if operand.rows != rows:
            raise SchemaError(f"a and b must share {rows!r}; b has dims {x.dims}")
        check_shared(first, x, (rows,), names=("a", "b"))
    return made


def nan_for_infinite(x: xr.DataArray) -> xr.DataArray:
    """Return ``x`` with NaN for infinity, so that what follows is NaN without NumPy's warnings."""
    return x.where(abs(x) != np.inf)
