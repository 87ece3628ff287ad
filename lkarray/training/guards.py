"""What a recorder refuses of a loop before a step counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lkarray.errors import NonFiniteError

#: Of a recording that ends without a step.
NOTHING = (
    "nothing was recorded: the loop never reached trace.step(indices). Is it empty (a DataLoader "
    "with drop_last of fewer examples than a batch, an iterator used up), or is the training step "
    "outside of the with block?"
)


def as_indices(indices: Any, step: int) -> np.ndarray:
    """Return a batch's indices as an array; refuse what was meant as the batch itself."""
    several = isinstance(indices, (tuple, list)) and any(np.ndim(part) for part in indices)
    if several or isinstance(indices, dict) or indices is None:
        raise ValueError(
            f"step {step}: pass indices of the batch's examples in train_set, one integer for "
            f"each, and not the batch itself ({type(indices).__name__}); let the loader give "
            "indices, for example with a data set that returns (index, input, target)"
        )
    return np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)


def refuse_positions(batch: np.ndarray, n: int, step: int) -> None:
    """Raise unless a batch is positions in a training set of ``n`` examples."""
    if batch.ndim != 1 or batch.size == 0 or batch.dtype.kind not in "iu":
        raise ValueError(
            f"step {step}: pass indices: a list of integers, one per example of the batch, not "
            f"{batch.dtype} of shape {batch.shape}"
        )
    if batch.min() < 0 or batch.max() >= n:
        raise ValueError(
            f"step {step}: indices go from {batch.min()} to {batch.max()}, but the training set "
            f"has {n} examples"
        )


def refuse_moved(now: Tensor, after: Tensor, step: int) -> None:
    """Raise where parameters are not those that the last step left."""
    if not torch.equal(now, after):
        raise ValueError(
            f"parameters changed between step {step - 1} and step {step}, outside "
            "trace.step(...); put every update of the model inside a step"
        )


def refuse_non_finite(norm: float, after: Tensor, step: int) -> None:
    """Raise where a step's gradient, of this norm, or the parameters after it are not finite."""
    if not math.isfinite(norm) or not bool(torch.isfinite(after).all()):
        raise NonFiniteError(
            f"the gradient or the parameters turned non-finite in step {step}; lower the "
            "learning rate or clip the gradient. The steps before are kept"
        )


def held(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the model's parameters that an optimizer holds, frozen ones among them."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in known}


def refuse_thawed(held: Mapping[str, nn.Parameter], names: Iterable[str], step: int) -> None:
    """Raise where other parameters are frozen than at the beginning, when ``names`` were not."""
    changed = sorted({name for name, p in held.items() if p.requires_grad} ^ set(names))
    if changed:
        raise ValueError(
            f"step {step}: requires_grad of {changed} was changed since the recording began; "
            "freeze and free parameters before, and record each stage into a store of its own"
        )


def refuse_stale(held: Mapping[str, nn.Parameter]) -> None:
    """Raise where the optimizer would move frozen parameters with a gradient from before."""
    stale = [name for name, p in held.items() if not p.requires_grad and p.grad is not None]
    if stale:
        raise ValueError(
            f"{stale} are frozen but have a gradient from before, with which the optimizer would "
            "move them; set their .grad to None"
        )
