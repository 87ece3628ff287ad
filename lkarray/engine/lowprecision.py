"""Products in bfloat16 with float32 accumulation, where torch and the processor are fast at it.

The only module of the engine that uses torch, and only once a product in low precision was
asked for: everything else works without torch.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

#: Below this many operations a contraction is over before torch is loaded; or, where it is
#: loaded already, before rounding pays.
_WORTH = 2e12
_WORTH_LOADED = 1e11


@dataclass(frozen=True)
class LowPanel:
    """A panel rounded to bfloat16, ``(rows, contracted)``, which multiplies fastest.

    Attributes
    ----------
    values
        torch tensor.
    error
        Norm of each row's rounding error, shape ``(rows,)``, float64.
    """

    values: Any
    error: np.ndarray

    @classmethod
    def of(cls, panel: np.ndarray) -> LowPanel:
        """Round a float32 panel ``(contracted, rows)``."""
        import torch

        with _one_thread():
            exact = torch.from_numpy(panel)
            low = exact.to(torch.bfloat16)
            # In slabs, so that the difference is never held whole.
            squares = torch.zeros(panel.shape[1], dtype=torch.float64, device="cpu")
            for start in range(0, len(exact), 64):
                difference = exact[start : start + 64] - low[start : start + 64].float()
                squares += difference.square_().sum(0)
            return cls(low.T.contiguous(), squares.sqrt_().numpy())


def turn(panel: np.ndarray) -> np.ndarray:
    """Return the transpose in its own memory, which torch makes twice as fast as numpy."""
    import torch

    with _one_thread():
        turned: np.ndarray = torch.from_numpy(panel).T.contiguous().numpy()
    return turned


def products_of_pairs(
    a: np.ndarray, b: np.ndarray, starts: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return ``a[i] . b[j]`` in float32, clipped to [-1, 1], for the pairs of a sparse matrix.

    Those of row ``i`` are with the rows ``columns[starts[i]:starts[i + 1]]`` of ``b``, sorted.
    """
    import torch

    _expect_warning()
    with _one_thread(), torch.inference_mode():
        values = torch.zeros(len(columns), device="cpu")
        pairs = torch.sparse_csr_tensor(
            torch.from_numpy(starts.astype(np.int64)),
            torch.from_numpy(columns.astype(np.int64)),
            values,
            (len(a), len(b)),
            check_invariants=True,
        )
        sampled = torch.sparse.sampled_addmm(
            pairs, torch.from_numpy(a), torch.from_numpy(b).T, beta=0
        )
        return sampled.values().clamp_(-1, 1).numpy()


@lru_cache(maxsize=1)
def _expect_warning() -> None:
    """Have torch say once, unheard, that its sparse tensors are in beta."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor(none, none[:0], none[:0], (0, 0), check_invariants=True)


def multiply_low(a: LowPanel, b: LowPanel) -> np.ndarray:
    """Return ``a.T @ b`` of two panels, float32, rounding errors of the output corrected.

    torch rounds the product of bfloat16 to bfloat16. Multiplying again onto minus that result
    leaves what was rounded away, since sums are float32 inside: two fast products.
    """
    import torch

    with torch.inference_mode():
        high = torch.mm(a.values, b.values.T)
        low = torch.addmm(high, a.values, b.values.T, beta=-1)
        return high.float().add_(low).numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch use one thread for what this thread asks of it: others have work of their own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class CoarseTile:
    """A product rounded to bfloat16 (relative error 2**-8), widened slab by slab."""

    bits: np.ndarray

    def slab(self, start: int, stop: int) -> np.ndarray:
        """Return some rows as float32, without torch's threads, which are busy elsewhere."""
        wide = self.bits[start:stop].astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)


def multiply_coarse(a: LowPanel, b: LowPanel) -> CoarseTile:
    """Return ``a.T @ b``, rounded to bfloat16."""
    import torch

    with _one_thread(), torch.inference_mode():
        product = torch.mm(a.values, b.values.T)
        return CoarseTile(product.view(torch.int16).numpy().view(np.uint16))


def choose(precision: str, operations: float, dtype: np.dtype, *, search: bool = False) -> str:
    """Return the precision to use: ``"auto"`` is bfloat16 where that was measured to be faster.

    Parameters
    ----------
    precision
        ``"float32"`` or ``"auto"``.
    operations
        Of the contraction: small ones are not worth loading torch for.
    dtype
        Of the operands: only float32 is ever rounded.
    search
        Whether the candidates are ranked again by float32 products, which takes longer to pay.
    """
    if precision != "auto" or dtype != np.float32:
        return "float32"
    worth = _WORTH_LOADED if "torch" in sys.modules and not search else _WORTH
    return "bfloat16" if operations >= worth and _is_faster() else "float32"


@lru_cache(maxsize=1)
def _is_faster() -> bool:
    """Measure once whether bfloat16 is at least 1.3 times as fast here."""
    try:
        import torch
    except ImportError:
        return False
    from lkarray.engine.blas import multiply

    if not getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return False
    panel = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32)
    low = LowPanel.of(panel)
    other = panel.copy()
    # Rounded first, and after a pause: idle threads of a BLAS spin for a while, and torch's wait.
    time.sleep(0.1)
    rounded = fastest_seconds(lambda: multiply_low(low, low))
    return fastest_seconds(lambda: multiply(panel, other)) > 1.3 * rounded


def fastest_seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of 16 runs: the one that others disturbed least."""
    runs = []
    for _ in range(16):
        began = time.perf_counter()
        work()
        runs.append(time.perf_counter() - began)
    return min(runs)
