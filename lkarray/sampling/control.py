"""The linear chain beside a chain: what it predicts of outcomes has a covariance that is known.

``q <- q - (eps / 2) (gamma q + V nbeta h V' q) + sqrt(eps) xi``, with the very noise xi of each
step of SGLD, is what ``w - w*`` would do if the training loss were quadratic with the leading
curvature (V, h). Started in its stationary law it stays there, whatever the loss is in truth, so
that predictions ``g_i . q`` of outcomes, g_i their gradients at w*, have the covariance
``g_i' Sigma g_j`` exactly: control variates (docs/methods/laplace.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkarray import schema
from lkarray.nn import Batches, FlatModel, PerExampleLoss
from lkarray.nn.batches import Inputs, fresh
from lkarray.nn.modes import gradients_on
from lkarray.nn.outcomes import Outcome
from lkarray.sampling.laplace_law import LaplaceLaw

#: What carries the linear chain among the vectors of a chain's state.
STATE = "control"

Scalars = Callable[[Any, Any], Tensor]
Parameters = dict[str, Tensor]

#: What torch raises of an operation that it cannot differentiate so.
_UNSUPPORTED = (RuntimeError, NotImplementedError, TypeError)


def predicted_outcome(outcomes: Iterable[Outcome]) -> str:
    """Return what is predicted of each sample: log-odds or a residual if recorded, or the loss."""
    names = {outcome.name for outcome in outcomes}
    known = (schema.LOG_ODDS.name, schema.RESIDUAL.name)
    return next((name for name in known if name in names), schema.LOSS.name)


@dataclass(frozen=True)
class Control:
    """Moves linear chains, and makes their predictions.

    Attributes
    ----------
    law
        In which they are stationary, of the sampler's step size.
    outcome
        Name of what is predicted.
    scalars
        Gives it, of output and target.
    bend
        The curvature's eigenvalues, where the weights are: no step waits for their copy.
    forward
        Whether derivatives are taken forwards; else by two passes backwards, which every model
        with second derivatives allows.
    """

    law: LaplaceLaw
    outcome: str
    scalars: Scalars
    bend: Tensor
    forward: bool = True

    def move(
        self, offset: Tensor, noise: Tensor, *, eps: float, nbeta: float, gamma: float
    ) -> None:
        """Take a step of one chain's offset ``q`` from w*, ``(param,)``, in place."""
        vectors = self.law.curvature.vectors
        along = (vectors @ offset).mul_(self.bend)  # (rank,)
        offset.mul_(1 - eps / 2 * gamma).addmv_(vectors.T, along, alpha=-eps / 2 * nbeta)
        offset.add_(noise, alpha=math.sqrt(eps))

    def predict(
        self, flat: FlatModel, center: Tensor, offset: Tensor, inputs: Inputs, target: Any
    ) -> Tensor:
        """Return the derivative of a batch's outcomes at w* along an offset, ``(batch,)``.

        NaN where the outcome is.
        """
        at, along = flat.named(center), flat.named(offset)
        derivative = _forwards if self.forward else _backwards
        value, slope = derivative(self._outcomes(flat, inputs, target), at, along)
        return torch.where(value.isnan(), torch.nan, slope).detach()

    def _outcomes(
        self, flat: FlatModel, inputs: Inputs, target: Any
    ) -> Callable[[Parameters], Tensor]:
        inputs, target = fresh(inputs, target)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})

        def outcomes(parameters: Parameters) -> Tensor:
            return self.scalars(functional_call(flat.module, parameters, args, kwargs), target)

        return outcomes


def make_control(
    law: LaplaceLaw,
    loss: PerExampleLoss,
    outcomes: Sequence[Outcome],
    flat: FlatModel,
    observed: Iterable[Batches],
) -> Control:
    """Return the control of a run, tried on the first items of its observed sets.

    Raises
    ------
    ValueError
        Losses are of tokens, or the model has no derivatives that will do.
    """
    if loss.dims:
        raise ValueError(
            f"control= predicts one number a sample, and losses {loss.name!r} are of each "
            f"{loss.dims[0]}: leave it out, or take loss='next_token_mean'"
        )
    name = predicted_outcome(outcomes)
    scalars = {outcome.name: outcome.of_logits for outcome in outcomes}.get(name, loss.per_example)
    control = Control(law, name, scalars, law.curvature.values.to(flat.theta))
    for data in observed:
        control = _tried(control, flat, data)
    return control


def _tried(control: Control, flat: FlatModel, data: Batches) -> Control:
    """Return the control, with derivatives that the model has."""
    inputs, target = data.take(np.arange(min(2, data.n)))
    center = flat.theta[0].clone()
    along = torch.ones_like(center)
    refused: Exception | None = None
    for forward in (True, False) if control.forward else (False,):
        chosen = replace(control, forward=forward)
        try:
            chosen.predict(flat, center, along, inputs, target)
        except _UNSUPPORTED as error:
            refused = error
        else:
            return chosen
    assert refused is not None
    raise ValueError(
        f"control=: the derivative of {control.outcome!r} along the weights cannot be had of this "
        f"model, neither forwards nor backwards ({str(refused).splitlines()[0]}); leave it out"
    ) from refused


def _forwards(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    """Return a function's values, and their derivative along a direction: one pass forwards."""
    # The fused kernels of attention have no rule for it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        made: tuple[Tensor, Tensor] = jvp(function, (at,), (along,))  # type: ignore[assignment]
    return made


def _backwards(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    """Return the same by the derivative of ``J'u`` along u: a pass forwards, two backwards."""
    with gradients_on(), sdpa_kernel(SDPBackend.MATH):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in at.items()}
        value = function(leaves)
        if not value.requires_grad:
            return value, torch.zeros_like(value)
        dual = torch.zeros_like(value, requires_grad=True)
        back = torch.autograd.grad(
            value, list(leaves.values()), dual, create_graph=True, materialize_grads=True
        )
        reached = [
            (slope, side)
            for slope, side in zip(back, along.values(), strict=True)
            if slope.requires_grad
        ]
        slopes, sides = zip(*reached, strict=True)
        (moved,) = torch.autograd.grad(slopes, dual, sides)
    return value.detach(), moved
