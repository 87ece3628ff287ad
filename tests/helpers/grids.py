"""Which cells of a table of cases the fast suite runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_turn(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Return all pairs: of each row one in the fast suite, with the columns in turn.

    So every row and every column is there; all pairs are in `minutes`.
    """
    columns = list(columns)
    return [
        pytest.param(row, column, marks=() if j == i % len(columns) else pytest.mark.minutes)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def first(cases: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Return all cases, those that are not ``fast`` for `minutes`."""
    fast = list(fast)
    return [c if c in fast else pytest.param(c, marks=pytest.mark.minutes) for c in cases]
