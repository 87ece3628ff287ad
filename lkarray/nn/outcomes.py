"""Outcomes: numbers that a loss is a smooth function of, from the forward pass of the losses.

The log-odds against the target are such a number of a cross-entropy, and the residual of a squared
error. Over draws they are nearer to Gaussian than losses are, and they resolve what a float32
loss does not: how sure a network is that is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkarray.links import LINKS
from lkarray.nn.losses import (
    IGNORED,
    NAMED,
    PerExampleLoss,
    binary_log_odds,
    identity,
    logits,
    next_tokens,
    wide,
)

#: The variable of losses, which is stored whatever else is.
LOSS = "loss"

Values = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """A number of each observed sample that its loss is a function, the link, of.

    Given to `sample` it is stored at each draw beside the loss, from the same forward pass.

    Parameters
    ----------
    name
        Of the variable: letters, digits and underscores.
    of_logits
        Gives the outcome of ``(model_output, target)``, with what a loss takes: shape ``(batch,)``,
        or ``(batch, token)`` where losses are of tokens. A function of each example alone.
    link
        What makes the loss of it: ``"softplus"`` (log-odds), ``"square"`` (a residual), or a name
        with a function of NumPy arrays, ``("negative_log", lambda p: -np.log(p))``, of which a
        store keeps the name alone.
    units
        Of the outcome; none where it is a pure number.

    Raises
    ------
    ValueError, TypeError
        A name that cannot be a variable's, an unknown link, or no function.

    Notes
    -----
    Which outcomes are built in: ``"log_odds"`` of the losses ``"cross_entropy"``,
    ``"next_token"`` and ``"binary_cross_entropy"``, ``"residual"`` of ``"mse"`` of one output.

    References
    ----------
    - Park et al. 2023, section 3: "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186,
      which takes log-odds for their gradients.
    - docs/methods/outcomes.md.

    Examples
    --------
    >>> import lkarray as lk
    >>> margin = lk.Outcome("margin", lambda output, y: output[:, 0] * (1 - 2 * y), "softplus")
    >>> margin.link_name, margin.link_function(0.0).round(4).item()
    ('softplus', 0.6931)
    """

    name: str
    of_logits: Callable[[Any, Any], Tensor]
    link: str | tuple[str, Values]
    units: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Outcome: name must be a string, not {type(self.name).__name__}")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise ValueError(
                f"Outcome: name {self.name!r} must be of letters, digits and underscores, since a "
                "variable is called so"
            )
        if not callable(self.of_logits):
            raise TypeError(
                f"Outcome {self.name!r}: of_logits must be a function (output, target) -> (batch,)"
                f", not {type(self.of_logits).__name__}"
            )
        if not isinstance(self.units, str):
            raise TypeError(f"Outcome {self.name!r}: units must be a string, not {self.units!r}")
        self._check_link()

    def _check_link(self) -> None:
        link, known = self.link, f"one of {sorted(LINKS)}, or a name with a function"
        if isinstance(link, str):
            if link not in LINKS:
                raise ValueError(f"Outcome {self.name!r}: link {link!r} is not {known}")
            return
        pair = isinstance(link, (tuple, list)) and len(link) == 2
        if not pair or not isinstance(link[0], str) or not callable(link[1]):
            raise TypeError(f"Outcome {self.name!r}: link must be {known}, not {link!r:.80}")
        if link[0] in LINKS:
            raise ValueError(
                f"Outcome {self.name!r}: link {link[0]!r} is lkarray's own; give the name alone, "
                "or another name"
            )
        object.__setattr__(self, "link", tuple(link))

    @property
    def link_name(self) -> str:
        """The link's name, as a store keeps it."""
        return self.link if isinstance(self.link, str) else self.link[0]

    @property
    def link_function(self) -> Values:
        """The link as a function of NumPy arrays."""
        return LINKS[self.link].function if isinstance(self.link, str) else self.link[1]

    @property
    def recorded(self) -> dict[str, str]:
        """What a fingerprint has of it: of a function of the user's own, a hash of what it does."""
        built_in = any(self in of.values() for of in BUILT_IN.values())
        function = self.name if built_in else identity(self.of_logits)
        return {"function": function, "link": self.link_name, "units": self.units}

    def check(self, losses: Tensor, output: Any, target: Any) -> None:
        """Raise unless it gives one number for each of ``losses``, of which the link makes that.

        Raises
        ------
        ValueError
            It raised on this output and target, returned another shape, or is no outcome of the
            loss.
        TypeError
            It did not return a tensor.
        """
        what = f"outcome {self.name!r}"
        try:
            values = self.of_logits(output, target)
        except Exception as error:
            raise ValueError(f"{what}: {error}") from error
        if not isinstance(values, Tensor):
            raise TypeError(f"{what} returned {type(values).__name__}, not a tensor")
        if values.shape != losses.shape:
            raise ValueError(
                f"{what} returned shape {tuple(values.shape)} where losses have "
                f"{tuple(losses.shape)}; it must give one number for each loss"
            )
        stored = losses.detach().double().cpu().numpy()
        with np.errstate(all="ignore"):  # of padding, which is NaN
            linked = np.asarray(self.link_function(values.detach().double().cpu().numpy()))
        both = np.isfinite(stored) & np.isfinite(linked)
        # Either may have been made in bfloat16.
        differ = both & ~np.isclose(linked, stored, rtol=1e-2, atol=1e-3)
        if differ.any():
            raise ValueError(
                f"{what}: its link {self.link_name!r} makes {linked[differ][0]:g} of it where the "
                f"loss is {stored[differ][0]:g}; the link of an outcome must give the loss"
            )


def log_odds(output: Any, target: Tensor) -> Tensor:
    """Log-odds against the target class, ``(batch,)``, of logits ``(batch, class)``.

    The logsumexp of the other classes' logits minus the target's own: cross-entropy is its
    softplus. Each other logit is taken relative to the target's first, so that nothing cancels,
    however sure the network is. Classes with a logit of -inf do not count. NaN where the target is
    `IGNORED`. In float32, or float64 if the logits are; one copy of the logits is made.
    """
    scores = logits(output)
    if not isinstance(target, Tensor) or target.is_floating_point():
        raise ValueError(
            "log-odds need a class of each example, an integer; targets that are probabilities of "
            "classes have none"
        )
    if scores.ndim != 2 or target.ndim != 1:
        raise ValueError(
            "log-odds of cross_entropy need logits (batch, class) and classes (batch,), not "
            f"{tuple(scores.shape)} and {tuple(target.shape)}: a loss that is a mean over "
            "positions is no function of one number; make positions the examples"
        )
    _refuse_one_class(scores)
    odds = _against_others(scores, target)
    return torch.where(target == IGNORED, torch.nan, odds)


def next_token_log_odds(output: Any, target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Log-odds against each next token, shape ``(batch, token)``, NaN where it is padding.

    As `log_odds`; those that are not finite of themselves are infinite, as losses are.
    """
    scores, shifted, counted = next_tokens(output, target)
    _refuse_one_class(scores)
    odds = _against_others(scores, shifted).reshape(len(counted), -1)[:, :-1]
    return torch.where(counted, torch.where(odds.isnan(), torch.inf, odds), torch.nan)


def residual(output: Any, target: Tensor) -> Tensor:
    """Output minus target of a model of one output, ``(batch,)``: mse is its square."""
    output = logits(output)
    if output.ndim > 2 or (output.ndim == 2 and output.shape[1] != 1):
        raise ValueError(
            f"a residual needs one output of each example, (batch,) or (batch, 1), not "
            f"{tuple(output.shape)}: a mean of squares is no function of one number. Give one "
            "output as lk.Outcome of a loss of your own"
        )
    if output.shape != target.shape:
        raise ValueError("a residual needs output and target of one shape; reshape one of them")
    difference: Tensor = output - target
    return difference.reshape(len(output))


def _refuse_one_class(scores: Tensor) -> None:
    if scores.shape[-1] < 2:
        raise ValueError(
            "log-odds need two classes or more, but the logits are of one; for one logit of two "
            "classes take loss='binary_cross_entropy'"
        )


def _against_others(scores: Tensor, target: Tensor) -> Tensor:
    """Return log-odds ``(n,)`` of logits ``(n, class)``; with any target below 0, of class 0."""
    index = target.clamp(min=0).long().unsqueeze(1)
    own = wide(scores.gather(1, index))
    # One copy of all logits, which is then changed in place: vocabularies are large.
    targets = torch.arange(scores.shape[1], device=scores.device) == index  # vmap has no scatter_
    rest = (scores - own).masked_fill_(targets, -torch.inf)
    top = rest.detach().amax(1, keepdim=True)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    odds = rest.sub_(top).exp_().sum(1).log() + top.squeeze(1)
    # A masked target is never right; inf minus inf of other masked classes says nothing.
    return torch.where(own.squeeze(1) == -torch.inf, torch.inf, odds)


_SOFTPLUS = {
    "cross_entropy": log_odds,
    "next_token": next_token_log_odds,
    "binary_cross_entropy": binary_log_odds,
}
#: Outcomes by name, and by the name of the loss that they are of.
BUILT_IN: dict[str, dict[str, Outcome]] = {
    "log_odds": {loss: Outcome("log_odds", f, "softplus") for loss, f in _SOFTPLUS.items()},
    "residual": {"mse": Outcome("residual", residual, "square")},
}


def chosen_outcomes(loss: PerExampleLoss, asked: Sequence[str | Outcome]) -> tuple[Outcome, ...]:
    """Return the outcomes beside the loss that were asked for, by name or as they are.

    Raises
    ------
    ValueError
        ``"loss"`` is not the first, one is unknown, named twice, or none of this loss.
    TypeError
        ``asked`` is no sequence of names and outcomes.
    """
    if isinstance(asked, (str, Outcome, Mapping)) or not isinstance(asked, Sequence):
        raise TypeError(
            "outcomes must be a tuple of names and lk.Outcome, for example ('loss', 'log_odds'), "
            f"not {type(asked).__name__}"
        )
    for each in asked:
        if not isinstance(each, (str, Outcome)):
            raise TypeError(
                f"outcomes: {each!r:.80} must be a name or lk.Outcome, not {type(each).__name__}"
            )
    if not asked or asked[0] != LOSS:
        raise ValueError(
            "outcomes must begin with 'loss', which is always stored: ('loss', 'log_odds'), say"
        )
    chosen = tuple(e if isinstance(e, Outcome) else _named(loss, e) for e in asked[1:])
    names = [LOSS, *(outcome.name for outcome in chosen)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"outcomes: {twice[0]!r} is named twice")
    for outcome in chosen:
        _refuse_other_link(outcome)
    return chosen


def _refuse_other_link(outcome: Outcome) -> None:
    """Raise where a user's outcome takes the name of a built-in one for something else."""
    own = BUILT_IN.get(outcome.name)
    if own is not None:
        link = next(iter(own.values())).link_name
        if outcome.link_name != link:
            raise ValueError(
                f"outcomes: {outcome.name!r} is the name of outcomes with link {link!r}, not "
                f"{outcome.link_name!r}; choose another name"
            )


def _named(loss: PerExampleLoss, name: str) -> Outcome:
    if name == LOSS:
        raise ValueError("outcomes: 'loss' is named twice")
    if name not in BUILT_IN:
        raise ValueError(
            f"outcomes: {name!r} is not one of {[LOSS, *sorted(BUILT_IN)]}; give one of your own "
            "as lk.Outcome(name, of_logits, link)"
        )
    if loss.name in BUILT_IN[name]:
        return BUILT_IN[name][loss.name]
    if loss.name not in NAMED:
        raise ValueError(
            f"outcomes: what {name!r} is of loss {loss.name!r}, a function of your own, is not "
            f"known; give it as lk.Outcome({name!r}, of_logits, link)"
        )
    if loss.name == "next_token_mean" and name == "log_odds":
        raise ValueError(
            "outcomes: a mean of tokens' losses has no log-odds, since it is no function of one "
            "number; take loss='next_token', of which each token has its own"
        )
    raise ValueError(
        f"outcomes: loss {loss.name!r} has no {name!r}; these do: {sorted(BUILT_IN[name])}"
    )


def with_outcomes(loss: PerExampleLoss, outcomes: Sequence[Outcome]) -> PerExampleLoss:
    """Return what gives losses and outcomes of one output, float32, ``(1 + n, batch, *dims)``."""

    def observed(output: Any, target: Any) -> Tensor:
        # Losses first: their passing copies are gone before the outcomes make theirs.
        values = [loss(output, target).float()]
        values += [outcome.of_logits(output, target).float() for outcome in outcomes]
        return torch.stack(values)

    return replace(loss, function=observed)
