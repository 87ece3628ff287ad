"""Whitened, sketched gradients of a posterior's examples, at w* or at draws of its Laplace law."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lkarray.errors import MemoryBudgetError, NonFiniteError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import Inputs
from lkarray.nn.gradients import ExampleGradients
from lkarray.nn.modes import gradients_on
from lkarray.nn.reference import Scalars
from lkarray.sampling.laplace_law import LaplaceLaw
from lkarray.sampling.randomness import ChainRandomness, host_generator

#: Examples whose gradients are taken at once, at most; one by one of networks with more parameters
#: than this, whose activations and gradients leave the processor's caches.
_BATCH, _ALONE = 64, 1_000_000
#: Gradients of a batch that are held: layers' factors, the gradients, their signed copies.
_COPIES = 4


class Sketch:
    """A count sketch: each parameter is added, with a random sign, to one of ``size`` numbers.

    Inner products are unbiased, with a variance of at most ``2 |x|^2 |y|^2 / size`` (Weinberger et
    al. 2009, eq. 5).
    """

    def __init__(self, params: int, size: int, *, seed: int, device: torch.device) -> None:
        generator = host_generator(seed, "sketch")
        self.size = size
        bucket = torch.randint(size, (params,), generator=generator, device="cpu")
        sign = torch.randint(2, (params,), generator=generator, dtype=torch.int8, device="cpu")
        self._bucket = bucket.to(device)
        self._sign = sign.mul_(2).sub_(1).to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the sketches of rows, ``(row, size)``."""
        out = rows.new_zeros((len(rows), self.size))
        return out.index_add_(1, self._bucket, rows * self._sign)


class FeatureMaker:
    """Makes features of some samples at some draw.

    Parameters
    ----------
    flat
        The model, at w*.
    data
        The observed set.
    scalars
        What is differentiated of each sample.
    law
        Whose covariance whitens, and whose draws gradients are taken at.
    sketch
        ``None`` keeps a number for each moving parameter.
    seed
        Of the draws.
    batch
        Samples whose gradients are taken at once.
    """

    def __init__(
        self,
        flat: FlatModel,
        data: Batches,
        scalars: Scalars,
        law: LaplaceLaw,
        sketch: Sketch | None,
        *,
        seed: int,
        batch: int,
    ) -> None:
        self.flat, self.data, self.law, self.sketch = flat, data, law, sketch
        self.batch = batch
        self.center = flat.theta[0].clone()
        self._scalars = scalars
        self._gradients = self._one_by_one
        if batch > 1:
            probe = data.take(np.arange(2) % data.n)
            self._gradients = ExampleGradients(flat, scalars, probe).gradients
        self._random = ChainRandomness(seed, 0, n=1, batch_size=None, like=self.center)
        vectors = law.curvature.vectors
        # The sketch is linear: that of a whitened gradient needs those of the eigenvectors alone.
        self._vectors = vectors if sketch is None else sketch(vectors)
        self._where = ""

    @property
    def modes(self) -> int:
        """Length of a feature."""
        if self.sketch is not None:
            return self.sketch.size
        return moving(self.flat)

    def move(self, draw: int | None) -> None:
        """Go to a draw of the law, or to w*."""
        self._where = "w*" if draw is None else f"draw {draw}"
        theta = self.flat.theta[0]
        if draw is None:
            theta.copy_(self.center)
        else:
            noise = self._random.noise(draw)
            if self.flat.mask is not None:
                noise = noise * self.flat.mask
            torch.add(self.center, self.law.root(noise), out=theta)

    def features(self, rows: slice) -> np.ndarray:
        """Return the features of some samples where the weights are, ``(sample, mode)``.

        Raises
        ------
        NonFiniteError
            A gradient is NaN or infinite; the message says of which sample.
        """
        parts = []
        for start in range(rows.start, rows.stop, self.batch):
            index = np.arange(start, min(start + self.batch, rows.stop))
            gradients = self._gradients(*self.data.take(index))
            parts.append(self._whitened(self._finite(gradients, index)))
        return torch.cat(parts).cpu().numpy()

    def _one_by_one(self, inputs: Inputs, target: Inputs) -> Tensor:
        """Return the gradient of a batch of one, ``(1, param)``: one forward and backward pass."""
        flat = self.flat
        flat.grad.zero_()
        with gradients_on():
            number = self._scalars(flat(inputs), target)
            torch.autograd.backward(number, torch.ones_like(number))
        return flat.grad.clone()

    def _finite(self, gradients: Tensor, index: np.ndarray) -> Tensor:
        # A sum is finite only if all of it is: one number to look at for each gradient.
        bad = ~gradients.sum(1, dtype=torch.float64).isfinite()
        if bool(bad.any()):
            first = index[bad.cpu().numpy()][:5].tolist()
            raise NonFiniteError(
                f"observed: the gradient of samples {first} is not finite at {self._where}; look "
                "at their inputs and targets (classes masked with -inf, say), or leave them out"
            )
        return gradients if self.flat.mask is None else gradients.mul_(self.flat.mask)

    def _whitened(self, gradients: Tensor) -> Tensor:
        """Return ``S Sigma^(1/2) g``, S the sketch."""
        law = self.law
        along = (gradients @ law.curvature.vectors.T).mul_(law.excess)  # (sample, rank)
        kept = gradients if self.sketch is None else self.sketch(gradients)
        out = torch.addmm(kept, along, self._vectors, beta=law.flat)
        if self.sketch is None and self.flat.mask is not None:
            return out[:, self.flat.mask]
        return out


def moving(flat: FlatModel) -> int:
    """Return how many parameters move."""
    return flat.theta.shape[1] if flat.mask is None else int(flat.mask.sum())


def gradient_batch(flat: FlatModel, budget: int) -> int:
    """Return how many gradients are taken at once.

    Raises
    ------
    MemoryBudgetError
        The budget does not hold that of one sample.
    """
    each = _COPIES * flat.theta.shape[1] * flat.theta.element_size()
    fit = budget // 2 // each
    if fit < 1:
        raise MemoryBudgetError(
            f"the gradient of one sample takes {each / 2**20:.0f} MiB with its copies; set memory= "
            f"to {2 * each / 2**20 + 1:.0f} MiB or more, or let fewer parameters move (trainable=)"
        )
    return 1 if flat.theta.shape[1] > _ALONE else min(_BATCH, fit)
