"""Per-example losses, by name or as any callable that gives one loss per example."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PerExampleLoss:
    """A loss of ``(model_output, target)`` that returns shape ``(batch,)``, checked.

    Attributes
    ----------
    name
        The loss's name, and for a callable a hash of what it does: part of a run's fingerprint.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the losses in nats, shape ``(batch,)``."""
        return self.function(output, target)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Raise unless the loss gives one number per example.

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
        batch = len(target)
        if losses.shape != (batch,):
            raise ValueError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for a batch of {batch}; "
                f"it must give one loss per example, shape ({batch},): use reduction='none', and "
                "average any further dims"
            )


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats of float32 logits ``(batch, class, ...)``, mean over the rest."""
    return _mean_rest(F.cross_entropy(output.float(), target, reduction="none"))


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Squared error without the half, averaged over all dims but the first.

    The mean over a batch is then ``torch.nn.functional.mse_loss``.
    """
    if output.shape != target.shape:
        raise ValueError("mse needs output and target of one shape; reshape one of them")
    return _mean_rest((output - target).square())


NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "mse": mse}


def per_example_loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> PerExampleLoss:
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
        return PerExampleLoss(loss, NAMED[loss])
    if not callable(loss):
        raise TypeError(
            f"loss must be one of {sorted(NAMED)} or a callable (output, target) -> (batch,), "
            f"not {type(loss).__name__}"
        )
    return PerExampleLoss(_identity(loss), loss)


def _identity(function: Callable[..., object]) -> str:
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


def _mean_rest(losses: Tensor) -> Tensor:
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
