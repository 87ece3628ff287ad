"""Makers of shards: gradients, or factors of gradients, of some examples at given weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkarray import schema
from lkarray.nn.batches import Inputs, Target, fresh
from lkarray.nn.features import Features, GradientPlan
from lkarray.nn.flat import FlatModel
from lkarray.nn.gradients import ExampleGradients
from lkarray.nn.losses import logit_at, logits
from lkarray.schema import PART, TENSOR
from lkarray.training.checking import literal
from lkarray.training.choosing import as_examples, select
from lkarray.training.projection import Projection
from lkarray.training.trace import Trace

#: Rows of the projection that are made at once.
_PROJECTED = 16384


class Maker:
    """Makes shards of a tensor: gradients of some examples at the weights that are set.

    Attributes
    ----------
    data, index
        The examples, and their labels along ``example``.
    tensors
        Which of the trace's tensors, in their order.
    outputs
        Number of the model's outputs, ``None`` where one number is differentiated.
    columns
        Length of ``param`` as it is stored.
    """

    def __init__(
        self, trace: Trace, examples: Any, of: Any, params: Any, project: Projection | None
    ) -> None:
        self.trace, self.project = trace, project
        self.data, self.index = as_examples(trace, examples)
        self.tensors = select(trace, params)
        names = [trace.names[i] for i in self.tensors]
        self.flat = FlatModel(trace.flat.module, trainable=[literal(name) for name in names])
        probe = self.data.take(np.arange(2) % self.data.n)
        self.outputs, numbers = _numbers(of, trace, self.flat, probe)
        self._engines = [ExampleGradients(self.flat, number, probe) for number in numbers]
        self.params = self.flat.theta.shape[1]
        self.columns = self.params if project is None else project.size
        # A selection's own places, by those in the whole vector.
        self.spans = [(int(trace.starts[i]), int(trace.stops[i])) for i in self.tensors]
        self._scale: Tensor | None = None

    @property
    def plan(self) -> GradientPlan:
        """How each tensor's gradients are made."""
        return self._engines[0].plan

    def set(self, theta: np.ndarray, denominator: np.ndarray | None) -> None:
        """Take the weights of one time, and the preconditioner that gradients are scaled by."""
        values = torch.from_numpy(theta)
        parameters = dict(self.flat.module.named_parameters())
        for name, start, stop in zip(
            self.trace.names, self.trace.starts, self.trace.stops, strict=True
        ):
            p = parameters[name]
            p.data.copy_(values[start:stop].view(p.shape))
        if denominator is not None:
            parts = [denominator[start:stop] for start, stop in self.spans]
            self._scale = torch.from_numpy(np.concatenate(parts)).to(self.flat.device).rsqrt()

    def shard(self, rows: slice) -> Tensor:
        """Return gradients ``(example, [output,] param)`` of some examples."""
        inputs, target = self.data.take(np.arange(rows.start, rows.stop))
        parts = [self._finish(e.gradients(inputs, target)) for e in self._engines]
        return parts[0] if self.outputs is None else torch.stack(parts, 1)

    def _finish(self, gradients: Tensor) -> Tensor:
        if self._scale is not None:
            gradients *= self._scale
        if self.project is None:
            return gradients
        out = gradients.new_zeros(len(gradients), self.project.size)
        column = 0
        for start, stop in self.spans:
            for a in range(start, stop, _PROJECTED):
                b = min(a + _PROJECTED, stop)
                signs = torch.from_numpy(self.project.rows(a, b)).to(gradients)
                out += gradients[:, column : column + b - a] @ signs
                column += b - a
        return out


class FactorMaker(Maker):
    """Makes shards of factors."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found = self._engines[0].features(*self.data.take(np.arange(2) % self.data.n))
        self.columns = sum(size for _, _, size in self._stretches(self._found))

    @staticmethod
    def _stretches(features: Features) -> list[tuple[str, str, int]]:
        out = [("dense", "dense", features.dense.shape[1])]
        for name, f in features.factors.items():
            out += [(name, "in", f.a.shape[3]), (name, "out", f.b.shape[3])]
        return [part for part in out if part[2]]

    def parts(self) -> dict[str, tuple[str, np.ndarray]]:
        """Return the coordinates of the stretches of elements."""
        names, roles, sizes = zip(*self._stretches(self._found), strict=True)
        stops = np.cumsum(sizes)
        text = np.dtypes.StringDType()
        return {
            PART: (PART, np.arange(len(names))),
            TENSOR: (PART, np.asarray(names).astype(text)),
            "role": (PART, np.asarray(roles).astype(text)),
            schema.START.name: (PART, np.concatenate(([0], stops[:-1])).astype(np.int64)),
            schema.STOP.name: (PART, stops.astype(np.int64)),
        }

    def shard(self, rows: slice) -> Tensor:
        """Return the factors of some examples, side by side, ``(example, element)``."""
        features = self._engines[0].features(*self.data.take(np.arange(rows.start, rows.stop)))
        parts = [features.dense]
        for name in self._found.factors:
            f = features.factors[name]
            parts += [f.a[:, 0, 0], f.b[:, 0, 0]]
        return torch.cat(parts, 1)


def _numbers(
    of: Any, trace: Trace, flat: FlatModel, probe: tuple[Inputs, Target]
) -> tuple[int | None, list[Callable[[Any, Any], Tensor]]]:
    """Return what is differentiated: one number, or one for each output of the model."""
    if callable(of):
        return None, [of]
    if of == "loss":
        return None, [trace.loss]
    with torch.no_grad():
        outputs = logits(flat(fresh(*probe)[0]))
    if outputs.ndim != 2:
        raise ValueError(
            f"of='output' needs outputs (batch, output), and the model gives {tuple(outputs.shape)}"
            "; pass a function of (output, target) that gives (batch,)"
        )
    count = outputs.shape[1]
    return count, [partial(logit_at, c) for c in range(count)]
