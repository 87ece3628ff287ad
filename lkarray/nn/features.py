"""Gradients of a batch in the form that inner products are cheapest in, and which form that is."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lkarray.nn.factors import Factors, rank_one_products


@dataclass(frozen=True)
class Site:
    """How one parameter tensor's gradients are made.

    Attributes
    ----------
    name, start, stop
        The tensor, and its place along ``param``.
    way
        ``"hooks"`` (factors of its layer) or ``"torch.func"`` (or autograd of one example at a
        time, where that cannot have the model).
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
