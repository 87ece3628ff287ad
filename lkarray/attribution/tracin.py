"""Attribution by inner products of loss gradients: TracIn (arXiv:2002.08484), and similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.attribution.scores import (
    Params,
    as_checkpoints,
    as_params,
    as_state,
    audit_labels,
    labelled,
    refuse_large,
)
from lkarray.auditing.audit import run_audit
from lkarray.auditing.blocks import join_features
from lkarray.auditing.budget import panel_size
from lkarray.auditing.panel import BATCH
from lkarray.auditing.problem import Problem, problem_of
from lkarray.auditing.realised import PlainDescent
from lkarray.auditing.request import Request
from lkarray.engine.plan import memory_budget
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from lkarray.nn.batches import MapDataset
from lkarray.nn.features import Features
from lkarray.nn.gradients import NotFactoredError
from lkarray.nn.modes import with_gradients
from lkarray.store import trace_layout
from lkarray.training.choosing import as_trace, select
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

_NAME = "tracin"


@checked()
@with_gradients
def tracin(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str | int | Callable[[Any, Any], Tensor] = "loss",
    checkpoints: str | Iterable[int] = "epoch",
    examples: Sequence[int] | np.ndarray | None = None,
    params: Params = None,
    coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Attribute by TracInCP: products of gradients at some states of a run.

    .. math:: T_{mn} = -\sum_k \eta_k \, g_m(\theta_k) \cdot g_n(\theta_k)

    (Pruthi et al. 2020, section 3, with the sign of an audit), for every training example at every
    checkpoint, whether or not it was in the batch. No other kind of step than plain gradient
    descent is accounted for, and the sum has no scale of its own: it grows with the number of
    checkpoints. `lkarray.tracin_in_run` follows the batches, `lkarray.audit` the optimizer too.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`.
    audit_set
        The examples whose predictions are attributed: a dataset like the training set, or indices
        into it.
    target
        What is attributed of each, as for `lkarray.audit`; ``"prediction"`` adds a dim ``output``.
    checkpoints
        ``"epoch"``: the state before the first step of each epoch; ``"step"``: before every step;
        or step numbers. Each has the learning rate of the step that follows, of each tensor's own
        parameter group.
    examples
        Indices of the training set; all by default.
    params
        Patterns of tensor or module names; ``"last"`` for the last layer (the module of the last
        tensor), to which TracIn is often restricted.
    coords
        Labels of the audited examples.
    unlike
        Allow an audit set whose inputs or labels lie outside what was trained on.
    memory
        Byte budget besides the result; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.DataArray
        ``tracin(example, audit)``, in memory, nats (of another target, its own units): negative
        where the example lowered what is audited.

    Raises
    ------
    ValueError
        An option is none of the above; a checkpoint is the state after the last step, which has no
        learning rate.
    FingerprintError
        The trace's gradients cannot be reproduced.
    MemoryBudgetError
        The budget does not hold the result, or one audited example.

    Notes
    -----
    At each checkpoint a forward and backward pass of the audited examples, and one of the training
    examples for each panel of audited ones that fits the budget (usually one); a product takes as
    many multiplications as `lkarray.gradient_plan` prints, by factors where that is cheaper.

    References
    ----------
    - Pruthi et al. 2020, section 3: "Estimating training data influence by tracing gradient
      descent", arXiv:2002.08484.
    """
    source = as_trace(trace)
    steps = as_checkpoints(source, checkpoints)
    if steps[-1] == source.steps:
        raise ValueError(
            f"checkpoints: no step follows state {source.steps}, so that it has no learning rate; "
            f"choose states from 0 to {source.steps - 1}"
        )
    problem = problem_of(source, _request(source, audit_set, target, params, examples, unlike))
    labels = audit_labels(coords, problem.index)
    weights = [-_rates(problem, step) for step in steps.tolist()]
    products = _Products(problem, memory_budget(memory))
    values = products.total(steps.tolist(), weights, progress)
    return labelled(
        _NAME,
        values,
        problem.examples,
        labels,
        method="TracInCP",
        target=problem.audited.name,
        checkpoints=steps.tolist(),
        params=_chosen(problem),
        units="nat" if target == "loss" else "1",
    )


@checked()
@with_gradients
def tracin_in_run(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str | int | Callable[[Any, Any], Tensor] = "loss",
    examples: Sequence[int] | np.ndarray | None = None,
    params: Params = None,
    coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Attribute by TracIn as it is idealised: every step, and the examples of its batch.

    .. math:: T_{mn} = -\sum_t \frac{\eta_t}{|B_t|} \sum_{m \in B_t} g_m(t) \cdot g_n(t)

    (Pruthi et al. 2020, section 3.1; the first order of in-run data Shapley, Wang et al. 2024; what
    Anonymous 2026, A.11 compares with.) An example that is in a batch twice counts twice. With
    plain SGD the sum over examples is the change of what is audited, up to second order in a step;
    momentum, preconditioner, clipping and decay are ignored, and `lkarray.audit` is what accounts
    for them.

    Parameters
    ----------
    trace, audit_set, target, examples, params, coords, unlike, progress
        As for `tracin`.
    memory
        Byte budget; ``LKARRAY_MEMORY`` or a quarter of the memory by default.

    Returns
    -------
    xarray.DataArray
        ``tracin(example, audit)``, as of `tracin`.

    Raises
    ------
    ValueError, SchemaError, FingerprintError, MemoryBudgetError
        As for `lkarray.audit`.

    Notes
    -----
    The pass of `lkarray.audit` with Euler's rule, and with steps taken for plain gradient descent:
    its cost and memory, without anything carried from step to step.

    References
    ----------
    - Pruthi et al. 2020, section 3.1: "Estimating training data influence by tracing gradient
      descent", arXiv:2002.08484.
    - Wang et al. 2024: "Data Shapley in one training run", arXiv:2406.11011.
    - Anonymous 2026, A.11: "Path-Integrated Loss-Gradient Kernels".
    """
    source = as_trace(trace)
    request = _request(source, audit_set, target, params, examples, unlike)
    ds = run_audit(
        source,
        request,
        coords=coords,
        example_coords=None,
        store=None,
        name=None,
        memory=memory,
        client=None,
        progress=progress,
    )
    influence = ds["influence"].rename(_NAME).drop_attrs(deep=False)
    return influence.assign_attrs(
        kernel=INFLUENCE_OPERATOR,
        method="TracIn in the run",
        target=ds.attrs["target"],
        params=[source.names[i] for i in select(source, request.params)],
        units="nat" if target == "loss" else "1",
    )


@checked()
@with_gradients
def gradient_similarity(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    at: int = -1,
    cosine: bool = False,
    examples: Sequence[int] | np.ndarray | None = None,
    params: Params = None,
    coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.DataArray:
    r"""Return products of loss gradients at one state of a run.

    :math:`g_m(\theta) \cdot g_n(\theta)`, or their cosines (Charpiat et al. 2019): at the final
    state, what is left of an attribution that looks at no training at all.

    Parameters
    ----------
    trace, audit_set, examples, params, coords, unlike, memory, progress
        As for `tracin`.
    at
        Number of the state: 0 before the first step; -1, the default, after the last.
    cosine
        Divide by both norms; an example without gradient has 0 with all.

    Returns
    -------
    xarray.DataArray
        ``gradient_similarity(example, audit)``, in memory; nats squared per squared unit of the
        parameters, or cosines. **Positive** where a step on the one example lowers the loss of the
        other: the opposite of an influence.

    Raises
    ------
    ValueError, FingerprintError, MemoryBudgetError
        As for `tracin`.

    Notes
    -----
    The cost of one checkpoint of `tracin`.

    References
    ----------
    - Charpiat et al. 2019: "Input similarity from the neural network perspective",
      arXiv:2102.05262.
    """
    source = as_trace(trace)
    step = as_state(source, at)
    problem = problem_of(source, _request(source, audit_set, "loss", params, examples, unlike))
    labels = audit_labels(coords, problem.index)
    products = _Products(problem, memory_budget(memory), cosine=cosine)
    values = products.total([step], [np.ones(len(problem.tensors))], progress)
    return labelled(
        "gradient_similarity",
        values,
        problem.examples,
        labels,
        method="cosine of gradients" if cosine else "product of gradients",
        at=step,
        params=_chosen(problem),
        units="1" if cosine else "nat^2",
    )


def _request(
    trace: Trace, audit_set: Any, target: Any, params: Params, examples: Any, unlike: bool
) -> Request:
    return Request(
        audit_set=audit_set,
        target=target,
        params=as_params(trace, params),
        rule="euler",
        examples=examples,
        unlike=unlike,
        updates=PlainDescent,
    )


def _chosen(problem: Problem) -> list[str]:
    return [problem.trace.names[i] for i in problem.tensors]


def _rates(problem: Problem, step: int) -> np.ndarray:
    """Return the learning rate of each tensor at a step: that of its parameter group."""
    groups = [problem.trace.fingerprint.group_of[i] for i in problem.tensors]
    field = trace_layout.FIELDS.index("learning_rate")
    return np.asarray(problem.trace.coefficients[step, groups, field])


class _Products:
    """Sums over states of weighted products of training and audited examples' gradients."""

    def __init__(self, problem: Problem, budget: int, *, cosine: bool = False) -> None:
        self._problem, self._cosine = problem, cosine
        self._shape = (len(problem.examples), problem.data.n, problem.outputs)
        self._dtype = problem.flat.theta.new_empty(0).cpu().numpy().dtype
        refuse_large(self._shape, self._dtype.itemsize, budget)
        self._panels = list(_slices(problem.data.n, panel_size(problem, budget)))

    def total(self, steps: list[int], weights: list[np.ndarray], progress: bool) -> np.ndarray:
        """Return ``(example, audit[, output])``; ``weights`` are of each state, by tensor."""
        while True:
            try:
                return self._total(steps, weights, progress)
            except NotFactoredError as error:  # a batch that uses a layer otherwise than the first
                self._problem.materialise(error.names)

    @torch.no_grad()
    def _total(self, steps: list[int], weights: list[np.ndarray], progress: bool) -> np.ndarray:
        problem = self._problem
        out = np.zeros(self._shape, self._dtype)
        count = len(steps) * len(self._panels)
        with bars.bar("products", total=count, unit="panel", show=progress) as bar:
            states = problem.trace.states(steps)
            for (_, theta), of_tensors in zip(states, weights, strict=True):
                problem.set(torch.from_numpy(theta))
                for panel in self._panels:
                    self._add(out, panel, of_tensors)
                    bar.update()
        return out if problem.audited.outputs is not None else out[:, :, 0]

    def _add(self, out: np.ndarray, panel: slice, weights: np.ndarray) -> None:
        problem = self._problem
        audited = [self._audited(o, panel) for o in range(problem.outputs)]
        norms = [_norms(features) for features in audited]
        # Weights go to the audited side: it is the smaller one, and made once for all batches.
        scaled = [_weighted(problem, features, weights) for features in audited]
        for batch in _slices(len(problem.examples), BATCH):
            examples = problem.trace.train.take(problem.examples[batch])
            training = problem.training.features(*examples)
            for output, features in enumerate(scaled):
                products = training.products(features)  # (example, audit)
                if self._cosine:
                    scale = _norms(training)[:, None] * norms[output]
                    products = torch.where(scale > 0, products / scale, 0).clamp(-1, 1)
                out[batch, panel, output] += products.cpu().numpy()

    def _audited(self, output: int, panel: slice) -> Features:
        engine, data = self._problem.engines[output], self._problem.data
        audits = np.arange(panel.start, panel.stop)
        batches = [
            engine.features(*data.take(audits[batch])) for batch in _slices(len(audits), BATCH)
        ]
        return join_features(batches)


def _weighted(problem: Problem, features: Features, weights: np.ndarray) -> Features:
    """Return gradients, of each tensor times its weight."""
    of = dict(zip((site.name for site in problem.training.plan.sites), weights, strict=True))
    columns = [
        features.dense.new_full((site.stop - site.start,), float(of[site.name]))
        for site in problem.training.plan.sites
        if site.form == "materialised"
    ]
    dense = features.dense * torch.cat(columns) if columns else features.dense
    factors = {name: replace(f, b=f.b * float(of[name])) for name, f in features.factors.items()}
    return Features(dense, factors)


def _norms(features: Features) -> Tensor:
    """Return the norm of each gradient, ``(example,)``."""
    total = features.dense.square().sum(1)
    for f in features.factors.values():  # of rank one
        total += f.a.square().sum((1, 2, 3)) * f.b.square().sum((1, 2, 3))
    return total.sqrt()


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
