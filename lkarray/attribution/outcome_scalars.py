"""What is differentiated of each example: a loss, or what a loss is a smooth function of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lkarray.nn import PerExampleLoss
from lkarray.nn.outcomes import BUILT_IN, next_token_log_odds

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
    if outcome == "log_odds" and loss.name in ("next_token", "next_token_mean"):
        return _mean_log_odds
    known = BUILT_IN[outcome]
    if loss.name not in known:
        has = [name for name, of in BUILT_IN.items() if loss.name in of]
        raise ValueError(
            f"outcome {outcome!r} is not one of loss {loss.name!r}; pass outcome="
            f"{' or '.join(map(repr, [*has, 'loss']))}"
        )
    return known[loss.name].of_logits


def _mean_log_odds(output: Any, target: Any) -> Tensor:
    """Return the mean of the log-odds of a sequence's tokens, without padding: ``(batch,)``."""
    odds = next_token_log_odds(output, target)
    counted = ~odds.isnan()
    # Zeros by selection, not by a product: what does not count has no gradient.
    return torch.where(counted, odds, 0).sum(1) / counted.sum(1)
