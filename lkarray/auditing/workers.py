"""Panels of an audit on the workers of a Dask cluster. Loads distributed on first use."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zarr
from torch import nn

from lkarray import store as stores
from lkarray.auditing.problem import Problem, problem_of
from lkarray.auditing.request import Request
from lkarray.auditing.running import run_panel
from lkarray.sampling.workers import another_store, cancel, check_place, needed, patiently, submit
from lkarray.store import audits
from lkarray.store.audit_layout import AuditLayout
from lkarray.store.audit_panels import PanelWriter
from lkarray.store.location import address
from lkarray.training.trace import Trace, open_trace
from lkarray.waiting import workers_awaited

if TYPE_CHECKING:
    from distributed import Client

#: The problem that a process has ready; panels of one process follow each other, since the memory
#: budget is that of the process.
_ready: dict[str, Problem] = {}
_turn = threading.Lock()

_SAFE = "The panels finished are safe"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs to make the problem again."""

    trace: Any
    model: nn.Module
    train_set: Any
    loss: Any
    request: Request
    store: Any
    layout: AuditLayout
    fingerprint: dict[str, Any]
    budget: int


def run_on(
    client: Client,
    root: zarr.Group,
    problem: Problem,
    layout: AuditLayout,
    fingerprint: dict[str, Any],
    panels: list[int],
    budget: int,
    bar: Any,
) -> None:
    """Run each panel as one task; one whose worker dies is taken up by another.

    Raises
    ------
    StoreError
        The store is in memory; workers died again and again, or see another store.
    ClusterError
        No worker is left, and none came.
    """
    import cloudpickle

    from lkarray.cluster.versions import refuse_mismatch

    trace = problem.trace
    for store in (root.store, trace.root.store):
        check_place(store)
    job = _Job(
        trace=address(trace.root.store),
        model=trace.flat.module,
        train_set=trace.train_set,
        loss=trace.loss.function,
        request=problem.request,
        store=address(root.store),
        layout=layout,
        fingerprint=fingerprint,
        budget=budget,
    )
    payload = cloudpickle.dumps(job)
    key = hashlib.sha256(payload).hexdigest()
    with workers_awaited("audited", _SAFE, client=client, bar=bar, resource=needed(client)):
        refuse_mismatch(client, needs=("torch",))
        _run_all(client, payload, key, panels, lambda: bar.update(problem.stop - problem.start))


def _run_all(
    client: Client, payload: bytes, key: str, panels: list[int], tick: Callable[[], Any]
) -> None:
    from distributed import as_completed

    # One copy for each worker; unlike scattered data it is made anew if the worker dies.
    sent = client.submit(bytes, payload, pure=False)
    tasks = [submit(client, _run, sent, key, panel) for panel in panels]
    try:
        for task in as_completed(tasks):
            task.result()
            tick()
    finally:
        cancel(client, tasks)


def _run(payload: bytes, key: str, panel: int) -> None:
    """Run one panel, in a worker."""
    job: _Job = pickle.loads(payload)
    root = stores.open_root(stores.as_store(job.store), mode="r+")
    if audits.audit_fingerprints(root).get(job.layout.group) != job.fingerprint:
        raise another_store(root)
    patiently(lambda: _panel(job, root, key, panel))


def _panel(job: _Job, root: zarr.Group, key: str, panel: int) -> None:
    name = f"{job.layout.group}-{panel}"
    with _turn, stores.region_lock(root.store, name):
        if key not in _ready:
            _ready.clear()
            _ready[key] = problem_of(_trace(job), job.request)
        writer = PanelWriter(root, job.layout, panel)
        run_panel(_ready[key], writer, job.budget, _untold, _untold)


def _untold(steps: int) -> None:
    """Let a panel's steps pass: the bar counts panels."""


def _trace(job: _Job) -> Trace:
    return open_trace(job.trace, job.model, job.train_set, loss=job.loss)
