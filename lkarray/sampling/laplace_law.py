"""The Gaussian law around w* that a posterior has where its loss is quadratic."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lkarray.nn import Batches, FlatModel
from lkarray.nn.flat import tensor_bytes
from lkarray.sampling.curvature import (
    Curvature,
    GaussNewton,
    leading_curvature,
    training_rows,
)
from lkarray.sampling.posterior import LocalPosterior


@dataclass(frozen=True)
class LawSettings:
    """Which law a sampler needs: eigenpairs that it knows, and eps of the SGLD whose law it is."""

    rank: int
    step_size: float = 0.0


@dataclass(frozen=True)
class LaplaceLaw:
    """``N(w*, Sigma)`` with ``Sigma = s(0) I + V' diag(s(h) - s(0)) V``.

    ``s(h) = 1 / (a (1 - eps a / 4))`` with ``a = nbeta h + gamma``: the stationary variance of SGLD
    with step size eps along an eigenvector of the curvature h; of the posterior itself where eps is
    0. Along what is not among the vectors h is taken to be 0.

    Attributes
    ----------
    curvature
        Eigenpairs; ``vectors`` is ``(rank, param)``.
    flat
        Root of the variance where nothing bends, ``s(0) ** 0.5``.
    excess
        ``s(h) ** 0.5 - s(0) ** 0.5`` of each eigenpair, ``(rank,)``, in the weights' dtype.
    mask
        The elements that move; ``None`` where all do.
    """

    curvature: Curvature
    flat: float
    excess: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        curvature: Curvature,
        *,
        nbeta: float,
        gamma: float,
        step_size: float = 0.0,
        mask: Tensor | None = None,
    ) -> LaplaceLaw:
        """Return the law of a curvature.

        Raises
        ------
        ValueError
            ``gamma`` is 0, or the step is one with which SGLD diverges.
        """
        if gamma <= 0:
            raise ValueError(
                "the Laplace law needs gamma above 0: along what the data leave free, its variance "
                "is 1 / gamma"
            )
        precision = nbeta * curvature.values + gamma  # (rank,)
        steepest = max([gamma, *precision.tolist()])
        if step_size * steepest >= 4:
            raise ValueError(
                f"step_size must be below {4 / steepest:.3g}, four over the largest curvature "
                f"nbeta h + gamma, not {step_size:g}: with it SGLD has no stationary law"
            )
        roots = (precision * (1 - step_size * precision / 4)).rsqrt()
        flat = (gamma * (1 - step_size * gamma / 4)) ** -0.5
        return cls(curvature, flat, (roots - flat).to(curvature.vectors), mask)

    def root(self, vectors: Tensor) -> Tensor:
        """Return ``Sigma ** 0.5`` times some vectors, ``(..., param)``."""
        rows = vectors.reshape(-1, vectors.shape[-1])
        along = (rows @ self.curvature.vectors.T).mul_(self.excess)  # (vector, rank)
        out = torch.addmm(rows, along, self.curvature.vectors, beta=self.flat)
        out = out.reshape(vectors.shape)
        return out if self.mask is None else out.mul_(self.mask)

    def drift(self, forces: Tensor, noise: Tensor, *, along: float, spread: float) -> Tensor:
        """Return ``along Sigma f + spread Sigma ** 0.5 xi`` of one force and noise, ``(param,)``.

        The eigenvectors are read twice, which is what it costs.
        """
        vectors, excess, flat = self.curvature.vectors, self.excess, self.flat
        out = torch.add(forces * (along * flat**2), noise, alpha=spread * flat)
        of_force, of_noise = (torch.stack([forces, noise]) @ vectors.T).unbind()  # (rank,)
        # s(h) - s(0) is (excess + 2 flat) excess.
        within = of_force * (excess * (excess + 2 * flat) * along) + of_noise * (excess * spread)
        out = torch.addmv(out, vectors.T, within)
        return out if self.mask is None else out.mul_(self.mask)

    @property
    def identity(self) -> str:
        """A hash of the eigenpairs, to the last bit."""
        digest = hashlib.sha256(tensor_bytes(self.curvature.vectors))
        digest.update(tensor_bytes(self.curvature.values))
        return digest.hexdigest()[:16]


def laplace_law(
    posterior: LocalPosterior,
    flat: FlatModel,
    train: Batches | None,
    batch: int,
    *,
    rank: int,
    step_size: float = 0.0,
    seed: int = 0,
) -> LaplaceLaw:
    """Return the Laplace law of a posterior at the weights that ``flat`` holds.

    Parameters
    ----------
    posterior
        What is approximated.
    flat
        Its model, width 1.
    train, batch
        Its training set, and how many items of it go through the model at once; ``None`` where no
        curvature is wanted.
    rank
        Eigenpairs of the curvature; 0 takes the loss to be flat, and reads no data.
    step_size
        eps of SGLD.
    seed
        Of what is random in the curvature.
    """
    if posterior.gamma <= 0:  # before any work
        LaplaceLaw.of(no_curvature(flat), nbeta=posterior.nbeta, gamma=posterior.gamma)
    if train is None or rank == 0 or posterior.nbeta == 0:
        curvature = no_curvature(flat)
    else:
        rows = training_rows(train.n, seed)
        product = GaussNewton(flat, posterior.loss, train, rows, batch)
        curvature = leading_curvature(product, rank, seed=seed)
    return LaplaceLaw.of(
        curvature,
        nbeta=posterior.nbeta,
        gamma=posterior.gamma,
        step_size=step_size,
        mask=flat.mask,
    )


def no_curvature(flat: FlatModel) -> Curvature:
    """Return the curvature of a flat loss: no eigenpairs, and nothing known of its trace."""
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    return Curvature(flat.theta.new_zeros((0, flat.theta.shape[1])), none, none, math.nan, 0)
