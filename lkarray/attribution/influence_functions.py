"""Attribution by the inverse Hessian of the loss: influence functions (arXiv:1703.04730)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.attribution.scores import Params, as_params, as_state, audit_labels, labelled
from lkarray.auditing.problem import Problem, problem_of
from lkarray.auditing.request import Request
from lkarray.engine.plan import memory_budget
from lkarray.errors import MemoryBudgetError
from lkarray.nn.batches import Inputs, MapDataset, Target, fresh
from lkarray.nn.modes import with_gradients
from lkarray.nn.reference import checkpoints_named
from lkarray.training.choosing import as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

#: Examples at once, and rows of the Hessian at once, each a backward pass of these.
_EXAMPLES, _BACKWARD = 256, 64
#: Matrices of the Hessian's size that are held: itself, one addend, its factor, a workspace.
_MATRICES = 4


@checked()
@with_gradients
def influence_functions(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str | int | Callable[[Any, Any], Tensor] = "loss",
    at: int = -1,
    damping: float = 0.01,
    examples: Sequence[int] | np.ndarray | None = None,
    params: Params = None,
    max_params: int = 5000,
    coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Attribute by influence functions: what an example's weight in a minimum does.

    .. math:: I_{mn} = -\tfrac{1}{M} \, g_n^\top (H + \delta I)^{-1} g_m

    with the Hessian :math:`H` of the mean loss of all :math:`M` training examples (Koh & Liang
    2017, eq. 2, divided by M): to first order what having the example in the training set did, of
    which leaving it out is the negative. It takes the weights for a minimum, reached without
    regard to the path; there ``damping`` stands for weight decay, and for what keeps a network
    from moving along the flat directions.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`.
    audit_set
        The examples whose predictions are attributed: a dataset like the training set, or indices
        into it.
    target
        What is attributed of each, as for `lkarray.audit`.
    at
        Number of the state: 0 before the first step; -1, the default, after the last.
    damping
        The :math:`\delta` above, in units of the Hessian.
    examples
        Indices of the training set to attribute to; all by default. The Hessian is of all.
    params
        Patterns of tensor or module names, of which alone the Hessian is; ``"last"`` for the last
        layer.
    max_params
        Parameters at most: the Hessian is a matrix of their square, inverted exactly.
    coords
        Labels of the audited examples.
    unlike
        Allow an audit set whose inputs or labels lie outside what was trained on.
    memory
        Byte budget; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        ``influence_functions(example, audit)``, float64, in memory, nats (of another target, its
        own units): negative where the example lowers what is audited. The attribute ``residual``
        is the largest remainder of the linear systems, relative to their right-hand sides.

    Raises
    ------
    ValueError
        There are more parameters than ``max_params``; the damped Hessian is not positive definite
        (the message has its least eigenvalue).
    MemoryBudgetError
        The budget does not hold the Hessian and the gradients.

    Notes
    -----
    ``P`` backward passes of the gradient of every training example, ``P^3 / 3`` operations in
    float64 for the factor, and ``2 P^2`` for each audited number. Memory: four matrices of ``P``
    squared and the gradients of all examples, in float64.

    References
    ----------
    - Koh and Liang 2017, eq. 2: "Understanding black-box predictions via influence functions",
      arXiv:1703.04730.
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> from zarr.storage import MemoryStore
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> store = MemoryStore()
    >>> with lk.record(model, optimizer, data, store=store, progress=False) as trace:
    ...     for batch in [[0, 1, 2, 3], [4, 5, 6, 7]]:
    ...         with trace.step(batch):
    ...             optimizer.zero_grad()
    ...             output = model(data.tensors[0][batch])
    ...             torch.nn.functional.cross_entropy(output, data.tensors[1][batch]).backward()
    ...             optimizer.step()
    >>> lk.influence_functions(trace, [0, 1], damping=1.0).sizes["example"]
    8
    """
    source = as_trace(trace)
    step = as_state(source, at)
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a number, not negative, not {damping!r}")
    chosen = as_params(source, params)
    request = Request(
        audit_set=audit_set, target=target, params=chosen, examples=examples, unlike=unlike
    )
    problem = problem_of(source, request)
    labels = audit_labels(coords, problem.index)
    _refuse_large(problem, max_params, memory_budget(memory))
    problem.set(torch.from_numpy(source.parameters(step)))
    hessian = mean_hessian(problem, progress)
    training, audited = _gradients(problem)
    solved, residual = _solve(hessian, audited.flatten(0, 1), float(damping))
    # (example, audit and output) apart again
    values = -(training @ solved.T).view(len(training), *audited.shape[:2]) / source.train.n
    scores = values.cpu().numpy()
    return labelled(
        "influence_functions",
        scores if problem.audited.outputs is not None else scores[:, :, 0],
        problem.examples,
        labels,
        method="influence functions",
        target=problem.audited.name,
        at=step,
        damping=float(damping),
        residual=residual,
        params=[source.names[i] for i in problem.tensors],
        units="nat" if target == "loss" else "1",
    )


def mean_hessian(problem: Problem, progress: bool = False) -> Tensor:
    """Return the Hessian of the mean training loss by the chosen parameters, float64.

    ``(param, param)``, symmetric. Reverse over reverse: every operation that can be differentiated
    twice has that, while forward derivatives are missing of some.
    """
    trace, flat = problem.trace, problem.flat
    shapes = [leaf.shape for leaf in flat.leaves]

    def total(theta: Tensor, inputs: Inputs, target: Target) -> Tensor:
        tensors = zip(flat.names, theta.split(list(flat.sizes)), shapes, strict=True)
        values = {name: tensor.view(shape) for name, tensor, shape in tensors}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        return trace.loss(functional_call(flat.module, values, args, kwargs), target).sum()

    at_once = jacrev(grad(total), chunk_size=_BACKWARD)

    transformed = True

    def hessian_of(theta: Tensor, inputs: Inputs, target: Target) -> Tensor:
        nonlocal transformed
        if transformed:
            try:
                hessian: Tensor = at_once(theta, *fresh(inputs, target))
                return hessian.detach()
            except Exception:  # torch.func has many ways to refuse a model
                transformed = False
        return _row_by_row(total, theta, *fresh(inputs, target))

    theta = flat.theta[0].detach()
    out = theta.new_zeros((len(theta), len(theta)), dtype=torch.float64)
    with (
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no second derivative
        bars.bar("hessian", total=trace.train.n, unit="example", show=progress) as bar,
    ):
        for batch, inputs, target in trace.train.numbered(_EXAMPLES):
            out += hessian_of(theta, inputs, target)
            bar.update(len(batch))
    # Rounding leaves the two triangles a little different.
    return (out + out.T).div_(2 * trace.train.n)


def _row_by_row(
    total: Callable[[Tensor, Inputs, Target], Tensor], theta: Tensor, inputs: Inputs, target: Target
) -> Tensor:
    """Return the Hessian of a number, a backward pass a row: where ``torch.func`` cannot."""
    theta = theta.clone().requires_grad_()
    with checkpoints_named(), torch.enable_grad():
        (slope,) = torch.autograd.grad(
            total(theta, inputs, target), theta, create_graph=True, materialize_grads=True
        )
        if not slope.requires_grad:
            return torch.zeros_like(theta).expand(len(theta), -1)
        rows = [
            torch.autograd.grad(component, theta, retain_graph=True, materialize_grads=True)[0]
            for component in slope
        ]
    return torch.stack(rows)


def _refuse_large(problem: Problem, max_params: int, budget: int) -> None:
    count = problem.flat.theta.shape[1]
    if count > max_params:
        raise ValueError(
            f"{count:,} parameters have a Hessian of {8 * count**2 / 2**30:.1f} GiB, and "
            f"max_params is {max_params:,}; choose params= (the last layer: params='last'), or "
            "raise max_params="
        )
    numbers = problem.data.n * problem.outputs
    needed = 8 * (
        _MATRICES * count**2
        + (len(problem.examples) + 3 * numbers) * count
        + len(problem.examples) * numbers
    )
    if needed > budget:
        raise MemoryBudgetError(
            f"the Hessian of {count:,} parameters, and the gradients, take {needed / 2**20:.0f} "
            f"MiB, and the budget is {budget / 2**20:.0f} MiB; choose params= or examples=, audit "
            "fewer at once, or set memory="
        )


def _gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return gradients in float64: ``(example, param)``, and ``(audit, output, param)``."""
    training = [
        problem.training.gradients(inputs, target).double()
        for _, inputs, target in problem.trace.train.numbered(_EXAMPLES, problem.examples)
    ]
    audited = [
        torch.stack([e.gradients(inputs, target) for e in problem.engines], 1).double()
        for _, inputs, target in problem.data.numbered(_EXAMPLES)
    ]
    return torch.cat(training), torch.cat(audited)


def _solve(hessian: Tensor, gradients: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return ``(row, param)`` by the inverse of the damped Hessian, and the relative remainder."""
    hessian.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        least = float(torch.linalg.eigvalsh(hessian)[0]) - damping
        raise ValueError(
            f"the Hessian plus damping={damping:g} is not positive definite: the Hessian's least "
            f"eigenvalue is {least:.4g}, so that these weights are no minimum; set damping= to "
            f"{max(-2 * least, 1e-6):.2g} or more, or choose params='last', where the loss of a "
            "linear layer is convex"
        )
    solved = torch.cholesky_solve(gradients.T, factor)
    off = torch.linalg.norm(hessian @ solved - gradients.T, dim=0)
    scale = torch.linalg.norm(gradients, dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return solved.T, float((off / scale).max())
