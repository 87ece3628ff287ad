"""The matrix in strips along its longer side: whatever is linear in it, in passes over the data.

A Gram of n rows contracted over S elements has a thin side, the shorter of the two. Spectra,
norms, alignments and group means need only arrays of that side, which sums over strips give:
each strip ``b`` is ``(short, stretch of the long side)``, standardised, read once a pass. Nothing
here is n x n unless n is the shorter side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import Any

import numpy as np
from dask.utils import format_bytes

from lkarray.engine.devices import Device, check_dtype, refuse
from lkarray.engine.operand import Operand, volume
from lkarray.engine.plan import (
    cache_bytes,
    cluster_threads,
    concurrent_tasks,
    memory_budget,
    source_bytes,
    split,
)
from lkarray.errors import MemoryBudgetError

_MOST = 2048  # of the long side in a strip: wider ones multiply no faster
_NEAR = 4  # the longer side over the shorter, up to which either may be cut
_HELD = 2  # strips of a task in memory: one in use, one being standardised


@dataclass(frozen=True)
class Strips:
    """Operands that share their long side, cut along it.

    Attributes
    ----------
    operands
        One or several. Several share their rows, which are then the long side.
    rows
        Whether the rows are the long side; otherwise the contracted dims are.
    cuts
        Panels of rows, or pieces of the contracted dims, in the order of the long side.
    cache
        Bytes of strips that a process may keep.
    groups
        Tasks of a pass.
    device, device_cache
        Where products are made, None for the cores; and bytes of strips that stay there.
    """

    operands: tuple[Operand, ...]
    rows: bool
    cuts: tuple[Any, ...]
    cache: int
    groups: int
    device: Device | None = None
    device_cache: int = 0

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        tokens = tuple(x.token for x in self.operands)
        return (tokens, self.rows, self.cuts, self.cache, self.groups, self.device)

    @property
    def short(self) -> int:
        """Size of the side that is not cut, of the first operand: the short one, as a rule."""
        x = self.operands[0]
        return prod(x.shape) if self.rows else x.n

    @property
    def spans(self) -> list[slice]:
        """Place of each strip along the long side."""
        if self.rows:
            return list(self.cuts)
        ends = np.cumsum([volume(piece) for piece in self.cuts]).tolist()
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def shares(self) -> list[range]:
        """Strips of each task of a pass: neighbours, so that its results are contiguous."""
        bounds = np.linspace(0, len(self.cuts), self.groups + 1).astype(int).tolist()
        return [range(a, b) for a, b in pairwise(bounds)]

    def blocks(self, k: int) -> tuple[np.ndarray, ...]:
        """Return strip ``k`` of each operand, ``(short, stretch)``."""
        return tuple(self.block(x, k) for x in self.operands)

    def block(self, x: Operand, k: int) -> np.ndarray:
        """Return strip ``k`` of one operand, ``(short, stretch)``."""
        if self.rows:
            whole = (tuple((0, size) for size in x.shape),)
            return x.panel((), self.cuts[k], whole, 0, self.cache)
        return x.panel((), slice(0, x.n), self.cuts, k, self.cache).T


def make_strips(
    *operands: Operand,
    memory: int | str | None = None,
    rows: bool | None = None,
    needs: Mapping[str, int] | None = None,
    device: Device | None = None,
) -> Strips:
    """Cut operands into strips that fit a byte budget.

    Parameters
    ----------
    operands
        One, or several with the same rows.
    memory
        Byte budget of a process; see `lkarray.engine.plan.memory_budget`.
    rows
        Whether to cut along the rows; by default, along the longer side.
    needs
        Bytes besides the strips: ``widened`` for each element of a strip in use, ``held`` by each
        task (its sums), ``kept`` by the process while passes run, and ``alone``, at most,
        between and after them.
    device
        Where products are made; None for the cores.

    Raises
    ------
    MemoryBudgetError
        No strip fits; the message says what would.
    """
    budget = memory_budget(memory)
    needs = {"widened": 0, "held": 0, "kept": 0, "alone": 0} | dict(needs or {})
    length, n = max(prod(x.shape) for x in operands), operands[0].n
    if rows is None:
        rows = along_rows(operands[0], budget)
    tasks = concurrent_tasks()
    widths = [x.grain()[1] if rows else prod(x.grain()[0][1:]) for x in operands]

    def peak(tasks: int, cuts: tuple[Any, ...]) -> int:
        most = sum(_strip_bytes(x, rows, cuts, needs["widened"]) for x in operands)
        passing = tasks * (most + needs["held"]) + needs["kept"]
        return max(passing, needs["alone"]) + _moments(operands, rows)

    def peak_on_device(tasks: int, cuts: tuple[Any, ...]) -> int:
        # Each strip, and what is made of it; then the sums, and what is added to them.
        areas = [_area(x, rows, cuts) for x in operands]
        strip = sum(
            area * (2 * x.dtype.itemsize + needs["widened"])
            for area, x in zip(areas, operands, strict=True)
        )
        return int(tasks * (strip + needs["held"]))

    if device is not None:
        check_dtype(np.result_type(*(x.dtype for x in operands)), device)
    allowed = 3 * budget // 4  # the rest is the cache's, and the allocator's
    while True:
        for width in _widths(n if rows else length, widths):
            cuts = _cut(operands[0], rows, width)
            needed = peak(tasks, cuts)
            above = 0 if device is None else peak_on_device(tasks, cuts)
            if needed <= allowed and (device is None or above <= 3 * device.budget // 4):
                groups = min(cluster_threads() or tasks, len(cuts))
                cache = cache_bytes(budget, needed)
                kept = 0 if device is None else device.budget - above
                return Strips(operands, rows, cuts, cache, max(groups, 1), device, kept)
        if tasks == 1 or cluster_threads():
            break
        tasks //= 2  # fewer sums at once
    if device is not None and needed <= allowed:
        refuse(device, above, f"strips of {operands[0].name!r} and the sums over them")
    raise MemoryBudgetError(
        f"{format_bytes(budget)} cannot hold strips of {operands[0].name!r} and the sums over "
        f"them; {ceil(needed * 4 / 3 / 2**10) + 1} KiB can: set memory= or LKARRAY_MEMORY"
    )


def along_rows(x: Operand, budget: int) -> bool:
    """Say whether to cut along the rows: the longer side, unless its chunks are too long for that.

    A strip narrower than a chunk has the chunk read again for each strip. Where strips of whole
    chunks fit the other way only, and the sides are near in size, that way it is.
    """
    n, length = x.n, prod(x.shape)
    grain, width = x.grain()
    longer = n >= length
    # (elements across a strip, elements of a chunk along it) by whether rows are cut
    sizes = {True: (length, width), False: (n, prod(grain))}

    def again(rows: bool) -> bool:
        across, chunk = sizes[rows]
        return chunk > _MOST // 4 and across * chunk * x.dtype.itemsize * _HELD * 2 > budget // 2

    near = max(n, length) <= _NEAR * min(n, length)
    return not longer if near and again(longer) and not again(not longer) else longer


def _strip_bytes(x: Operand, rows: bool, cuts: tuple[Any, ...], widened: int) -> int:
    """Return the bytes of a task for one operand's strips, and the chunks they are read from."""
    grain, width = x.grain()
    item, chunk, length = x.variable.dtype.itemsize, x.source_chunk(), prod(x.shape)
    area = _area(x, rows, cuts)
    if rows:
        side = max(cut.stop - cut.start for cut in cuts)
        source = source_bytes(length, side, x.n, width, item, chunk)
    else:
        piece = max(map(volume, cuts))
        source = source_bytes(min(piece * max(1, grain[0]), length), x.n, x.n, width, item, chunk)
    return int(area * (_HELD * x.dtype.itemsize + widened) + source)


def _area(x: Operand, rows: bool, cuts: tuple[Any, ...]) -> int:
    """Return the elements of the largest strip of an operand."""
    if rows:
        widest: int = max(cut.stop - cut.start for cut in cuts)
        return widest * prod(x.shape)
    return max(map(volume, cuts)) * x.n


def _moments(operands: tuple[Operand, ...], rows: bool) -> int:
    return 0 if rows else sum(16 * x.n * x.groups for x in operands)


def _widths(long: int, chunks: list[int]) -> Iterator[int]:
    """Yield widths to try, widest first: whole chunks, then halves of them."""
    width = min(_MOST, long)
    chunk = max(chunks)
    if 1 < chunk < width:
        width -= width % chunk
    elif width < chunk < long:
        yield chunk  # read once, if that fits
    while True:
        yield width
        if width == 1:
            return
        width = max(1, width // 2)


def _cut(x: Operand, rows: bool, width: int) -> tuple[Any, ...]:
    if rows:
        lengths = x.variable.chunksizes.get(x.rows, ())
        if not lengths or max(lengths) > width:
            return tuple(slice(a, min(a + width, x.n)) for a in range(0, x.n, width))
        ends = [0]  # of strips of whole chunks
        for start, end in pairwise(np.cumsum((0, *lengths)).tolist()):
            if end - ends[-1] > width:
                ends.append(start)
        return tuple(slice(a, b) for a, b in pairwise([*ends, x.n]))
    # Cut the outermost dim at will, so that pieces follow the order of the flattened side.
    return split(x.shape, width, (1, *x.grain()[0][1:]))
