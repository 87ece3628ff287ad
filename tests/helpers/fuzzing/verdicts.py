"""How a call with an odd argument ends, and what is wrong with that."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

import lkarray as lk
from lkarray.errors import LkarrayError
from tests.helpers.fuzzing.values import PATHS
from tests.helpers.fuzzing.world import Case

PACKAGE = str(Path(lk.__file__).parent)


def contents(store: Path) -> dict[str, bytes]:
    """Return every file of a store but its locks."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if "lock" not in path.name}


#: What an annotation of plain kinds allows, by the classes of values.
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int, np.integer),
    "float": (float, int, np.floating, np.integer),
    "bool": (bool, np.bool_),
    "str": (str,),
    "None": (type(None),),
}


def allowed(case: Case, argument: str, value: object) -> bool:
    """Say whether a value may be taken by what the argument's annotation says of plain kinds."""
    parameter = inspect.signature(case.call).parameters.get(argument)
    words = str(parameter.annotation).split(" | ") if parameter else []
    if not words or not set(words) <= set(_PLAIN):
        return True
    if isinstance(value, np.ndarray | xr.DataArray | torch.Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, int | np.integer) and "bool" in words and value in (0, 1):
        return True
    if isinstance(value, bool | np.bool_) and "bool" not in words:
        return False
    return isinstance(value, tuple(kind for word in words for kind in _PLAIN[word]))


def outcome(case: Case, arguments: Mapping[str, Any]) -> Any:
    """Call, and compute what is lazy; what comes back is comparable."""
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        got = case.call(**arguments)
        if isinstance(got, xr.DataArray | xr.Dataset):
            got = got.compute()
        elif isinstance(got, xr.DataTree):
            got = xr.DataTree.from_dict({n.path: n.to_dataset().compute() for n in got.subtree})
        elif isinstance(got, Figure):
            got.draw_without_rendering()
            got = None
    return got


def fault(case: Case, argument: str, value: object) -> str | None:
    """Return what is wrong with how a call with an odd argument ends, or ``None``."""
    arguments = dict(case.arguments) | {argument: value}
    try:
        outcome(case, arguments)
    except (ValueError, TypeError, LkarrayError) as error:
        return _unnamed(case, argument, value, error)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    if not allowed(case, argument, value):
        return "is taken"
    return None


def _unnamed(case: Case, argument: str, value: object, error: Exception) -> str | None:
    """Return what is wrong with an error: it is another's, or does not name the argument."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_code.co_filename if last else ""
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if not where.startswith(PACKAGE):
        return f"is not refused by lkarray: {text} ({Path(where).name})"
    words = [argument, *_words(case.arguments.get(argument)), *case.also.get(argument, ())]
    if isinstance(value, str | Path) and argument in PATHS:
        words += [str(value)]
    if isinstance(value, xr.DataArray | xr.Dataset | xr.DataTree):
        words += list(case.arguments)  # two that do not fit each other
    if not any(re.search(rf"(?<!\w){re.escape(str(word))}s?(?!\w)", str(error)) for word in words):
        return f"does not name it: {text}"
    return None


def _words(base: Any) -> Iterator[str]:
    """Yield the names of what is in labelled data, by which an error may name its place."""
    if isinstance(base, xr.DataTree):
        for name, child in base.children.items():
            yield str(name)
            yield from _words(child.to_dataset())
    if isinstance(base, xr.Dataset):
        yield from map(str, base.variables)
    if isinstance(base, xr.DataArray):
        yield from map(str, (base.name, *base.coords))
    if isinstance(base, xr.DataArray | xr.Dataset):
        yield from map(str, base.sizes)
    if isinstance(base, Path):
        yield str(base)
