"""The sums over strips that `cka` and `frobenius` are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from lkarray.engine.blocks import fetched, like, squares, sums
from lkarray.engine.devices import Device, made_on
from lkarray.engine.numbers import matmul
from lkarray.engine.passes import Passes
from lkarray.engine.strips import make_strips
from lkarray.engine.tasks import Key
from lkarray.kernels.operands import shared_operands

Pair = tuple[int, int]


class Products:
    """Inner products of kernels of tensors that share their samples."""

    def __init__(
        self,
        tensors: Sequence[xr.DataArray],
        center: str,
        normalize: str,
        memory: int | str | None,
        device: Device | None = None,
    ) -> None:
        self.memory, self.device = memory, device
        made = shared_operands(tensors, center, normalize, "sample")
        self.operands = [operand for _, operand, *_ in made]
        self.scale = [scale for _, _, scale, _ in made]

    @property
    def made_on(self) -> dict[str, str]:
        """Attributes of results that say where products were made; none of the cores."""
        return made_on(self.device, np.result_type(*(x.dtype for x in self.operands)))

    def compute(self, pairs: Sequence[Pair], kind: str | None) -> da.Array:
        """Return the products of pairs, lazily: plain, of centred kernels, or unbiased HSIC."""
        n = self.operands[0].n
        sizes = [int(np.prod(x.shape)) for x in self.operands]
        wide = n >= max(sizes)  # then Grams of the draws are smaller than the kernels
        scale = np.array([self.scale[i] * self.scale[j] for i, j in pairs])
        distinct = tuple(dict.fromkeys(pairs))
        passes = Passes("inner", self.operands, pairs, kind, self.memory, self.device)
        if wide:
            products = self._wide(passes, distinct, kind, sizes)
        else:
            products = self._narrow(passes, distinct, kind)
        picked = passes.then(_pick, products, distinct, list(pairs), scale)
        return passes.array([picked], (len(pairs),), np.float64)

    def _wide(
        self, passes: Passes, pairs: tuple[Pair, ...], kind: str | None, sizes: list[int]
    ) -> Key:
        """Add the products by ``S x S`` Grams of the draws: ``<K, L> = |X Y'|^2``."""
        held = 12 * sum(sizes[i] * sizes[j] for i, j in pairs)
        needs = {"held": held, "alone": 2 * held}
        options: dict[str, Any] = {"memory": self.memory, "needs": needs, "device": self.device}
        strips = make_strips(*self.operands, rows=True, **options)
        n = self.operands[0].n
        added = None if kind is None else passes.total(strips, sum_step)
        # Backwards even where nothing was read before: one order of the sums for every kind.
        grams = passes.total(strips, gram_step, added, n, pairs, kind, back=True)
        return passes.then(_from_grams, grams, n, len(pairs), kind)

    def _narrow(self, passes: Passes, pairs: tuple[Pair, ...], kind: str | None) -> Key:
        """Add the products by the kernels themselves, n x n, one after another."""
        n, kernels = self.operands[0].n, []
        for operand in self.operands:
            kept = 8 * n * n * len(self.operands)
            needs = {"held": 12 * n * n, "kept": kept, "alone": kept + 16 * n * n}
            options: dict[str, Any] = {"memory": self.memory, "needs": needs, "device": self.device}
            strips = make_strips(operand, rows=False, **options)
            kernels.append(passes.total(strips, _kernel_step, kind is not None))
        return passes.then(_from_kernels, kernels, pairs, kind)


def sum_step(blocks: tuple[np.ndarray, ...], span: slice) -> tuple[np.ndarray, ...]:
    """Return the sums of each tensor's strip over samples: tuples of shape ``(contracted,)``."""
    return tuple(sums(b, 1) for b in blocks)


def gram_step(
    blocks: tuple[np.ndarray, ...],
    span: slice,
    added: tuple[np.ndarray, ...] | None,
    n: int,
    pairs: tuple[Pair, ...],
    kind: str | None,
) -> tuple[np.ndarray, ...]:
    """Cross Grams of the draws, of centred blocks; and for HSIC the sums over diagonals."""
    if added is not None:
        blocks = tuple(
            # Centred over the samples before any product, else a common mode cancels digits.
            b - like(b, s / n)[:, None]
            for b, s in zip(blocks, added, strict=True)
        )
    products = tuple(blocks[i] @ blocks[j].T for i, j in pairs)  # each (S_i, S_j)
    if kind != "unbiased":
        return products
    diagonal = [squares(b, 0) for b in blocks]
    # (pair, 3): the product of the diagonals, and the sum of each
    extra = [(diagonal[i] @ diagonal[j], diagonal[i].sum(), diagonal[j].sum()) for i, j in pairs]
    return (*products, np.array(extra))


def _kernel_step(blocks: tuple[np.ndarray, ...], span: slice, centred: bool) -> np.ndarray:
    (b,) = blocks
    if centred:
        b = b - like(b, fetched(sums(b, 0)) / len(b))
    return matmul(b, b.T)


def _from_grams(grams: tuple[np.ndarray, ...], n: int, count: int, kind: str | None) -> np.ndarray:
    """Return the products from ``count`` Grams; for HSIC sums over diagonals come after them."""
    squares = np.array([(c**2).sum() for c in grams[:count]])
    if kind != "unbiased":
        return squares
    return _unbiased(squares, *grams[count].T, n=n)


def _from_kernels(
    kernels: list[np.ndarray], pairs: tuple[Pair, ...], kind: str | None
) -> np.ndarray:
    products = np.array([(kernels[i] * kernels[j]).sum() for i, j in pairs])
    if kind != "unbiased":
        return products
    diagonal = [np.diagonal(k) for k in kernels]
    extra = np.array(
        [(diagonal[i] @ diagonal[j], diagonal[i].sum(), diagonal[j].sum()) for i, j in pairs]
    )
    return _unbiased(products, *extra.T, n=len(kernels[0]))


def _unbiased(
    products: np.ndarray, both: np.ndarray, first: np.ndarray, second: np.ndarray, *, n: int
) -> np.ndarray:
    """Return HSIC_1 (Song et al. 2012) from kernels whose rows sum to zero.

    The estimate does not change when the features are centred over the samples; then a row of the
    kernel without its diagonal sums to minus that diagonal.
    """
    # Kernels without their diagonals: their product's trace, and the sums of all entries, which
    # are minus the diagonals' sums.
    trace = products - both
    sums = first * second / ((n - 1) * (n - 2))
    return (trace + sums - 2 * both / (n - 2)) / (n * (n - 3))


def _pick(
    products: np.ndarray, distinct: tuple[Pair, ...], pairs: list[Pair], scale: np.ndarray
) -> np.ndarray:
    order = [distinct.index(tuple(pair)) for pair in pairs]
    return products[order] * scale
