"""`reconstruction`: how much of the truth an audit would add up to, before it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from lkarray import progress as bars
from lkarray.arguments import checked
from lkarray.auditing.describing import errors, layout_of
from lkarray.auditing.panel import BATCH
from lkarray.auditing.per_step import PathOnly
from lkarray.auditing.problem import problem_of
from lkarray.auditing.request import Request
from lkarray.auditing.running import run_panel
from lkarray.engine.plan import memory_budget
from lkarray.nn.batches import MapDataset
from lkarray.nn.modes import with_gradients
from lkarray.schema import AUDIT, EPOCH
from lkarray.training.choosing import as_trace
from lkarray.training.recorder import Recorder
from lkarray.training.trace import Trace


@checked()
@with_gradients
def reconstruction(
    trace: Trace | Recorder,
    audit_set: MapDataset | Sequence[int] | np.ndarray,
    *,
    target: str | int | Callable[[Any, Any], Tensor] = "loss",
    module: str | None = None,
    rule: str = "trapezoid",
    supersample: int = 1,
    stride: int = 1,
    steps: tuple[int, int] | None = None,
    unlike: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Return what an audit would add up to, without the audit: the errors of a rule or stride.

    Influences and residual of `audit` add up to the integral along the path to rounding (its
    attribute ``closure``), so that its errors are those of the integral, which takes no training
    gradients: about a sixth of the cost.

    Parameters
    ----------
    trace, audit_set, target, module, rule, supersample, stride, steps, unlike, memory, progress
        As for `audit`.

    Returns
    -------
    xarray.Dataset
        ``change(audit)``, ``path(audit)``, ``length(audit)``, ``reconstruction(epoch, audit)`` and
        ``epoch_change(epoch, audit)``, in memory, as `audit` describes them; attributes ``mre`` and
        ``lc``.

    References
    ----------
    - Anonymous 2026, lemma 3.2 and A.2.7: "Path-Integrated Loss-Gradient Kernels".
    - docs/methods/adjoint.md, "Rules of quadrature".
    """
    request = Request(
        audit_set=audit_set,
        target=target,
        module=module,
        rule=rule,
        supersample=supersample,
        stride=stride,
        steps=steps,
        unlike=unlike,
    )
    problem = problem_of(as_trace(trace), request)
    budget = memory_budget(memory)
    layout = layout_of(problem, "", budget, None, None, per_panel=min(problem.data.n, BATCH))
    panels = []
    with bars.bar(
        "reconstruction",
        total=(problem.stop - problem.start) * len(layout.panels),
        unit="step",
        show=progress,
    ) as bar:
        for audits in layout.panels:
            kept = _Kept(audits)
            run_panel(problem, kept, budget, bar.update, bar.update, per_step=PathOnly)
            panels.append(kept.sums)
    specs = {
        name: spec for name, spec in layout.specs().items() if name not in ("residual", "total")
    }
    variables = {
        name: (spec.dims, np.concatenate([sums[name] for sums in panels], spec.dims.index(AUDIT)))
        for name, spec in specs.items()
    }
    ds = xr.Dataset(variables, {AUDIT: problem.index, EPOCH: layout.epochs}, layout.attrs)
    for name, spec in specs.items():
        ds[name].attrs = spec.attrs()
    mre, lc = errors(ds["path"].values, ds["change"].values)
    return ds.drop_attrs(deep=False).assign_attrs(
        {k: v for k, v in layout.attrs.items() if k in ("target", "rule", "supersample", "stride")}
        | {"mre": mre, "lc": lc}
    )


class _Kept:
    """Stands for a panel's writer, and keeps the sums: never due, and without influences."""

    def __init__(self, audits: slice) -> None:
        self.audits = audits
        self.sums: Mapping[str, np.ndarray] = {}

    def resume(self) -> None:
        return None

    def due(self) -> bool:
        return False

    def commit(self, left: int, state: Mapping[str, np.ndarray]) -> None:
        raise AssertionError("a reconstruction commits nothing")

    def write(self, values: np.ndarray, window: int | None) -> None:
        raise AssertionError("a reconstruction has no influences")

    def finish(self, sums: Mapping[str, np.ndarray]) -> None:
        self.sums = sums
