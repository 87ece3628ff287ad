"""Block Krylov iteration for the leading eigenvectors of the shorter side's Gram.

Each pass over the strips multiplies the newest vectors; the best vectors are taken from all so far
(Musco and Musco 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lkarray.engine.passes import Passes, apply_step, project_step
from lkarray.engine.strips import Strips
from lkarray.engine.tasks import Key

_SEED = 0


@dataclass
class Krylov:
    """The Krylov iteration: its basis, the operator in it, and the best vectors so far."""

    basis: np.ndarray  # (short, vectors), orthonormal
    operator: np.ndarray  # of the vectors that were multiplied
    ritz: np.ndarray  # (short, width)
    residual: np.ndarray  # (k,), relative
    passes: int
    done: bool


def start(short: int, width: int) -> Krylov:
    """Return the iteration before its first pass: random vectors, always the same."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    first = np.linalg.qr(generator.standard_normal((short, width)))[0]
    return Krylov(first, np.zeros((0, 0)), first, np.full(width, np.inf), 0, False)


def iterate(
    passes: Passes, strips: Strips, k: int, width: int, tolerance: float, max_passes: int
) -> Key:
    """Add passes, each of which does nothing once the state before it is done; return the last."""
    state = passes.then(start, strips.short, width)
    for _ in range(max_passes):
        image = passes.total(strips, krylov_step, state)
        state = passes.then(advance, state, image, k, width, tolerance)
    return state


def krylov_step(blocks: tuple[np.ndarray, ...], span: slice, state: Krylov) -> np.ndarray | None:
    """Return what a strip adds to the image of the newest vectors."""
    if state.done:
        return None
    return apply_step(blocks, span, state.basis[:, len(state.operator) :])


def advance(
    state: Krylov, image: np.ndarray | None, k: int, width: int, tolerance: float
) -> Krylov:
    """Extend the Krylov space by the image of its last block, and find its best vectors."""
    if image is None:
        return state
    basis, known = state.basis, len(state.operator)
    size = basis.shape[1]
    inner = basis.T @ image  # (vectors, newest): the operator's last columns
    operator_ = np.zeros((size, size))
    operator_[:known, :known] = state.operator
    operator_[:, known:] = inner
    operator_[known:, :] = inner.T
    operator_[known:, known:] = (inner[known:] + inner[known:].T) / 2
    # Twice: once leaves rounding along the basis, and vectors that converged would come back.
    rest = image - basis @ inner
    rest -= basis @ (basis.T @ rest)
    block, factor = np.linalg.qr(rest)
    value, vector = np.linalg.eigh(operator_)
    value, vector = value[::-1], vector[:, ::-1]  # largest first
    # A Ritz vector's image leaves the space only by way of the newest block.
    norms = np.linalg.norm(factor @ vector[known:, :k], axis=0)
    residual = norms / np.maximum(value[:k], np.finfo(np.float64).tiny)
    room = min(width, len(basis) - size)
    done = bool((residual <= tolerance).all()) or room == 0
    grown = basis if done else np.hstack((basis, block[:, :room]))
    ritz = basis @ vector[:, :width]
    return Krylov(grown, operator_, ritz, residual, state.passes + 1, done)


def decompose(gram: np.ndarray, width: int) -> Krylov:
    """Return the leading eigenvectors of the short side's whole Gram."""
    vector = np.linalg.eigh(gram)[1][:, ::-1][:, :width]
    return Krylov(vector, gram, vector, np.zeros(width), 1, True)


def project(blocks: tuple[np.ndarray, ...], span: slice, state: Krylov) -> np.ndarray:
    """Return the long side of a strip, of the best vectors."""
    return project_step(blocks, span, state.ritz)
