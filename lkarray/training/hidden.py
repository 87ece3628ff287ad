"""What a recorded model computes on the way: activations, and how inputs move mode coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from lkarray.arguments import checked
from lkarray.engine.plan import memory_budget
from lkarray.errors import MemoryBudgetError
from lkarray.labels import given_coords
from lkarray.nn.batches import MapDataset, fresh
from lkarray.nn.modes import with_gradients
from lkarray.nn.reference import checkpoints_named
from lkarray.results import as_dataset
from lkarray.schema import EXAMPLE, MODE, TIME
from lkarray.training.choosing import as_examples, as_steps, as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.shifting import directions, float_inputs
from lkarray.training.trace import Trace

_ROWS = 512


@checked()
@with_gradients
def activations(
    trace: Trace | Recorder,
    examples: MapDataset | Sequence[int] | np.ndarray,
    times: str | Iterable[int] = "epoch",
    *,
    module: str,
    coords: Any = None,
    memory: int | str | None = None,
) -> xr.DataArray:
    """Return what a module puts out for examples along a run, computed.

    Parameters
    ----------
    trace, examples, times, coords
        As for `gradient_features`.
    module
        Name of a submodule, as in ``model.named_modules()``; its output is flattened to units.
    memory
        Byte budget for the result.

    Returns
    -------
    xarray.DataArray
        ``activations(time, example, unit)`` float32: for `lkarray.activation_overlap` and
        `lkarray.hidden_similarity`.

    Raises
    ------
    ValueError
        No module has that name, or its output has no tensor with one row an example.
    MemoryBudgetError
        The result exceeds the budget.
    """
    source = as_trace(trace)
    steps, (data, index) = as_steps(source, times), as_examples(source, examples)
    named = dict(source.flat.module.named_modules())
    if not module or module not in named:
        raise ValueError(f"module {module!r} is none of {[name for name in named if name]}")
    labels = given_coords(coords, data.n, dim=EXAMPLE, index=index)
    out: np.ndarray | None = None
    for t, (_, theta) in enumerate(source.states(steps.tolist())):
        source.set_parameters(theta)
        for rows, inputs, _ in data.numbered(_ROWS):
            units = _output(source, named[module], inputs, len(rows))
            if out is None:
                shape = (len(steps), data.n, units.shape[1])
                _require(4 * int(np.prod(shape)), memory)
                out = np.empty(shape, np.float32)
            out[t, rows] = units.cpu().numpy()
    return xr.DataArray(
        out,
        dims=(TIME, EXAMPLE, "unit"),
        coords={TIME: steps} | {name: (EXAMPLE, values) for name, values in labels.items()},
        name="activations",
        attrs={"module": module},
    )


def _output(trace: Trace, module: nn.Module, inputs: Any, rows: int) -> Tensor:
    kept: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, output: kept.append(output))
    try:
        with torch.no_grad():
            trace.flat(inputs)
    finally:
        handle.remove()
    if not kept or not isinstance(kept[-1], Tensor) or len(kept[-1]) != rows:
        raise ValueError("the module gives no tensor with one row for each example; choose another")
    return kept[-1].flatten(1)


def _require(needed: int, memory: int | str | None) -> None:
    if needed > memory_budget(memory):
        raise MemoryBudgetError(
            f"the activations take {needed / 2**20:.0f} MiB; take fewer times or examples, or set "
            "memory="
        )


@checked(modes=None)
@with_gradients
def mode_sensitivity(
    trace: Trace | Recorder,
    modes: xr.DataTree | xr.Dataset,
    examples: MapDataset | Sequence[int] | np.ndarray,
    step: int,
    *,
    whole: bool = False,
) -> xr.Dataset:
    r"""Return how much the inputs move the mode coefficients.

    .. math:: |\nabla_x c_{kn}|, \qquad c_{kn} = v_k \cdot \nabla_\theta \ell(x_n)

    Parameters
    ----------
    trace, examples
        As for `gradient_features`; inputs must be floating-point tensors.
    modes
        With ``direction(mode, param)`` over all parameters of the trace, as `lkarray.modes` gives.
    step
        Whose parameters to take, 0 to ``trace.steps``.
    whole
        Return the gradients by the inputs too, ``slope(example, mode, input)``, inputs flattened:
        their span is the active subspace (Anonymous 2026, section 6.3.1). ``4 N K D`` bytes.

    Returns
    -------
    xarray.Dataset
        ``sensitivity(example, mode)`` and ``corrected(example, mode)``, divided by the norm of the
        example's loss gradient: coefficients grow with the loss, and so does the raw one. NaN
        where the gradient is zero.

    Raises
    ------
    SchemaError
        ``modes`` has no direction over the trace's parameters.
    TypeError
        Inputs are not floating-point.

    Notes
    -----
    One double backward pass of a batch for each mode.

    References
    ----------
    - Anonymous 2026, section 6.3, figure 16: "Path-Integrated Loss-Gradient Kernels".
    """
    source = as_trace(trace)
    modes = as_dataset(modes, "modes")
    vectors = directions(source, modes)
    flat = source.flat
    data, index = as_examples(source, examples)
    source.set(step)
    sensitivity = np.empty((data.n, len(vectors)))
    norms = np.empty(data.n)
    slopes_of: list[np.ndarray] = []
    for rows, inputs, target in data.numbered(_ROWS):
        inputs = float_inputs(inputs, "mode_sensitivity").clone().requires_grad_()
        kept = np.empty((len(rows), len(vectors), inputs[0].numel()), np.float32) if whole else None
        with torch.enable_grad(), checkpoints_named():
            given, wanted = fresh(inputs, target)
            losses = source.loss(flat(given), wanted)
            slopes = torch.autograd.grad(
                losses.sum(), flat.leaves, create_graph=True, materialize_grads=True
            )
            gradient = torch.cat([slope.flatten() for slope in slopes])
            for k, vector in enumerate(vectors):
                (by_input,) = torch.autograd.grad(
                    gradient @ vector, inputs, retain_graph=True, materialize_grads=True
                )
                sensitivity[rows, k] = by_input.flatten(1).norm(dim=1).cpu().numpy()
                if kept is not None:
                    kept[:, k] = by_input.flatten(1).cpu().numpy()
        if kept is not None:
            slopes_of.append(kept)
        norms[rows] = _gradient_norms(source, inputs.detach(), target)
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = np.where(norms[:, None] > 0, sensitivity / norms[:, None], np.nan)
    dims = (EXAMPLE, MODE)
    slope = {"slope": ((*dims, "input"), np.concatenate(slopes_of))} if whole else {}
    return xr.Dataset(
        {"sensitivity": (dims, sensitivity), "corrected": (dims, corrected), **slope},
        coords={EXAMPLE: index, MODE: modes[MODE]},
        attrs={"step": step},
    )


def _gradient_norms(trace: Trace, inputs: Tensor, target: Any) -> np.ndarray:
    from lkarray.nn.gradients import ExampleGradients

    probe = trace.train.take(np.arange(2) % trace.train.n)
    engine = ExampleGradients(trace.flat, trace.loss, probe)
    rows = [
        engine.gradients(x, y).norm(dim=1)
        for x, y in zip(inputs.split(64), target.split(64), strict=True)
    ]
    return torch.cat(rows).cpu().numpy()
