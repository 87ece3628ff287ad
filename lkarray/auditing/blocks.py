"""Stretches of the gradient that share a form, and what the adjoint pass does with each.

A block holds the audited examples' gradients of some tensors: as they are, or as the two factors
of a linear layer's weight, of which only some rows at a time are ever multiplied out, while they
fit the processor's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lkarray.nn.features import Features
from lkarray.nn.gradients import ExampleGradients

#: Gradients at the nodes of a stretch, each with its weight.
Nodes = Sequence[tuple[float, Features]]

#: Returns room for numbers of a shape, which may be used until it is asked again: memory fresh from
#: the system costs more than what is done with it.
Room = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """Some tensors, side by side.

    Attributes
    ----------
    tensors, sizes
        Indices among the trace's tensors, and their numbers of elements.
    places
        Where each lies among all parameters.
    layer
        Index of the group of parameters that they belong to.
    """

    tensors: tuple[int, ...]
    sizes: tuple[int, ...]
    places: tuple[slice, ...]
    layer: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(self.sizes)

    def take(self, values: Tensor) -> Tensor:
        """Return the block's elements of a vector of all parameters."""
        stretches = [values[place] for place in self.places]
        return stretches[0] if len(stretches) == 1 else torch.cat(stretches)

    @abstractmethod
    def prepare(self, nodes: Nodes) -> Any:
        """Return the gradients of a stretch, in the form that `mean` takes."""

    @abstractmethod
    def mean(self, prepared: Any, rows: slice, out: Tensor) -> None:
        """Write the mean gradient over the stretch of some audited examples."""

    @abstractmethod
    def dot(self, prepared: Any, vector: Tensor) -> Tensor:
        """Return the inner products of all mean gradients with one vector, ``(row,)``."""

    @abstractmethod
    def training(self, features: Features) -> Any:
        """Return the training examples' gradients in the form that `products` takes."""

    @abstractmethod
    def products(self, k: Tensor, training: Any, room: Room) -> Tensor:
        """Return the inner products of ``k`` ``(row, element)`` with training gradients."""

    @abstractmethod
    def batch_mean(self, training: Any) -> Tensor:
        """Return the mean of the training examples' gradients, ``(element,)``."""


@dataclass(frozen=True, kw_only=True)
class Dense(Block):
    """Tensors whose gradients are materialised; ``columns`` are theirs in `Features.dense`."""

    columns: slice

    @override
    def prepare(self, nodes: Nodes) -> list[tuple[float, Tensor]]:
        return [(weight, f.dense[:, self.columns]) for weight, f in nodes]

    @override
    def mean(self, prepared: list[tuple[float, Tensor]], rows: slice, out: Tensor) -> None:
        weight, first = prepared[0]
        torch.mul(first[rows], weight, out=out)
        for weight, values in prepared[1:]:
            out.add_(values[rows], alpha=weight)

    @override
    def dot(self, prepared: list[tuple[float, Tensor]], vector: Tensor) -> Tensor:
        return torch.stack([weight * (values @ vector) for weight, values in prepared]).sum(0)

    @override
    def training(self, features: Features) -> Tensor:
        return features.dense[:, self.columns]

    @override
    def products(self, k: Tensor, training: Tensor, room: Room) -> Tensor:
        return k @ training.T

    @override
    def batch_mean(self, training: Tensor) -> Tensor:
        return training.mean(0)


@dataclass(frozen=True, kw_only=True)
class Outer(Block):
    """The weight of a linear layer that each example goes through once.

    Its gradient is the outer product of what comes back, ``(out,)``, and what went in, ``(in,)``.
    """

    name: str

    @override
    def prepare(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        """Return weighted outputs' gradients ``(row, node, out)``, inputs ``(row, node, in)``."""
        b = torch.stack([weight * f.factors[self.name].b[:, 0, 0] for weight, f in nodes], 1)
        a = torch.stack([f.factors[self.name].a[:, 0, 0] for _, f in nodes], 1)
        return b, a

    @override
    def mean(self, prepared: tuple[Tensor, Tensor], rows: slice, out: Tensor) -> None:
        b, a = (factor[rows] for factor in prepared)
        torch.bmm(b.transpose(1, 2), a, out=out.view(len(b), b.shape[2], a.shape[2]))

    @override
    def dot(self, prepared: tuple[Tensor, Tensor], vector: Tensor) -> Tensor:
        b, a = prepared
        matrix = vector.view(b.shape[2], a.shape[2])  # (out, in), as the layer's weight
        return torch.matmul(a, matrix.T).mul_(b).sum((1, 2))

    @override
    def training(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return what went in ``(in, example)`` and what came back ``(out, example)``."""
        f = features.factors[self.name]
        return f.a[:, 0, 0].T.contiguous(), f.b[:, 0, 0].T.contiguous()

    @override
    def products(self, k: Tensor, training: tuple[Tensor, Tensor], room: Room) -> Tensor:
        """Contract the longer side by one product, ``2 row in out example`` operations."""
        a, b = training
        inputs, outputs, n = len(a), len(b), a.shape[1]
        if inputs >= outputs:
            contracted = room(len(k), outputs, n)  # (row, out, example)
            torch.mm(k.view(-1, inputs), a, out=contracted.view(-1, n))
            return contracted.mul_(b).sum(1)
        turned = k.view(len(k), outputs, inputs).transpose(1, 2)
        contracted = torch.matmul(turned, b, out=room(len(k), inputs, n))  # (row, in, example)
        return contracted.mul_(a).sum(1)

    @override
    def batch_mean(self, training: tuple[Tensor, Tensor]) -> Tensor:
        a, b = training
        return (b @ a.T).view(-1).div_(a.shape[1])

    def factor_products(
        self, prepared: tuple[Tensor, Tensor], training: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the inner products of the mean gradients themselves, ``(row, example)``.

        The ghost dot product (Anonymous 2026, A.2.8): ``2 (in + out)`` operations each, and no
        gradient is multiplied out.
        """
        (b, a), (inputs, back) = prepared, training
        total = (b[:, 0] @ back) * (a[:, 0] @ inputs)
        for node in range(1, b.shape[1]):
            total += (b[:, node] @ back) * (a[:, node] @ inputs)
        return total


def blocks_of(
    engine: ExampleGradients,
    tensors: Sequence[int],
    starts: Sequence[int],
    layers: Sequence[int],
) -> list[Block]:
    """Return the blocks of the tensors that an engine differentiates by.

    Parameters
    ----------
    engine
        Of per-example gradients: its plan says which have factors.
    tensors
        Their indices among the trace's, in the engine's order.
    starts
        First element of each among all parameters.
    layers
        The group of parameters that each belongs to.
    """
    out: list[Block] = []
    dense: dict[int, list[_Dense]] = {}
    column = 0
    for site, tensor, start, layer in zip(engine.plan.sites, tensors, starts, layers, strict=True):
        size = site.stop - site.start
        place = slice(int(start), int(start) + size)
        if site.form == "factored":
            out.append(
                Outer(
                    tensors=(tensor,), sizes=(size,), places=(place,), layer=layer, name=site.name
                )
            )
            continue
        dense.setdefault(layer, []).append(_Dense(tensor, place, column))
        column += size
    for layer, tensors_of in dense.items():
        out += [_side_by_side(layer, run) for run in _runs(tensors_of)]
    return out


class _Dense(NamedTuple):
    """A tensor whose gradients are materialised: its place, and its first column."""

    tensor: int
    place: slice
    column: int

    @property
    def size(self) -> int:
        return int(self.place.stop - self.place.start)


def _runs(tensors: Sequence[_Dense]) -> list[list[_Dense]]:
    """Return tensors in runs whose columns lie side by side."""
    runs: list[list[_Dense]] = []
    end = -1
    for dense in tensors:
        if dense.column == end:
            runs[-1].append(dense)
        else:
            runs.append([dense])
        end = dense.column + dense.size
    return runs


def _side_by_side(layer: int, run: Sequence[_Dense]) -> Dense:
    sizes = tuple(dense.size for dense in run)
    first = run[0].column
    return Dense(
        tensors=tuple(dense.tensor for dense in run),
        sizes=sizes,
        places=tuple(dense.place for dense in run),
        layer=layer,
        columns=slice(first, first + sum(sizes)),
    )


def join_features(batches: Sequence[Features]) -> Features:
    """Return the features of several batches as those of one."""
    if len(batches) == 1:
        return batches[0]
    factors = {}
    for name, f in batches[0].factors.items():
        a = torch.cat([batch.factors[name].a for batch in batches])
        b = torch.cat([batch.factors[name].b for batch in batches])
        factors[name] = type(f)(f.kind, a, b)
    numbers = [batch.numbers for batch in batches if batch.numbers is not None]
    return Features(torch.cat([batch.dense for batch in batches]), factors, torch.cat(numbers))
