"""What is sampled and what is observed, on one device: shared by all chains there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lkarray import schema
from lkarray.nn import Batches, FlatModel, Outcome, PerExampleLoss
from lkarray.nn.batches import Inputs
from lkarray.nn.outcomes import with_outcomes
from lkarray.sampling.control import Control
from lkarray.sampling.laplace_law import LaplaceLaw

#: A function of the model: a number or a tensor of a few.
Observable = Callable[[nn.Module], Any]

Minibatch = Tensor | np.ndarray | None


@dataclass(frozen=True)
class ObservedSet:
    """Inputs whose losses are recorded, and how many are evaluated at once."""

    group: str
    data: Batches
    rows: int


@dataclass(frozen=True)
class Target:
    """The posterior on a device, with what is observed at each draw.

    All tensors lead with the stack's axis, ``chain``, of length ``flat.width``. Nothing here
    waits for the device.
    """

    flat: FlatModel
    center: Tensor
    train: Batches
    train_rows: int
    observed: tuple[ObservedSet, ...]
    loss: PerExampleLoss
    nbeta: float
    gamma: float
    autocast: torch.dtype | None = None
    compiled: bool = False
    observables: Mapping[str, Observable] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    law: LaplaceLaw | None = None
    starts: LaplaceLaw | None = None  # in which chains start; None starts them at w*
    control: Control | None = None
    _shares: dict[torch.Size, Tensor] = field(default_factory=dict)

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of what is recorded of each observed sample: the loss, then outcomes."""
        return (schema.LOSS.name, *(outcome.name for outcome in self.outcomes))

    @cached_property
    def _seen(self) -> Callable[[Inputs, Inputs], tuple[Tensor, ...]]:
        """What is recorded of one batch, float32; compiled once where that was asked for."""
        flat, outcomes = self.flat, self.outcomes
        loss = with_outcomes(self.loss, outcomes) if outcomes else self.loss

        def seen(inputs: Inputs, target: Inputs) -> tuple[Tensor, ...]:
            values = flat.losses(loss, inputs, target, shared=True).float()
            return values.unbind(1) if outcomes else (values,)

        return torch.compile(seen, dynamic=False) if self.compiled else seen

    def start(self) -> None:
        """Put all chains at w*."""
        self.flat.theta.copy_(self.center.expand_as(self.flat.theta))

    def gradient(self, rows: Minibatch, *, limit: int | None = None) -> Tensor:
        """Set ``flat.grad`` to the gradient of the mean loss of a minibatch of each chain.

        Parameters
        ----------
        rows
            Indices ``(chain, batch)``, or ``(batch,)`` where one chain is alone; ``None`` takes
            the whole training set, a slice at a time.
        limit
            Slices of the whole training set that are taken; ``None`` takes all.

        Returns
        -------
        Tensor
            Losses of the minibatch, shape ``(chain, batch)``.
        """
        flat = self.flat
        flat.grad.zero_()
        batches = []
        for inputs, target in self._batches(rows, limit):
            # The gradient of the mean, without a node for the mean.
            if flat.width == 1:
                losses = self._step_losses(inputs, target)
                count = self.train.n if rows is None else len(losses)
                torch.autograd.backward(losses, self._share(losses, count))
            else:
                losses = flat.losses(self._step_loss, inputs, target, shared=rows is None)
                count = self.train.n if rows is None else losses.shape[1]
                share = self._share(losses, count)
                slopes = torch.autograd.grad(losses, flat.leaves, share, materialize_grads=True)
                flat.grad.add_(flat.flatten(slopes))
            batches.append(losses.detach().view(flat.width, -1))  # (chain, batch)
        if flat.mask is not None:
            flat.grad.mul_(flat.mask)
        return _side_by_side(batches)

    @cached_property
    def _step_loss(self) -> PerExampleLoss:
        return self.loss.per_example

    @cached_property
    def _step_losses(self) -> Callable[[Inputs, Inputs], Tensor]:
        """Losses of one chain's minibatch, shape ``(batch,)``; compiled as those observed are."""
        flat, loss = self.flat, self._step_loss  # looked up here: compilers do not follow locks

        def losses(inputs: Inputs, target: Inputs) -> Tensor:
            return loss(flat(inputs), target)

        return torch.compile(losses, dynamic=False) if self.compiled else losses

    def _share(self, losses: Tensor, count: int) -> Tensor:
        """Return ``1 / count`` in the shape of the losses."""
        kept = self._shares.get(losses.shape)
        if kept is None or kept.dtype != losses.dtype:
            kept = self._shares[losses.shape] = torch.full_like(losses, 1 / count)
        return kept

    def curvature(self, rows: Minibatch, signs: Tensor, *, limit: int | None = None) -> Tensor:
        """Estimate the diagonal of the Hessian of the minibatch's mean loss (Hutchinson).

        Parameters
        ----------
        rows, limit
            The minibatch, as for `gradient`.
        signs
            Random signs, shape ``(chain, param)``.

        Returns
        -------
        Tensor
            ``signs * (H @ signs)``, shape ``(chain, param)``; unbiased.
        """
        flat, leaves = self.flat, self.flat.leaves
        out = torch.zeros_like(flat.grad)
        sides = flat.unflatten(signs)
        for inputs, target in self._batches(rows, limit):
            losses = flat.losses(self._step_loss, inputs, target, shared=rows is None)
            count = self.train.n if rows is None else losses.shape[1]
            slopes = torch.autograd.grad(
                losses.sum() / count, leaves, create_graph=True, materialize_grads=True
            )
            pairs = zip(slopes, sides, strict=True)
            products = [(slope * sign).sum() for slope, sign in pairs if slope.requires_grad]
            if products:
                # The gradient of g . v is H v; chains do not share terms, so one sum serves all.
                total = torch.stack(products).sum()
                out += flat.flatten(torch.autograd.grad(total, leaves, materialize_grads=True))
        out.mul_(signs)
        return out if flat.mask is None else out.mul_(flat.mask)

    def _batches(self, rows: Minibatch, limit: int | None) -> Iterable[tuple[Inputs, Inputs]]:
        if rows is None:
            return islice(self.train.slices(self.train_rows), limit)
        return [self.train.take(rows)]

    @property
    def slices(self) -> int:
        """Forward passes of a draw."""
        return sum(-(-observed.data.n // observed.rows) for observed in self.observed)

    def observe(
        self, tick: Callable[[], object] = lambda: None, *, limit: int | None = None
    ) -> dict[str, Tensor]:
        """Return the losses and outcomes of all observed samples, by the paths of their arrays.

        Shape ``(chain, sample, ...)``, float32, whatever the forward pass ran in.

        Parameters
        ----------
        tick
            Called after every forward pass.
        limit
            Passes of each observed set; ``None`` takes all.
        """
        out = {}
        with torch.no_grad() if self.compiled else torch.inference_mode(), self._precision():
            for observed in self.observed:
                batches = []
                for inputs, target in islice(observed.data.slices(observed.rows), limit):
                    batches.append(self._seen(inputs, target))
                    tick()
                for name, values in zip(self.recorded, zip(*batches, strict=True), strict=True):
                    out[f"{observed.group}/{name}"] = _side_by_side(values)
        return out

    def predict(self, offsets: Tensor) -> dict[str, Tensor]:
        """Return what the control predicts of all observed samples, by the paths of their arrays.

        Parameters
        ----------
        offsets
            Of each chain's linear chain from w*, ``(chain, param)``.

        Returns
        -------
        dict
            Each ``(chain, sample)``, float32; none without a control.
        """
        out: dict[str, Tensor] = {}
        control = self.control
        if control is None:
            return out
        name = schema.prediction(control.outcome).name
        for observed in self.observed:
            batches = []
            for inputs, target in observed.data.slices(observed.rows):
                each = [control.predict(self.flat, self.center, q, inputs, target) for q in offsets]
                batches.append(torch.stack(each).float())
            out[f"{observed.group}/{name}"] = _side_by_side(batches)
        return out

    def first_losses(self, count: int) -> Tensor:
        """Return what `observe` would give of the first items of each set, ``(chain, values)``."""
        sets = []
        with torch.inference_mode(), self._precision():
            for observed in self.observed:
                inputs, target = observed.data.take(np.arange(min(count, observed.data.n)))
                sets += [values.flatten(1) for values in self._seen(inputs, target)]
        return torch.cat(sets, dim=1)

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.flat.device.type, dtype=self.autocast)

    def measure(self) -> dict[str, Tensor]:
        """Return the observables at the present weights, by path: ``(chain, ...)``, float32."""
        out = {}
        for name, function in self.observables.items():
            with torch.no_grad():
                values = [function(self.flat.bind(row)) for row in range(self.flat.width)]
                each = [torch.as_tensor(value, device=self.flat.device) for value in values]
            out[f"{schema.OBSERVABLES}/{name}"] = torch.stack([v.detach().float() for v in each])
        return out

    def distance(self) -> Tensor:
        """Return each chain's Euclidean distance from w*, shape ``(chain,)``."""
        return torch.linalg.vector_norm(self.flat.theta - self.center, dim=1)


def _side_by_side(batches: Sequence[Tensor]) -> Tensor:
    """Return ``(chain, batch, ...)`` joined along the batch; one alone is not copied."""
    return batches[0] if len(batches) == 1 else torch.cat(tuple(batches), dim=1)
