"""Factors of a model's layers, of one batch: from one forward and one backward pass, vetted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lkarray.nn.batches import Inputs, Target, batch_size, fresh
from lkarray.nn.factors import Factors, Rule, fits, rule_of
from lkarray.nn.flat import FlatModel
from lkarray.nn.graphs import Graph, graph_of
from lkarray.nn.modes import gradients_on
from lkarray.nn.reference import Scalars, rows_of

#: Relative difference beyond which gradients are taken for different.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


@dataclass
class Call:
    """One call of a layer: what went in, the place of what came out, and the gradient by that."""

    module: nn.Module
    a: Tensor
    edge: GradientEdge
    b: Tensor | None = None

    def fits(self, n: int) -> bool:
        """Say whether as many rows of each of ``n`` examples went through."""
        return self.b is None or fits(self.module, self.a, self.b, n)

    def owned(self, other: Tensor | None, weights: Tensor) -> bool:
        """Say whether what comes back to an example's rows comes from its own number alone.

        ``other`` is the gradient with the numbers weighted.
        """
        n = len(weights)
        if self.b is None or other is None or not self.b.numel():
            return self.b is other is None or (other is not None and not other.numel())
        if not self.fits(n):
            return False
        rule = _rule(self.module)
        back, weighted = (rule(self.module, self.a, b, n).b.reshape(n, -1) for b in (self.b, other))
        weighted = weighted / weights[:, None]
        size = torch.maximum(back.abs().amax(1), weighted.abs().amax(1))
        tolerance = TOLERANCE.get(back.dtype, 1e-2)
        return bool(((back - weighted).abs().amax(1) <= tolerance * size).all())


@dataclass
class Pass:
    """What one batch leaves.

    Attributes
    ----------
    numbers
        What is differentiated, ``(example,)``.
    factors
        Of each call of each layer, last first.
    untrusted
        Tensors that the layers' factors do not give the gradient of, for this batch.
    """

    numbers: Tensor
    factors: Iterator[tuple[nn.Module, Factors]]
    untrusted: set[str]


class Layers:
    """The layers of a model whose gradients are products of factors.

    That a layer's factors give its gradient holds where each example has rows of its own in it, in
    order, and nothing but calls of the layer read its tensors. Models are free to break that for
    some inputs only, so it is looked at in each batch: every reading of a tensor must be a call of
    a layer, and the graph must be one that moves no rows (see `graph_of`), of the same operations
    as that of other batches of such inputs. Where it is not, a second backward pass, a weight for
    each example in it, shows whose the rows are.

    Attributes
    ----------
    modules
        With their moving tensors, and what these are.
    left_out
        Tensors that are not asked for.
    """

    def __init__(self, flat: FlatModel, scalars: Scalars) -> None:
        self._flat, self._scalars = flat, scalars
        self.modules = _modules(flat)
        self.left_out: set[str] = set()
        parameters = dict(flat.module.named_parameters())
        self._parameters = {name: parameters[name] for name in flat.names}
        self._usual: dict[object, object] = {}

    def clear(self, inputs: Inputs, target: Target) -> bool:
        """Say whether batches of such inputs are such that no rows move."""
        return self._expected(inputs, target) is not None

    def run(self, inputs: Inputs, target: Target) -> Pass:
        """Return what a batch leaves: one forward pass, and one backward pass, or two."""
        n = batch_size((inputs, target))
        numbers, calls, graph = self._forward(inputs, target)
        if graph is None or graph.hidden or not self._names:
            hidden = graph is not None and graph.hidden
            return Pass(numbers.detach(), iter(()), self._names if hidden else set())
        untrusted = self._read_elsewhere(calls, graph)
        usual = graph.clear and _outline(calls, graph, n) == self._expected(inputs, target)
        asked = self._names - untrusted
        calls = [call for call in calls if asked & set(self.modules[call.module])]
        # The numbers' slopes by each layer's output, all by one backward pass.
        edges, ones = [call.edge for call in calls], torch.ones_like(numbers)
        slopes = _slopes(numbers, edges, ones, keep=not usual)
        for call, b in zip(calls, slopes, strict=True):
            call.b = b
        if not usual:
            # A row of an output that belongs to one example comes back times that one's weight.
            weights = _weights(numbers)
            again = _slopes(numbers, edges, weights, keep=False)
            for call, other in zip(calls, again, strict=True):
                if not call.owned(other, weights):
                    untrusted |= set(self.modules[call.module])
        for call in calls:
            if not call.fits(n):
                untrusted |= set(self.modules[call.module])
        return Pass(numbers.detach(), _factors(calls, n), untrusted & self._names)

    @property
    def _names(self) -> set[str]:
        return {name for names in self.modules.values() for name in names} - self.left_out

    def _forward(self, inputs: Inputs, target: Target) -> tuple[Tensor, list[Call], Graph | None]:
        calls: list[Call] = []
        x, y = fresh(inputs, target)
        with gradients_on(), self._hooked(calls):
            numbers = self._scalars(self._flat(x), y)
            if not numbers.requires_grad:
                return numbers, [], None
            graph = graph_of(numbers)
        return numbers, [call for call in calls if call.edge.node in graph.nodes], graph

    @contextmanager
    def _hooked(self, calls: list[Call]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                a = args[0] if args else next(iter(kwargs.values()))
                # The edge, not the output: a later operation may change that in place.
                calls.append(Call(module, a.detach(), get_gradient_edge(output)))

        wanted = [m for m, names in self.modules.items() if set(names) - self.left_out]
        handles = [m.register_forward_hook(keep, with_kwargs=True) for m in wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_elsewhere(self, calls: list[Call], graph: Graph) -> set[str]:
        """Return the tensors that something else than calls of their layers reads."""
        called = Counter(name for call in calls for name in self.modules[call.module])
        return {
            name for name in self._names if graph.reads[id(self._parameters[name])] != called[name]
        }

    def _expected(self, inputs: Inputs, target: Target) -> object:
        """Return the outline of batches of such inputs; ``None`` where it varies or rows may move.

        It is that of two and of three examples: what depends on their number shows.
        """
        key = _shapes(inputs), _shapes(target)
        if key not in self._usual:
            outlines = []
            n = batch_size((inputs, target))
            for rows in ([0, 1 % n], [0, 1 % n, 0]):
                some = rows_of(inputs, rows), rows_of(target, rows)
                _, calls, graph = self._forward(*some)
                clear = graph is not None and graph.clear
                outlines.append(_outline(calls, graph, len(rows)) if clear else None)
            same = outlines[0] == outlines[1]
            self._usual[key] = outlines[0] if same else None
        return self._usual[key]


def _outline(calls: list[Call], graph: Graph | None, n: int) -> object:
    assert graph is not None
    rows = tuple((id(call.module), call.a.numel() / n) for call in calls)
    return rows, graph.signature


def _shapes(values: Any) -> object:
    if isinstance(values, dict):
        return tuple((key, tensor.shape[1:]) for key, tensor in sorted(values.items()))
    return values.shape[1:]


def _weights(numbers: Tensor) -> Tensor:
    """Return weights of the examples, any two of which differ by a factor that shows."""
    # Multiples of the golden ratio spread evenly, whatever their number; 10 ** (-3 to 3).
    turns = torch.arange(len(numbers), dtype=torch.float64, device="cpu") * 0.6180339887498949 % 1
    return (10 ** (6 * turns - 3)).to(numbers)


def _slopes(
    numbers: Tensor, edges: list[GradientEdge], weights: Tensor, *, keep: bool
) -> tuple[Tensor | None, ...]:
    if not edges:
        return ()
    return torch.autograd.grad(numbers, edges, weights, retain_graph=keep, allow_unused=True)


def _factors(calls: list[Call], n: int) -> Iterator[tuple[nn.Module, Factors]]:
    """Yield factors, last first, each made when it is asked for."""
    while calls:
        call = calls.pop()
        if call.b is not None and call.fits(n):
            yield call.module, _rule(call.module)(call.module, call.a, call.b, n)


def _rule(module: nn.Module) -> Rule:
    rule = rule_of(module)
    assert rule is not None
    return rule


def _modules(flat: FlatModel) -> dict[nn.Module, dict[str, str]]:
    """Return the layers that have factors, each with its moving tensors and what they are."""
    first = {id(p): name for name, p in flat.module.named_parameters()}
    moving = set(flat.names)
    layers: dict[nn.Module, dict[str, str]] = {}
    for module in flat.module.modules():
        if rule_of(module) is None:
            continue
        own = {first[id(p)]: kind for kind, p in module.named_parameters(recurse=False)}
        if set(own) & moving:
            layers[module] = {name: kind for name, kind in own.items() if name in moving}
    return layers
