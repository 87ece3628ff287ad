"""Gradients of every example of a batch, whole or as factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lkarray.nn.batches import Inputs, Target, batch_size
from lkarray.nn.factors import MATRIX, Factors, add_bias, add_weight
from lkarray.nn.features import Features, GradientPlan, Site
from lkarray.nn.flat import FlatModel
from lkarray.nn.layers import TOLERANCE, Layers
from lkarray.nn.modes import gradients_on
from lkarray.nn.reference import Reference, Scalars, examples


class NotFactoredError(ValueError):
    """A batch whose gradients by some tensors are not of rank one, as they were planned to be.

    Attributes
    ----------
    names
        The tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        super().__init__(
            f"the gradients by {self.names} were to be kept as factors, and the model uses these "
            "tensors otherwise for some inputs than for the first ones (another number of calls or "
            "of rows, a second reading); store whole gradients instead (lk.gradient_features)"
        )


class ExampleGradients:
    """Per-example gradients of a model by its moving parameters.

    Linear, Conv1d, Conv2d, Embedding, LayerNorm, GroupNorm and BatchNorm (in eval mode) layers
    give factors, from one forward and one backward pass of the batch; the remaining tensors
    go through ``torch.func.vmap(grad)``, or autograd of one example at a time where that cannot
    have the model. Which way each tensor takes is decided on two examples, where every layer's
    result is compared with plain autograd of one example at a time: a layer that is used in a way
    that its factors do not tell of (its weight read elsewhere, a batch that is not its leading
    dim) goes through ``torch.func``. In later batches that is looked at again (see `Layers`), and
    a batch for which it does not hold goes another way, too.

    The model and the number get copies of what they are given, so that they may change it.

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
        Examples of a batch influence each other's numbers, or these have no gradient. In
        `features` (`NotFactoredError`): a batch's gradients have no factors as planned.
    RuntimeError
        An operation has no gradient.
    """

    def __init__(self, flat: FlatModel, scalars: Scalars, probe: tuple[Inputs, Target]) -> None:
        if flat.width != 1:
            raise ValueError(f"per-example gradients take a model of width 1, not {flat.width}")
        self.flat, self.scalars = flat, scalars
        self._starts = dict(zip(flat.names, _starts(flat.sizes), strict=True))
        self._sizes = dict(zip(flat.names, flat.sizes, strict=True))
        self._layers = Layers(flat, scalars)
        self._reference = Reference(flat, scalars)
        #: Lengths of the factors of tensors that are kept as such.
        self._sides: dict[str, tuple[int, int]] = {}
        with gradients_on():
            self.plan = self._choose(probe)

    # --- what a caller asks for -------------------------------------------------------------

    def gradients(self, inputs: Inputs, target: Target, out: Tensor | None = None) -> Tensor:
        """Return the gradients of a batch, ``(example, param)``.

        One forward and one backward pass, and ``2 example position param`` operations; memory
        is the result and the factors of the layers.
        """
        n = batch_size((inputs, target))
        with gradients_on(), torch.no_grad():
            if out is None:
                out = self.flat.theta.new_empty((n, self.flat.theta.shape[1]))
            passed = self._layers.run(inputs, target)
            written: set[str] = set()
            for module, f in passed.factors:
                self._write(module, f, out, self._column, written, passed.untrusted)
            self._fill(inputs, target, out, self._column, written, passed.untrusted)
        return out

    def features(self, inputs: Inputs, target: Target) -> Features:
        """Return the gradients of a batch for inner products, factored where that is cheaper.

        Raises
        ------
        NotFactoredError
            Gradients that were planned to be factored are not of rank one in this batch.
        """
        n = batch_size((inputs, target))
        columns, width = self._dense_columns
        with gradients_on(), torch.no_grad():
            passed = self._layers.run(inputs, target)
            features = Features(self.flat.theta.new_empty((n, width)), numbers=passed.numbers)
            other = passed.untrusted - set(columns)
            written: set[str] = set()
            for module, f in passed.factors:
                for name in set(self._layers.modules[module]) - set(columns):
                    # A second call of the layer adds a product of its own: rank two.
                    if not f.single or name in features.factors:
                        other.add(name)
                    features.factors[name] = f
                self._write(module, f, features.dense, columns.get, written, passed.untrusted)
            if other:
                raise NotFactoredError(other)
            for name in set(self._sides) - set(columns) - set(features.factors):
                features.factors[name] = self._nothing(name, n)  # the batch did not reach the layer
            self._fill(inputs, target, features.dense, columns.get, written, passed.untrusted)
        return features

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
        untrusted: set[str],
    ) -> None:
        """Write the gradients of one call of a layer, or add them to those of another call."""
        for name, kind in self._layers.modules[module].items():
            place = column(name)
            if place is None or name in self._layers.left_out or name in untrusted:
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
        untrusted: set[str],
    ) -> None:
        """Write the gradients of the tensors that layers did not tell of."""
        others = self._layers.left_out | untrusted
        rest = {n: place for n in self._starts if n in others and (place := column(n)) is not None}
        if rest:
            slopes = self._reference.gradients(list(rest), inputs, target)
            for name, place in rest.items():
                out[:, place] = slopes[name].flatten(1)
        for name in self._starts:
            place = column(name)
            if place is not None and name not in written and name not in rest:
                out[:, place] = 0  # the batch did not reach the layer

    def _nothing(self, name: str, n: int) -> Factors:
        a, b = (self.flat.theta.new_zeros((n, 1, 1, size)) for size in self._sides[name])
        return Factors(MATRIX, a, b)

    # --- which way --------------------------------------------------------------------------

    def _choose(self, probe: tuple[Inputs, Target]) -> GradientPlan:
        inputs, target = probe
        alone = [self._reference.alone(x, y) for x, y in examples(inputs, target)]
        expected = torch.stack([gradient for _, gradient in alone])
        self._refuse_coupling(torch.stack([number for number, _ in alone]), inputs, target)
        if not bool(expected.any()):
            self._refuse_detached(inputs, target)
        layers, names = self._layers, self.flat.names
        kinds: dict[str, list[Factors]] = {}
        try:
            passed = layers.run(inputs, target)
            for module, f in passed.factors:
                for name in layers.modules[module]:
                    kinds.setdefault(name, []).append(f)
            hooked = {name for names in layers.modules.values() for name in names}
            layers.left_out = passed.untrusted | (set(names) - hooked)
            taken = self.gradients(inputs, target)
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):
            layers.left_out = set(names)
            taken = self.gradients(inputs, target)
        wrong = [name for name in names if not self._same(taken, expected, name)]
        if wrong and not layers.left_out.issuperset(wrong):
            layers.left_out |= set(wrong)
            taken = self.gradients(inputs, target)
            wrong = [name for name in names if not self._same(taken, expected, name)]
        if wrong:  # torch.func is not right about it: an autograd function's own vmap, say
            self._reference.one_by_one = True
            layers.left_out |= set(wrong)
        steady = layers.clear(inputs, target)
        return GradientPlan(
            tuple(self._site(name, kinds.get(name, []) if steady else []) for name in names)
        )

    def _site(self, name: str, factors: list[Factors]) -> Site:
        place, size = self._column(name), self._sizes[name]
        way = "torch.func" if name in self._layers.left_out else "hooks"
        form, cost = "materialised", size
        if way == "hooks" and len(factors) == 1 and factors[0].single:
            a, b = factors[0].a.shape[3], factors[0].b.shape[3]
            if size == a * b and a + b < size:
                form, cost = "factored", a + b
                self._sides[name] = a, b
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

    def _same(self, taken: Tensor, expected: Tensor, name: str) -> bool:
        place = self._column(name)
        tolerance = TOLERANCE.get(taken.dtype, 1e-2)
        scale = expected[:, place].abs().max().clamp(min=1e-3 * float(expected.abs().max()))
        return bool(((taken - expected)[:, place].abs() <= tolerance * scale).all())

    def _refuse_coupling(self, alone: Tensor, inputs: Inputs, target: Target) -> None:
        with torch.no_grad():
            together = self._reference.numbers(inputs, target)
        tolerance = TOLERANCE.get(alone.dtype, 1e-2)
        off = (together - alone).abs() > tolerance * alone.abs().max().clamp(min=1e-3)
        if bool(off.any()):
            raise ValueError(
                f"example {int(off.int().argmax())} has another loss in a batch of {len(alone)} "
                "than alone: examples influence each other (a term of the loss over the batch, or "
                "a layer that mixes examples), so there is no gradient per example"
            )

    def _refuse_detached(self, inputs: Inputs, target: Target) -> None:
        """Raise where numbers have no gradient by anything: zeros would be wrong then."""
        others = [p for p in self.flat.module.parameters() if not p.requires_grad]
        try:
            for p in others:
                p.requires_grad_(p.is_floating_point())
            attached = self._reference.numbers(inputs, target).requires_grad
        finally:
            for p in others:
                p.requires_grad_(False)
        if not attached:
            raise ValueError(
                "what is differentiated has no gradient by any parameter: look for a detach(), a "
                "no_grad() or inference_mode(), or an argmax in the model or the loss"
            )


def _starts(sizes: Iterable[int]) -> list[int]:
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start += size
    return starts
