"""One value for each sample, as arrays and as labelled objects, brought into the samples' order.

Whatever takes "one label for each sample", or a second table of the same samples, asks here.
Arrays and lists are taken by position. What carries an index of its own (a DataArray with a
coordinate on its dim, a pandas Series) is taken by that index, or refused: never by position.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from lkarray.errors import SchemaError
from lkarray.schema import RESERVED, SAMPLE
from lkarray.values import array as as_array

_BARE = "pass its values alone (.values) if they are in order already"


def one_each(values: Any, x: xr.DataArray | xr.Dataset, dim: Hashable, *, what: str) -> np.ndarray:
    """Return one value for each entry of ``x`` along ``dim``, in that order; see `aligned`."""
    return aligned(values, x.indexes.get(dim), x.sizes[dim], dim=dim, what=what)


def aligned(values: Any, index: pd.Index | None, n: int, *, dim: Hashable, what: str) -> np.ndarray:
    """Return one value for each of ``n`` entries, in the order of their index.

    Parameters
    ----------
    values
        An array or a list, in order; or a DataArray or Series whose index has the entries' labels,
        in any order, and maybe others.
    index
        Labels of the entries; ``None`` where they are known by position alone. Labelled values
        must then be labelled 0 to ``n`` - 1, in this order: their order alone says nothing.
    n
        Number of entries.
    dim
        What the entries are, for messages.
    what
        What the values are, for messages.

    Returns
    -------
    numpy.ndarray
        Shape ``(n,)``.

    Raises
    ------
    TypeError
        Values are a table rather than one column.
    SchemaError
        There is not one value for each entry, or their indexes do not fit (the message says which).
    """
    if isinstance(values, xr.Dataset | xr.DataTree | pd.DataFrame):
        raise TypeError(
            f"{what} must be one value for each {dim}, not a {type(values).__name__}; pass one "
            "column of it, for example table['label']"
        )
    array = as_array(what, values)
    if array.dtype.kind == "U" and isinstance(values, list | tuple) and array.ndim == 1:
        kept = np.array(values, dtype=object)
        array = array if all(isinstance(v, str) for v in kept) else kept  # NaN is no text
    own = _own_index(values)
    if own is None or array.ndim != 1:
        if array.shape != (n,):
            raise SchemaError(
                f"{what} has shape {array.shape}; expected ({n},), for there are {n} {dim}s: give "
                f"one label for each {dim}, in order"
            )
        return array
    at = positions(own, index, n, dim=dim, what=what)
    return array if at is None else array[at]


def in_order(
    x: xr.DataArray, dim: Hashable, index: pd.Index | None, n: int, *, what: str
) -> xr.DataArray:
    """Return a labelled array with ``n`` entries along ``dim``, in the order of an index.

    Parameters
    ----------
    x
        Taken by position where it, or what it is to fit, has no index along ``dim``.
    dim, index, n, what
        As for `aligned`.

    Raises
    ------
    SchemaError
        Sizes or indexes do not fit.
    """
    own = x.indexes.get(dim)
    if own is not None and index is not None:
        at = positions(own, index, n, dim=dim, what=what)
        return x if at is None else x.isel({dim: at})
    if x.sizes[dim] != n:
        raise SchemaError(f"{what} has {x.sizes[dim]} entries along {dim!r}; expected {n}")
    return x


def squared(kernel: xr.DataArray, what: str) -> xr.DataArray:
    """Return a square kernel with its columns in the order of its rows."""
    rows, columns = kernel.dims
    index, n = kernel.indexes.get(rows), kernel.sizes[rows]
    if index is None and columns in kernel.indexes:
        kernel = kernel.drop_vars([columns])  # of a side without labels, as they are
    return in_order(kernel, columns, index, n, what=f"{columns!r} of {what}")


def items(given: Any, index: pd.Index | None, n: int, *, dim: Hashable, what: str) -> Any:
    """Return things such as images, one for each of ``n`` entries, in the order of an index.

    As `aligned`, but what carries no index of its own is given back as it is.
    """
    own = None
    if isinstance(given, xr.DataArray) and given.ndim:
        own = given.indexes.get(given.dims[0])
    elif isinstance(given, pd.Series):
        own = given.index
    if own is None:
        return given
    at = positions(own, index, n, dim=dim, what=what)
    values = given.values
    return values if at is None else values[at]


def as_columns(values: Mapping[str, Any], *, dim: Hashable) -> dict[str, np.ndarray]:
    """Return several columns of the same entries in one order, that of the first with an index.

    Raises
    ------
    TypeError
        One is a table.
    SchemaError
        Their lengths or indexes do not fit; or indexes are in different orders, and one that has
        none could be in either.
    """
    indexes = {name: index for name, x in values.items() if (index := _own_index(x)) is not None}
    lead = next(iter(indexes), next(iter(values)))
    index, n = indexes.get(lead), np.size(values[lead])
    out = {name: aligned(x, index, n, dim=dim, what=repr(name)) for name, x in values.items()}
    bare = [name for name in values if name not in indexes]
    moved = [name for name, own in indexes.items() if not own.equals(index)]
    if bare and moved:
        raise SchemaError(
            f"{bare[0]!r} has no index, and {lead!r} and {moved[0]!r} have theirs in different "
            f"orders, so that nothing says whose it is in; give it the labels of its {dim}s"
        )
    return out


def given_coords(
    coords: Mapping[str, Any] | None,
    n: int,
    *,
    dim: str = SAMPLE,
    index: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return coordinates given for the ``sample`` dim, or for another, as arrays, index first.

    Those with an index of their own are brought into the order of ``index``, or
    of the index among ``coords``. Where entries are numbered in the order in which they come, only
    an index that says just that is taken, since a shuffled table has one too.

    Raises
    ------
    TypeError
        A coordinate is a table.
    SchemaError
        A coordinate has another length than the observed set, more than one dim, or takes
        the name of a dim or variable; or ``sample`` is not a list of distinct integers.
    """
    out: dict[str, np.ndarray] = {dim: np.arange(n) if index is None else index}
    numbers = as_array(f"coords: {dim!r}", (coords or {}).get(dim, out[dim]))
    known = None
    if numbers.shape == (n,) and not np.array_equal(numbers, np.arange(n)):
        known = pd.Index(numbers)
    for name, values in (coords or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[^\s/.][^\s/]*", name):
            raise SchemaError(
                f"coords: {name!r} must be a string without spaces and slashes, which does not "
                "begin with a dot"
            )
        if name in RESERVED:
            raise SchemaError(f"coords: {name!r} is a name of lkarray itself; choose another")
        if name == dim:
            values = numbers
        array = aligned(values, known, n, dim=dim, what=f"coords[{name!r}]")
        if array.dtype.kind not in "biufUOTM":
            raise SchemaError(f"coords[{name!r}] has dtype {array.dtype}; use numbers or strings")
        if array.dtype.kind == "O" and not all(isinstance(v, str) for v in array):
            raise SchemaError(
                f"coords[{name!r}] mixes kinds or has missing values; use numbers or strings only"
            )
        if array.dtype.kind in "UO":
            array = array.astype(np.dtypes.StringDType())
        out[str(name)] = array
    if out[dim].dtype.kind not in "iu" or len(np.unique(out[dim])) != n:
        raise SchemaError(f"coords[{dim!r}] must be distinct integers, one per {dim}")
    return out


def positions(
    own: pd.Index, index: pd.Index | None, n: int, *, dim: Hashable, what: str
) -> np.ndarray | None:
    """Return where among its own labels the wanted ones are; ``None`` if all are in order."""
    if index is None:
        if len(own) == n and own.equals(pd.RangeIndex(n)):
            return None
        raise SchemaError(
            f"{what} has an index of its own ({_some(own)}), and the {n} {dim}s are known by "
            f"position alone, so that nothing says which is which; {_BARE}"
        )
    require_unique(own, what)
    require_unique(index, f"the index of {dim!r}")
    if own.equals(index):
        return None
    at: np.ndarray = own.get_indexer(index)
    if (at < 0).any():
        absent = index[at < 0]
        raise SchemaError(
            f"{what} has the index {_some(own)}, which lacks {len(absent)} of the {n} {dim}s, the "
            f"first being {absent[:1].tolist()[0]!r}; give it the labels of {dim!r}, or {_BARE}"
        )
    return at


def require_unique(index: pd.Index | None, what: str) -> None:
    """Raise ``SchemaError`` where an index has a value twice, and name one; without one, do not."""
    if index is not None and not index.is_unique:
        value = index[index.duplicated()].tolist()[0]
        raise SchemaError(
            f"{what} has values twice, {value!r} for one, so that it names no entry; "
            "make them distinct, for example with .assign_coords(sample=np.arange(n))"
        )


def coded(values: np.ndarray, *, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values in order, and the number of each entry among them.

    Raises
    ------
    SchemaError
        A value is missing (NaN, None), or they are of kinds that have no order.
    """
    missing = is_missing(values)
    if missing.any():
        raise SchemaError(
            f"{what} is missing for {int(missing.sum())} of {len(values)}, first at position "
            f"{int(missing.argmax())}; leave these out, or give them a label of their own"
        )
    try:
        distinct, codes = np.unique(values, return_inverse=True)
    except TypeError:
        kinds = sorted({type(value).__name__ for value in values.tolist()})
        raise SchemaError(f"{what} mixes {' and '.join(kinds)}; use numbers or strings") from None
    return distinct, codes


def is_missing(values: np.ndarray) -> np.ndarray:
    """Say which values are missing: NaN, None and the like."""
    if values.dtype.kind == "T":  # numpy's text of any length, into which pandas does not look
        if not hasattr(values.dtype, "na_object"):
            return np.zeros(values.shape, bool)
        values = values.astype(object)
    return np.asarray(pd.isna(values))


def _own_index(values: Any) -> pd.Index | None:
    """Return the index that values carry, if they carry one."""
    if isinstance(values, pd.Series):
        return values.index
    if isinstance(values, xr.DataArray) and values.ndim == 1:
        return values.indexes.get(values.dims[0])
    return None


def _some(index: pd.Index) -> str:
    shown = ", ".join(repr(value) for value in index[:3].tolist())
    return f"[{shown}{', ...' if len(index) > 3 else ''}]"
