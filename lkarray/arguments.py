"""Checks of arguments, in one place: what each may be follows from its annotation.

``@checked()`` in front of a public function refuses what its annotations of plain kinds
(``int``, ``float``, ``bool``, ``str``, labelled data, several of these) do not allow, before any
work and by the argument's name, and hands over Python's own numbers for NumPy's. What else must
hold of a number stands beside it: ``@checked(k=COUNT, level=SHARE)``.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar, cast

import xarray as xr

from lkarray.values import (
    byte_count,
    integer,
    kind_of,
    mapping,
    number,
    plain_number,
    real,
    require_real,
    several,
    short,
    text,
    truth,
)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Limits:
    """What must hold of a number, besides that it is one.

    Attributes
    ----------
    least, most
        The smallest and the largest that is allowed.
    above, below
        What it must be above and below.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, name: str, value: float) -> None:
        """Raise ``ValueError``, with the name, unless a number is within the limits."""
        if wrong := self._broken(value):
            raise ValueError(f"{name} must be {' and '.join(wrong)}, not {short(value)}")

    def check_float(self, name: str, value: object) -> float:
        """Return a finite number within the limits as Python's own, or raise and name it."""
        finite = real(name, value)
        if not math.isfinite(finite) or self._broken(finite):
            every = " and ".join(self._broken(math.nan))
            expected = "a positive number" if self == POSITIVE else f"a finite number of {every}"
            raise ValueError(f"{name} must be {expected}, not {short(value)}")
        return finite

    def _broken(self, value: float) -> list[str]:
        """Return in words which of the limits a number is not within; NaN is within none."""
        return [
            f"{word} {limit}"
            for word, limit, holds in (
                ("at least", self.least, operator.ge),
                ("at most", self.most, operator.le),
                ("above", self.above, operator.gt),
                ("below", self.below, operator.lt),
            )
            if limit is not None and not holds(value, limit)
        ]


#: How many of something that is not stored; more would be a mistake, and fill the memory.
COUNT = Limits(least=1)
NATURAL = Limits(least=0)
REPEATS = Limits(least=1, most=100_000)
#: Strictly between 0 and 1, as the level of an interval is.
SHARE = Limits(above=0, below=1)
POSITIVE = Limits(above=0)


def checked(**limits: Limits | None) -> Callable[[F], F]:
    """Return a decorator of functions whose arguments are checked when they are called.

    Parameters
    ----------
    **limits
        What else must hold of numbers, by the names of the arguments. ``None`` leaves an argument
        to the function, which has more to say about it.

    Returns
    -------
    Callable
        The decorator. The function gets ``int``, ``float``, ``bool`` and tuples, whatever kinds
        of numbers and iterables were given.

    Raises
    ------
    TypeError, ValueError
        On calling: an argument is of another kind, or outside its limits.
    MemoryBudgetError
        On calling: ``memory`` is no number of bytes.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        checks = {
            name: check
            for name, parameter in signature.parameters.items()
            if limits.get(name, NATURAL) is not None
            and (check := _check_of(name, parameter.annotation)) is not None
        }

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own words for a missing argument
            for name, value in bound.arguments.items():
                if name in checks:
                    bound.arguments[name] = value = checks[name](name, value)
                limit = limits.get(name)
                if limit is not None and isinstance(value, int | float):
                    limit.check(name, value)
            return function(*bound.args, **bound.kwargs)

        return cast(F, call)

    return decorate


def check_fields(settings: Any, **limits: Limits) -> None:
    """Check the fields of a frozen dataclass as `checked` does arguments."""
    for field in fields(settings):
        name, check = field.name, _check_of(field.name, field.type)
        if field.type == "float" and name in limits:
            check = limits[name].check_float
        if check is None:
            continue
        value = check(name, getattr(settings, name))
        object.__setattr__(settings, name, value)
        if name in limits:
            limits[name].check(name, value)


def at_least(name: str, value: object, least: int) -> int:
    """Return ``value`` as an int of at least ``least``, or raise and name it."""
    number = integer(name, value)
    Limits(least=least).check(name, number)
    return number


Check = Callable[[str, Any], Any]


def _memory(name: str, value: object) -> object:
    if value is not None:
        byte_count(name, value)
    return plain_number(value)


def _labelled(*kinds: type) -> Check:
    names = [kind.__name__ for kind in kinds]
    expected = f"an xarray.{names[0]}"
    if len(names) > 1:
        expected = f"a {', '.join(names[:-1])} or {names[-1]}"

    def check(name: str, value: object) -> object:
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")
        if isinstance(value, xr.DataArray) and len(kinds) < len(_LABELLED["Losses"]):
            require_real(name, value)
        if isinstance(value, xr.Dataset):
            for variable, each in value.data_vars.items():
                if each.dtype.kind == "c":
                    require_real(f"{name}: variable {variable!r}", each)
        return value

    return check


def _several(each: Check, what: str) -> Check:
    def check(name: str, value: object) -> object:
        if isinstance(value, str | Mapping | xr.Dataset | xr.DataTree):
            raise TypeError(f"{name} must be {what}, not {kind_of(value)}")
        return tuple(each(f"{name}[{at}]", part) for at, part in enumerate(several(name, value)))

    return check


def _pair(each: Check, what: str) -> Check:
    parts_of = _several(each, what)

    def check(name: str, value: object) -> object:
        parts = cast(tuple[Any, ...], parts_of(name, value))
        if len(parts) != 2:
            raise ValueError(f"{name} must be {what}, not {len(parts)} of them")
        return parts

    return check


#: Checks of single values, by the classes that tell which one is meant.
_PLAIN: dict[str, tuple[Check, str]] = {
    "int": (integer, "an integer"),
    "float": (number, "a number"),
    "bool": (truth, "True or False"),
    "str": (text, "a string"),
    "Iterable[str]": (_several(text, "strings"), "strings"),
    "Sequence[str]": (_several(text, "strings"), "strings"),
    "Iterable[int]": (_several(integer, "integers"), "integers"),
    "Sequence[float]": (_several(number, "numbers"), "numbers"),
    "tuple[int, int]": (_pair(integer, "two integers"), "two integers"),
    "tuple[float, float]": (_pair(number, "two numbers"), "two numbers"),
}
_LABELLED: dict[str, tuple[type, ...]] = {
    "xr.DataArray": (xr.DataArray,),
    "xr.Dataset": (xr.Dataset,),
    "xr.DataTree": (xr.DataTree,),
    "Losses": (xr.DataTree, xr.Dataset, xr.DataArray),
}


def _check_of(name: str, annotation: object) -> Check | None:
    """Return the check that an annotation asks for; none where it names other kinds."""
    if name in ("memory", "device_memory"):
        return _memory
    words = str(annotation).replace("Params", "str | Iterable[str] | None").split(" | ")
    optional, words = "None" in words, [word for word in words if word != "None"]
    if words and set(words) <= set(_LABELLED):
        check = _labelled(*dict.fromkeys(kind for word in words for kind in _LABELLED[word]))
    elif len(words) == 1 and words[0].startswith("Mapping["):
        check = mapping
    elif words and set(words) <= set(_PLAIN):
        check = _PLAIN[words[0]][0] if len(words) == 1 else _either(words)
    else:
        return None
    return (
        (lambda name, value: None if value is None else check(name, value)) if optional else check
    )


def _either(words: list[str]) -> Check:
    """Return the check of several kinds: that of the one which a value looks like."""

    def check(name: str, value: object) -> object:
        if isinstance(value, str):
            kind = "str" if "str" in words else words[0]
        elif isinstance(value, Iterable) and getattr(value, "ndim", True):
            kind = next((word for word in words if "[" in word), "")
        else:
            kind = next((word for word in words if word in ("int", "float", "bool")), "")
        if not kind:
            names = " or ".join(_PLAIN[word][1] for word in words)
            raise TypeError(f"{name} must be {names}, not {kind_of(value)}")
        return _PLAIN[kind][0](name, value)

    return check
