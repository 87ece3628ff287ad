"""What a trace was made with: weights, code, data, loss and optimizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import zarr
from torch import nn

from lkarray._version import __version__
from lkarray.nn.flat import hash_weights
from lkarray.nn.losses import identity
from lkarray.store.trace_layout import TraceLayout
from lkarray.store.trajectory import trace_fingerprint

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


@dataclass(frozen=True)
class TraceFingerprint:
    """What a resumed recording, or a reader of the trace, must share with it.

    Stored as JSON, in the order of the fields; tensors made from a trace have hashes of it.

    Attributes
    ----------
    weights, code, train_set
        Hashes: of the weights before the first step, the model's code, and the data.
    loss, optimizer
        Names of the loss and of the optimizer's class.
    groups
        Options of the optimizer's groups, without those that change from step to step.
    buffer
        Name of the optimizer's state that is the momentum; ``None`` where it has none.
    group_of
        Group of each parameter tensor.
    every
        Steps from one stored state to the next.
    device, dtype, torch, lkarray
        Where, how precisely and with which versions was trained.
    """

    weights: str
    code: str
    train_set: str
    loss: str
    optimizer: str
    groups: list[dict[str, Any]]
    buffer: str | None
    group_of: list[int]
    every: int
    device: str
    dtype: str
    torch: str
    lkarray: str

    def stored(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_store(cls, root: zarr.Group) -> TraceFingerprint | None:
        """Return that of the trace in a store; ``None`` if there is no trace."""
        stored = trace_fingerprint(root)
        return None if stored is None else cls(**stored)


def fingerprint(
    model: nn.Module, check: StepCheck, capture: Capture, every: int
) -> TraceFingerprint:
    """Return the fingerprint of a run that is being recorded."""
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in _MOVING}
        for group in capture.optimizer.param_groups
    ]
    return TraceFingerprint(
        weights=hash_weights(model),
        code=code(model),
        train_set=check.train.identity,
        loss=check.loss.name,
        optimizer=type(capture.optimizer).__name__,
        groups=groups,
        buffer=capture.rule.buffer(capture.optimizer.param_groups[min(capture.group_of)]),
        group_of=capture.group_of,
        every=every,
        device=capture.raw.device.type,
        dtype=str(capture.raw.dtype).removeprefix("torch."),
        torch=torch.__version__,
        lkarray=__version__,
    )


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
