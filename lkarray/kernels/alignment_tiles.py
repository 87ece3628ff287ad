"""The products that `cka` and `frobenius` are made of, from tiles: of kernels of outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.engine import SERIES_BYTES, Contraction, make_plan, table_bytes
from lkarray.engine.devices import Device, made_on
from lkarray.engine.tasks import Tasks
from lkarray.engine.tile_sums import KernelSums, added_bytes, tile_moments
from lkarray.kernels.operands import shared_operands

Pair = tuple[int, int]


class TileProducts:
    """Inner products of kernels of outcomes that share their samples; see `Products`."""

    def __init__(
        self,
        tensors: Sequence[xr.DataArray],
        center: str,
        normalize: str,
        memory: int | str | None,
        device: Device | None = None,
    ) -> None:
        self.device = device
        made = shared_operands(tensors, center, normalize, "gaussian")
        first = made[0][1]
        # All tiles of one place are held at once, and the sums over them.
        length = 2 * len(made) * (first.n + len(made))
        held = sum(table_bytes(operand) for _, operand, _, _ in made) + added_bytes(length)
        options: dict[str, Any] = {"memory": memory, "held": held, "device": device}
        options |= {"sink": 8 * len(made), "device_sink": SERIES_BYTES}
        plans = [make_plan(operand, **options) for _, operand, _, _ in made]
        side = min(plan.rows[0].stop for plan in plans)
        self.kernels = []
        for (_, operand, _, series), plan in zip(made, plans, strict=True):
            even = plan if plan.rows[0].stop == side else make_plan(operand, side=side, **options)
            self.kernels.append(Contraction(operand, None, even, series=series))

    @property
    def made_on(self) -> dict[str, str]:
        """Attributes of results that say where products were made; none of the cores."""
        return made_on(self.device, np.result_type(*(c.dtype for c in self.kernels)))

    def compute(self, pairs: Sequence[Pair], kind: str | None) -> da.Array:
        """Return the products of pairs, lazily: plain, of centred kernels, or unbiased HSIC."""
        distinct = list(dict.fromkeys(pairs))
        tasks = Tasks("inner-tiles", self.kernels, list(pairs), kind)
        kernels = [tasks.hold(c) for c in self.kernels]
        asked = tasks.hold(distinct)
        sums = [tasks.then(tile_moments, kernels, asked, tile) for tile in self.kernels[0].tiles()]
        total = tasks.added(sums)
        order = [distinct.index(pair) for pair in pairs]
        picked = tasks.then(_products, total, asked, len(kernels), kind, order)
        return tasks.array([picked], (len(pairs),), np.float64)


def _products(
    flat: np.ndarray, pairs: list[Pair], kernels: int, kind: str | None, order: list[int]
) -> np.ndarray:
    """Return products from sums over all entries, in the order of the pairs that were asked for."""
    m = KernelSums.read(flat, len(pairs), kernels)
    n = m.rows.shape[1]
    out = m.products
    if kind == "centred":
        cross = np.array([2 * (m.rows[i] @ m.rows[j]) / n for i, j in pairs])
        sums = np.array([m.rows[i].sum() * m.rows[j].sum() / n**2 for i, j in pairs])
        out = out - cross + sums
    elif kind == "unbiased":  # Song et al. 2012, of kernels without their diagonals
        rows = m.rows - m.diagonals
        cross = np.array([2 * (rows[i] @ rows[j]) / (n - 2) for i, j in pairs])
        sums = np.array([rows[i].sum() * rows[j].sum() for i, j in pairs])
        trace = out - m.diagonal_products
        out = (trace + sums / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))
    return out[order]
