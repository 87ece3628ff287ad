"""A random projection of parameters that is the same everywhere: signs from a counter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Rows whose signs are drawn from one counter.
_BLOCK = 256


@dataclass(frozen=True)
class Projection:
    """``R(param, k)`` of independent signs over ``sqrt(k)``: inner products are kept on average.

    Row ``p`` belongs to the p-th parameter of the whole model, whatever is selected. Signs are
    the bits of Philox 4x64 (Salmon et al. 2011) keyed with the seed and ``p // 256``, row by row:
    integers, so that any machine, chunking and library version makes the same matrix.

    Attributes
    ----------
    size
        Columns, k. An inner product of ``a`` and ``b`` has the standard deviation
        ``|a| |b| sqrt(2 / k)`` at most.
    seed
        Non-negative.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("size", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (name == "size"):
                raise ValueError(f"projection: {name} must be a positive integer, not {value!r}")

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop``, ``(stop - start, size)`` float32."""
        out = np.empty((stop - start, self.size), np.float32)
        place = start
        while place < stop:
            block = place // _BLOCK
            end = min((block + 1) * _BLOCK, stop)
            rows = self._block(block)[place - block * _BLOCK : end - block * _BLOCK]
            out[place - start : end - start] = rows
            place = end
        out *= 2
        out -= 1
        out *= self.size**-0.5
        return out

    def _block(self, block: int) -> np.ndarray:
        """Return the bits of one block of rows, ``(256, size)``."""
        count = _BLOCK * self.size // 64
        words = np.random.Philox(key=[self.seed, block]).random_raw(count)
        octets = words.astype("<u8", copy=False).view(np.uint8)
        return np.unpackbits(octets, bitorder="little").reshape(_BLOCK, self.size)
