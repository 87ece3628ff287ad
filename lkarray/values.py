"""Checks of single values: each returns one as Python's own, or raises and names the argument."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
from dask.utils import parse_bytes

from lkarray.errors import MemoryBudgetError, SchemaError


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ``ValueError`` unless an option has one of its values."""
    if not isinstance(value, str | bool | int | None) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, not {short(value)}")


def integer(name: str, value: object) -> int:
    """Return an integer as Python's own, or raise and name it."""
    plain = plain_number(value)
    if isinstance(plain, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, not {short(value)}")
    try:
        return operator.index(cast(Any, plain))
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def number(name: str, value: object) -> float:
    """Return a finite real number as Python's own, or raise and name it."""
    finite = real(name, value)
    if not math.isfinite(finite):
        raise ValueError(f"{name} must be a finite number, not {short(value)}")
    return finite


def plain_number(value: object) -> object:
    """Return a number of NumPy's, or one in an array without dims, as Python's own."""
    kinds = np.generic | np.ndarray | xr.DataArray
    if isinstance(value, kinds) and value.ndim == 0 and value.dtype.kind in "biuf":
        return value.item()
    return value


def real(name: str, value: object) -> float:
    """Return a real number, finite or not, as Python's own, or raise and name it."""
    plain = plain_number(value)
    if isinstance(plain, bool | np.bool_) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name} must be a number, not {kind_of(value)}")
    try:
        return float(plain)
    except OverflowError:
        return math.inf


def truth(name: str, value: object) -> bool:
    """Return True or False as Python's own, or raise and name it."""
    plain = plain_number(value)
    whole = isinstance(plain, numbers.Integral) and plain in (0, 1)
    if not isinstance(plain, bool | np.bool_) and not whole:
        raise TypeError(f"{name} must be True or False, not {short(value)}")
    return bool(plain)


def text(name: str, value: object) -> str:
    """Return a string, or raise and name it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {kind_of(value)}")
    return str(value)


def path_like(name: str, value: object) -> Path:
    """Return the path of a file or folder, or raise and name it."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, not {kind_of(value)}")
    path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name} must be the path of a file or folder, not {path!r}")
    return Path(path)


def mapping(name: str, value: object) -> Mapping[Any, Any]:
    """Return a mapping, or raise and name it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, not {kind_of(value)}")
    return value


def several(name: str, value: object) -> tuple[Any, ...]:
    """Return what some iterable holds, which is no string, or raise and name it."""
    if isinstance(value, str | bytes | type) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list, not {kind_of(value)}")
    try:
        return tuple(value)
    except TypeError:  # an array without dims
        raise TypeError(f"{name} must be a list, not one {type(value).__name__}") from None


def array(name: str, value: object) -> np.ndarray:
    """Return an array of labels or numbers, or raise and name it; a tensor may be on any device."""
    try:
        if hasattr(value, "detach") and hasattr(value, "cpu"):  # torch is not loaded to ask
            value = value.detach().cpu()
        if isinstance(value, str | Mapping | set | xr.Dataset | xr.DataTree):
            raise TypeError
        values = np.asarray(value)
        if values.dtype.kind == "O" and values.ndim == 0:
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be an array, or lists that one can be made of, not {kind_of(value)}"
        ) from None
    return values


def real_array(name: str, value: object) -> np.ndarray:
    """Return an array of real numbers, or raise and name it."""
    values = array(name, value)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be real numbers, not {values.dtype}")
    return values


def require_real(name: str, x: xr.DataArray) -> None:
    """Raise ``SchemaError`` unless labelled data are real numbers."""
    if x.dtype.kind not in "fiub":
        raise SchemaError(f"{name} is {x.dtype}, expected real numbers")


def byte_count(name: str, value: object) -> int:
    """Return a number of bytes, from a number or a string such as ``"2 GiB"``.

    Raises
    ------
    TypeError
        It is neither.
    MemoryBudgetError
        It is no finite positive number of bytes.
    """
    try:
        count = int(parse_bytes(value) if isinstance(value, str) else number(name, value))
    except (ValueError, OverflowError):
        raise MemoryBudgetError(
            f"{name} {value!r} is not a number of bytes; use for example '2 GiB'"
        ) from None
    if count <= 0:
        raise MemoryBudgetError(f"{name} must be positive, not {value!r}")
    return count


def kind_of(value: object) -> str:
    """Return what something is, for a message: its value where that is short, else its class."""
    if isinstance(value, str | bool | int | float | None):
        return short(value)
    return type(value).__name__


def short(value: object) -> str:
    """Return a value as it is written, where that is short, else its class."""
    if isinstance(value, np.generic):
        value = value.item()
    shown = repr(value) if isinstance(value, str | bytes | bool | int | float | None) else ""
    return shown if 0 < len(shown) <= 60 else type(value).__name__
