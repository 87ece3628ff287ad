"""What a trace was made with: weights, code, data, loss and optimizer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lkarray._version import __version__
from lkarray.nn.flat import hash_weights
from lkarray.nn.losses import identity
from lkarray.store.trace_layout import TraceLayout

if TYPE_CHECKING:
    from lkarray.training.capture import Capture
    from lkarray.training.checking import StepCheck

#: Options of an optimizer that change from step to step, and are stored with each.
_MOVING = {"params", "lr", "initial_lr", "betas", "momentum", "weight_decay"}


def layout_of(capture: Capture, groups: int, every: int) -> TraceLayout:
    """Return what a trace has of each step, of an optimizer of ``groups`` parameter groups."""
    return TraceLayout(
        [
            (name, name.rpartition(".")[0], place.start, place.stop)
            for name, place in zip(capture.names, capture.places, strict=True)
        ],
        str(capture.raw.dtype).removeprefix("torch."),
        groups,
        every,
        capture.rule.denominator is not None,
        capture.vectors,
        capture.scalars,
    )


def fingerprint(model: nn.Module, check: StepCheck, capture: Capture, every: int) -> dict[str, Any]:
    """Return what a resumed recording, or a reader of the trace, must share with it."""
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in _MOVING}
        for group in capture.optimizer.param_groups
    ]
    return {
        "weights": hash_weights(model),
        "code": code(model),
        "train_set": check.train.identity,
        "loss": check.loss.name,
        "optimizer": type(capture.optimizer).__name__,
        "groups": groups,
        "buffer": capture.rule.buffer(capture.optimizer.param_groups[min(capture.group_of)]),
        "group_of": capture.group_of,
        "every": every,
        "device": capture.raw.device.type,
        "dtype": str(capture.raw.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "lkarray": __version__,
    }


def code(model: nn.Module) -> str:
    """Return a hash of a model's structure and of what its own classes compute."""
    digest = hashlib.sha256(repr(model).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
    kinds = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
        if not kind.__module__.startswith("torch."):
            digest.update(identity(kind.forward).encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
