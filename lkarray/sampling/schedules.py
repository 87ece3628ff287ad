"""Step-size schedules: factors of the step size, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lkarray.arguments import COUNT, POSITIVE, Limits, check_fields

#: Anything that maps a step (from 0) to a factor of the step size.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class PolynomialDecay:
    """``(1 + step / scale) ** -power``, as in Welling and Teh (2011, section 2).

    Parameters
    ----------
    scale
        Steps after which the decay sets in.
    power
        In (0.5, 1], the chain converges as steps go to infinity.

    References
    ----------
    - Welling and Teh 2011, section 2: "Bayesian learning via stochastic gradient Langevin
      dynamics", ICML.
    """

    scale: float
    power: float = 0.55

    def __post_init__(self) -> None:
        check_fields(self, scale=POSITIVE, power=Limits(above=0, most=1))

    def __call__(self, step: int) -> float:
        """Return the factor of a step."""
        return float((1 + step / self.scale) ** -self.power)


@dataclass(frozen=True)
class Warmup:
    """Rise linearly to 1 over the first ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT)

    def __call__(self, step: int) -> float:
        """Return the factor of a step."""
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class Cyclical:
    """Fall from 1 to 0 as a cosine in each period (Zhang et al. 2020, eq. 1).

    Parameters
    ----------
    period
        Steps of a cycle.
    least
        Smallest factor; it keeps the steps positive.

    References
    ----------
    - Zhang et al. 2020, eq. 1: "Cyclical stochastic gradient MCMC for Bayesian deep learning",
      arXiv:1902.03932.
    """

    period: int
    least: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, period=COUNT, least=Limits(above=0, most=1))

    def __call__(self, step: int) -> float:
        """Return the factor of a step."""
        phase = (step % self.period) / self.period
        return max(self.least, (1 + math.cos(math.pi * phase)) / 2)


#: Schedules that a store can name, so that a chain can be replayed from it alone.
SCHEDULES = {kind.__name__: kind for kind in (PolynomialDecay, Warmup, Cyclical)}
