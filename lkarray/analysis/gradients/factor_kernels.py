"""Plain kernels from stored factors: the ghost dot product (Anonymous 2026, A.2.8).

For a gradient that is an outer product ``b a'``, the inner product of two examples' gradients is
``(a . a') (b . b')``: two thin Grams of the engine, multiplied element by element.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.errors import SchemaError
from lkarray.kernels.gram import gram
from lkarray.schema import EXAMPLE, FACTOR, PART, TENSOR, TIME, second
from lkarray.tensors import Losses

_ELEMENT = FACTOR.dims[-1]
_MADE = ("device", "precision")  # attributes that say where and how products were made


def holds_factors(G: Any) -> bool:
    """Say whether something holds factors instead of gradients."""
    if isinstance(G, xr.DataArray):
        return G.name == FACTOR.name
    return isinstance(G, (xr.Dataset, xr.DataTree)) and FACTOR.name in G.data_vars


def factor_kernel(
    G: Losses,
    y: Losses | None,
    *,
    root: xr.Variable | None,
    path: bool,
    cosine: bool,
    **options: Any,
) -> xr.DataArray:
    """Return the LGK of each time, or summed over ``path``; cosines of that sum.

    ``root`` is the root of the weight of each time. Cost: ``n**2`` times the stored elements for
    each time, and a product of two tiles for each factored tensor. Tiles of all times are held
    while they are added.
    """
    x, other = _factors(G, "G"), None if y is None else _factors(y, "y")
    each = [TIME] if TIME in x[FACTOR.name].dims else []
    total: xr.DataArray | None = None
    made: dict[str, Any] = {}
    for term in _terms(x, other):
        product: xr.DataArray | None = None
        for a, b in term:
            thin = gram(a, b, over=_ELEMENT, each=each, **options)
            made = {k: v for k, v in thin.attrs.items() if "device" in thin.attrs and k in _MADE}
            product = thin if product is None else product * thin
        assert product is not None
        total = product if total is None else total + product
    assert total is not None
    if root is not None:
        total = total * xr.Variable(root.dims, root.values**2).astype(total.dtype)
    if path and each:
        total = total.sum(TIME)
    if cosine:
        total = _normalised(total, x, x if other is None else other, root, symmetric=other is None)
    total = total.assign_attrs(over=[*(each if path else []), "param"], contracted="factors")
    return total.assign_attrs(made)


def _factors(G: Losses, name: str) -> xr.Dataset:
    if isinstance(G, xr.DataTree):
        G = G.to_dataset()
    if not isinstance(G, xr.Dataset) or PART not in G.dims:
        raise SchemaError(
            f"{name}: factors are told apart by coordinates on 'part', which are not here; pass "
            "the Dataset that lk.gradient_factors returned"
        )
    missing = [key for key in (FACTOR.name, TENSOR, "role", "start", "stop") if key not in G]
    if missing or not G.sizes[PART]:
        raise SchemaError(
            f"{name} lacks {missing or 'parts'}; pass the Dataset that lk.gradient_factors returned"
        )
    x = G[FACTOR.name]
    if not {EXAMPLE, _ELEMENT} <= set(x.dims) or x.dtype.kind not in "fiub":
        raise SchemaError(
            f"{name}: variable 'factor' has dims {x.dims} and is {x.dtype}; expected real numbers "
            f"with {EXAMPLE!r} and {_ELEMENT!r}: select times and examples only"
        )
    return G


def _stretches(G: xr.Dataset) -> list[tuple[str, str, slice]]:
    """Return name, role and elements of each part."""
    columns = (G[key].values.tolist() for key in (TENSOR, "role", "start", "stop"))
    return [(str(n), str(r), slice(a, b)) for n, r, a, b in zip(*columns, strict=True)]


def _terms(
    x: xr.Dataset, y: xr.Dataset | None
) -> Iterator[list[tuple[xr.DataArray, xr.DataArray | None]]]:
    """Yield the pairs of operands whose Grams are multiplied: one pair, or two for a product."""
    if y is not None and _stretches(x) != _stretches(y):
        raise SchemaError(
            "G and y are factors of other tensors, or were made in another form; make both with "
            "the same params="
        )
    pairs: dict[str, list[tuple[xr.DataArray, xr.DataArray | None]]] = {}
    for name, _, place in _stretches(x):
        operands = [
            None if of is None else of[FACTOR.name].isel({_ELEMENT: place}) for of in (x, y)
        ]
        assert operands[0] is not None
        pairs.setdefault(name, []).append((operands[0], operands[1]))
    yield from pairs.values()


def _norm(G: xr.Dataset, root: xr.Variable | None) -> xr.DataArray:
    """Return the norm of each example's path features, float64."""
    products = []
    for term in _terms(G, None):
        squares = [(factor.astype(np.float64) ** 2).sum(_ELEMENT) for factor, _ in term]
        products.append(functools.reduce(operator.mul, squares))
    total = functools.reduce(operator.add, products)
    if root is not None:
        total = total * xr.Variable(root.dims, root.values**2)
    if TIME in total.dims:
        total = total.sum(TIME)
    return total**0.5


def _normalised(
    k: xr.DataArray, x: xr.Dataset, y: xr.Dataset, root: xr.Variable | None, *, symmetric: bool
) -> xr.DataArray:
    """Return cosines: 0 where a norm is 0, clipped, with a diagonal of exactly 1."""
    rows, columns = k.dims
    scales = []
    for of, dim in ((x, rows), (y, columns)):
        norm = _norm(of, root).variable.chunk({EXAMPLE: k.chunksizes[dim]})
        inverse = (1 / norm).where(norm > 0, 0.0).astype(k.dtype)
        scales.append(xr.Variable((dim,), inverse.data))
    out = (k * scales[0] * scales[1]).clip(-1, 1)
    if symmetric and columns == second(str(rows)):
        own = xr.Variable((rows,), da.arange(k.sizes[rows], chunks=k.chunksizes[rows]))
        other = xr.Variable((columns,), da.arange(k.sizes[columns], chunks=k.chunksizes[columns]))
        unit = (scales[0] > 0).astype(k.dtype)
        out = out.where(own != other, unit)
    return out.assign_attrs(k.attrs)
