"""Langevin dynamics that is exact for a Gaussian law, so that only the rest limits the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lkarray.arguments import NATURAL, check_fields
from lkarray.sampling.laplace_law import LaplaceLaw, LawSettings
from lkarray.sampling.samplers import Move, Sampler, StepInput, row_sums


@dataclass(frozen=True)
class InformedLangevin(Sampler):
    r"""Langevin dynamics informed by curvature: exact where the loss is a known quadratic.

    With ``Sigma = (gamma I + nbeta V h V')^-1``, the covariance of `Laplace` from ``rank``
    eigenpairs of the Gauss-Newton matrix of the mean training loss at w*, and r = exp(-eps / 2),

    ``w <- w - (1 - r) Sigma (nbeta * g + gamma (w - w*)) + sqrt(1 - r^2) Sigma^(1/2) xi``.

    That is the exact solution, over a time eps, of dynamics with the law ``N(w*, Sigma)``, while
    what the gradient deviates from this law's own is held constant. All directions forget at the
    same rate, in ``2 / eps`` steps; flat ones need ``2 / (eps gamma)`` steps of `SGLD`, whose eps
    the steepest bounds.

    Parameters
    ----------
    step_size
        eps, a number without units: 0.2 to 2. A direction whose precision is rho times that which
        the law gives it has the stationary variance ``(1 + r) / (2 - (1 - r) rho)`` over its
        precision: 1 where the law is right. It diverges where ``(1 - r) rho`` is above 2.
    schedule
        Factor of the step size as a function of the step.
    rank
        Eigenpairs that the law has, as for `Laplace`; more than the data give are the exact matrix.
        0 is exact for the localisation alone, at no cost.

    Raises
    ------
    ValueError
        A setting is out of its range. When sampling: gamma is 0, so that there is no law, or the
        model has no second derivatives and ``rank`` is not 0.

    Notes
    -----
    A step costs a gradient, as SGLD's, and for each chain two readings of ``rank P`` numbers.
    Before the first, and again before a resume, ``2 rank + 24`` products of the Gauss-Newton matrix
    with vectors, each some three gradients of up to 1,024 training items.

    Too long a step shows in ``lk.loss_gain``: it must be that of half the step. Minibatches widen
    the law too: noise of covariance C / batch in their gradients adds
    ``tanh(eps / 4) nbeta^2 Sigma C Sigma / batch`` to it, which no Metropolis test sees.

    References
    ----------
    - Cui, Law and Marzouk 2016: "Dimension-independent likelihood-informed MCMC",
      doi:10.1016/j.jcp.2015.10.008.
    - Beskos et al. 2008: "MCMC methods for diffusion bridges", doi:10.1142/S0219493708002378.
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.InformedLangevin(step_size=0.5, rank=20).law
    LawSettings(rank=20, step_size=0.0)
    """

    step_size: float = 1.0
    rank: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, rank=NATURAL)

    @property
    def law(self) -> LawSettings:
        """The Gaussian that the dynamics is exact for."""
        return LawSettings(self.rank)

    def step(self, given: StepInput) -> None:
        """Move ``given.theta``; each chain by itself, whatever the width of the stack."""
        law, eps = _law(given.law), self.size(given.step)
        along, spread = math.expm1(-eps / 2), math.sqrt(-math.expm1(-eps))  # r - 1, root of 1 - r^2
        rows = zip(given.theta, given.grad, given.noise, strict=True)
        for theta, grad, noise in rows:
            # r d - (1 - r) Sigma (f - A d) is d - (1 - r) Sigma f: the law's own force goes with
            # the rest.
            force = (theta - given.center).mul_(given.gamma).add_(grad, alpha=given.nbeta)
            theta.add_(law.drift(force, noise, along=along, spread=spread))

    def log_ratio(self, drop: Tensor, move: Move) -> Tensor:
        """Return the logarithm of the Metropolis ratio of a step; 0 where the law is exact."""
        law, pace = _law(move.law), math.tanh(self.size(move.step) / 4)
        forces = torch.stack([law.root(forces) for forces in move.forces])
        drop += math.sqrt(pace) * row_sums(forces * move.noise)
        drop -= pace / 2 * row_sums(forces * forces)
        return drop


def _law(law: LaplaceLaw | None) -> LaplaceLaw:
    assert law is not None, "a law is made where the run is prepared"
    return law
