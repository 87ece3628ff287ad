"""Tiles that fit a byte budget, decided before anything is read."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from dask.system import CPU_COUNT
from dask.utils import format_bytes

from lkarray.engine.blas import products_at_once, side_by_side
from lkarray.engine.devices import Demand, Device, Placed, check_dtype
from lkarray.engine.machine import machine_memory
from lkarray.engine.operand import Operand, Piece, volume
from lkarray.engine.reading import AHEAD
from lkarray.errors import MemoryBudgetError
from lkarray.values import byte_count
from lkarray.waiting import current_client

#: Bytes for each element of a tile that is written: its transpose, and what that is encoded to.
WRITTEN_BYTES = 8
#: Bytes of Zarr, BLAS and threads: left free, with a tenth of the budget for the allocator.
BUFFER_BYTES = 32 << 20
_SIDE = 4096  # of a tile, at most: larger ones multiply no faster and select more coarsely
_FAST = 1024  # side from which products are at full speed
_WHOLE = 512  # below this side, contract in pieces rather than make tiles smaller
_LEAST = 8
_PANELS = 110  # at most, so that their pairs, and merges, stay under ten thousand tasks
_CUTS = 8  # of a source chunk along rows, at most: each part computes the chunk again
_SHARED = 16 << 20  # bytes of an operand, at least, before its contraction is shared out
_TASK = 2 << 20  # bytes that could be read in the time which a tile's task takes besides
_HELD = 2  # pieces of panels that a task holds, besides the chunks that one is made from

#: What is known of the workers of each client, for while they are started again.
_known: weakref.WeakKeyDictionary[Any, list[dict[str, Any]]] = weakref.WeakKeyDictionary()


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
    peak
        Bytes that a process is projected to hold at most, beyond its interpreter.
    shares
        Tasks among which the pieces of one tile are shared out, where there are fewer tiles than
        workers.
    many
        Whether there are tiles enough for products of one BLAS thread each, side by side.
    placed
        How tiles are made on a device; None where numpy makes them on the cores.
    """

    rows: tuple[slice, ...]
    cols: tuple[slice, ...]
    pieces: tuple[Piece, ...]
    budget: int
    cache: int
    peak: int = 0
    shares: int = 1
    many: bool = False
    placed: Placed | None = None

    def __str__(self) -> str:
        side = self.rows[0].stop - self.rows[0].start
        return (
            f"{len(self.rows)} x {len(self.cols)} tiles of side {side}, contracted in "
            f"{len(self.pieces)} pieces, within {format_bytes(self.budget)} a process"
        )


def memory_budget(memory: int | str | None) -> int:
    """Return the byte budget of a process: given, from ``LKARRAY_MEMORY``, or by default.

    By default, half the memory limit of the smallest worker of the Dask cluster this process
    is a client of; without one, a quarter of the machine's or container's memory.
    """
    given = memory if memory is not None else os.environ.get("LKARRAY_MEMORY")
    if given is None:
        limits = [worker["memory_limit"] for worker in _workers() if worker["memory_limit"]]
        return min(limits) // 2 if limits else machine_memory() // 4
    return byte_count("memory", given)


def concurrent_tasks() -> int:
    """Return how many tasks run at once in a process: of the cluster's workers, or of this."""
    return max((worker["nthreads"] for worker in _workers()), default=CPU_COUNT)


def _workers() -> list[dict[str, Any]]:
    """Return what the scheduler knows of its workers, if this process is its client.

    Where all of them are just being started again, what it knew of the last ones: those that come
    have their memory.
    """
    client = current_client()
    if client is None:
        return []
    workers = list(client.scheduler_info(n_workers=-1)["workers"].values())
    if workers:
        _known[client] = workers
    return workers or _known.get(client, [])


def on_cluster() -> bool:
    """Say whether Dask computes on the workers of a cluster."""
    return current_client() is not None


@dataclass(frozen=True)
class _Shape:
    """The sizes that memory depends on, and what a process holds at most."""

    n: int
    length: int  # contracted elements
    item: int  # bytes of an element in memory
    source: int  # bytes of an element as stored
    chunk: int | None  # bytes of a source chunk, where they are read one by one
    groups: int  # centring groups
    shape: tuple[int, ...]
    grain: tuple[int, ...]  # largest source chunk along each contracted dim
    width: int  # and along rows
    sink: int  # bytes that a sink needs for each element of a tile
    held: int  # and besides
    tasks: int

    @property
    def least(self) -> int:
        """Side of a tile, at least."""
        return max(
            min(self.n, _LEAST), ceil(self.n / _PANELS), min(self.n, ceil(self.width / _CUTS))
        )

    def tile(self, side: int, *, pieces: bool) -> int:
        """Return the bytes of a task's tile, and of its accumulator."""
        return side * side * (self.item + self.sink + (8 + self.item if pieces else 0))

    def peak(self, side: int, length: int) -> int:
        """Return the bytes of all tasks, each with tiles of ``side`` in pieces of ``length``."""
        pieces = length < self.length
        read = source_bytes(length, side, self.n, self.width, self.source, self.chunk)
        task = _HELD * length * side * self.item + read
        moments = 16 * self.n * self.groups if pieces else 0
        return self.tasks * (task + self.tile(side, pieces=pieces)) + moments + self.held


def source_bytes(length: int, side: int, n: int, width: int, item: int, chunk: int | None) -> int:
    """Return the bytes of a source's chunks that a task holds while it reads a panel."""
    whole = length * min(n, ceil(side / width) * width) * item
    # Those being read, as stored and decoded, and the one that is copied to its place.
    return whole if chunk is None else min(whole, (1 + 2 * AHEAD) * chunk)


def make_plan(
    x: Operand,
    y: Operand | None = None,
    *,
    memory: int | str | None = None,
    side: int | None = None,
    sink: int = 0,
    held: int = 0,
    device: Device | None = None,
    device_sink: int = 0,
) -> Plan:
    """Choose the tiles of ``x`` against ``y`` (or itself).

    Parameters
    ----------
    x, y
        The operands; ``y=None`` contracts ``x`` with itself.
    memory
        Byte budget of a process; see `memory_budget`.
    side
        Side of a tile, instead of the planner's choice.
    sink
        Bytes that whatever takes the tiles needs for each of a tile's elements.
    held
        Bytes that it holds besides.
    device
        Where tiles are made; None for numpy on the cores.
    device_sink
        Bytes that whatever takes the tiles needs there for each of a tile's elements.

    Raises
    ------
    MemoryBudgetError
        No tile fits; the message says what would.
    """
    budget = memory_budget(memory)
    operands = operands_of(x, y)
    grains = [operand.grain() for operand in operands]
    sizes = _Shape(
        n=max(operand.n for operand in operands),
        length=prod(x.shape),
        item=max(operand.dtype.itemsize for operand in operands),
        source=max(operand.variable.dtype.itemsize for operand in operands),
        chunk=_largest_chunk(operands),
        groups=x.groups,
        shape=x.shape,
        grain=tuple(map(max, zip(*(grain for grain, _ in grains), strict=True))),
        width=max(width for _, width in grains),
        sink=sink,
        held=held,
        tasks=concurrent_tasks(),
    )
    demand = None
    if device is not None:
        check_dtype(np.result_type(*(operand.dtype for operand in operands)), device)
        demand = Demand(device, sizes.item, device_sink, sizes.length, sizes.tasks)
    top = sizes.n if demand is None else demand.widest(side or sizes.least)
    side, pieces = _fit(sizes, budget, side, top)
    rows = _panels(x.n, side)
    cols = rows if y is None else _panels(y.n, side)
    tiles = len(rows) * (len(rows) + 1) // 2 if y is None else len(rows) * len(cols)
    tiles *= prod(x.variable.sizes[dim] for dim in x.each)
    pieces, shares = _share(sizes, pieces, tiles, cluster_threads() or sizes.tasks)
    peak = sizes.peak(side, max(map(volume, pieces)))
    cache = cache_bytes(budget, peak)
    panels = sum(operand.n for operand in operands) * sizes.length * sizes.item
    # Whatever is not cache may reach the budget: Zarr's buffers, BLAS, the allocator.
    most = min(budget, peak + min(cache, panels) + BUFFER_BYTES + budget // 10)
    many = side_by_side(tiles)
    placed = None if demand is None else demand.place(side, [volume(piece) for piece in pieces])
    return Plan(rows, cols, pieces, budget, cache, max(most, peak), shares, many, placed)


def _largest_chunk(operands: list[Operand]) -> int | None:
    """Return the bytes of the largest source chunk; None where one is not read by chunks."""
    chunks = [operand.source_chunk() for operand in operands]
    return None if None in chunks else max(chunk for chunk in chunks if chunk is not None)


def operands_of(x: Operand, y: Operand | None) -> list[Operand]:
    """Return the operands that there are."""
    return [x] if y is None else [x, y]


def _share(
    sizes: _Shape, pieces: tuple[Piece, ...], tiles: int, threads: int
) -> tuple[tuple[Piece, ...], int]:
    """Cut the contracted dims where there are more threads than tiles: reading overlaps, too."""
    shares = min(ceil(threads / tiles), sizes.length)
    if shares < 2 or sizes.length * sizes.item * sizes.n < _SHARED:
        return pieces, 1
    if len(pieces) < shares:
        pieces = split(sizes.shape, ceil(sizes.length / shares), sizes.grain)
    return pieces, min(shares, len(pieces))


def cluster_threads() -> int:
    """Return the threads of all workers of the cluster; 0 without one."""
    return sum(worker["nthreads"] for worker in _workers())


def _fit(sizes: _Shape, budget: int, given: int | None, top: int) -> tuple[int, tuple[Piece, ...]]:
    """Return the side of the tiles, at most ``top``, and the pieces of the contracted dims."""
    n, whole = sizes.n, split(sizes.shape, sizes.length)
    least = sizes.least
    if given is not None:
        if sizes.peak(given, sizes.length) <= budget:
            return given, whole
        least = given
    # A quarter of the budget stays for the cache, without which panels are read over and over.
    allowed = 3 * budget // 4
    side = _largest(lambda s: sizes.peak(s, sizes.length), least, min(n, _SIDE, top), allowed)
    if side >= min(n, _WHOLE, top) and given is None:
        return _cheapest(sizes, side, least, budget), whole
    most = _largest(
        lambda s: sizes.tasks * sizes.tile(s, pieces=True),
        least,
        min(n, _SIDE // 2, top),
        allowed // 3,
    )
    if given is None:
        most = max(most, least)
        side = _align(ceil(n / ceil(n / most)), n, sizes.width, least, most)
    else:
        side = given
    while True:
        slope = sizes.peak(side, 1) - sizes.peak(side, 0)
        length = max((allowed - sizes.peak(side, 0)) // slope, 1)
        pieces = split(sizes.shape, min(length, sizes.length), sizes.grain)
        needed = sizes.peak(side, max(map(volume, pieces)))
        if needed <= budget:
            return side, pieces
        if side == least:
            break
        side = max(least, side // 2)
    chunks = (
        ""
        if max(sizes.grain) <= 1
        else (
            f", or .chunk() the tensor smaller: its chunks are up to {max(sizes.grain)} long along "
            f"what is contracted and {sizes.width} wide"
        )
    )
    raise MemoryBudgetError(
        f"{format_bytes(budget)} cannot hold the tiles of {n} rows with {sizes.tasks} tasks at "
        f"once; {ceil(needed / 2**10)} KiB can: set memory= or LKARRAY_MEMORY{chunks}"
    )


def _cheapest(sizes: _Shape, most: int, least: int, budget: int) -> int:
    """Return the side, at most ``most``, with which the fewest bytes are read.

    Larger tiles need each panel less often, but leave the cache room for fewer of them. Rows
    of tiles are swept to and fro, so that what the cache kept of the last is used by the next.
    """
    n, best = sizes.n, (float("inf"), 0)
    # Tiles enough that all cores have work to the end, while they multiply at full speed.
    enough = min(ceil((8 * products_at_once()) ** 0.5), n // _FAST)
    fewest = max(ceil(n / most), enough)
    for panels in range(fewest, max(fewest, min(4 * fewest, _PANELS)) + 1):
        even = ceil(n / panels)
        side = _align(even, n, sizes.width, least, most)
        panel = side * sizes.length * sizes.item
        kept = cache_bytes(budget, sizes.peak(side, sizes.length)) // panel
        missed = max(ceil(n / side) - kept, 0)
        again = max(ceil(sizes.width / side), 1)  # a chunk wider than a panel
        read = (n + side * missed**2 / 2) * again * sizes.length * sizes.item
        best = min(best, (read + (n / side) ** 2 / 2 * _TASK, -side))
        if not missed:
            break
    return -best[1]


def cache_bytes(budget: int, peak: int) -> int:
    """Return the bytes of a budget that may hold panels beside what tasks hold."""
    return max(9 * budget // 10 - BUFFER_BYTES - peak, 0)


def split(
    shape: tuple[int, ...], length: int, grain: tuple[int, ...] | None = None
) -> tuple[Piece, ...]:
    """Split the box ``shape`` into pieces of at most ``length`` elements, outermost dim first.

    Cuts fall on multiples of ``grain``, even where pieces are longer for it: a chunk of the
    source that is cut is computed once for each part.
    """
    if not shape:
        return ((),)
    step_of = grain or (1,) * len(shape)
    inner = prod(shape[1:])
    grains_inner = prod(min(g, size) for g, size in zip(step_of[1:], shape[1:], strict=True))
    least = min(step_of[0], shape[0])
    step = max(length // max(inner, 1), 1)
    if length >= inner * least or inner == grains_inner:
        step = max(step - step % least, least)
        tails: tuple[Piece, ...] = (tuple((0, size) for size in shape[1:]),)
    else:
        step = least
        tails = split(shape[1:], max(length // least, 1), step_of[1:])
    heads = [(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
    return tuple((head, *tail) for head in heads for tail in tails)


def _largest(cost: Callable[[int], int], least: int, most: int, budget: int) -> int:
    """Return the largest side between ``least`` and ``most`` within ``budget``, or 0."""
    if cost(least) > budget:
        return 0
    low, high = least, max(most, least)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _align(side: int, n: int, chunk: int, least: int, most: int) -> int:
    """Return the side nearest to ``side`` of whole chunks, or of whole parts of a chunk."""
    if side >= n or chunk <= 1:
        return side
    if side < chunk:
        near = [ceil(chunk / cuts) for cuts in (chunk // side, ceil(chunk / side))]
    else:
        near = [(side // chunk + more) * chunk for more in (0, 1)]
    near = [aligned for aligned in near if least <= aligned <= most]
    return min(near, key=lambda aligned: abs(aligned - side), default=side)


def _panels(n: int, side: int) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + side, n)) for a in range(0, n, side))
