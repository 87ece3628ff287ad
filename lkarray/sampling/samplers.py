"""Samplers: how one step moves the weights of a stack of chains.

All vectors have shape ``(chain, param)`` or ``(param,)``; every update is a few fused,
elementwise passes over them, so a chain's numbers do not depend on its neighbours'. ``grad``
is that of the mean minibatch loss, and the force is ``nbeta * grad + gamma (w - w*)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lkarray.arguments import POSITIVE, Limits, check_fields
from lkarray.nn.losses import identity
from lkarray.sampling.laplace_law import LaplaceLaw, LawSettings
from lkarray.sampling.schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class StepInput:
    """What one step is made of.

    Attributes
    ----------
    theta
        Weights, which the step moves in place.
    grad
        Gradient of the mean minibatch loss.
    noise
        Standard normal.
    center
        w*, ``(param,)``.
    nbeta, gamma
        Of the posterior.
    step
        Steps taken before, burn-in included.
    state
        What the chain carries from step to step (`Sampler.carries`), moved in place.
    curvature
        Estimate of the Hessian's diagonal, where the sampler needs one.
    law
        The Gaussian around w* that a step, or an independent draw, is made with (`Sampler.law`).
    """

    theta: Tensor
    grad: Tensor
    noise: Tensor
    center: Tensor
    nbeta: float
    gamma: float
    step: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    curvature: Tensor | None = None
    law: LaplaceLaw | None = None


@dataclass(frozen=True)
class Move:
    """A Langevin step that was taken, for its Metropolis test.

    Attributes
    ----------
    step
        Steps taken before it.
    forces
        ``nbeta * grad + gamma (w - w*)`` where it began, plus where it ended; ``(chain, param)``.
    noise
        That it was made of.
    state
        What the chain carries, after it.
    law
        As in `StepInput`.
    """

    step: int
    forces: Tensor
    noise: Tensor
    state: Mapping[str, Tensor]
    law: LaplaceLaw | None = None


@dataclass(frozen=True)
class Sampler(ABC):
    """What all samplers share: a step size and its schedule.

    Parameters
    ----------
    step_size
        eps of the papers, at the first step.
    schedule
        Factor of the step size as a function of the step (from 0, burn-in included), for
        example ``lk.schedules.PolynomialDecay(1000)``; ``None`` keeps it constant.

    Raises
    ------
    ValueError
        A setting is out of its range.
    """

    step_size: float
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_fields(self, step_size=POSITIVE)
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(
                f"schedule must map a step to a factor, not be {type(self.schedule).__name__}"
            )

    @property
    def carries(self) -> tuple[str, ...]:
        """Names of the vectors that a chain carries from step to step beside its weights."""
        return ()

    @property
    def needs_curvature(self) -> bool:
        """Whether a step needs an estimate of the Hessian's diagonal."""
        return False

    @property
    def independent(self) -> bool:
        """Whether each step is a draw of its own, which takes no gradient (`Laplace`)."""
        return False

    @property
    def law(self) -> LawSettings | None:
        """The Gaussian around w* that a step needs; made where a run is prepared."""
        return None

    @property
    def testable(self) -> bool:
        """Whether a Metropolis test of a Langevin step applies (`log_ratio`)."""
        return True

    def size(self, step: int) -> float:
        """Return the step size of a step."""
        if self.schedule is None:
            return self.step_size
        size = self.step_size * float(self.schedule(step))
        if not math.isfinite(size) or size <= 0:
            raise ValueError(f"the schedule gave step {step} the size {size}; keep it positive")
        return size

    @abstractmethod
    def step(self, given: StepInput) -> None:
        """Move ``given.theta``, and ``given.state``, in place."""

    def preconditioner(self, step: int, state: Mapping[str, Tensor]) -> Tensor | float:
        """Return what multiplied the force of the last step."""
        return 1.0

    def log_ratio(self, drop: Tensor, move: Move) -> Tensor:
        """Return the logarithm of the Metropolis ratio of a step, ``(chain,)`` float64.

        Of MALA (Roberts and Tweedie 1996): ``drop`` is how far the energy fell, to which
        ``log q(w|w') - log q(w'|w)`` is added in place, the noise's own large square cancelled by
        hand.
        """
        eps, scale = self.size(move.step), self.preconditioner(move.step, move.state)
        root = scale**0.5  # everything below is (chain, param), and each sum (chain,)
        drop += math.sqrt(eps) / 2 * row_sums(root * move.noise * move.forces)
        drop -= eps / 8 * row_sums(scale * move.forces * move.forces)
        return drop

    def settings(self) -> dict[str, Any]:
        """Return what a store keeps of the sampler: plain values under their names."""
        settings: dict[str, Any] = {"name": type(self).__name__} | asdict(self)
        if self.schedule is None:
            del settings["schedule"]
        elif type(self.schedule).__name__ in SCHEDULES and is_dataclass(self.schedule):
            name = {"name": type(self.schedule).__name__}
            settings["schedule"] = name | asdict(self.schedule)
        else:
            settings["schedule"] = identity(self.schedule)
        return settings


def row_sums(values: Tensor) -> Tensor:
    """Return the sum of each row, in float64."""
    return values.sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class SGLD(Sampler):
    """Stochastic gradient Langevin dynamics.

    ``w <- w - (eps / 2) (nbeta * g + gamma (w - w*)) + sqrt(eps) * xi``, with g the gradient
    of the mean minibatch loss and xi standard normal.

    Parameters
    ----------
    step_size
        eps. For a quadratic of curvature h the stationary variance is
        ``1 / (h (1 - eps h / 4))`` with ``h = nbeta * H + gamma``, and a step above 4 / h
        diverges.
    schedule
        Factor of the step size as a function of the step; ``None`` keeps it constant.

    Raises
    ------
    ValueError
        The step size is not a positive number.

    References
    ----------
    - Welling and Teh 2011: "Bayesian learning via stochastic gradient Langevin dynamics", ICML.
    - Adam et al. 2025a, eq. 10: "The Loss Kernel", arXiv:2509.26537.
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.SGLD(step_size=1e-4, schedule=lk.schedules.PolynomialDecay(100.0)).size(100)
    6.830201283771978e-05
    """

    def step(self, given: StepInput) -> None:
        """Move ``given.theta`` in place, in three passes."""
        theta, eps = given.theta, self.size(given.step)
        # The pull to w* as an interpolation: no vector is made for w - w*.
        theta.lerp_(given.center, eps / 2 * given.gamma)
        theta.add_(given.grad, alpha=-eps / 2 * given.nbeta)
        theta.add_(given.noise, alpha=math.sqrt(eps))


@dataclass(frozen=True)
class RMSpropSGLD(Sampler):
    r"""SGLD preconditioned as RMSprop.

    ``V <- a V + (1 - a) g^2``, ``G = 1 / (sqrt(V / (1 - a^t)) + damping)``, and
    ``w <- w - (eps / 2) (G (nbeta * g + gamma (w - w*)) - Gamma) + sqrt(eps G) * xi``.

    Gamma is the drift that a preconditioner which depends on w needs for the chain to have the
    right stationary distribution: ``Gamma_i = dG_i / dw_i``. The literature drops it, since it
    needs second derivatives; then the variance is biased. With ``drift_correction`` it is
    computed from the derivative of V along a common shift of the steps that V averages,
    ``D <- a D + (1 - a) 2 g diag(H)``, with an unbiased estimate of the Hessian's diagonal
    (Hutchinson's, one random sign vector a step; Bekas et al. 2007).

    Parameters
    ----------
    step_size
        eps, before the preconditioner.
    schedule
        Factor of the step size as a function of the step.
    decay
        a, the weight of the past in V.
    damping
        Added to the root of V; the largest G is one over it.
    drift_correction
        Whether to add Gamma. A step then costs a second backward pass.

    Raises
    ------
    ValueError
        A setting is out of its range.

    References
    ----------
    - Li et al. 2016, algorithm 1: "Preconditioned stochastic gradient Langevin dynamics for deep
      neural networks", arXiv:1512.07666.
    - Bekas et al. 2007: "An estimator for the diagonal of a matrix",
      doi:10.1016/j.apnum.2007.01.003.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.RMSpropSGLD(step_size=1e-4).carries
    ('second_moment',)
    """

    decay: float = 0.99
    damping: float = 0.1
    drift_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, decay=Limits(least=0, below=1), damping=POSITIVE)

    @property
    def carries(self) -> tuple[str, ...]:
        """Names of the moments."""
        names = ("second_moment", "second_moment_slope")
        return names if self.drift_correction else names[:1]

    @property
    def needs_curvature(self) -> bool:
        """Whether a step needs an estimate of the Hessian's diagonal."""
        return self.drift_correction

    def step(self, given: StepInput) -> None:
        """Move ``given.theta`` and the moments in place."""
        theta, grad, step, curvature = given.theta, given.grad, given.step, given.curvature
        eps, moment = self.size(step), given.state["second_moment"]
        # The gradient of this step counts in G already, as in RMSprop.
        moment.mul_(self.decay).addcmul_(grad, grad, value=1 - self.decay)
        scale = self._scale(step, moment)
        force = (theta - given.center).mul_(given.gamma).add_(grad, alpha=given.nbeta)
        if curvature is not None:
            slope = given.state["second_moment_slope"]
            slope.mul_(self.decay).addcmul_(grad, curvature, value=2 * (1 - self.decay))
            # dG/dw = -G^2 dV/dw / (2 sqrt(V)), where V is not zero.
            root = (moment / self._bias(step)).sqrt_()
            drift = slope.div(2 * self._bias(step)).div_(root).mul_(scale).mul_(scale)
            # It is 0 / 0 where no gradient has reached a weight yet.
            theta.add_(drift.nan_to_num_(0.0, 0.0, 0.0), alpha=-eps / 2)
        theta.addcmul_(force, scale, value=-eps / 2)
        theta.addcmul_(given.noise, scale.sqrt_(), value=math.sqrt(eps))  # last: G is overwritten

    def preconditioner(self, step: int, state: Mapping[str, Tensor]) -> Tensor | float:
        """Return G of the last step."""
        return self._scale(step, state["second_moment"])

    def _bias(self, step: int) -> float:
        return 1 - self.decay ** (step + 1)

    def _scale(self, step: int, moment: Tensor) -> Tensor:
        return moment.div(self._bias(step)).sqrt_().add_(self.damping).reciprocal_()


@dataclass(frozen=True)
class SGHMC(Sampler):
    """Stochastic gradient Hamiltonian Monte Carlo.

    ``v <- (1 - a) v - (eps / 2) (nbeta * g + gamma (w - w*)) + sqrt(a eps) * xi`` and
    ``w <- w + v``; a friction of 1 is SGLD with the same eps. For a quadratic of curvature h
    the stationary variance is ``1 / (h (1 - eps h / (4 (2 - a))))``, and a step above
    ``4 (2 - a) / h`` diverges.

    Parameters
    ----------
    step_size
        eps, as for SGLD.
    schedule
        Factor of the step size as a function of the step.
    friction
        a, in (0, 1]: the share of the momentum that is lost at each step.

    Raises
    ------
    ValueError
        A setting is out of its range.

    References
    ----------
    - Chen, Fox and Guestrin 2014, eq. 15: "Stochastic gradient Hamiltonian Monte Carlo",
      arXiv:1402.4102.
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.SGHMC(step_size=1e-4, friction=0.5).carries
    ('momentum',)
    """

    friction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, friction=Limits(above=0, most=1))

    @property
    def carries(self) -> tuple[str, ...]:
        """Name of the momentum."""
        return ("momentum",)

    @property
    def testable(self) -> bool:
        """Whether a Metropolis test of a Langevin step applies: it does not."""
        return False

    def step(self, given: StepInput) -> None:
        """Move ``given.theta`` and the momentum in place, in five passes."""
        eps, momentum = self.size(given.step), given.state["momentum"]
        momentum.mul_(1 - self.friction).add_(given.grad, alpha=-eps / 2 * given.nbeta)
        momentum.add_(given.center - given.theta, alpha=eps / 2 * given.gamma)
        momentum.add_(given.noise, alpha=math.sqrt(self.friction * eps))
        given.theta.add_(momentum)  # last: the force is of where the step began
