"""Gradients of every example of a batch, whole or as factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkarray.nn.batches import Inputs, Target, batch_size
from lkarray.nn.factors import (
    Factors,
    add_bias,
    add_weight,
    rank_one_products,
    rule_of,
)
from lkarray.nn.flat import FlatModel

#: One number of each example, ``(batch,)``, from the model's output and the target.
Scalars = Callable[[Any, Any], Tensor]

#: Relative difference beyond which a layer's gradient is taken for wrong.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


@dataclass(frozen=True)
class Site:
    """How one parameter tensor's gradients are made.

    Attributes
    ----------
    name, start, stop
        The tensor, and its place along ``param``.
    way
        ``"hooks"`` (factors of its layer) or ``"torch.func"``.
    form
        What inner products are taken of: ``"factored"``, where that takes fewer operations, or
        ``"materialised"``.
    cost
        Multiplications of one inner product in that form.
    """

    name: str
    start: int
    stop: int
    way: str
    form: str
    cost: int


@dataclass(frozen=True)
class GradientPlan:
    """What `ExampleGradients` chose for each tensor; prints as a table."""

    sites: tuple[Site, ...]

    @property
    def cost(self) -> int:
        """Multiplications of one inner product of two gradients."""
        return sum(site.cost for site in self.sites)

    def __str__(self) -> str:
        width = max(len(site.name) for site in self.sites)
        rows = [f"{'tensor':{width}}  elements  gradient    products      multiplications"]
        rows += [
            f"{s.name:{width}}  {s.stop - s.start:8,}  {s.way:10}  {s.form:12}  {s.cost:15,}"
            for s in self.sites
        ]
        whole = self.sites[-1].stop
        return "\n".join([*rows, f"one inner product: {self.cost:,} instead of {whole:,}"])


@dataclass
class Features:
    """Gradients of a batch in the form that inner products are cheapest in.

    Attributes
    ----------
    dense
        ``(example, elements)`` of the tensors that are materialised, side by side.
    factors
        Of the others, by tensor: of rank one.
    numbers
        What was differentiated, ``(example,)``.
    """

    dense: Tensor
    factors: dict[str, Factors] = field(default_factory=dict)
    numbers: Tensor | None = None

    def products(self, other: Features) -> Tensor:
        """Return the inner products of all gradients of two batches, ``(n, m)``.

        Equal to ``gradients @ other_gradients.T``, in `GradientPlan.cost` multiplications each.
        """
        total = self.dense @ other.dense.T
        for name, f in self.factors.items():
            total += rank_one_products(f, other.factors[name])
        return total


class ExampleGradients:
    """Per-example gradients of a model by its moving parameters.

    Linear, Conv1d, Conv2d, Embedding, LayerNorm, GroupNorm and BatchNorm (in eval mode) layers
    give factors, from one forward and one backward pass of the batch; the remaining tensors
    go through ``torch.func.vmap(grad)``. Which way each tensor takes is found on two examples,
    where every layer's result is compared with plain autograd of one example at a time: a layer
    that is used in a way that its factors do not tell of (its weight read elsewhere, a batch
    that is not its leading dim) goes through ``torch.func``.

    Parameters
    ----------
    flat
        The model, width 1; its ``theta`` may change between calls.
    scalars
        The number to differentiate, of each example: its loss, say.
    probe
        Two examples or more (of one data set, one twice if there is only one).

    Raises
    ------
    ValueError
        Examples of a batch influence each other's numbers.
    RuntimeError
        An operation has no gradient.
    """

    def __init__(self, flat: FlatModel, scalars: Scalars, probe: tuple[Inputs, Target]) -> None:
        if flat.width != 1:
            raise ValueError(f"per-example gradients take a model of width 1, not {flat.width}")
        self.flat, self.scalars = flat, scalars
        self._starts = dict(zip(flat.names, _starts(flat.sizes), strict=True))
        self._sizes = dict(zip(flat.names, flat.sizes, strict=True))
        self._modules = _modules(flat)
        self._functional: list[str] = []
        self._called: set[nn.Module] = set()
        self.plan = self._choose(probe)

    # --- what a caller asks for -------------------------------------------------------------

    def gradients(self, inputs: Inputs, target: Target, out: Tensor | None = None) -> Tensor:
        """Return the gradients of a batch, ``(example, param)``.

        One forward and one backward pass, and ``2 example position param`` operations; memory
        is the result and the factors of the layers.
        """
        n = batch_size((inputs, target))
        if out is None:
            out = self.flat.theta.new_empty((n, self.flat.theta.shape[1]))
        written: set[str] = set()
        for module, f in self._factors(inputs, target):
            self._write(module, f, out, self._column, written)
        self._fill(inputs, target, out, self._column, written)
        return out

    def features(self, inputs: Inputs, target: Target) -> Features:
        """Return the gradients of a batch for inner products, factored where that is cheaper."""
        n = batch_size((inputs, target))
        columns, width = self._dense_columns
        found = Features(self.flat.theta.new_empty((n, width)))
        written: set[str] = set()
        for module, f in self._factors(inputs, target, found):
            for name in self._modules[module]:
                if name not in columns:
                    found.factors[name] = f
            self._write(module, f, found.dense, columns.get, written)
        self._fill(inputs, target, found.dense, columns.get, written)
        return found

    def materialise(self, names: Iterable[str]) -> None:
        """Let `features` give some tensors' gradients whole, also where factors are cheaper."""
        wanted = set(names)
        sites = tuple(
            replace(s, form="materialised", cost=s.stop - s.start) if s.name in wanted else s
            for s in self.plan.sites
        )
        self.plan = GradientPlan(sites)

    # --- how --------------------------------------------------------------------------------

    def _column(self, name: str) -> slice:
        return slice(self._starts[name], self._starts[name] + self._sizes[name])

    def _write(
        self,
        module: nn.Module,
        f: Factors,
        out: Tensor,
        column: Callable[[str], slice | None],
        written: set[str],
    ) -> None:
        """Write the gradients of one call of a layer, or add them to those of another call."""
        for name, kind in self._modules[module].items():
            place = column(name)
            if place is None or name in self._functional:
                continue
            write = add_weight if kind == "weight" else add_bias
            write(f, out[:, place], fresh=name not in written)
            written.add(name)

    def _fill(
        self,
        inputs: Inputs,
        target: Target,
        out: Tensor,
        column: Callable[[str], slice | None],
        written: set[str],
    ) -> None:
        """Write the gradients of the tensors that layers did not tell of."""
        rest = {name: place for name in self._functional if (place := column(name)) is not None}
        if rest:
            found = self._by_functional(list(rest), inputs, target)
            for name, place in rest.items():
                out[:, place] = found[name].flatten(1)
        for name in self._starts:
            place = column(name)
            if place is not None and name not in written and name not in rest:
                out[:, place] = 0  # the batch did not reach the layer

    def _factors(
        self, inputs: Inputs, target: Target, found: Features | None = None
    ) -> Iterator[tuple[nn.Module, Factors]]:
        """Yield the factors of each call of each layer, last first: one forward, one backward.

        ``found`` gets the numbers that were differentiated.
        """
        n = batch_size((inputs, target))
        calls: list[tuple[nn.Module, Tensor, GradientEdge]] = []
        with torch.enable_grad(), self._hooked(calls):
            numbers = self.scalars(self.flat(inputs), target)
            total = numbers.sum()
        if found is not None:
            found.numbers = numbers.detach()
        if not calls:
            return
        edges = [edge for _, _, edge in calls]
        slopes = torch.autograd.grad(total, edges, allow_unused=True)
        with torch.no_grad():
            while calls:
                module, a, _ = calls.pop()
                b = slopes[len(calls)]
                if b is not None:
                    rule = rule_of(module)
                    assert rule is not None
                    yield module, rule(module, a, b, n)

    @contextmanager
    def _hooked(self, calls: list[tuple[nn.Module, Tensor, GradientEdge]]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._called.add(module)
            a = args[0] if args else next(iter(kwargs.values()))
            # The edge, not the output: a later operation may change that in place.
            calls.append((module, a.detach(), get_gradient_edge(output)))

        wanted = [m for m, names in self._modules.items() if set(names) - set(self._functional)]
        handles = [m.register_forward_hook(keep, with_kwargs=True) for m in wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _by_functional(self, names: list[str], inputs: Inputs, target: Target) -> dict[str, Tensor]:
        parameters = dict(self.flat.module.named_parameters())
        chosen = {name: parameters[name].detach() for name in names}

        def one(values: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            x, y = _single(x), _single(y)
            args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
            output = functional_call(self.flat.module, values, args, kwargs)
            return self.scalars(output, y).squeeze(0)

        try:
            with _batching():
                found: dict[str, Tensor] = vmap(grad(one), (None, 0, 0))(chosen, inputs, target)
        except RuntimeError:  # an operation without a batching rule, or a branch on values
            parts = [grad(one)(chosen, *pair) for pair in _examples(inputs, target)]
            found = {name: torch.stack([part[name] for part in parts]) for name in names}
        return found

    # --- which way --------------------------------------------------------------------------

    def _choose(self, probe: tuple[Inputs, Target]) -> GradientPlan:
        inputs, target = probe
        alone = [self._alone(x, y) for x, y in _examples(inputs, target)]
        expected = torch.stack([gradient for _, gradient in alone])
        self._refuse_coupling(torch.stack([number for number, _ in alone]), inputs, target)
        kinds: dict[str, list[Factors]] = {}
        try:
            for module, f in self._factors(inputs, target):
                for name in self._modules[module]:
                    kinds.setdefault(name, []).append(f)
            # A layer that was called and has no slope is off the number's way: zeros are right.
            off = {name for module in self._called for name in self._modules[module]}
            self._functional = [name for name in self.flat.names if name not in {*kinds, *off}]
            found = self.gradients(inputs, target)
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):
            self._functional = list(self.flat.names)
            found = self.gradients(inputs, target)
        wrong = [name for name in self.flat.names if not self._same(found, expected, name)]
        if wrong:
            self._functional = [n for n in self.flat.names if n in {*self._functional, *wrong}]
            found = self.gradients(inputs, target)
            wrong = [name for name in wrong if not self._same(found, expected, name)]
        if wrong:
            raise ValueError(
                f"the gradients of {wrong} found by torch.func are not those of autograd; a custom "
                "autograd function may lack its vmap or setup_context"
            )
        return GradientPlan(tuple(self._site(name, kinds.get(name, [])) for name in self._starts))

    def _site(self, name: str, factors: list[Factors]) -> Site:
        place, size = self._column(name), self._sizes[name]
        way = "torch.func" if name in self._functional else "hooks"
        form, cost = "materialised", size
        if way == "hooks" and len(factors) == 1 and factors[0].single:
            a, b = factors[0].a.shape[3], factors[0].b.shape[3]
            if size == a * b and a + b < size:
                form, cost = "factored", a + b
        return Site(name, place.start, place.stop, way, form, cost)

    @property
    def _dense_columns(self) -> tuple[dict[str, slice], int]:
        """Return where the materialised tensors lie in `Features.dense`, and its width."""
        columns, start = {}, 0
        for site in self.plan.sites:
            if site.form == "materialised":
                size = site.stop - site.start
                columns[site.name] = slice(start, start + size)
                start += size
        return columns, start

    def _same(self, found: Tensor, expected: Tensor, name: str) -> bool:
        place = self._column(name)
        tolerance = _TOLERANCE.get(found.dtype, 1e-2)
        scale = expected[:, place].abs().max().clamp(min=1e-3 * float(expected.abs().max()))
        return bool(((found - expected)[:, place].abs() <= tolerance * scale).all())

    def _refuse_coupling(self, alone: Tensor, inputs: Inputs, target: Target) -> None:
        with torch.no_grad():
            together = self.scalars(self.flat(inputs), target)
        tolerance = _TOLERANCE.get(alone.dtype, 1e-2)
        off = (together - alone).abs() > tolerance * alone.abs().max().clamp(min=1e-3)
        if bool(off.any()):
            raise ValueError(
                f"example {int(off.int().argmax())} has another loss in a batch of {len(alone)} "
                "than alone: examples influence each other (a term of the loss over the batch, or "
                "a layer that mixes examples), so there is no gradient per example"
            )

    def _alone(self, inputs: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Return the number of one example and its gradient, in a batch of one, by autograd."""
        with torch.enable_grad():
            numbers = self.scalars(self.flat(_single(inputs)), _single(target))
        leaves = self.flat.leaves
        slopes = torch.autograd.grad(numbers.sum(), leaves, materialize_grads=True)
        return numbers.detach().squeeze(0), torch.cat([slope.flatten() for slope in slopes])


@contextmanager
def _batching() -> Iterator[None]:
    """Let ``vmap`` batch attention by its definition: the fused kernels have no rule for it."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def _starts(sizes: Iterable[int]) -> list[int]:
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start += size
    return starts


def _modules(flat: FlatModel) -> dict[nn.Module, dict[str, str]]:
    """Return the layers that have factors, each with its moving tensors and what they are."""
    first = {id(p): name for name, p in flat.module.named_parameters()}
    moving = set(flat.names)
    found: dict[nn.Module, dict[str, str]] = {}
    for module in flat.module.modules():
        if rule_of(module) is None:
            continue
        own = {first[id(p)]: kind for kind, p in module.named_parameters(recurse=False)}
        if set(own) & moving:
            found[module] = {name: kind for name, kind in own.items() if name in moving}
    return found


def _examples(inputs: Inputs, target: Target) -> Iterator[tuple[Any, Any]]:
    for i in range(batch_size((inputs, target))):
        yield _pick(inputs, i), _pick(target, i)


def _pick(values: Any, i: int) -> Any:
    return {k: v[i] for k, v in values.items()} if isinstance(values, dict) else values[i]


def _single(values: Any) -> Any:
    """Return one example as a batch of one."""
    if isinstance(values, dict):
        return {key: value.unsqueeze(0) for key, value in values.items()}
    return values.unsqueeze(0)
