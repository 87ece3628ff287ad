"""Tiles made on a device of torch, and what is made of them there.

Panels are read and standardised on the host, in float64 as for the cores, by the same code; then
they are copied to the device and kept there. Where a whole panel does not fit, some of its
contracted elements go up at a time, and the products are added in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lkarray.engine.blas import product_slot
from lkarray.engine.blocks import fetched
from lkarray.engine.devices import Placed, Returning, exact, out_of_memory, unless_full, upload
from lkarray.engine.operand import Operand, volume
from lkarray.engine.plan import Plan
from lkarray.engine.series import Terms, own_entries, scales

#: Bytes that the best of each row, and counts, need for each element of a tile.
BEST_BYTES = 12
_DEVICE_SLAB = 1 << 22  # elements of a tile at once: three such arrays stay in a GPU's L2 cache
_SORTED = 256  # rows that are sorted or counted at once, which takes many times their memory


class Factors(NamedTuple):
    """What a tile is the product of: rows of one operand, and of another or the same."""

    x: Operand
    y: Operand
    plan: Plan
    entry: tuple[int, ...]
    rows: slice
    cols: slice

    @property
    def same(self) -> bool:
        """Whether both panels are one."""
        return self.x is self.y and self.rows == self.cols

    @property
    def placed(self) -> Placed:
        """How the plan runs on the device."""
        assert self.plan.placed is not None
        return self.plan.placed


def sum_on_device(f: Factors, start: int, stop: int) -> np.ndarray:
    """Return the sum of the products of some pieces, made on the device, as an array.

    Where its memory ends, what is kept there is freed, and each half of the rows tried once.

    Raises
    ------
    MemoryBudgetError
        Not even a half fits.
    """
    coming = unless_full(lambda: Returning(_sum(f, start, stop)))
    if coming is not None:
        return coming.array()
    size = f.rows.stop - f.rows.start
    halves = []
    for half in (slice(0, (size + 1) // 2), slice((size + 1) // 2, size)):
        sums = unless_full(partial(_sum_of_half, f, start, stop, half))
        if sums is None:
            raise out_of_memory(f.placed.device, f"half a tile of {size} rows")
        halves.append(sums)
    return np.concatenate(halves)


def _sum_of_half(f: Factors, start: int, stop: int, half: slice) -> np.ndarray:
    return Returning(_sum(f, start, stop, half)).array()


def _sum(f: Factors, start: int, stop: int, half: slice | None = None) -> Any:
    """Return the sum as a tensor: of one product at the operands' precision, of more in float64."""
    import torch

    device = f.placed.device
    total: Any = None
    parts = [(p, part) for p in range(start, stop) for part in _parts(f, p, half)]
    # As on the cores, what several tasks add up later is float64 too.
    alone = len(f.plan.pieces) == 1 and len(parts) == 1
    for p, part in parts:
        a = _panel(f, f.x, f.rows, p, part, half)
        b = a if f.same and half is None else _panel(f, f.y, f.cols, p, part, None)
        with product_slot(many=False), exact(device):
            product = multiply(a, b)
            if alone:
                return product
            total = product.to(torch.float64) if total is None else total.add_(product)
    return total


def multiply(a: Any, b: Any) -> Any:
    """Return ``a.T @ b`` of two tensors on a device, at the wider of their precisions."""
    import torch

    kind = torch.promote_types(a.dtype, b.dtype)
    return a.T.to(kind) @ b.to(kind)


def _parts(f: Factors, p: int, half: slice | None) -> Iterator[slice]:
    """Yield the contracted elements of a piece that are multiplied at once."""
    size = volume(f.plan.pieces[p])
    step = f.placed.length if half is None else max(f.placed.length // 2, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _panel(f: Factors, x: Operand, rows: slice, p: int, part: slice, half: slice | None) -> Any:
    """Return a part of a panel on the device; of a retry it is not kept."""
    pieces, device = f.plan.pieces, f.placed.device

    def load(own: slice = slice(None)) -> Any:
        host = x.panel(f.entry, rows, pieces, p, f.plan.cache)
        return upload(host[part, own], device)

    if half is not None:
        return load(half)
    size = (part.stop - part.start) * (rows.stop - rows.start) * x.dtype.itemsize
    key = (device.name, f.entry, rows.start, rows.stop, pieces[p], part.start, part.stop)
    return x.on_device(key, load, size=size, limit=f.placed.cache)


class Finish(NamedTuple):
    """What is done to a tile's sum: a factor, for cosines the bounds, and a series.

    Terms are asked for when panels have been read, since they need their means and norms.
    """

    scale: float
    dtype: np.dtype
    cosine: bool
    terms: Callable[[], Terms | None]


def _finished(f: Factors, finish: Finish) -> Any:
    """Return a whole tile as a tensor; see `lkarray.engine.contraction.finish_tile`."""
    import torch

    total = _sum(f, 0, len(f.plan.pieces))
    terms = finish.terms()
    if finish.scale != 1 and terms is None:
        total *= finish.scale
    total = total.to(getattr(torch, finish.dtype.name))
    if finish.cosine:
        total.clamp_(-1, 1)
        if f.same:
            own = total.diagonal()
            own[own > 0.5] = 1.0
    if terms is not None:
        _apply_series(total, terms, diagonal=f.same)
    return total


def tile_on_device(f: Factors, finish: Finish) -> np.ndarray | None:
    """Return a whole finished tile; None where the device's memory ends."""
    import torch

    def work() -> Returning:
        with torch.inference_mode():
            return Returning(_finished(f, finish))

    coming = unless_full(work)
    return None if coming is None else coming.array()


def _apply_series(tile: Any, terms: Terms, *, diagonal: bool) -> None:
    """Do what `lkarray.engine.series.apply_series` does to a tensor, where it is."""
    import torch

    if diagonal:
        tile.fill_diagonal_(0)
    rows, cols = scales(terms)
    largest = np.array([min(float(tile.abs().max()), 1.0)])
    count = int(terms.needed(largest).max())
    like: dict[str, Any] = {"dtype": tile.dtype, "device": tile.device}
    a, b = (torch.as_tensor(np.ascontiguousarray(t.unit[:count]), **like) for t in terms[:2])
    step = max(1, _DEVICE_SLAB // max(tile.shape[1], 1))
    for start in range(0, len(tile), step):
        rho, own = tile[start : start + step], a[:, start : start + step, None]
        total = own[count - 1] * b[count - 1]
        term = torch.empty_like(total)
        for k in range(count - 2, -1, -1):
            torch.mul(own[k], b[k], out=term)
            total.mul_(rho).add_(term)
        rho.mul_(total)
    if rows is not None:
        tile.mul_(torch.as_tensor(np.array(rows), **like)[:, None])
        tile.mul_(torch.as_tensor(np.array(cols), **like))
    if terms.cosine:
        tile.clamp_(-abs(terms.factor), abs(terms.factor))
    if diagonal:
        tile.diagonal().copy_(torch.as_tensor(own_entries(terms), **like))


class Wanted(NamedTuple):
    """The ``k`` largest or smallest of rows and columns, without some pairs.

    ``codes`` number the groups of rows and of columns; ``mask`` is true where a pair is left out;
    ``still`` says, once the panels were read, which rows and which columns do not vary.
    """

    k: int
    largest: bool
    codes: tuple[np.ndarray, np.ndarray] | None
    mask: np.ndarray | None
    still: Callable[[], tuple[np.ndarray, np.ndarray]]


def best_of_tile(
    f: Factors, finish: Finish, wanted: Wanted
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Return columns and values of the best of each row, and, off the diagonal, of each column.

    Best first; the values of the smallest are negated. None where the device's memory ends.
    """
    import torch

    def work() -> list[tuple[np.ndarray, np.ndarray]]:
        with torch.inference_mode():
            values = _finished(f, finish)
            if not wanted.largest:
                values.neg_()
            _leave_out(values, f, wanted)
            sides = [values] if f.same else [values, values.T]
            return [_best(side, min(wanted.k, side.shape[1])) for side in sides]

    return unless_full(work)


def _leave_out(values: Any, f: Factors, wanted: Wanted) -> None:
    """Make what does not count the worst, in place, the entries of rows with themselves too."""
    worst, device = -np.inf, f.placed.device
    if wanted.codes is not None:
        rows, cols = (upload(side, device) for side in wanted.codes)
        values[rows[:, None] == cols[None, :]] = worst
    if wanted.mask is not None:
        values[upload(wanted.mask, device)] = worst
    rows_still, cols_still = wanted.still()
    if rows_still.any() or cols_still.any():
        values[upload(rows_still, device)] = worst
        values[:, upload(cols_still, device)] = worst
    if f.same:
        values.fill_diagonal_(worst)


def _best(values: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and values of the ``k`` largest, in the order of `numbers.top_k`.

    torch takes any of equal values: rows where that matters are sorted whole, in order.
    """
    import torch

    value, index = torch.topk(values, k, dim=1)
    reach = (values >= value[:, -1:]).sum(1)
    for rows in torch.nonzero(reach > k)[:, 0].split(_SORTED):
        order = torch.sort(values[rows], dim=1, descending=True, stable=True)[1]
        index[rows] = order[:, :k]
    index = index.sort(dim=1)[0]  # by column, so that equal values stay in that order
    value, order = values.gather(1, index).sort(dim=1, descending=True, stable=True)
    return fetched(index.gather(1, order)), fetched(value)


class Counted(NamedTuple):
    """Even bins between two bounds, and the groups of rows and of columns."""

    low: float
    high: float
    number: int
    codes: tuple[np.ndarray, np.ndarray]
    groups: int


def counts_of_tile(f: Factors, finish: Finish, counted: Counted) -> np.ndarray | None:
    """Return the counts ``(group, group, 1 + bins + 1)`` of a tile, as on the cores.

    None where the device's memory ends.
    """
    import torch

    low, high, number, codes, groups = counted
    width, bins = (high - low) / number, number + 2

    def work() -> np.ndarray:
        with torch.inference_mode():
            values = _finished(f, finish)
            rows, cols = (upload(side, f.placed.device) for side in codes)
            total = torch.zeros(groups**2 * bins, dtype=torch.int64, device=values.device)
            for start in range(0, len(values), _SORTED):
                own = values[start : start + _SORTED]
                place = torch.floor((own - low) / width)
                # The last bin holds its upper bound, as numpy's does.
                place[(place == number) & (own <= high)] = number - 1
                cell = place.clamp_(-1, number).to(torch.int64) + 1
                cell += (rows[start : start + _SORTED, None] * groups + cols) * bins
                if f.same:  # not the entries of rows with themselves
                    away = torch.ones_like(own, dtype=torch.bool)
                    away[:, start : start + _SORTED].fill_diagonal_(False)
                    cell = cell[away]
                total += torch.bincount(cell.ravel(), minlength=len(total))
            return fetched(total).reshape(groups, groups, bins)

    return unless_full(work)
