"""`shift_modes` moves inputs so that their mode coefficients move (Anonymous 2026, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.nn.batches import MapDataset, fresh
from lkarray.nn.losses import logits
from lkarray.nn.modes import with_gradients
from lkarray.nn.reference import checkpoints_named
from lkarray.results import as_dataset
from lkarray.schema import MODE, PARAM
from lkarray.training.choosing import as_examples, as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

_ROWS = 128


@checked(modes=None)
@with_gradients
def shift_modes(
    trace: Trace | Recorder,
    modes: xr.DataTree | xr.Dataset,
    examples: MapDataset | Sequence[int] | np.ndarray,
    step: int,
    *,
    shift: float,
    radius: float,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 50,
    step_size: float | None = None,
    labels: Literal["predicted", "own"] = "predicted",
    away_from: Tensor | np.ndarray | None = None,
    match: float = 1.0,
    ortho: float = 1.0,
    loss: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""Move inputs a little, so that their mode coefficients shift against the drives.

    How far inputs' coefficients moved is measured by `lkarray.mode_shifts`.

    Anonymous 2026, algorithm 2, the mode-aware cure. With
    :math:`c_{kn}(x) = v_k \cdot \nabla_\theta \ell(f(x), y^*_n)` and the target
    :math:`c_{kn}(x_n) - \tau\, \mathrm{sign}(\Lambda_k)`, projected gradient descent on

    .. math:: \tfrac{w_m}{2} |c_n(x) - \hat c_n|^2 + w_o \cos^2(x - x_n, \delta_n)
              + w_\ell\, \ell(f(x), y_n)

    Parameters
    ----------
    trace, examples
        As for `gradient_features`; inputs must be float tensors, targets classes.
    modes
        With ``direction(mode, param)`` over all parameters of the trace and ``drive(mode)``, as
        `lkarray.modes` gives them; select those to shift: ``modes.isel(mode=slice(10))``.
    step
        Whose parameters to take, 0 to ``trace.steps``.
    shift
        :math:`\tau`, in the units of the coefficients (nats by parameter).
    radius, norm
        Of the ball around each input that the result stays in.
    steps, step_size
        Of the descent; the size of a step, in the norm, is ``2.5 * radius / steps`` by default.
    labels
        :math:`y^*`: what the network says of the input that it is given, or the input's label.
    away_from
        :math:`\delta`, shape of the inputs: perturbations not to be undone, such as adversarial
        minus clean input. Without them that term is left out.
    match, ortho, loss
        Weights of the three terms. ``loss`` uses the inputs' own labels, and makes the result one
        that labels have entered.
    bounds
        Of the inputs.

    Returns
    -------
    torch.Tensor
        Moved inputs, of the examples' shape, on the CPU.

    Raises
    ------
    SchemaError
        ``modes`` lacks directions over the trace's parameters, or drives.
    TypeError
        Inputs are not floating-point.
    ValueError
        A number is out of its range, or ``away_from`` has another shape.

    Notes
    -----
    Each step takes, for a batch, as many double backward passes as there are modes.

    References
    ----------
    - Anonymous 2026, algorithm 2: "Path-Integrated Loss-Gradient Kernels".
    """
    _refuse_options(norm, labels, radius, steps, bounds)
    source = as_trace(trace)
    modes = as_dataset(modes, "modes")
    vectors = directions(source, modes)
    if "drive" not in modes or modes["drive"].dims != (MODE,):
        raise SchemaError("modes must hold drive(mode), as lk.modes gives it")
    signs = torch.from_numpy(np.sign(modes["drive"].values)).to(vectors)
    data, _ = as_examples(source, examples)
    source.set(step)
    size = 2.5 * radius / steps if step_size is None else step_size
    avoided = away_from
    if avoided is not None:
        host = avoided if isinstance(avoided, Tensor) else torch.from_numpy(np.array(avoided))
        avoided = host.to(vectors)
    moved = []
    for start in range(0, data.n, _ROWS):
        rows = np.arange(start, min(start + _ROWS, data.n))
        inputs, own = data.take(rows)
        inputs = float_inputs(inputs, "shift_modes")
        if avoided is not None and (
            len(avoided) != data.n or avoided.shape[1:] != inputs.shape[1:]
        ):
            raise ValueError(
                f"away_from has the shape {tuple(avoided.shape)}, and the inputs "
                f"{(data.n, *inputs.shape[1:])}"
            )
        wanted = own
        if labels == "predicted":
            with torch.no_grad():
                wanted = logits(source.flat(inputs.clone())).argmax(1)
        objective = _Objective(
            trace=source,
            vectors=vectors,
            inputs=inputs,
            own=own,
            wanted=wanted,
            target=coefficients(source, vectors, inputs, wanted).detach() - shift * signs,
            unwanted=None if avoided is None else avoided[torch.from_numpy(rows)].to(inputs),
            weights=(match, ortho, loss),
        )
        moved.append(_descend(objective, inputs, radius, norm, steps, size, bounds).cpu())
    return torch.cat(moved)


def _refuse_options(
    norm: str, labels: str, radius: float, steps: int, bounds: tuple[float, float]
) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if labels not in ("predicted", "own"):
        raise ValueError(f"labels must be 'predicted' or 'own', not {labels!r}")
    if not radius > 0 or steps < 1 or not bounds[0] < bounds[1]:
        raise ValueError(
            f"radius must be above 0, steps at least 1 and bounds ascend, not {radius}, {steps}, "
            f"{bounds}"
        )


@dataclass(frozen=True)
class _Objective:
    """What is descended for a batch of inputs, summed over them.

    Attributes
    ----------
    trace, vectors
        The run, at the weights that are set, and the directions of the modes.
    inputs, own, wanted
        The inputs as they are given, their labels, and the labels of the coefficients.
    target
        Coefficients to reach, ``(example, mode)``.
    unwanted
        Perturbations not to be undone.
    weights
        Of the three terms: match, ortho, loss.
    """

    trace: Trace
    vectors: Tensor
    inputs: Tensor
    own: Any
    wanted: Any
    target: Tensor
    unwanted: Tensor | None
    weights: tuple[float, float, float]

    def __call__(self, x: Tensor) -> Tensor:
        match, ortho, loss = self.weights
        off = coefficients(self.trace, self.vectors, x, self.wanted) - self.target
        total = match * 0.5 * off.square().sum()
        if self.unwanted is not None and ortho:
            cosine = torch.cosine_similarity(
                (x - self.inputs).flatten(1), self.unwanted.flatten(1), dim=1, eps=1e-12
            )
            total = total + ortho * cosine.square().sum()
        if loss:
            given, classes = fresh(x, self.own)
            total = total + loss * self.trace.loss(self.trace.flat(given), classes).sum()
        return total


def _descend(
    objective: Callable[[Tensor], Tensor],
    x0: Tensor,
    radius: float,
    norm: str,
    steps: int,
    size: float,
    bounds: tuple[float, float],
) -> Tensor:
    """Projected gradient descent, each step normalised."""
    x = x0.clone()
    for _ in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(objective(x), x)
        x = x.detach()
        if norm == "linf":
            x = x - size * slope.sign()
            x = x0 + (x - x0).clamp(-radius, radius)
        else:
            x = x - size * slope / _lengths(slope).clamp_min(1e-30)
            off = x - x0
            x = x0 + off * (radius / _lengths(off).clamp_min(1e-30)).clamp(max=1)
        x = x.clamp(*bounds)
    return x


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return lengths.view(-1, *(1,) * (x.ndim - 1))


def directions(trace: Trace, modes: xr.Dataset) -> Tensor:
    """Return the directions of modes over all parameters of a trace, ``(mode, param)``."""
    direction: xr.DataArray | None
    direction, size = modes.get("direction"), trace.flat.theta.shape[1]
    if direction is None or dict(direction.sizes) != {MODE: modes.sizes[MODE], PARAM: size}:
        raise SchemaError(
            f"modes must hold direction(mode, param) with param of {size}, as lk.modes gives for "
            "gradients of all parameters"
        )
    values = np.array(direction.transpose(MODE, PARAM).values)
    return torch.from_numpy(values).to(trace.flat.theta)


def float_inputs(inputs: Any, who: str) -> Tensor:
    """Return inputs that can be differentiated by."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TypeError(f"{who} differentiates by inputs: they must be float tensors")
    return inputs


def coefficients(trace: Trace, vectors: Tensor, inputs: Tensor, target: Any) -> Tensor:
    r"""Return :math:`c_{kn} = v_k \cdot \nabla_\theta \ell(x_n)`, ``(example, mode)``, to derive.

    The loss of each example gets a weight of 1, and the gradient of the weighted sum along
    :math:`v_k` is linear in the weights: its slopes are the coefficients.
    """
    flat = trace.flat
    with torch.enable_grad(), checkpoints_named():
        given, wanted = fresh(inputs, target)  # in the graph, so that a model may change them
        losses = trace.loss(flat(given), wanted)
        weights = torch.ones_like(losses).requires_grad_()
        slopes = torch.autograd.grad(
            (weights * losses).sum(), flat.leaves, create_graph=True, materialize_grads=True
        )
        along = vectors @ torch.cat([slope.flatten() for slope in slopes])
        rows = [torch.autograd.grad(slope, weights, create_graph=True)[0] for slope in along]
    return torch.stack(rows, 1)
