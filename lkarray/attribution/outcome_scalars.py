"""What is differentiated of each example: a loss, or what a loss is a smooth function of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lkarray.nn import PerExampleLoss
from lkarray.nn.losses import IGNORED, logits, token_ids

OUTCOMES = ("log_odds", "loss", "residual")


def outcome_scalars(outcome: str, loss: PerExampleLoss) -> Callable[[Any, Any], Tensor]:
    """Return a function of output and target that gives one number an example.

    Raises
    ------
    ValueError
        The loss has no such outcome; on calling: the output has one class, or several numbers
        where a residual is of one.
    """
    if outcome == "loss":
        return loss.per_example
    named = {
        ("log_odds", "cross_entropy"): _class_log_odds,
        ("log_odds", "next_token"): _token_log_odds,
        ("log_odds", "next_token_mean"): _token_log_odds,
        ("residual", "mse"): _residual,
    }
    if (outcome, loss.name) not in named:
        has = [of for of, name in named if name == loss.name]
        raise ValueError(
            f"outcome {outcome!r} is not one of loss {loss.name!r}; pass outcome="
            f"{' or '.join(map(repr, [*has, 'loss']))}"
        )
    return named[outcome, loss.name]


def _class_log_odds(output: Any, target: Tensor) -> Tensor:
    """``logsumexp`` of the other classes' logits minus the target's: mean over what counts."""
    if target.is_floating_point():
        raise ValueError(
            "log-odds need targets that are classes; for probabilities of classes, pass "
            "outcome='loss'"
        )
    odds = _log_odds(logits(output).movedim(1, -1), target)
    return _mean(odds, target != IGNORED)


def _token_log_odds(output: Any, target: Any) -> Tensor:
    wanted = token_ids(target)[:, 1:]
    return _mean(_log_odds(logits(output)[:, :-1], wanted), wanted != IGNORED)


def _log_odds(scores: Tensor, target: Tensor) -> Tensor:
    """Return log-odds of logits ``(..., class)``: no difference of numbers that are nearly equal.

    Where the loss is 1e-7 this is -16, and its gradient is of the same size as elsewhere.
    """
    if scores.shape[-1] < 2:
        raise ValueError(
            "log-odds need two classes or more, and the model has one logit; pass outcome='loss'"
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    index = target.clamp(min=0).unsqueeze(-1)
    others = scores.scatter(-1, index, -torch.inf).logsumexp(-1)
    return others - scores.gather(-1, index).squeeze(-1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    if values.ndim == 1:
        return torch.where(counted, values, torch.nan)
    # Zeros by selection, not by a product: what does not count may be infinite.
    kept = torch.where(counted, values, 0).flatten(1)
    return kept.sum(1) / counted.flatten(1).sum(1)


def _residual(output: Any, target: Tensor) -> Tensor:
    output = logits(output)
    residual = (output - target.reshape(output.shape)).flatten(1)
    if residual.shape[1] != 1:
        raise ValueError(
            f"a residual is of one number, and the output has {residual.shape[1]}; pass "
            "outcome='loss'"
        )
    alone: Tensor = residual[:, 0]
    return alone
