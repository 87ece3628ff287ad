"""Per-example gradients that ask nothing of the layers: one at a time, or by ``torch.func``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkarray.nn.batches import Inputs, Target, batch_size, fresh
from lkarray.nn.flat import FlatModel
from lkarray.nn.modes import gradients_on

#: One number of each example, ``(batch,)``, from the model's output and the target.
Scalars = Callable[[Any, Any], Tensor]

#: What torch says of a reentrant checkpoint whose gradients it loses, and of one that it refuses.
_NOTHING_TO_CHECKPOINT, _REENTRANT = "None of the inputs have requires_grad=True", "use_reentrant"


class Reference:
    """Gradients of a number of each example, by the moving parameters of a model.

    Parameters
    ----------
    flat
        The model, width 1.
    scalars
        The number, of each example.

    Attributes
    ----------
    one_by_one
        Whether ``torch.func`` cannot have the model, or is not right about it, so that autograd
        takes one example at a time.
    """

    def __init__(self, flat: FlatModel, scalars: Scalars) -> None:
        self.flat, self.scalars = flat, scalars
        self.one_by_one = False
        #: Whether there is a reentrant checkpoint, which knows no gradient but by everything.
        self._whole = False

    def alone(self, inputs: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Return the number of one example, and its gradient ``(param,)``: the definition."""
        numbers, slope = self._summed(single(inputs), single(target))
        return numbers.squeeze(0), slope

    def total(self, inputs: Inputs, target: Target) -> Tensor:
        """Return the gradient of the sum of a batch's numbers, ``(param,)``, by autograd."""
        return self._summed(inputs, target)[1]

    def _summed(self, inputs: Any, target: Any) -> tuple[Tensor, Tensor]:
        with gradients_on(), checkpoints_named():
            if not self._whole:
                numbers = self.numbers(inputs, target)
                try:
                    return numbers.detach(), self.flat.slope(numbers.sum())
                except RuntimeError as error:
                    if _REENTRANT not in str(error):
                        raise
                    self._whole = True
            numbers = self.numbers(inputs, target)
            return numbers.detach(), self.flat.whole_slope(numbers.sum())

    def numbers(self, inputs: Inputs, target: Target) -> Tensor:
        """Return the numbers of a batch, which the model gets a copy of."""
        x, y = fresh(inputs, target)
        return self.scalars(self.flat(x), y)

    def gradients(self, names: list[str], inputs: Inputs, target: Target) -> dict[str, Tensor]:
        """Return the gradients of some tensors, ``(example, *shape)``."""
        if not self.one_by_one:
            try:
                return self._transformed(names, inputs, target)
            except Exception:  # torch.func has many ways to refuse a model
                self.one_by_one = True
        rows = torch.stack([self.alone(x, y)[1] for x, y in examples(inputs, target)])
        columns = zip(self.flat.names, rows.split(self.flat.sizes, 1), strict=True)
        return {name: column for name, column in columns if name in names}

    def _transformed(self, names: list[str], inputs: Inputs, target: Target) -> dict[str, Tensor]:
        module = self.flat.module
        values = {name: p.detach() for name, p in module.named_parameters()}
        chosen = {name: values.pop(name) for name in names}

        def of_example(chosen: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            x, y = single(x), single(y)
            args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
            output = functional_call(module, values | chosen, args, kwargs)
            return self.scalars(output, y).squeeze(0)

        with gradients_on(), _batching():
            each = vmap(grad(of_example), (None, 0, 0))
            slopes: dict[str, Tensor] = each(chosen, *fresh(inputs, target))
        return {name: slope.detach() for name, slope in slopes.items()}


@contextmanager
def _batching() -> Iterator[None]:
    """Let ``vmap`` batch attention by its definition: the fused kernels have no rule for it."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


@contextmanager
def checkpoints_named() -> Iterator[None]:
    """Refuse reentrant checkpoints by name, where they lose gradients or cannot give them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", _NOTHING_TO_CHECKPOINT)
        try:
            yield
        except (UserWarning, RuntimeError) as error:
            if _NOTHING_TO_CHECKPOINT not in str(error) and _REENTRANT not in str(error):
                raise
            raise ValueError(
                "the model has a torch.utils.checkpoint with use_reentrant=True, which torch gives "
                "no such gradient through (or loses it, where the inputs need none); set "
                "use_reentrant=False there, which changes no number"
            ) from None


def examples(inputs: Inputs, target: Target) -> Iterator[tuple[Any, Any]]:
    """Yield the examples of a batch."""
    for i in range(batch_size((inputs, target))):
        yield _pick(inputs, i), _pick(target, i)


def _pick(values: Any, i: int) -> Any:
    return {k: v[i] for k, v in values.items()} if isinstance(values, dict) else values[i]


def rows_of(values: Any, rows: Iterable[int]) -> Any:
    """Return some examples of a batch."""
    index = list(rows)
    return {k: v[index] for k, v in values.items()} if isinstance(values, dict) else values[index]


def single(values: Any) -> Any:
    """Return one example as a batch of one."""
    if isinstance(values, dict):
        return {key: value.unsqueeze(0) for key, value in values.items()}
    return values.unsqueeze(0)
