"""`audit`: what every training example did to every prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import Tensor
from zarr.storage import MemoryStore

from lkarray import progress as bars
from lkarray import store as store_
from lkarray.arguments import checked
from lkarray.auditing.describing import fingerprint, layout_of, metrics
from lkarray.auditing.problem import problem_of
from lkarray.auditing.request import SEEN, Request
from lkarray.auditing.running import run_panel
from lkarray.engine.plan import memory_budget
from lkarray.nn.batches import MapDataset
from lkarray.nn.modes import with_gradients
from lkarray.store import audits
from lkarray.store.audit_panels import PanelWriter, panels_left
from lkarray.training.choosing import as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace

if TYPE_CHECKING:
    from distributed import Client


@checked()
@with_gradients
def audit(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str | int | Callable[[Any, Any], Tensor] = "loss",
    module: str | None = None,
    groups: Mapping[str, Any] | None = None,
    overlap: bool = False,
    credit: str = SEEN,
    rule: str = "trapezoid",
    supersample: int = 1,
    stride: int = 1,
    examples: Sequence[int] | np.ndarray | None = None,
    params: str | Iterable[str] | None = None,
    steps: tuple[int, int] | None = None,
    coords: Mapping[str, Any] | None = None,
    example_coords: Mapping[str, Any] | None = None,
    unlike: bool = False,
    store: Any = None,
    name: str | None = None,
    memory: int | str | None = None,
    client: Client | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""Decompose what training did to predictions into what each training example did.

    The change of an audited quantity along the recorded path is

    .. math:: \ell_n(\theta_T) - \ell_n(\theta_0) \approx \sum_t \bar g_n(t) \cdot \Delta\theta_t

    (Anonymous 2026, proposition 3.1), and every :math:`\Delta\theta_t` is, through momentum,
    preconditioner, clipping and decay as they were realised, linear in the gradients of the
    examples of the batches so far. The recorded steps are run backwards once, and each product
    lands on the example that it belongs to: influences and residual add up to the sum on the right
    exactly, which rounding and nothing else disturbs.

    Parameters
    ----------
    trace
        What `open_trace` returned, or a finished `record`.
    audit_set
        The examples whose predictions are audited: a dataset like the training set, or indices
        into it.
    target
        What is audited of each: ``"loss"``; ``"prediction"``, every output of the model (adds a
        dim ``output``); ``"logit"``, the output of the example's own label; the number of an
        output; or a differentiable function ``(model output, target) -> (batch,)``.
    module
        Name of a module inside the model: ``target`` is then a function of what that one gives,
        ``(activation, target) -> (batch,)``.
    groups
        What influence is added up by, any of: ``"example"``: a label of each training example, or
        a dict of names and indices (dim ``group``); ``"param"``: ``"module"``, ``"tensor"``, or a
        dict of names and patterns (dim ``layer``); ``"time"``: ``"epoch"`` (dim ``epoch``), steps
        between windows, or a dict of names and ``(first step, one beyond the last)`` (dim
        ``window``).
    overlap
        Allow groups that overlap: then influences do not add up.
    credit
        Which window of time influence counts in: ``"seen"``: in which the example's batch was;
        ``"acted"``: in which it moved the parameters, at once or later through momentum. With
        ``"acted"`` every window is complete for itself, and ``residual`` is split by windows too.
    rule
        ``"trapezoid"``, error of third order in a step; ``"euler"``, of second order, as TracIn;
        ``"midpoint"``; ``"simpson"``.
    supersample
        Equal stretches of each step that the rule is applied to (Anonymous 2026, A.2.7).
    stride
        Steps between evaluations of the audited examples; training gradients are of every step.
    examples
        Training examples to find the influence of; all by default.
    params
        Patterns of tensor or module names to restrict the audit to; all by default.
    steps
        First step audited, and the one beyond the last; all by default. What momentum brings from
        before them is in the residual.
    coords, example_coords
        Labels: of the audited examples, and of the training examples (or of their groups). Their
        names must differ.
    unlike
        Allow an audit set whose inputs or labels lie outside what was trained on.
    store
        Where to write, usually the trace's own store: a killed audit then goes on when it is
        called again. ``None`` keeps the result in memory.
    name
        Of the audit: group ``audit``, or ``audit_<name>``.
    memory
        Byte budget of a process; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
        Audited examples are taken in panels that fit.
    client
        A Dask client: panels are spread over its workers, which must see the store.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.Dataset
        ``influence(example, audit)``, lazy, negative where the example lowered what is audited,
        with the dims of ``target`` and ``groups``: ``(group, audit, output, layer, epoch)`` at
        most. ``residual(audit)``: what weight decay did, and momentum from before the run.
        ``change(audit)``: the true change, from end to end. ``total(audit)``: the influences'
        sum. ``path(audit)``: the sum on the right above, and ``length(audit)`` that of its terms'
        magnitudes. ``reconstruction(epoch, audit)`` and ``epoch_change(epoch, audit)``: path and
        change by the end of each epoch. Attributes: ``mre`` and ``lc`` (Anonymous 2026, definitions
        12 and 13), ``closure`` (largest ``|total + residual - path| / length``), ``complete`` and,
        if it is not, why. Of a partial audit, such as one of some ``params``, ``mre`` and
        ``closure`` are NaN, and ``lc`` stays usable: how the part goes with the whole change.

    Raises
    ------
    ValueError, SchemaError
        An option is none of the above; a target gives no number of each example or does not
        depend on the parameters; groups overlap; the audit set was prepared otherwise.
    FingerprintError
        The trace's gradients cannot be reproduced (the message names the first step); or the
        store holds another audit of this name.
    DamagedError
        Something of the trace, or of the audit in the store, is missing or not what was committed.
    MemoryBudgetError
        The budget does not hold one audited example.
    StoreError
        The disk lacks the space for the result; the message has its size.
    ClusterError
        No worker of the client is left and none came, or its scheduler is gone: the panels finished
        are safe, and the same call goes on.

    Notes
    -----
    Each step takes a forward and backward pass of its batch and of each panel, and ``2 B N P``
    operations for the products of a batch of ``B`` with ``N`` audited numbers and ``P``
    parameters. Memory: ``N P`` numbers for momentum (none without), twice ``N`` times those of the
    gradients that have no factors (convolutions), and one window's influence
    (``layers x examples x N``), for each panel; each panel runs through the whole trace.

    References
    ----------
    - Anonymous 2026, proposition 3.1 and eq. 1; defs. 9 to 13; A.2: "Path-Integrated Loss-Gradient
      Kernels".
    - docs/methods/adjoint.md.

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
    >>> audited = lk.audit(trace, [0, 1])
    >>> audited["influence"].dims, dict(audited["influence"].sizes)
    (('example', 'audit'), {'example': 8, 'audit': 2})
    >>> gap = audited["total"] + audited["residual"] - audited["path"]
    >>> bool(abs(gap).max() < 1e-6)
    True
    """
    source = as_trace(trace)
    request = Request(
        audit_set=audit_set,
        target=target,
        module=module,
        params=params,
        rule=rule,
        supersample=supersample,
        stride=stride,
        steps=steps,
        examples=examples,
        groups=groups,
        overlap=overlap,
        credit=credit,
        unlike=unlike,
    )
    return run_audit(
        source,
        request,
        coords=coords,
        example_coords=example_coords,
        store=store,
        name=name,
        memory=memory,
        client=client,
        progress=progress,
    )


def run_audit(
    trace: Trace,
    request: Request,
    *,
    coords: Any,
    example_coords: Any,
    store: Any,
    name: str | None,
    memory: Any,
    client: Client | None,
    progress: bool,
) -> xr.Dataset:
    """Run what was asked for; see `audit`."""
    with bars.showing(progress), bars.busy("preparing the audit"):
        problem = problem_of(trace, request)
    budget = memory_budget(memory)
    target = MemoryStore() if store is None else store_.as_store(store)
    group = audits.audit_group(name)
    layout = layout_of(problem, group, budget, coords, example_coords)
    made_with = fingerprint(problem)
    known = audits.whole_audit(target, group, made_with)
    if known is not None:  # on a read-only disk too
        return audits.open_audit(known, group)
    with store_.writer_lock(target):
        stored = audits.stored_panel_size(target, group)
        if stored is not None:  # panels are those it was begun with, whatever the budget is now
            layout = layout_of(problem, group, budget, coords, example_coords, per_panel=stored)
        root = audits.begin_audit(target, layout, made_with)
        todo = panels_left(root, group)
        total = (problem.stop - problem.start) * len(todo)
        with bars.bar("audit", total=total, unit="step", show=progress) as bar:
            if client is None:
                for panel in todo:
                    writer = PanelWriter(root, layout, panel)
                    run_panel(problem, writer, budget, bar.update, partial(bars.skip, bar))
            else:
                from lkarray.auditing.workers import run_on

                run_on(client, root, problem, layout, made_with, todo, budget, bar)
        audits.drop_states(root, group)
        audits.describe_audit(root, group, metrics(problem, audits.open_audit(root, group)))
        store_.finish(root)
    stored_audit = audits.open_audit(root, group)
    return stored_audit.compute() if store is None else stored_audit
