r"""What torch's optimizers did at a step, read from their state after it.

Every optimizer here is linear in the gradients once its realised quantities are given
(docs/methods/adjoint.md)::

    u_t = C_t g_t + coupled theta_t
    b_t = mu b_{t-1} + S_t u_t
    theta_{t+1} - theta_t = - Q_t b_t - N_t u_t - decoupled theta_t

with ``S = s``, ``Q = q``, ``N = n``, of which those named in `Rule.divides` are also divided by
the denominator, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lkarray.errors import StoreError

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Coefficients:
    """Scalars of one step and group; see the module. ``decoupled`` has the learning rate in it."""

    learning_rate: float
    mu: float
    s: float
    q: float
    n: float
    coupled: float
    decoupled: float = 0.0


@dataclass(frozen=True)
class Rule:
    """How to read one kind of optimizer.

    Attributes
    ----------
    coefficients
        Of a group, a parameter's state after the step, and whether it had a buffer before it.
    denominator
        Of a parameter's group and state after the step; ``None`` if nothing is divided.
    divides
        Which of ``S``, ``Q``, ``N`` the denominator divides.
    buffer
        Name of the state that is ``b``, given the group; ``None`` where ``b = S u``.
    vectors, scalars
        Names in a parameter's state: of tensors like the parameter, given the group, and of
        numbers.
    """

    coefficients: Callable[[Group, State, bool], Coefficients]
    denominator: Callable[[Group, State], Tensor] | None = None
    divides: str = ""
    buffer: Callable[[Group], str | None] = lambda group: None
    vectors: Callable[[Group], list[str]] = lambda group: []
    scalars: tuple[str, ...] = ("step",)


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _sgd(group: Group, state: State, buffered: bool) -> Coefficients:
    rate, mu, decay = (_number(group[key]) for key in ("lr", "momentum", "weight_decay"))
    if not mu:
        return Coefficients(rate, 0.0, 1.0, rate, 0.0, decay)
    s = 1.0 - _number(group["dampening"]) if buffered else 1.0
    if group["nesterov"]:
        return Coefficients(rate, mu, s, rate * mu, rate, decay)
    return Coefficients(rate, mu, s, rate, 0.0, decay)


def _decays(group: Group, rate: float) -> tuple[float, float]:
    """Return coupled decay, and decoupled decay times the learning rate."""
    decay = _number(group["weight_decay"])
    return (0.0, rate * decay) if group.get("decoupled_weight_decay") else (decay, 0.0)


def _adam(group: Group, state: State, buffered: bool) -> Coefficients:
    rate, (beta, _) = _number(group["lr"]), map(_number, group["betas"])
    q = rate / (1 - beta ** _number(state["step"]))
    return Coefficients(rate, beta, 1 - beta, q, 0.0, *_decays(group, rate))


def _adam_denominator(group: Group, state: State) -> Tensor:
    square = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    correction = 1 - _number(group["betas"][1]) ** _number(state["step"])
    return torch.sqrt(square).div(correction**0.5).add_(group["eps"])


def _nadam(group: Group, state: State, buffered: bool) -> Coefficients:
    rate, (beta, _) = _number(group["lr"]), map(_number, group["betas"])
    step, fall = _number(state["step"]), _number(group["momentum_decay"])
    mu = beta * (1 - 0.5 * 0.96 ** (step * fall))
    after = beta * (1 - 0.5 * 0.96 ** ((step + 1) * fall))
    product = _number(state["mu_product"])
    q, n = rate * after / (1 - product * after), rate * (1 - mu) / (1 - product)
    return Coefficients(rate, beta, 1 - beta, q, n, *_decays(group, rate))


def _rmsprop(group: Group, state: State, buffered: bool) -> Coefficients:
    rate, mu, decay = (_number(group[key]) for key in ("lr", "momentum", "weight_decay"))
    return Coefficients(rate, mu, 1.0, rate, 0.0, decay)


def _rmsprop_denominator(group: Group, state: State) -> Tensor:
    square = state["square_avg"]
    if group["centered"]:
        square = square - state["grad_avg"].square()
    return torch.sqrt(square).add_(group["eps"])


def _adagrad(group: Group, state: State, buffered: bool) -> Coefficients:
    rate, fall = _number(group["lr"]), _number(group["lr_decay"])
    q = rate / (1 + (_number(state["step"]) - 1) * fall)
    return Coefficients(rate, 0.0, 1.0, q, 0.0, _number(group["weight_decay"]))


def _adagrad_denominator(group: Group, state: State) -> Tensor:
    return torch.sqrt(state["sum"]).add_(group["eps"])


def _momentum_buffer(group: Group) -> str | None:
    return "momentum_buffer" if group["momentum"] else None


def _momentum_vectors(group: Group) -> list[str]:
    return ["momentum_buffer"] * bool(group["momentum"])


def _adam_vectors(group: Group) -> list[str]:
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group.get("amsgrad"))


def _rmsprop_vectors(group: Group) -> list[str]:
    return ["square_avg", *_momentum_vectors(group)] + ["grad_avg"] * bool(group["centered"])


_ADAM = Rule(_adam, _adam_denominator, "Q", lambda group: "exp_avg", _adam_vectors)

#: Rules by the exact class: a subclass may do anything. Add your own here.
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(_sgd, buffer=_momentum_buffer, vectors=_momentum_vectors, scalars=()),
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: replace(_ADAM, coefficients=_nadam, divides="QN", scalars=("step", "mu_product")),
    RMSprop: Rule(_rmsprop, _rmsprop_denominator, "S", _momentum_buffer, _rmsprop_vectors),
    Adagrad: Rule(_adagrad, _adagrad_denominator, "S", vectors=lambda group: ["sum"]),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """Return how to read an optimizer.

    Raises
    ------
    TypeError
        It is none, or one that the recorder does not know.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    rule = RULES.get(type(optimizer))
    if rule is None:
        known = sorted(kind.__name__ for kind in RULES)
        raise TypeError(
            f"the recorder does not know {type(optimizer).__qualname__}; it knows {known}. Add a "
            "rule that reads its realised quantities: "
            f"lkarray.training.RULES[{type(optimizer).__name__}] = lkarray.training.Rule(...)"
        )
    return rule


def kind_named(name: str) -> type[Optimizer]:
    """Return the class of optimizer that a trace names; raise `StoreError` if none has a rule."""
    for kind in RULES:
        if kind.__name__ == name:
            return kind
    raise StoreError(
        f"the run was recorded with {name}, for which there is no rule here; add the one it was "
        f"recorded with: lkarray.training.RULES[{name}] = lkarray.training.Rule(...)"
    )


def carried(optimizer: Optimizer) -> tuple[list[str], list[str]]:
    """Return the names of the vectors and scalars that the optimizer's states will have."""
    rule = rule_of(optimizer)
    vectors = sorted({name for group in optimizer.param_groups for name in rule.vectors(group)})
    return vectors, list(rule.scalars)
