"""Whether an audit set is like what the model was trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lkarray.nn.batches import Batches, Inputs, Target

_LOOKED_AT = 512
#: Ratio of spreads, and shift in spreads, beyond which inputs were not prepared alike.
_RATIO, _SHIFT = 4.0, 4.0


def refuse_unlike(train: Batches, audited: Batches) -> None:
    """Raise ``ValueError`` if audited examples were plainly not prepared as the training set was.

    Shapes, dtypes, the scale and mean of the inputs, and the range of labels are compared, on some
    hundred examples of each.
    """
    sets = [_some(batches) for batches in (train, audited)]
    (known, labels), (given, given_labels) = sets
    for key, (a, b) in _pairs(known, given).items():
        what = f"input {key!r}" if key else "inputs"
        if a.dtype != b.dtype or (a.ndim == b.ndim and a.shape[1:] != b.shape[1:] and _fixed(a)):
            raise ValueError(
                f"the audit set's {what} are {b.dtype} of shape {tuple(b.shape[1:])}, and those of "
                f"the training set {a.dtype} of shape {tuple(a.shape[1:])}; prepare them alike"
            )
        if a.is_floating_point():
            _refuse_scale(a.double(), b.double(), what)
    _refuse_labels(labels, given_labels)


def _refuse_scale(a: Tensor, b: Tensor, what: str) -> None:
    spread, other = float(a.std()), float(b.std())
    shift = abs(float(a.mean()) - float(b.mean()))
    unit = max(spread, 1e-12)
    if shift > _SHIFT * unit or other > _RATIO * unit or (_RATIO * other < spread):
        raise ValueError(
            f"the audit set's {what} have mean {float(b.mean()):.4g} and spread {other:.4g}, those "
            f"of the training set {float(a.mean()):.4g} and {spread:.4g}: they were not prepared "
            "alike (scaled to another range, or not normalised). Prepare them alike, or pass "
            "unlike=True if that is what you mean to audit"
        )


def _refuse_labels(known: Target, given: Target) -> None:
    if not isinstance(known, Tensor) or not isinstance(given, Tensor):
        return
    if known.ndim != given.ndim or known.shape[1:] != given.shape[1:]:
        raise ValueError(
            f"the audit set's targets have the shape {tuple(given.shape[1:])}, those of the "
            f"training set {tuple(known.shape[1:])}"
        )
    if known.is_floating_point() or given.is_floating_point() or known.ndim != 1:
        return
    low, high = int(known.min()), int(known.max())
    outside = (given < low) | (given > high)
    if bool(outside.any()):
        raise ValueError(
            f"the audit set has the label {int(given[outside][0])}, and the training set labels "
            f"from {low} to {high}; number the classes as in training, or pass unlike=True"
        )


def _some(batches: Batches) -> tuple[Inputs, Target]:
    # Labels may come sorted: look at examples from everywhere.
    count = min(batches.n, _LOOKED_AT)
    return batches.take(np.unique(np.linspace(0, batches.n - 1, count).astype(int)))


def _pairs(known: Inputs, given: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    if isinstance(known, dict) != isinstance(given, dict):
        raise ValueError("the audit set's items are not of the training set's form")
    if isinstance(known, dict) and isinstance(given, dict):
        if set(known) != set(given):
            raise ValueError(
                f"the audit set's inputs are {sorted(given)}, the training set's {sorted(known)}"
            )
        return {key: (known[key], given[key]) for key in known}
    assert isinstance(known, Tensor)
    assert isinstance(given, Tensor)
    return {"": (known, given)}


def _fixed(values: Tensor) -> bool:
    """Say whether examples must have one shape: sequences of tokens need not."""
    return values.dtype not in (torch.int64, torch.int32)
