"""Noise and minibatches as pure functions of (seed, chain, step).

A resumed chain, and a chain replayed on other inputs, sees the very same numbers, because
nothing random is carried from one step to the next.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_STEP_BITS = 24
#: Steps whose minibatches are drawn together, from one counter of Philox.
_BLOCK = 64
#: Largest number of steps of one chain, and of chains, for which no noise ever repeats.
MAX_STEPS = 1 << _STEP_BITS
MAX_CHAINS = 1 << (32 - _STEP_BITS)


def host_generator(seed: int, use: str) -> torch.Generator:
    """Return a generator on the host, the same on every machine, of a seed of any size.

    ``use`` tells apart what takes random numbers of one seed.
    """
    digest = hashlib.sha256(f"lkarray:{use}:{seed}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ChainRandomness:
    """What one chain draws at each step.

    Minibatches come from Philox, keyed by seed and chain, its counter set by the step. Noise
    comes from torch's generator on the chain's device (four times faster), seeded anew at
    each step by a keyed one-to-one map of (chain, step) onto 32 bits, the seed width of
    torch's CPU generator: within one run, no two steps share their noise.

    Parameters
    ----------
    seed, chain
        The run's seed and the chain's index.
    n
        Size of the training set.
    batch_size
        Items per step, drawn without replacement; ``None`` or at least ``n`` takes all.
    like
        A vector of the dtype, device and length of the noise.

    Attributes
    ----------
    batch
        Items that a step takes.
    """

    def __init__(
        self, seed: int, chain: int, *, n: int, batch_size: int | None, like: Tensor
    ) -> None:
        self._n = n
        self.batch = n if batch_size is None else min(batch_size, n)
        self._everything = np.arange(n)
        self._block = -1
        self._indices: np.ndarray = self._everything[None]
        self._device = like.device
        self._uploaded, self._uploaded_block = like.new_empty(0), -2
        # Two words of the digest key Philox, the other two the permutation of noise.
        digest = hashlib.sha256(f"lkarray:{seed}".encode()).digest()
        words = np.frombuffer(digest, np.uint64)
        self._key = np.array([words[0] ^ np.uint64(chain), words[1]])
        self._mask = [int(word) & 0xFFFFFFFF for word in words[2:]]
        self._chain = chain
        self._generator = torch.Generator(like.device)
        self._noise = torch.empty_like(like)

    @property
    def everything(self) -> bool:
        """Whether each step takes the whole training set."""
        return self.batch == self._n

    def indices(self, step: int) -> np.ndarray:
        """Return the minibatch of a step: shape ``(batch,)``, distinct."""
        place = self._find(step)  # first: it replaces the block that is looked into
        return self._indices[place]

    def rows(self, step: int) -> Tensor:
        """Return the minibatch of a step on the chain's device, uploaded 64 steps at a time."""
        place = self._find(step)
        if self._uploaded_block != self._block:
            host = torch.from_numpy(self._indices)
            if self._device.type == "cuda":
                host = host.pin_memory()
            self._uploaded = host.to(self._device, non_blocking=True)
            self._uploaded_block = self._block
        return self._uploaded[place]

    def _find(self, step: int) -> int:
        """Return the place of a step's minibatch in ``_indices``, which it fills."""
        if self.everything:
            return 0
        block, place = divmod(step, _BLOCK)
        if block != self._block:
            # One generator for many steps: making one costs more than a small model's step.
            bits = np.random.Philox(key=self._key, counter=[0, 0, 0, block])
            choice = np.random.Generator(bits).choice
            picked = [choice(self._n, self.batch, replace=False) for _ in range(_BLOCK)]
            self._indices, self._block = np.stack(picked), block  # (step, batch)
        return place

    def noise(self, step: int, out: Tensor | None = None) -> Tensor:
        """Return the standard normal vector of a step, in ``out`` or until the next call."""
        self._generator.manual_seed(self._scramble((self._chain << _STEP_BITS) + step))
        return (self._noise if out is None else out).normal_(generator=self._generator)

    def signs(self, step: int, out: Tensor) -> Tensor:
        """Fill ``out`` with random signs that are independent of the step's noise."""
        self.noise(step)  # the generator then stands behind the step's noise
        return out.bernoulli_(0.5, generator=self._generator).mul_(2).sub_(1)

    def _scramble(self, word: int) -> int:
        """Map 32 bits one-to-one (two keyed rounds of the murmur3 finaliser)."""
        for mask in self._mask:
            # Each line can be undone, so that no two words meet.
            word ^= mask
            word ^= word >> 16
            word = word * 0x85EBCA6B & 0xFFFFFFFF
            word ^= word >> 13
            word = word * 0xC2B2AE35 & 0xFFFFFFFF
            word ^= word >> 16
        return word
