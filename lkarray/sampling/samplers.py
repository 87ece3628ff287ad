"""Samplers: how one step moves the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SGLD:
    """Stochastic gradient Langevin dynamics (Welling and Teh 2011; loss-kernel eq. 10).

    ``w <- w - (eps / 2) (nbeta * g + gamma (w - w*)) + sqrt(eps) * xi``, with g the gradient
    of the mean minibatch loss and xi standard normal.

    Parameters
    ----------
    step_size
        eps. For a quadratic of curvature h the stationary variance is
        ``1 / (h (1 - eps h / 4))`` with ``h = nbeta * H + gamma``, and a step above 4 / h
        diverges.

    Raises
    ------
    ValueError
        The step size is not a positive number.
    """

    step_size: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.step_size) or self.step_size <= 0:
            raise ValueError(f"step_size must be a positive number, not {self.step_size!r}")
        object.__setattr__(self, "step_size", float(self.step_size))

    def step(
        self,
        theta: Tensor,
        grad: Tensor,
        noise: Tensor,
        center: Tensor,
        *,
        nbeta: float,
        gamma: float,
    ) -> None:
        """Move ``theta`` in place; all vectors have shape ``(param,)``. Three fused passes."""
        half = self.step_size / 2
        theta.lerp_(center, half * gamma)
        theta.add_(grad, alpha=-half * nbeta)
        theta.add_(noise, alpha=math.sqrt(self.step_size))
