"""Per-example losses, by name or as any callable that gives one loss per example."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

#: Target of a position that does not count, as in torch and Hugging Face.
IGNORED = -100

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class PerExampleLoss:
    """A loss of ``(model_output, target)``, checked.

    Attributes
    ----------
    name
        The loss's name, and for a callable a hash of what it does: part of a run's fingerprint.
    function
        Gives what is observed, shape ``(batch, *dims)``.
    dims
        Names of the dims after the batch: ``("token",)`` for losses of single tokens.
    mean
        Gives one loss per example, shape ``(batch,)``, whose mean is what a step descends;
        ``None`` where ``function`` does that.
    counts
        Says of a target how many positions of each example count, shape ``(batch,)``; ``None``
        where no target can leave any out. An example without any has no loss: NaN.
    """

    name: str
    function: LossFunction
    dims: tuple[str, ...] = ()
    mean: LossFunction | None = None
    counts: Callable[[Any], Tensor | None] | None = None

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the losses that are observed, in nats, shape ``(batch, *dims)``.

        Of losses with ``dims``, NaN is padding, and infinity a loss that is not finite.
        """
        return self.function(output, target)

    @property
    def per_example(self) -> PerExampleLoss:
        """The loss with one number per example."""
        if self.mean is None:
            return self
        return PerExampleLoss(self.name, self.mean, counts=self.counts)

    def check(self, output: Any, target: Any, batch: int) -> None:
        """Raise unless the loss gives one number per example (and token).

        Raises
        ------
        ValueError
            The loss raised on this output and target, or returned another shape.
        TypeError
            It did not return a tensor.
        """
        try:
            losses = self.function(output, target)
        except Exception as error:
            raise ValueError(
                f"loss {self.name!r} failed on output of shape {_shape(output)} and target of "
                f"shape {_shape(target)}: {error}"
            ) from error
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss {self.name!r} returned {type(losses).__name__}, not a tensor")
        if losses.ndim != 1 + len(self.dims) or len(losses) != batch:
            raise ValueError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for a batch of {batch}; "
                f"it must give one loss per example, shape ({batch},): use reduction='none', and "
                "average any further dims"
            )


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy in nats of logits ``(batch, class, ...)``, mean over the rest.

    Of the rest, positions with the target `IGNORED` are left out, so that the loss of an example
    is what ``torch.nn.functional.cross_entropy`` gives of it alone: NaN if no position counts.
    In float32, or float64 if the logits are.
    """
    # (batch, ...), 0 where a position is left out
    losses = F.cross_entropy(wide(logits(output)), target, reduction="none", ignore_index=IGNORED)
    counted = _labelled(target)
    if counted is None:
        return _mean_rest(losses)
    if losses.ndim == 1:
        return torch.where(counted, losses, torch.nan)
    # Losses of positions that are left out are zero.
    return losses.flatten(1).sum(1) / counted.flatten(1).sum(1)


def _labelled(target: Any) -> Tensor | None:
    """Return which positions have a class; ``None`` where targets are no numbers of classes."""
    if not isinstance(target, Tensor) or target.is_floating_point() or not target.dtype.is_signed:
        return None
    return target != IGNORED


def mse(output: Any, target: Tensor) -> Tensor:
    """Squared error without the half, averaged over all dims but the first.

    The mean over a batch is then ``torch.nn.functional.mse_loss``.
    """
    output = logits(output)
    if output.shape != target.shape:
        raise ValueError("mse needs output and target of one shape; reshape one of them")
    return _mean_rest((output - target).square())


def binary_cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy in nats of one logit each, ``(batch,)`` or ``(batch, 1)``: of target 1 to 0.

    NaN where a target is neither 0 nor 1, `IGNORED` among them. In float32, or float64 if the
    logits are.
    """
    # Beyond the threshold softplus is the number itself, to float64's rounding.
    return F.softplus(binary_log_odds(output, target), threshold=40)


def binary_log_odds(output: Any, target: Tensor) -> Tensor:
    """Log-odds against targets 0 and 1 of one logit each, ``(batch,)``: plus or minus the logit."""
    scores = logits(output)
    sizes = {tuple(scores.shape), tuple(target.shape)}
    if scores.ndim == 0 or not sizes <= {(len(scores),), (len(scores), 1)}:
        raise ValueError(
            "binary_cross_entropy needs one logit and one target, 0 or 1, of each example: "
            f"(batch,) or (batch, 1), not {tuple(scores.shape)} and {tuple(target.shape)}"
        )
    scores, target = wide(scores).reshape(-1), target.reshape(-1)
    return torch.where(target == 1, -scores, torch.where(target == 0, scores, torch.nan))


def next_token(output: Any, target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each next token in nats, shape ``(batch, token)``, NaN where it is padding.

    ``output`` has logits ``(batch, position, vocabulary)``; a loss belongs to the token that is
    predicted, so there is one less than positions. Tokens that are `IGNORED`, or whose
    ``attention_mask`` is 0, are padding. Only these are NaN: a loss that is not finite, as of a
    chain that diverged, is infinite.
    """
    losses, counted = _token_losses(output, target)
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    return torch.where(counted, losses, torch.nan)


def next_token_mean(output: Any, target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Mean of `next_token` over the tokens of each sequence that are not padding.

    NaN of a sequence that is padding alone.
    """
    losses, counted = _token_losses(output, target)
    return losses.sum(1) / counted.sum(1)


def _token_losses(output: Any, target: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of each next token, 0 where it is padding, and which are none."""
    scores, shifted, counted = next_tokens(output, target)
    flat = F.cross_entropy(wide(scores), shifted, reduction="none", ignore_index=IGNORED)
    return flat.reshape(len(counted), -1)[:, :-1], counted


def next_tokens(
    output: Any, target: Tensor | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits ``(batch * position, vocabulary)``, the ids they predict, which count.

    The latter ``(batch, position - 1)``; those before are `IGNORED` at the last positions too.
    """
    scores = logits(output)
    ids = token_ids(target)
    if scores.ndim != 3 or scores.shape[:2] != ids.shape:
        raise ValueError(
            "a next-token loss needs logits (batch, position, vocabulary) and as many token ids "
            "(batch, position)"
        )
    wanted = ids[:, 1:]  # (batch, position - 1): each token is predicted from those before it
    # The last position predicts nothing. Scoring it too spares a copy of all logits.
    shifted = torch.cat([wanted, torch.full_like(ids[:, :1], IGNORED)], dim=1)
    flat = scores.reshape(-1, scores.shape[-1])
    return flat, shifted.reshape(-1), wanted != IGNORED


def _tokens(target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of each sequence are predicted."""
    return (token_ids(target)[:, 1:] != IGNORED).sum(1)


def _binary(target: Tensor) -> Tensor:
    """Return 1 for each example whose target is 0 or 1, and 0 for others."""
    return ((target == 0) | (target == 1)).reshape(-1).long()


def _positions(target: Any) -> Tensor | None:
    """Return how many positions of each example have a class."""
    counted = _labelled(target)
    return None if counted is None else counted.reshape(len(counted), -1).sum(1)


def token_ids(target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return token ids ``(batch, position)``, those under a zero mask `IGNORED`."""
    if isinstance(target, Tensor):
        return target
    if "input_ids" not in target:
        raise ValueError(f"a next-token loss needs 'input_ids' or 'labels', not {list(target)}")
    ids, mask = target["input_ids"], target.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)


def logits(output: Any) -> Tensor:
    """Return the tensor that a model gives: itself, ``output.logits``, or the first of a tuple."""
    scores = getattr(output, "logits", output)
    if isinstance(scores, Mapping) and "logits" in scores:
        scores = scores["logits"]
    if isinstance(scores, (tuple, list)) and scores:
        scores = scores[0]
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__} without logits; pass a callable as the "
            "loss, which takes the output as it is"
        )
    return scores


def logit_at(index: int, output: Any, target: Any) -> Tensor:
    """Return one output of each example, whatever its target: shape ``(batch,)``."""
    return logits(output)[:, index]


#: Losses by name.
NAMED = {
    "cross_entropy": PerExampleLoss("cross_entropy", cross_entropy, counts=_positions),
    "binary_cross_entropy": PerExampleLoss(
        "binary_cross_entropy", binary_cross_entropy, counts=_binary
    ),
    "mse": PerExampleLoss("mse", mse),
    "next_token": PerExampleLoss("next_token", next_token, ("token",), next_token_mean, _tokens),
    "next_token_mean": PerExampleLoss("next_token_mean", next_token_mean, counts=_tokens),
}


def per_example_loss(loss: str | LossFunction) -> PerExampleLoss:
    """Return the loss with that name, or the callable under a name of its own.

    Raises
    ------
    ValueError
        No loss has that name.
    TypeError
        It is neither a name nor a callable.
    """
    if isinstance(loss, str):
        if loss not in NAMED:
            raise ValueError(f"loss {loss!r} is not one of {sorted(NAMED)}; or pass a callable")
        return NAMED[loss]
    if not callable(loss):
        raise TypeError(
            f"loss must be one of {sorted(NAMED)} or a callable (output, target) -> (batch,), "
            f"not {type(loss).__name__}"
        )
    return PerExampleLoss(identity(loss), loss)


def identity(function: Callable[..., object]) -> str:
    """Return a name for a callable, with a hash of what it does."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name}@{hashlib.sha256(repr(_content(function)).encode()).hexdigest()[:12]}"


def _content(value: object, depth: int = 6) -> object:
    """Return what a callable does, as plain values: its code, constants, closure, attributes.

    Two losses that differ in any of these are taken for different ones by a resume.
    """
    if isinstance(value, (str, bytes, int, float, complex, type(None), torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().cpu().tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.shape, value.tolist()
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, _content(value.co_consts, depth - 1)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        return value.__qualname__, _content(parts, depth - 1)
    if isinstance(value, types.MethodType):
        return _content((value.__func__, value.__self__), depth - 1)
    if isinstance(value, functools.partial):
        return _content((value.func, value.args, value.keywords), depth - 1)
    if isinstance(value, Mapping):
        return [(str(k), _content(v, depth - 1)) for k, v in sorted(value.items(), key=repr)]
    if isinstance(value, (Sequence, frozenset, set)):
        items = sorted(value, key=repr) if isinstance(value, (frozenset, set)) else value
        return [_content(item, depth - 1) for item in items]
    return type(value).__qualname__, _content(getattr(value, "__dict__", {}), depth - 1)


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def _mean_rest(losses: Tensor) -> Tensor:
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
