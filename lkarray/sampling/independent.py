"""Independent draws in place of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lkarray.arguments import NATURAL, check_fields
from lkarray.sampling.laplace_law import LawSettings
from lkarray.sampling.samplers import Sampler, StepInput


@dataclass(frozen=True)
class Laplace(Sampler):
    r"""Independent draws of the Gaussian that a posterior has where its loss is quadratic.

    ``w = w* + Sigma^(1/2) xi`` with ``Sigma = (A (1 - eps A / 4))^-1``, ``A = nbeta H + gamma``,
    and H the Gauss-Newton matrix of the mean training loss at w*, of which the leading ``rank``
    eigenpairs are kept and the rest is taken to be 0. So a draw costs a forward pass of what is
    observed and nothing else: no burn-in, no thinning, no minibatches. What it costs in truth is a
    bias, where the loss is not quadratic over the law's width: compare ``lk.loss_gain`` with a run
    of `SGLD`.

    Parameters
    ----------
    step_size
        eps: 0 is the posterior's own law, another the stationary law of SGLD with this step size.
    schedule
        Must be None.
    rank
        Eigenpairs of the curvature; 0 takes ``Sigma = I / gamma`` (nearly), at no cost.

    Raises
    ------
    ValueError
        A setting is out of its range.

    Notes
    -----
    Before the first draw: ``2 rank + 24`` products of the Gauss-Newton matrix with vectors, each
    some three gradients of up to 1,024 training items, and ``(2 rank + 16) P`` numbers. A resume
    does that again, and compares.

    References
    ----------
    - MacKay 1992: "A practical Bayesian framework for backpropagation networks",
      doi:10.1162/neco.1992.4.3.448.
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.Laplace(rank=10).independent
    True
    """

    step_size: float = 0.0
    rank: int = 100

    def __post_init__(self) -> None:
        check_fields(self, step_size=NATURAL, rank=NATURAL)
        if self.schedule is not None:
            raise ValueError("independent draws have no schedule of step sizes: schedule=None")

    @property
    def independent(self) -> bool:
        """Whether each step is a draw of its own: it is."""
        return True

    @property
    def law(self) -> LawSettings:
        """The Gaussian that draws come from."""
        return LawSettings(self.rank, self.step_size)

    def size(self, step: int) -> float:
        """Return NaN: a draw is no step."""
        return math.nan

    def step(self, given: StepInput) -> None:
        """Set ``given.theta`` to a draw; each chain by itself, whatever the width of the stack."""
        assert given.law is not None, "a law is made where the run is prepared"
        for theta, noise in zip(given.theta, given.noise, strict=True):
            torch.add(given.center, given.law.root(noise), out=theta)
