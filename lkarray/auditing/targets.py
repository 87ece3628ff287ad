"""What is audited: numbers of each example, as functions of the model's output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lkarray.nn.batches import Inputs, Target, batch_size, fresh
from lkarray.nn.flat import FlatModel
from lkarray.nn.graphs import graph_of
from lkarray.nn.losses import identity, logit_at, logits
from lkarray.nn.reference import Scalars
from lkarray.training.trace import Trace

LOSS, PREDICTION, LOGIT = "loss", "prediction", "logit"


class Audited:
    """What is audited of every example.

    Attributes
    ----------
    name
        For attributes and fingerprints.
    outputs
        Number of numbers of each example, ``None`` where there is one.
    numbers
        Functions ``(model output, target) -> (batch,)``.
    """

    def __init__(
        self,
        target: str | int | Callable[[Any, Any], Tensor],
        module: str | None,
        trace: Trace,
        flat: FlatModel,
        probe: tuple[Inputs, Target],
    ) -> None:
        self.outputs: int | None = None
        function = target
        if module is not None:
            if not callable(target):
                raise ValueError(
                    f"module={module!r} needs a target that is a function (activation, target) -> "
                    f"(batch,), not {target!r}"
                )
            function = _Activation(_submodule(flat, module), target)
        self.numbers: list[Scalars] = self._functions(function, trace, flat, probe)
        self.name = identity(target) if callable(target) else str(target)
        if module is not None:
            self.name += f" of {module}"
        for number in self.numbers:
            _check(number, flat, probe, self.name)

    def _functions(
        self, target: Any, trace: Trace, flat: FlatModel, probe: tuple[Inputs, Target]
    ) -> list[Scalars]:
        if callable(target):
            return [target]
        if not isinstance(target, str | int | np.integer):
            raise TypeError(
                f"target must be a string, the number of an output or a function, not "
                f"{type(target).__name__}"
            )
        if target == LOSS:
            return [trace.loss]
        if target == LOGIT:
            return [_own_logit]
        if isinstance(target, np.integer):
            target = int(target)
        if target != PREDICTION and (not isinstance(target, int) or isinstance(target, bool)):
            raise ValueError(
                "target must be 'loss', 'prediction' (every output), 'logit' (of the example's own "
                f"label), the number of an output, or a function, not {target!r}"
            )
        with torch.no_grad():
            outputs = logits(flat(fresh(*probe)[0]))
        if outputs.ndim != 2:
            raise ValueError(
                f"target={target!r} needs outputs (batch, output), and the model gives "
                f"{tuple(outputs.shape)}; pass a function of (output, target) that gives (batch,)"
            )
        if target == PREDICTION:
            self.outputs = outputs.shape[1]
            return [partial(logit_at, c) for c in range(self.outputs)]
        if not 0 <= target < outputs.shape[1]:
            raise ValueError(f"target={target}: the model has outputs 0 to {outputs.shape[1] - 1}")
        return [partial(logit_at, target)]


class _Activation:
    """A function of what a module inside the model gave in the last forward pass."""

    def __init__(self, module: nn.Module, function: Callable[[Any, Any], Tensor]) -> None:
        self._function = function
        self._kept: list[Any] = []  # one at most
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._kept[:] = [output]

    def __call__(self, output: Any, target: Any) -> Tensor:
        return self._function(self._kept.pop(), target)


def _submodule(flat: FlatModel, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(flat.module.named_modules())
    if name not in modules or not name:
        raise ValueError(f"module={name!r} is none of the model's: {[n for n in modules if n]}")
    return modules[name]


def _own_logit(output: Any, target: Any) -> Tensor:
    by_class = logits(output)
    if by_class.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        raise ValueError("target='logit' needs outputs (batch, class) and one label an example")
    return by_class.gather(1, target[:, None].long()).squeeze(1)


def _check(number: Scalars, flat: FlatModel, probe: tuple[Inputs, Target], name: str) -> None:
    """Raise unless a target gives one number of each example, which the parameters move."""
    batch = batch_size(probe)
    with torch.enable_grad():
        inputs, wanted = fresh(*probe)
        numbers = number(flat(inputs), wanted)
    if not isinstance(numbers, Tensor):
        raise TypeError(f"target {name!r} returned {type(numbers).__name__}, not a tensor")
    if numbers.ndim != 1 or len(numbers) != batch:
        raise ValueError(
            f"target {name!r} returned shape {tuple(numbers.shape)} for a batch of {batch}; it "
            f"must give one number per example, ({batch},): take no mean or sum over the batch"
        )
    if not numbers.requires_grad or not _depends(numbers, flat):
        raise ValueError(
            f"target {name!r} does not depend on the parameters that are audited, so training "
            "cannot have moved it; look for a detach(), a no_grad() or an argmax in it, or for "
            "params= that come after the module"
        )


def _depends(numbers: Tensor, flat: FlatModel) -> bool:
    """Say whether numbers depend on a moving parameter: whether their graph leads to one."""
    graph = graph_of(numbers)
    reads = any(graph.reads[id(leaf)] for leaf in flat.leaves)
    return reads or graph.hidden  # inside a reentrant checkpoint, nothing is seen
