"""Tiles that fit a byte budget, decided before anything is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from dask.system import CPU_COUNT
from dask.utils import format_bytes, parse_bytes

from lkarray.engine.operand import Operand, Piece
from lkarray.errors import MemoryBudgetError

_SIDE = 4096  # of a tile, at most: larger ones multiply no faster and select more coarsely
_WHOLE = 512  # below this side, contract in pieces rather than make tiles smaller
_LEAST = 8
_PANELS = 140  # at most, so that their pairs stay under ten thousand tasks
_HELD = 4  # pieces of panels that a task holds: two to multiply, one raw, one copied


@dataclass(frozen=True)
class Plan:
    """How a contraction runs.

    Attributes
    ----------
    rows, cols
        The panels of both operands along what remains.
    pieces
        The pieces of the contracted dims that stream through an accumulator; often one.
    budget, cache
        Bytes allowed in a process, and those of them that may hold panels.
    """

    rows: tuple[slice, ...]
    cols: tuple[slice, ...]
    pieces: tuple[Piece, ...]
    budget: int
    cache: int

    def __str__(self) -> str:
        side = self.rows[0].stop - self.rows[0].start
        return (
            f"{len(self.rows)} x {len(self.cols)} tiles of side {side}, contracted in "
            f"{len(self.pieces)} pieces, within {format_bytes(self.budget)} a process"
        )


def memory_budget(memory: int | str | None) -> int:
    """Return the byte budget of a process: given, from ``LKARRAY_MEMORY``, or a quarter.

    A quarter of the machine's memory, or of the container's limit where that is smaller.
    """
    given = memory if memory is not None else os.environ.get("LKARRAY_MEMORY")
    if given is not None:
        try:
            budget = int(parse_bytes(given))
        except ValueError as error:
            raise MemoryBudgetError(
                f"memory {given!r} is not a number of bytes; use for example '2 GiB'"
            ) from error
        if budget <= 0:
            raise MemoryBudgetError(f"memory must be positive, not {given!r}")
        return budget
    return _machine_memory() // 4


def _machine_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def make_plan(
    x: Operand,
    y: Operand | None = None,
    *,
    memory: int | str | None = None,
    side: int | None = None,
    tasks: int = CPU_COUNT,
) -> Plan:
    """Choose the tiles of ``x`` against ``y`` (or itself).

    Parameters
    ----------
    x, y
        The operands; ``y=None`` contracts ``x`` with itself.
    memory
        Byte budget of a process, ``LKARRAY_MEMORY`` or a quarter of the machine by default.
    side
        Side of a tile, instead of the planner's choice.
    tasks
        Tasks that run at once in a process.

    Raises
    ------
    MemoryBudgetError
        No tile fits; the message says what would.
    """
    budget = memory_budget(memory)
    n = max(x.n, y.n if y is not None else 0)
    length = max(prod(x.shape), 1)
    item = x.dtype.itemsize

    def whole(side: int) -> int:
        return tasks * (_HELD * length * side * item + side * side * item)

    def accumulators(side: int) -> int:
        return tasks * side * side * (8 + 2 * item)

    least = max(min(n, _LEAST), ceil(n / _PANELS))
    if side is None:
        side = _largest(whole, least, min(max(n, 1), _SIDE), 3 * budget // 4)
        if side < min(n, _WHOLE):
            side = _largest(accumulators, least, min(n, _SIDE // 2), budget // 3)
        # Half the budget is room for pieces, so that they are not single elements.
        needed = max(3 * accumulators(least), 2 * tasks * _HELD * least * item)
        if budget < needed:
            raise MemoryBudgetError(
                f"{format_bytes(budget)} cannot hold the tiles of {n} rows with {tasks} tasks at "
                f"once; {ceil(needed / 2**10)} KiB can: set memory= or LKARRAY_MEMORY"
            )
        side = _align(side, n, x.row_chunks(), least)
    if whole(side) <= 3 * budget // 4:
        pieces = split(x.shape, length)
        work = whole(side)
    else:
        room = max(budget // 2, 1)
        pieces = split(x.shape, max(1, room // (tasks * _HELD * side * item)))
        work = accumulators(side) + room
    rows = _panels(x.n, side)
    cols = rows if y is None else _panels(y.n, side)
    return Plan(rows, cols, pieces, budget, max(budget - work, 0))


def split(shape: tuple[int, ...], length: int) -> tuple[Piece, ...]:
    """Split the box ``shape`` into pieces of at most ``length`` elements, outermost dim first."""
    if not shape:
        return ((),)
    inner = prod(shape[1:])
    if length >= inner:
        step = max(1, length // max(inner, 1))
        parts = [(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
        rest = tuple((0, size) for size in shape[1:])
        return tuple((part, *rest) for part in parts)
    tails = split(shape[1:], length)
    return tuple(((a, a + 1), *tail) for a in range(shape[0]) for tail in tails)


def _largest(cost: object, least: int, most: int, budget: int) -> int:
    """Return the largest side between ``least`` and ``most`` within ``budget``, or 0."""
    assert callable(cost)
    if cost(least) > budget:
        return 0
    low, high = least, max(most, least)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _align(side: int, n: int, chunks: tuple[int, ...] | None, least: int) -> int:
    """Shrink ``side`` so that panels are even, and whole chunks or whole parts of chunks."""
    side = ceil(n / ceil(n / side)) if n else 1
    chunk = max(chunks) if chunks else 1
    if chunk < side < n:
        aligned = side - side % chunk
    elif side < chunk:
        aligned = ceil(chunk / ceil(chunk / side))
    else:
        return side
    return aligned if aligned >= least else side


def _panels(n: int, side: int) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + side, n)) for a in range(0, n, side))
