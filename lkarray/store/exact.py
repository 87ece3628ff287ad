"""Results as Zarr and xarray can keep them, so that they come back as they were.

Text of a fixed length has no specification in Zarr and is stored as text of any length; dates of
another unit than nanoseconds and numbers of the other byte order come back changed. Where it
differs, the dtype is noted beside the array (`NOTED`) and taken again on reading. What would not
be read back as it is (labels of None, attributes by which xarray decodes) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from lkarray.errors import SchemaError
from lkarray.store.arrays import CODECS
from lkarray.store.names import SAVED, check_name
from lkarray.store.seals import SEAL

#: Attribute of an array: the dtype that it had, if it is stored as another.
NOTED = "lkarray_dtype"

#: Attributes by which xarray changes values on reading.
_DECODED = {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "dtype"}
_TIME = {"units", "calendar"}


def storable(ds: xr.Dataset) -> tuple[xr.Dataset, dict[str, dict[str, Any]]]:
    """Return a Dataset as it can be stored, and the encoding to store it with.

    Raises
    ------
    SchemaError
        A label is None or of a kind that cannot be stored, or an attribute is.
    GroupError
        A variable's name is no name in a store.
    """
    ds = ds.drop_encoding()
    ds.attrs = plain_attrs(ds.attrs, "the result")
    encoding: dict[str, dict[str, Any]] = {}
    for name in list(ds.variables):
        check_name(name, "the name of a variable,")
        if isinstance(ds.indexes.get(name), pd.MultiIndex):
            raise SchemaError(
                f"{name!r} is an index of several levels, which Zarr cannot hold; take it apart: "
                f"x.reset_index({name!r})"
            )
        variable = _storable(str(name), ds.variables[name], is_index=name in ds.dims)
        adding = ds.assign_coords if name in ds.coords else ds.assign
        ds = adding({name: variable})
        encoding[str(name)] = {"compressors": CODECS}
    return ds, encoding


def _storable(name: str, variable: xr.Variable, *, is_index: bool) -> xr.Variable:
    dtype, data = variable.dtype, variable.data
    attrs = checked_attrs(variable.attrs, name)
    if not isinstance(dtype, np.dtype) or dtype.kind == "O":
        data = np.asarray(variable.values)  # of pandas' own dtypes too
        dtype = data.dtype
    if dtype.kind in "UOT":
        data = _text(name, np.asarray(variable.values))
        data = data if is_index else data.astype(np.dtypes.StringDType())
    elif dtype.kind in "Mm":
        if taken := sorted(_TIME & set(attrs)):
            raise SchemaError(f"{name!r} holds times and has the attributes {taken}; drop these")
    elif dtype.kind not in "fiubc":
        raise SchemaError(
            f"{name!r} has dtype {dtype}, which cannot be stored; make it numbers, text or dates"
        )
    if dtype.kind in "UO" or not dtype.isnative or (dtype.kind in "Mm" and dtype != _nano(dtype)):
        attrs[NOTED] = dtype.str
    return xr.Variable(variable.dims, data, attrs)


def _nano(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}8[ns]")


def _text(name: str, values: np.ndarray) -> np.ndarray:
    """Return text as objects; anything else among it is refused, with its place."""
    texts = values.astype(object)
    for place, value in enumerate(texts.ravel().tolist()):
        if not isinstance(value, str):
            at = np.unravel_index(place, texts.shape)
            where = f" at position {', '.join(map(str, at))}" if at else ""
            raise SchemaError(
                f"{name!r} holds {value!r}{where} among its text, which cannot be stored; give it "
                "a text of its own, as 'none', or make all of them numbers"
            )
    return texts


def checked_attrs(attrs: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Return a variable's attributes as they are stored.

    Raises
    ------
    SchemaError
        One cannot be stored, or would change the values when they are read.
    """
    plain = plain_attrs(attrs, repr(name))
    bad = sorted(_DECODED & set(plain))
    if " since " in str(plain.get("units", "")):
        bad.append("units")
    if bad:
        raise SchemaError(
            f"{name!r} has the attributes {bad}, by which xarray would change its values when they "
            "are read again; rename or drop them"
        )
    return plain


def plain_attrs(attrs: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Return attributes as JSON holds them: arrays and tuples as lists.

    Raises
    ------
    SchemaError
        One is nothing that JSON holds.
    """
    plain = {}
    for key, value in attrs.items():
        if key in (SEAL, SAVED, NOTED):
            continue  # of the store that it was read from
        if not isinstance(key, str):
            raise SchemaError(f"{what} has an attribute named {key!r}; names must be text")
        try:
            plain[key] = json.loads(json.dumps(value, default=_plain))
        except (TypeError, ValueError) as error:
            raise SchemaError(
                f"attribute {key!r} of {what} cannot be stored ({error}); drop it, or make it text"
            ) from None
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def restored(ds: xr.Dataset) -> xr.Dataset:
    """Return a stored result as it was given, without what lkarray noted of it."""
    for name in list(ds.variables):
        variable = ds.variables[name]
        if NOTED in variable.attrs:
            attrs = {key: value for key, value in variable.attrs.items() if key != NOTED}
            data = variable.data.astype(np.dtype(variable.attrs[NOTED]))
            adding = ds.assign_coords if name in ds.coords else ds.assign
            ds = adding({name: xr.Variable(variable.dims, data, attrs)})
    ds.attrs = {key: value for key, value in ds.attrs.items() if key not in (SEAL, SAVED)}
    return ds


def require_exact(stored: xr.Dataset, given: xr.Dataset) -> None:
    """Raise `SchemaError` unless the labels that were stored read back as they were given."""
    for name, want in given.coords.items():
        got = stored.coords.get(name)
        if got is None or got.dtype != want.dtype or not got.variable.equals(want.variable):
            raise SchemaError(
                f"the labels {name!r} of dtype {want.dtype} are not read back as they are; make "
                "them numbers, text or dates near today, or drop them"
            )
