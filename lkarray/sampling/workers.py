"""Stacks of chains on the workers of a Dask cluster. Loads distributed on first use."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from lkarray import store as stores
from lkarray.errors import LockedError, StoreError
from lkarray.sampling.devices import numerics
from lkarray.sampling.fingerprints import Fingerprint
from lkarray.sampling.groups import run_group
from lkarray.sampling.job import Job, Prepared
from lkarray.sampling.preparing import check_center, prepare
from lkarray.sampling.target import Target
from lkarray.store.location import address, local_path
from lkarray.waiting import workers_awaited

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("lkarray")

T = TypeVar("T")

_GPU = "GPU"
_SAFE = "The draws committed are safe"
_POLL_SECONDS, _POLL_REMOTE_SECONDS = 0.5, 5.0  # on object storage every look is a request

#: Seconds that a task waits for the one before it, whose worker was given up but may still live:
#: a host that the scheduler lost sight of ends its own tasks within a minute or so.
PATIENCE = 150.0
_PAUSE = 0.5

_idle: dict[str, list[Target]] = {}
_lock = threading.Lock()


def check_place(store: Store) -> None:
    """Raise unless other processes can reach the store."""
    if isinstance(store, MemoryStore):
        raise StoreError(
            "a store in memory cannot be reached by Dask workers; give a folder that all of them "
            "see, or a URL"
        )


def prepare_on(client: Client, job: Job, **request: Any) -> Prepared:
    """Prepare a job where it will run: threads, device and layout are a worker's own."""
    from lkarray.cluster.versions import refuse_mismatch

    payload = _dumps(job)  # once: a job holds the model
    with workers_awaited("prepared to sample", _SAFE, client=client):
        refuse_mismatch(client, needs=("torch",))
        prepared: Prepared = submit(client, _prepare, payload, request).result()
    return prepared


def run_on(
    client: Client,
    root: zarr.Group,
    job: Job,
    prepared: Prepared,
    groups: list[list[int]],
    bar: Any,
) -> list[tuple[int, int]]:
    """Run each group as one task; return which chains diverged, and where.

    A group whose worker dies is taken up by another worker, from its last commit.

    Raises
    ------
    StoreError
        Workers died again and again, or cannot see the store.
    ClusterError
        No worker is left, and none came.
    """
    with workers_awaited("sampled", _SAFE, client=client, bar=bar, resource=needed(client)):
        return _run_on(client, root, job, prepared, groups, bar)


def _run_on(
    client: Client,
    root: zarr.Group,
    job: Job,
    prepared: Prepared,
    groups: list[list[int]],
    bar: Any,
) -> list[tuple[int, int]]:
    from distributed import wait

    where = address(root.store)
    payload = _dumps(job)
    # One copy of the job for each worker; it is made anew from these bytes if that worker dies.
    loaded = client.submit(_loads, payload, pure=False)
    key = hashlib.sha256(payload).hexdigest()
    common = (loaded, key, where, prepared.fingerprint)
    tasks = [submit(client, _run, *common, group) for group in groups]
    shown = _steps(root, groups)
    pause = _POLL_SECONDS if local_path(root.store) is not None else _POLL_REMOTE_SECONDS
    try:
        while running := [task for task in tasks if not task.done()]:
            with suppress(TimeoutError):
                wait(running, timeout=pause)
            now = _steps(root, groups)
            bar.update(now - shown)
            shown = now
        return [stop for task in tasks for stop in task.result()]
    finally:
        cancel(client, tasks)


def submit(client: Client, function: Callable[..., Any], *args: Any) -> Any:
    """Submit a task; on a GPU of its own where workers announce the resource ``GPU``."""
    resource = needed(client)
    resources = None if resource is None else {resource: 1}
    return client.submit(function, *args, pure=False, resources=resources)


def needed(client: Client) -> str | None:
    """Return the resource that a task takes one of, if workers announce it; wait for a worker."""
    from lkarray.cluster.watching import worker_infos

    infos = worker_infos(client)
    return _GPU if any(w.get("resources", {}).get(_GPU, 0) >= 1 for w in infos) else None


def another_store(root: zarr.Group) -> StoreError:
    """Return the error of a worker that opens something else than the client did."""
    return StoreError(
        f"a worker sees another store at {stores.describe(root.store)} than the client does; give "
        "a path on storage that all of them share"
    )


def cancel(client: Client, tasks: Iterable[Any]) -> None:
    """Cancel what has not ended, where there is still a scheduler to tell."""
    left = [task for task in tasks if not task.done()]
    if left and client.status == "running":
        client.cancel(left)


def _steps(root: zarr.Group, groups: list[list[int]]) -> int:
    return sum(stores.read_record(root, chain).step for group in groups for chain in group)


def _dumps(job: Job) -> bytes:
    import cloudpickle

    return cloudpickle.dumps(job)


def _loads(payload: bytes) -> Job:
    import pickle

    return pickle.loads(payload)


def _prepare(payload: bytes, request: Mapping[str, Any]) -> Prepared:
    prepared, _ = prepare(_loads(payload), **request)
    return prepared


@contextmanager
def _prepared(job: Job, key: str, fingerprint: Fingerprint) -> Iterator[Target]:
    """Lend a target of the job: one that a task of this process has done with, or a new one.

    Reading the data, and compiling, can take longer than a group of chains.
    """
    with _lock:
        idle = _idle.get(key, [])
        target = idle.pop() if idle else None
    if target is None:
        layout = fingerprint.layout
        prepared, target = prepare(job, chains=fingerprint.chains_per_device, layout=layout)
        stores.refuse_changes(
            fingerprint.stored(),
            prepared.fingerprint.stored(),
            "the store",
            remedy="use workers of one kind, with the same versions",
        )
    yield target
    # Given back only where nothing failed: a target in doubt is made anew.
    with _lock:
        if key not in _idle:
            _idle.clear()
        _idle.setdefault(key, []).append(target)


def _run(
    job: Job, key: str, where: Any, fingerprint: Fingerprint, chains: list[int]
) -> list[tuple[int, int]]:
    """Run one group, in a worker."""
    root = stores.open_root(stores.as_store(where), mode="r+")
    if stores.stored_fingerprint(root) != fingerprint.stored():
        raise another_store(root)
    key += json.dumps(fingerprint.stored(), sort_keys=True)
    with _prepared(job, key, fingerprint) as target, numerics(fingerprint.threads):
        check_center(root, target)
        return patiently(partial(run_group, root, job, target, chains, lambda _: None))


def patiently(work: Callable[[], T]) -> T:
    """Return what ``work`` does, once a task that was given up has let go of its region."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
