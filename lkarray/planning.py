"""`plan`: what a kernel will cost, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from dask.utils import format_bytes, format_time

from lkarray.arguments import checked
from lkarray.engine.contraction import Contraction, contraction_of, count_tasks
from lkarray.engine.devices import Placed, device_rate
from lkarray.engine.plan import operands_of
from lkarray.results import Result, as_dataset

_READ_RATE = 1e9  # bytes a second, of a disk that is neither slow nor fast
_COPY_RATE = 2e10  # to a GPU and back, of page-locked memory over PCIe: stated, not measured


@dataclass(frozen=True)
class KernelPlan:
    """The cost of a kernel or a neighbour table, as planned.

    Attributes
    ----------
    tiles, side
        Products to be computed, and rows and columns of the largest.
    pieces
        Pieces of the contracted dims that stream through an accumulator.
    tasks
        Tasks of the Dask graph that are not the input's own.
    operations
        Multiplications and additions.
    bytes_read
        Of the input in memory, each panel as often as the budget's cache makes it be read (at
        most: which panels stay depends on the order of tasks).
    bytes_written
        Of the result, if all of it is kept.
    budget, peak
        Byte budget of a process, and the peak projected beyond its interpreter, without the
        result.
    precision
        Of the products.
    seconds
        Projected: the larger of multiplying, at the rate measured in this process, and
        reading at 1 GB/s; with a device, of copying to it and back at 20 GB/s too. A cluster's
        workers are not counted in.
    bound
        Which of these it is: ``"products"``, ``"reading"`` or ``"copying"``.
    device
        Where products are made; None for the cores.
    device_budget, device_peak
        Bytes of its memory that may be used, and those that tiles and panels are projected to take.
    bytes_up, bytes_back
        Copied to the device (each panel as often as its cache makes it be, at most), and back.
    """

    tiles: int
    side: int
    pieces: int
    tasks: int
    operations: int
    bytes_read: int
    bytes_written: int
    budget: int
    peak: int
    precision: str
    seconds: float
    bound: str = "products"
    device: str | None = None
    device_budget: int = 0
    device_peak: int = 0
    bytes_up: int = 0
    bytes_back: int = 0

    def __str__(self) -> str:
        lines: tuple[str, ...] = (
            f"{self.tiles} tiles of up to {self.side} x {self.side}, contracted in "
            f"{self.pieces} piece{'s' * (self.pieces > 1)}, {self.tasks} tasks",
            f"{self.operations:.3g} operations in {self.precision}, "
            f"{format_bytes(self.bytes_read)} read at most, {format_bytes(self.bytes_written)} "
            "of results",
            f"peak {format_bytes(self.peak)} of {format_bytes(self.budget)} a process, about "
            f"{format_time(self.seconds)} on this machine",
        )
        if self.device is not None:
            lines += (
                f"on {self.device}: peak {format_bytes(self.device_peak)} of "
                f"{format_bytes(self.device_budget)}, {format_bytes(self.bytes_up)} up at most, "
                f"{format_bytes(self.bytes_back)} back; bound by {self.bound} (products at the "
                f"rate measured there, copies at {format_bytes(int(_COPY_RATE))}/s, reading at "
                f"{format_bytes(int(_READ_RATE))}/s)",
            )
        return "\n".join(lines)


@checked()
def plan(kernel: Result) -> KernelPlan:
    """Return what a lazy kernel or neighbour table will cost; nothing is computed.

    Parameters
    ----------
    kernel
        What `gram`, `covariance`, `correlation`, `influence` or `neighbors` returned, or
        something computed from it: the plan is that of the whole kernel.

    Returns
    -------
    KernelPlan
        Tiles, tasks, operations, bytes, projected peak memory and time; printable. The first
        call in a process measures the rate of a product, for a quarter of a second.

    Raises
    ------
    ValueError
        ``kernel`` is not lazy, or no kernel of lkarray.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> cost = lk.plan(lk.covariance(losses))
    >>> cost.tiles, cost.precision
    (1, 'float32')
    """
    arrays: list[Any] = [kernel]
    if isinstance(kernel, xr.Dataset | xr.DataTree):
        arrays = list(as_dataset(kernel, "kernel").data_vars.values())
    for array in arrays:
        c = contraction_of(getattr(array, "data", None))
        if c is not None:
            return _describe(c, array, sum(a.nbytes for a in arrays))
    raise ValueError(
        "plan takes a lazy kernel or neighbour table, as lk.correlation(...) or "
        "lk.neighbors(...) return it; this one holds no tiles (was it computed already?)"
    )


def _describe(c: Contraction, array: xr.DataArray, written: int) -> KernelPlan:
    p = c.plan
    read, up, back = _bytes_read(c, p.cache), 0, 0
    if p.placed is not None:
        up, back = _bytes_up(c, p.placed), _bytes_back(c, p.placed, array)
    rate = _rate(c.precision) if p.placed is None else device_rate(p.placed.device, c.dtype)
    times = {
        "products": c.operations / rate,
        "reading": read / _READ_RATE,
        "copying": (up + back) / _COPY_RATE,
    }
    bound = max(times, key=lambda what: times[what])
    return KernelPlan(
        tiles=sum(1 for _ in c.tiles()),
        side=max(s.stop - s.start for s in (*p.rows, *p.cols)),
        pieces=len(p.pieces),
        tasks=count_tasks(array.data),
        operations=c.operations,
        bytes_read=read,
        bytes_written=written,
        budget=p.budget,
        peak=p.peak,
        precision=c.precision,
        seconds=times[bound],
        bound=bound,
        bytes_up=up,
        bytes_back=back,
        **_on_device(p.placed, up),
    )


def _on_device(placed: Placed | None, up: int) -> dict[str, Any]:
    """Return what a plan says of a device."""
    if placed is None:
        return {}
    return {
        "device": placed.device.name,
        "device_budget": placed.device.budget,
        "device_peak": min(placed.device.budget, placed.peak + min(placed.cache, up)),
    }


def _bytes_up(c: Contraction, placed: Placed) -> int:
    """Return the bytes of all panels at the operands' precision, as often as they go up."""
    size: int = prod(c.each) * prod(c.x.shape)
    stored: int = sum(size * x.n * x.variable.dtype.itemsize for x in operands_of(c.x, c.y))
    held: int = sum(size * x.n * x.dtype.itemsize for x in operands_of(c.x, c.y))
    return _bytes_read(c, placed.cache) * held // max(stored, 1)


def _bytes_back(c: Contraction, placed: Placed, array: xr.DataArray) -> int:
    """Return the bytes of tiles that come back; of neighbours, of the best of each tile."""
    if array.shape[-2:] != (c.x.n, c.other.n):
        k = array.shape[-1] if array.ndim else 1
        return c.x.n * len(c.plan.cols) * k * (8 + c.dtype.itemsize)
    # Sums of several products are float64.
    alone = len(c.plan.pieces) == 1 and placed.length >= prod(c.x.shape)
    area = 0
    for tile in c.tiles():
        rows, cols = c.plan.rows[tile.i], c.plan.cols[tile.j]
        area += (rows.stop - rows.start) * (cols.stop - cols.start)
    return area * (c.dtype.itemsize if alone else 8)


def _bytes_read(c: Contraction, cache: int) -> int:
    """Return the bytes of all panels, as often as a cache makes them be read in row-major order."""
    operands = operands_of(c.x, c.y)
    size: int = prod(c.each) * prod(c.x.shape)
    once: int = sum(size * x.n * x.variable.dtype.itemsize for x in operands)
    held: int = sum(size * x.n * x.dtype.itemsize for x in operands)
    if held <= cache:
        return once
    tiles = sum(1 for _ in c.tiles())
    return max(
        once, once * tiles // max(len(c.plan.rows) + len(c.plan.cols) * (not c.symmetric), 1)
    )


@lru_cache(maxsize=2)
def _rate(precision: str) -> float:
    """Return operations a second of a product, measured now."""
    from lkarray.engine.blas import multiply
    from lkarray.engine.lowprecision import LowPanel, fastest_seconds, multiply_low

    panel = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32)
    other = panel.copy()
    operations = 2 * 2048 * 1024 * 1024
    if precision == "float32":
        return operations / fastest_seconds(lambda: multiply(panel, other))
    low = LowPanel.of(panel)
    return operations / fastest_seconds(lambda: multiply_low(low, low))
