"""What influence is added up by: groups of examples, of parameters and of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lkarray.labels import aligned, coded
from lkarray.schema import EPOCH, EXAMPLE, GROUP, LAYER, PARAM, TIME, WINDOW
from lkarray.training.choosing import select
from lkarray.training.trace import Trace
from lkarray.values import array, integer, several


@dataclass(frozen=True)
class Groups:
    """A grouping along one dim.

    Attributes
    ----------
    dim
        Of the result.
    labels
        Of the groups, in order.
    members
        Of each group: example or tensor indices, ascending; of a window its first step and the
        one beyond its last.
    """

    dim: str
    labels: np.ndarray
    members: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def overlapping(self) -> list[str]:
        """Labels of two groups that share a member; empty if none do."""
        if self.dim in (EPOCH, WINDOW):
            order = sorted(range(len(self)), key=lambda i: tuple(self.members[i]))
            for i, j in pairwise(order):
                if self.members[j][0] < self.members[i][1]:
                    return [str(self.labels[i]), str(self.labels[j])]
            return []
        owner: dict[int, int] = {}
        for i, members in enumerate(self.members):
            for member in members.tolist():
                if member in owner:
                    return [str(self.labels[owner[member]]), str(self.labels[i])]
                owner[member] = i
        return []

    def covers(self, members: Sequence[int] | np.ndarray) -> bool:
        """Say whether every member is in a group."""
        if self.dim in (EPOCH, WINDOW):
            seen = np.concatenate([np.arange(a, b) for a, b in self.members])
        else:
            seen = np.concatenate(self.members)
        return bool(np.isin(members, seen).all())


def groupings(
    groups: Mapping[str, Any] | None, trace: Trace, steps: tuple[int, int], *, overlap: bool
) -> dict[str, Groups]:
    """Return groupings by what they group: ``example``, ``param`` and ``time``, checked.

    Raises
    ------
    ValueError
        A key or value is none that `lkarray.audit` knows, a group is empty or out of range, or
        groups overlap and ``overlap`` was not asked for.
    """
    out: dict[str, Groups] = {}
    makers = {EXAMPLE: _examples, PARAM: _params, TIME: _times}
    for key, value in (groups or {}).items():
        if key not in makers:
            raise ValueError(
                f"groups: {key!r} is not one of {sorted(makers)}; for example groups={{'example': "
                "labels, 'param': 'module', 'time': 'epoch'}"
            )
        out[key] = makers[key](value, trace, steps)
        shared = out[key].overlapping
        if shared and not overlap:
            raise ValueError(
                f"groups[{key!r}]: {shared[0]!r} and {shared[1]!r} overlap, so that their "
                "influences count some twice and do not add up; pass overlap=True if that is meant"
            )
    return out


def _examples(value: Any, trace: Trace, steps: tuple[int, int]) -> Groups:
    n = trace.train.n
    if isinstance(value, Mapping):
        members = []
        for label, given in value.items():
            index = array(f"groups['example'][{label!r}]", given)
            if index.dtype == bool and index.shape == (n,):
                what = f"groups['example'][{label!r}]"
                index = np.flatnonzero(aligned(given, None, n, dim=EXAMPLE, what=what))
            if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
                raise ValueError(
                    f"groups['example'][{label!r}] must be indices of training examples, or a "
                    f"boolean for each of the {n}, at least one"
                )
            if index.min() < 0 or index.max() >= n:
                raise ValueError(f"groups['example'][{label!r}] has indices outside 0 to {n - 1}")
            members.append(np.unique(index))
        return Groups(GROUP, _labels(list(value)), tuple(members))
    array("groups['example']", value)
    if np.shape(value) != (n,):
        raise ValueError(
            f"groups['example'] has shape {np.shape(value)}; give one label for each of the {n} "
            "training examples, or a dict of names and indices"
        )
    what = "groups['example']"
    names, inverse = coded(aligned(value, None, n, dim=EXAMPLE, what=what), what=what)
    return Groups(GROUP, names, tuple(np.flatnonzero(inverse == i) for i in range(len(names))))


def _edges(value: Any) -> list[int]:
    """Return steps that stand in ``groups['time']``, checked."""
    return [integer("groups['time']", step) for step in several("groups['time']", value)]


def _params(value: Any, trace: Trace, steps: tuple[int, int]) -> Groups:
    if isinstance(value, Mapping):
        members = tuple(np.asarray(select(trace, patterns)) for patterns in value.values())
        return Groups(LAYER, _labels(list(value)), members)
    if not isinstance(value, str) or value not in ("module", "tensor"):
        raise ValueError(
            "groups['param'] must be 'module', 'tensor' or a dict of names and patterns "
            f"({{'conv': 'conv*'}}), not {value!r}"
        )
    names = trace.modules if value == "module" else trace.names
    order = list(dict.fromkeys(names))
    members = tuple(
        np.asarray([i for i, other in enumerate(names) if other == name]) for name in order
    )
    return Groups(LAYER, _labels(order), members)


def _times(value: Any, trace: Trace, steps: tuple[int, int]) -> Groups:
    start, stop = steps
    if isinstance(value, str):
        if value != EPOCH:
            raise ValueError(
                f"groups['time'] must be 'epoch', windows or the steps between them, not {value!r}"
            )
        numbered = epochs(trace, steps)
        windows = tuple(np.asarray((a, b)) for _, a, b in numbered)
        return Groups(EPOCH, np.asarray([e for e, _, _ in numbered]), windows)
    if isinstance(value, Mapping):
        pairs = [_edges(pair) for pair in value.values()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("groups['time'] must be pairs (first step, one beyond the last)")
        ends = [(pair[0], pair[1]) for pair in pairs]
        labels = _labels(list(value))
    else:
        ends = list(pairwise(sorted({start, *_edges(value), stop})))
        labels = np.asarray([a for a, _ in ends])
    bad = [pair for pair in ends if not start <= pair[0] < pair[1] <= stop]
    if bad or not ends:
        raise ValueError(
            f"groups['time']: windows {bad[:3]} are not (first step, one beyond the last) within "
            f"{start} to {stop}"
        )
    return Groups(WINDOW, labels, tuple(np.asarray(pair) for pair in ends))


def epochs(trace: Trace, steps: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Return number, first step and the one beyond the last, of each epoch that steps meet."""
    start, stop = steps
    edges = [*trace.epochs.tolist(), trace.steps]
    return [
        (e, max(a, start), min(b, stop))
        for e, (a, b) in enumerate(pairwise(edges))
        if a < stop and b > start and a < b
    ]


def _labels(names: list[Any]) -> np.ndarray:
    array = np.asarray(names)
    return array.astype(np.dtypes.StringDType()) if array.dtype.kind == "U" else array
