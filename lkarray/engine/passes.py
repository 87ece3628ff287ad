"""Passes over strips as lazy tasks: sums over all strips, and what is joined along them.

Whoever needs a Gram, a norm or a projection says what a strip adds (a *step*), and gets the key
of the sum; `Tasks` then makes arrays of it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from lkarray.engine.blas import product_slot
from lkarray.engine.blocks import fetched, like, wide
from lkarray.engine.devices import exact, gradientless, out_of_memory, unless_full, upload
from lkarray.engine.numbers import matmul
from lkarray.engine.operand import Operand
from lkarray.engine.strips import Strips
from lkarray.engine.tasks import Key, Tasks

#: What a pass calls on each strip: the blocks of all operands, the strip's place along the
#: long side, and whatever else the pass was given.
Step = Callable[..., Any]


class Passes(Tasks):
    """Tasks, among them passes over strips.

    Each pass visits the strips of a task in the other direction than the pass before, so that a
    cache of some of them is hit.
    """

    def __init__(self, label: str, *distinct: Any) -> None:
        super().__init__(label, *distinct)
        self._turns: dict[int, tuple[Strips, Key, int]] = {}

    def total(self, strips: Strips, step: Step, *args: Any, back: bool | None = None) -> Key:
        """Add a pass that sums ``step(blocks, span, *args)`` over all strips.

        Sums are float64 (of arrays, or of tuples of arrays), in a fixed order: that of the strips,
        or backwards where ``back``. A step may give None: the pass is not needed any more, and
        its sum is None.
        """
        return self.then(_add_all, self._pass(_sum_strips, strips, step, args, back))

    def joined(self, strips: Strips, step: Step, *args: Any) -> list[Key]:
        """Add a pass that joins ``step(blocks, span, *args)`` along the long side.

        One key, and one block of the result, for each task; see `joined_lengths`.
        """
        return self._pass(_join_strips, strips, step, args)

    def _pass(
        self,
        run: Callable[..., Any],
        strips: Strips,
        step: Step,
        args: tuple[Any, ...],
        back: bool | None = None,
    ) -> list[Key]:
        """Add the tasks of a pass, one for each share of the strips."""
        if id(strips) not in self._turns:
            self._turns[id(strips)] = (strips, self.hold(strips), 0)
        _, held, turn = self._turns[id(strips)]
        self._turns[id(strips)] = (strips, held, turn + 1)
        back = turn % 2 == 1 if back is None else back
        return [self.then(run, held, step, share, back, list(args)) for share in strips.shares]


def joined_lengths(strips: Strips) -> tuple[int, ...]:
    """Return the lengths of the blocks that `Passes.joined` gives."""
    spans = strips.spans
    return tuple(spans[s[-1]].stop - spans[s[0]].start for s in strips.shares)


def _visit(strips: Strips, step: Step, k: int, args: list[Any]) -> Any:
    if strips.device is not None:
        for _ in range(2):  # again, once what was kept there is freed
            done = unless_full(lambda: (_visit_on_device(strips, step, k, args),))
            if done is not None:
                return done[0]
        raise out_of_memory(strips.device, "a strip")
    blocks = strips.blocks(k)  # read before the slot is taken: reading overlaps with products
    with product_slot(many=False):
        return step(blocks, strips.spans[k], *args)


def _visit_on_device(strips: Strips, step: Step, k: int, args: list[Any]) -> Any:
    """Do a step where its products are made; what it gives stays there."""
    device = strips.device
    assert device is not None
    blocks = []
    for x in strips.operands:

        def load(x: Operand = x) -> Any:
            return upload(strips.block(x, k), device)

        size = x.dtype.itemsize * (strips.spans[k].stop - strips.spans[k].start)
        size *= prod(x.shape) if strips.rows else x.n
        cut = strips.cuts[k]
        key = (device.name, "strip", strips.rows, (cut.start, cut.stop) if strips.rows else cut)
        blocks.append(x.on_device(key, load, size=size, limit=strips.device_cache))
    with product_slot(many=False), exact(device):
        return step(tuple(blocks), strips.spans[k], *args)


def _sum_strips(strips: Strips, step: Step, share: range, back: bool, args: list[Any]) -> Any:
    total: Any = None
    for k in reversed(share) if back else share:
        addend = _visit(strips, step, k, args)
        if addend is None:  # the pass is not needed any more
            return None
        if strips.device is None:
            total = _add(total, addend)
        else:
            with gradientless():
                total = _add(total, addend)
    return fetched(total)


def _join_strips(strips: Strips, step: Step, share: range, back: bool, args: list[Any]) -> Any:
    order = reversed(share) if back else share
    blocks = {k: fetched(_visit(strips, step, k, args)) for k in order}
    return np.concatenate([blocks[k] for k in share])


def _add(total: Any, addend: Any) -> Any:
    """Return the sum in float64, in place after the first addend."""
    if isinstance(addend, tuple):
        return tuple(_add(None if total is None else total[i], a) for i, a in enumerate(addend))
    if total is None:
        return wide(addend) if hasattr(addend, "cpu") else np.asarray(addend, np.float64)
    total += addend
    return total


def _add_all(totals: list[Any]) -> Any:
    """Return the sum of the tasks' totals, each of which stays as it is: Dask may hold it."""
    if totals[0] is None:
        return None
    out = totals[0]
    for total in totals[1:]:
        out = (
            tuple(a + b for a, b in zip(out, total, strict=True))
            if isinstance(out, tuple)
            else out + total
        )
    return out


# --- steps ------------------------------------------------------------------------------------
# `b` is a strip, (short, stretch of the long side): an array, or a tensor on a device.


def gram_step(blocks: tuple[np.ndarray, ...], span: slice, whole: bool = False) -> np.ndarray:
    """Return ``b b'``, the Gram of the short side, in float64 where ``whole``."""
    b = wide(blocks[0]) if whole else blocks[0]
    return matmul(b, b.T)


def times_step(blocks: tuple[np.ndarray, ...], span: slice, matrix: np.ndarray) -> np.ndarray:
    """Return ``b M`` for a matrix along the long side."""
    return matmul(blocks[0], like(blocks[0], matrix[span]))


def project_step(blocks: tuple[np.ndarray, ...], span: slice, matrix: np.ndarray) -> np.ndarray:
    """Return ``b' M`` for a matrix along the short side."""
    return matmul(blocks[0].T, like(blocks[0], matrix))


def apply_step(blocks: tuple[np.ndarray, ...], span: slice, matrix: np.ndarray) -> np.ndarray:
    """Return ``b b' M`` for a matrix along the short side: both products in one reading."""
    b = blocks[0]
    return matmul(b, b.T @ like(b, matrix))
