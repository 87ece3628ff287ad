r"""The adjoint pass: the recorded steps run backwards, for a panel of audited examples.

With every realised quantity of a step given, the parameters are linear in the training gradients
(docs/methods/adjoint.md; Anonymous 2026, A.2 unrolls the same sums forwards). So the change of any
audited quantity, :math:`\sum_t \bar g_n(t) \cdot \Delta\theta_t`, is pulled back through the
updates::

    q_n  = Q_t gbar_n(t) + mu_{t+1} q_n
    k_n  = S_t q_n + N_t gbar_n(t)
    P_mn -= (C_t g_m(t)) . k_n / |B_t|                      m in B_t
    R_n  -= coupled theta_t . k_n + decoupled theta_t . gbar_n(t)
    at the first step:  R_n -= mu_0 q_n . b_{-1}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkarray.auditing.blocks import Block, Outer
from lkarray.auditing.realised import Scale, Update

#: Bytes of a block's rows that are worked on at once: they stay in the cache, between operations.
_CACHED = {"cpu": 8 << 20, "cuda": 256 << 20}
#: Scale at which a state takes it up, long before its numbers overflow.
_SMALLEST = 2.0**-30


@dataclass
class Adjoint:
    """What is carried from step to step, for the rows of a panel.

    Attributes
    ----------
    blocks
        The tensors.
    state, scales
        Of each block ``q = scale state``, ``(row, element)``; empty where no step has momentum.
        The number spares a pass over the state at each step.
    """

    blocks: Sequence[Block]
    rows: int
    state: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, blocks: Sequence[Block], rows: int, like: Tensor, *, stateless: bool) -> Adjoint:
        """Return the state after the last step: nothing is carried into it."""
        state = [] if stateless else [like.new_zeros((rows, block.size)) for block in blocks]
        return cls(blocks, rows, state, [1.0] * len(state))

    def decay(self, i: int, mu: Scale) -> None:
        """Multiply ``q`` of a block by the momentum of the step after."""
        if not self.state:
            return
        if isinstance(mu, Tensor):
            self.state[i].mul_(mu)
            return
        self.scales[i] *= mu
        if self.scales[i] < _SMALLEST:
            self.state[i].mul_(self.scales[i])
            self.scales[i] = 1.0

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return what is carried, as arrays whose names begin with ``name``."""
        states = {f"{name}-{i}": q.cpu().numpy() for i, q in enumerate(self.state)}
        return {name: np.asarray(self.scales), **states}

    def restore(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `arrays` gave."""
        self.scales = arrays[name].tolist()
        for i, q in enumerate(self.state):
            q.copy_(torch.from_numpy(arrays[f"{name}-{i}"]))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One recorded step, as the pass needs it.

    Attributes
    ----------
    theta, moved
        Parameters before it, and how it changed them, ``(param,)``.
    updates, later_mu
        Of each block: what the optimizer did, and the momentum of the step after.
    training
        Of each block: the gradients of the batch's examples.
    count, size
        Examples whose gradients these are, and of the whole batch.
    means
        Of each block: the audited gradients over the stretch; ``None`` outside the window.
    add
        Adds the products ``(row, example of the batch)`` of a layer, already signed and scaled.
    """

    theta: Tensor
    moved: Tensor
    updates: Sequence[Update]
    later_mu: Sequence[Scale]
    training: Sequence[Any]
    count: int
    size: int
    means: Sequence[Any] | None
    add: Callable[[int, Tensor], None]


class Scratch:
    """Buffers that one block's rows are worked on in, reused from step to step."""

    def __init__(self, blocks: Sequence[Block], rows: int, like: Tensor) -> None:
        cached = _CACHED.get(like.device.type, _CACHED["cpu"])
        item = like.element_size()
        self._rows = [max(1, min(rows, cached // (block.size * item))) for block in blocks]
        most = max(r * block.size for r, block in zip(self._rows, blocks, strict=True))
        self._buffers = [like.new_empty(most) for _ in range(2)]
        self._room = like.new_empty(0)

    def chunks(self, block: int, rows: int) -> list[slice]:
        """Return the rows of a block that are worked on together."""
        step = self._rows[block]
        return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]

    def views(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        """Return both buffers, as ``(row, element)``."""
        first, second = (buffer[: rows * size].view(rows, size) for buffer in self._buffers)
        return first, second

    def room(self, *shape: int) -> Tensor:
        """Return room for what is between two of a block's operations."""
        size = math.prod(shape)
        if len(self._room) < size:
            self._room = self._room.new_empty(size)
        return self._room[:size].view(shape)


def pull_back(adjoint: Adjoint, step: Step, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Take one step backwards.

    Parameters
    ----------
    adjoint
        What was carried from the steps after; holds what is carried from this one, afterwards.
    step
        The step.
    scratch
        Buffers.

    Returns
    -------
    residual, moved
        ``(row,)`` float64: what weight decay adds, and ``gbar . dtheta`` of this step (zeros
        outside the window).
    """
    products = _Products(step, adjoint.rows)
    residual = step.theta.new_zeros(adjoint.rows, dtype=torch.float64)
    moved = torch.zeros_like(residual)
    for i, block in enumerate(adjoint.blocks):
        update = step.updates[i]
        means = None if step.means is None else step.means[i]
        if means is not None:
            moved += block.dot(means, block.take(step.moved))
            if _present(update.decoupled):
                residual -= block.dot(means, block.take(step.theta) * update.decoupled)
        if isinstance(block, Outer) and means is not None and _unscaled(adjoint, update):
            _multiply_factors(i, block, means, step, products, residual)
        else:
            _multiply_out(i, means, adjoint, step, scratch, products, residual)
    for layer, of_layer in products.by_layer.items():
        step.add(layer, of_layer)
    return residual, moved


class _Products:
    """Inner products of ``k`` with the training gradients of a step, summed over a layer's blocks.

    Attributes
    ----------
    by_layer
        ``(row, example of the batch)`` of each layer that has any.
    """

    def __init__(self, step: Step, rows: int) -> None:
        self._step, self._shape = step, (rows, step.count)
        self.by_layer: dict[int, Tensor] = {}

    def add(self, layer: int, rows: slice, products: Tensor, factor: float) -> None:
        """Add products of some rows; the sign and the batch's size are put in here."""
        if layer not in self.by_layer:
            self.by_layer[layer] = self._step.theta.new_zeros(self._shape)
        self.by_layer[layer][rows].add_(products, alpha=-factor / self._step.size)


def _multiply_factors(
    i: int, block: Outer, means: Any, step: Step, products: _Products, residual: Tensor
) -> None:
    """Take a block whose ``k`` is a number times the mean gradient: nothing is multiplied out."""
    update = step.updates[i]
    direct: Any = update.s * update.q + update.n
    if _present(update.coupled):
        residual -= block.dot(means, block.take(step.theta) * (direct * update.coupled))
    if step.count:
        of_all = block.factor_products(means, step.training[i])
        products.add(block.layer, slice(None), of_all, direct * update.clip)


def _multiply_out(
    i: int,
    means: Any,
    adjoint: Adjoint,
    step: Step,
    scratch: Scratch,
    products: _Products,
    residual: Tensor,
) -> None:
    """Take a block by some rows of ``q`` and ``k`` at a time, which stay in the cache."""
    block, update = adjoint.blocks[i], step.updates[i]
    theta = block.take(step.theta)
    adjoint.decay(i, step.later_mu[i])  # before this step's gradient is added
    for rows in scratch.chunks(i, adjoint.rows):
        mean, work = scratch.views(rows.stop - rows.start, block.size)  # (row, element)
        if means is not None:
            block.mean(means, rows, mean)
        q, scale = _carry(adjoint, i, rows, update, mean, means is None, work)
        k, factor = _times(q, update.s, work)
        factor *= scale
        if means is not None and _present(update.n):
            k, factor = _add_scaled(k, factor, mean, update.n, work)
        if _present(update.coupled):
            # Before clipping: decay is added to the gradient that was clipped already.
            residual[rows] -= factor * (k @ (theta * update.coupled))
        if step.count:
            k, clip = _times(k, update.clip, work)
            of_rows = block.products(k, step.training[i], scratch.room)
            products.add(block.layer, rows, of_rows, factor * clip)


def inherited(adjoint: Adjoint, mu: Sequence[Scale], buffers: Sequence[Tensor | None]) -> Tensor:
    """Return what the buffer that the first step began with adds to the residual, ``(row,)``."""
    total = torch.zeros(adjoint.rows, dtype=torch.float64, device="cpu")
    for q, scale, momentum, buffer in zip(adjoint.state, adjoint.scales, mu, buffers, strict=True):
        if buffer is not None:
            total -= scale * (q @ (momentum * buffer)).double().cpu()
    return total


def _carry(
    adjoint: Adjoint, i: int, rows: slice, update: Update, mean: Tensor, outside: bool, work: Tensor
) -> tuple[Tensor, float]:
    """Return ``q`` of some rows at this step, and its scale; brings the state there in place."""
    if not adjoint.state:
        return torch.mul(mean, update.q, out=work), 1.0
    q, scale = adjoint.state[i][rows], adjoint.scales[i]
    if not outside:
        q.addcmul_(mean, torch.as_tensor(update.q, dtype=q.dtype, device=q.device) / scale)
    return q, scale


def _times(values: Tensor, scale: Scale, work: Tensor) -> tuple[Tensor, float]:
    """Return values and a number, whose product is the values times the scale."""
    if isinstance(scale, Tensor):
        return torch.mul(values, scale, out=work), 1.0
    return values, scale


def _add_scaled(
    k: Tensor, factor: float, mean: Tensor, n: Scale, work: Tensor
) -> tuple[Tensor, float]:
    """Return ``factor k + n mean``."""
    torch.mul(k, factor, out=work)
    if isinstance(n, Tensor):
        work.addcmul_(mean, n)
    else:
        work.add_(mean, alpha=n)
    return work, 1.0


def _present(scale: Scale) -> bool:
    return isinstance(scale, Tensor) or scale != 0


def _unscaled(adjoint: Adjoint, update: Update) -> bool:
    """Say whether ``k`` is the mean gradient times a number."""
    return not adjoint.state and not any(
        isinstance(scale, Tensor) for scale in (update.s, update.q, update.n, update.clip)
    )
