"""Leading eigenpairs of the Gauss-Newton matrix of the mean training loss, never ``P x P``.

``H = mean_i J_i' L_i J_i``, with J the derivative of a model's output by the moving parameters, and
L the second derivative of the loss by the output: for cross-entropy and squared error it is the
Fisher matrix, and positive. Products with vectors take a forward pass, a backward pass that is kept
for all vectors of a block, and of each vector one pass forwards (the derivative of ``J'u`` by u)
and one backwards. Plain autograd does it, so that any model with second derivatives will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkarray import progress as bars
from lkarray.nn import Batches, FlatModel, PerExampleLoss
from lkarray.nn.losses import logits
from lkarray.nn.modes import gradients_on
from lkarray.sampling.randomness import host_generator

#: Training items that the matrix is taken of at most: directions, not their precision, matter.
ROWS = 1024
#: Vectors multiplied at once, and those beyond which the basis grows no further.
BLOCK = 16
_PROBES = 8


@dataclass(frozen=True)
class Curvature:
    """Leading eigenpairs of a Gauss-Newton matrix.

    Attributes
    ----------
    vectors
        Orthonormal, ``(rank, param)``.
    values
        Their eigenvalues, positive and descending, ``(rank,)``, float64.
    residuals
        ``|H v - h v|`` of each, ``(rank,)``, float64.
    trace
        Of the whole matrix: that within the basis, and a Hutchinson estimate of the rest.
    rows
        Training items that it is of.
    """

    vectors: Tensor
    values: Tensor
    residuals: Tensor
    trace: float
    rows: int

    @property
    def captured(self) -> float:
        """Share of the trace that the eigenvalues are."""
        return float(self.values.sum()) / self.trace if self.trace > 0 else 1.0


class GaussNewton:
    """Products with the Gauss-Newton matrix of the mean loss of some training items.

    Parameters
    ----------
    flat
        The model, width 1, at the weights that the matrix is of.
    loss
        Gives one number an example, of the output's tensor.
    data, rows
        The training set, and the items of it that count.
    batch
        Items that go through the model at once.
    """

    def __init__(
        self, flat: FlatModel, loss: PerExampleLoss, data: Batches, rows: np.ndarray, batch: int
    ) -> None:
        self.flat, self.data, self.rows, self.batch = flat, data, rows, batch
        self._loss = loss.per_example

    @property
    def passes(self) -> int:
        """Batches of one product."""
        return -(-len(self.rows) // self.batch)

    def __call__(self, vectors: Tensor, tick: Callable[[], object] = lambda: None) -> Tensor:
        """Return ``H v`` of each of some vectors, ``(vector, param)``.

        Raises
        ------
        ValueError
            The model or the loss has no second derivatives, or the output is no tensor.
        """
        out = torch.zeros_like(vectors)
        sides = [self.flat.unflatten(v[None]) for v in vectors]
        with gradients_on(), sdpa_kernel(SDPBackend.MATH):
            for _, inputs, target in self.data.numbered(self.batch, self.rows):
                try:
                    self._add(out, sides, inputs, target)
                except (RuntimeError, TypeError, NotImplementedError) as error:
                    raise ValueError(
                        f"the Gauss-Newton matrix of this model and loss {self._loss.name!r} "
                        f"cannot be had ({str(error).splitlines()[0]}); rank=0 does without it"
                    ) from error
                tick()
        return out if self.flat.mask is None else out.mul_(self.flat.mask)

    def _add(self, out: Tensor, sides: list[list[Tensor]], inputs: object, target: object) -> None:
        leaves = self.flat.leaves
        output = logits(self.flat(inputs))  # type: ignore[arg-type]
        cut = output.detach().requires_grad_()
        total = self._loss(cut, target).sum() / len(self.rows)
        (slope,) = torch.autograd.grad(total, cut, create_graph=True)
        if not (output.requires_grad and slope.requires_grad):
            return  # a loss that is linear in the output bends nothing
        dual = torch.zeros_like(output, requires_grad=True)
        back = torch.autograd.grad(
            output, leaves, dual, create_graph=True, materialize_grads=True
        )  # J'u, linear in u
        reached = [i for i, tensor in enumerate(back) if tensor.requires_grad]
        for row, side in zip(out, sides, strict=True):
            (moved,) = torch.autograd.grad(
                [back[i] for i in reached], dual, [side[i] for i in reached], retain_graph=True
            )  # J v
            (bent,) = torch.autograd.grad(slope, cut, moved, retain_graph=True)
            product = torch.autograd.grad(
                output, leaves, bent, retain_graph=True, materialize_grads=True
            )
            row += self.flat.flatten(product)[0]


def training_rows(n: int, seed: int) -> np.ndarray:
    """Return the training items that a curvature is taken of: all, or `ROWS` of them by seed."""
    if n <= ROWS:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, n]).choice(n, ROWS, replace=False))


def leading_curvature(product: GaussNewton, rank: int, *, seed: int) -> Curvature:
    """Return the leading eigenpairs by block Lanczos with full orthogonalisation.

    Parameters
    ----------
    product
        Multiplies with the matrix.
    rank
        Eigenpairs wanted. No more are returned than are above rounding, so that a rank beyond what
        the data give is the exact matrix.
    seed
        Of the first block.

    Returns
    -------
    Curvature
        From a basis of ``2 rank + 16`` vectors, or of all there are.

    Notes
    -----
    Memory: the basis. Time: a product for each of its vectors, and eight for the trace.
    """
    flat = product.flat
    moving = flat.theta.shape[1] if flat.mask is None else int(flat.mask.sum())
    wanted = -(-(2 * rank + BLOCK) // BLOCK) * BLOCK
    basis = _Basis(flat, min(wanted, moving), seed)
    rounds = -(-basis.size // BLOCK) + (basis.size < moving)
    with bars.bar("curvature", total=rounds * product.passes, unit="batch") as bar:
        matrix, left = basis.fill(lambda block: product(block, bar.update))
        trace = float(matrix.trace())
        if basis.size < moving:
            trace += basis.trace_beyond(lambda block: product(block, bar.update))
    values, turned = torch.linalg.eigh(matrix)
    values, turned = values.flip(0)[:rank], turned.flip(1)[:, :rank]
    kept = values > 10 * torch.finfo(flat.theta.dtype).eps * max(float(values[0]), 0.0)
    values, turned = values[kept], turned[:, kept]
    last = turned[len(turned) - len(left) :]  # (vector, rank): the part along the last block
    residuals = torch.einsum("vr,vw,wr->r", last, left, last).clamp(min=0).sqrt()
    vectors = turned.to(flat.theta).T @ basis.vectors
    return Curvature(vectors, values, residuals, trace, len(product.rows))


Multiply = Callable[[Tensor], Tensor]


class _Basis:
    """An orthonormal basis of a block Krylov space, and the matrix in it.

    Attributes
    ----------
    vectors
        Shape ``(vector, param)``.
    """

    def __init__(self, flat: FlatModel, size: int, seed: int) -> None:
        theta = flat.theta
        self.size, self._mask = size, flat.mask
        self.vectors = theta.new_zeros((size, theta.shape[1]))
        self._generator = host_generator(seed, "curvature")

    def fill(self, multiply: Multiply) -> tuple[Tensor, Tensor]:
        """Return the matrix in the basis, float64, and the Gram of what of its last block is left.

        Where the space ends early (the matrix has a lower rank), random vectors go on.
        """
        matrix = torch.zeros((self.size, self.size), dtype=torch.float64, device="cpu")
        ahead = self.vectors[:0]
        left = matrix[:0, :0]
        for start in range(0, self.size, BLOCK):
            stop = min(start + BLOCK, self.size)
            largest = float(matrix.diagonal().abs().max())
            for row in range(start, stop):
                given = ahead[row - start] if row - start < len(ahead) else None
                self._add(row, given, largest)
            ahead = multiply(self.vectors[start:stop])
            shares = self._within(ahead, stop)
            matrix[:stop, start:stop] = shares.double().cpu().T
            ahead -= shares @ self.vectors[:stop]
            ahead -= self._within(ahead, stop) @ self.vectors[:stop]
            left = (ahead @ ahead.T).double().cpu()
        upper = matrix.triu(1)
        return upper + upper.T + matrix.diagonal().diag(), left

    def trace_beyond(self, multiply: Multiply) -> float:
        """Return an unbiased estimate of the trace outside the basis (Hutchinson)."""
        probes = torch.stack([self._random() for _ in range(_PROBES)]).sign()
        if self._mask is not None:
            probes *= self._mask
        probes -= self._within(probes, self.size) @ self.vectors
        return float((multiply(probes) * probes).sum(dtype=torch.float64)) / _PROBES

    def _within(self, rows: Tensor, stop: int) -> Tensor:
        return rows @ self.vectors[:stop].T

    def _random(self) -> Tensor:
        size = self.vectors.shape[1]
        host = torch.randn(size, generator=self._generator, dtype=self.vectors.dtype, device="cpu")
        vector = host.to(self.vectors.device)
        return vector if self._mask is None else vector * self._mask

    def _add(self, row: int, given: Tensor | None, largest: float) -> None:
        """Add a vector to the basis: what of ``given`` is new, or a random one."""
        floor = 100 * torch.finfo(self.vectors.dtype).eps * largest
        while True:
            vector = self._random() if given is None else given
            for _ in range(2):  # twice is enough (Giraud et al. 2005)
                vector = vector - (self.vectors[:row] @ vector) @ self.vectors[:row]
            norm = float(torch.linalg.vector_norm(vector))
            if given is None or norm > floor:
                self.vectors[row] = vector / norm
                return
            given = None
