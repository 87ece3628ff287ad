"""`check`: a self-test of a minute, before a run of hours."""

from __future__ import annotations

import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xarray as xr
from dask.utils import format_bytes
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray.analysis.losses import correlation
from lkarray.cluster.versions import mismatches
from lkarray.errors import LkarrayError
from lkarray.saving import save
from lkarray.store import verify
from lkarray.store.location import (
    StoreLike,
    address,
    as_store,
    create_root,
    describe,
    inner_store,
    local_path,
)
from lkarray.store.objects import without_credentials

if TYPE_CHECKING:
    from distributed import Client

_CHAINS, _DRAWS, _SAMPLES = 2, 40, 300
_WAIT = 45.0  # seconds that one step may take
_FORGETTING = 2.0  # seconds in which workers forget what the steps before have left

#: What a step tells: whether it went as it should, and what it showed.
Told: TypeAlias = Iterator[tuple[bool | None, str]]


@dataclass(frozen=True)
class Finding:
    """What one step of the self-test showed.

    Attributes
    ----------
    step
        What was tried.
    ok
        Whether it went as it should; ``None`` where it could not be tried, or deserves a look.
    message
        What it showed, and what to do about it.
    """

    step: str
    ok: bool | None
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", without_credentials(self.message))

    def __str__(self) -> str:
        word = {True: "ok     ", False: "PROBLEM", None: "note   "}[self.ok]
        return f"{word} {self.step}: {self.message}"


def check(client: Client, shared: StoreLike | None = None, *, loss: bool = True) -> list[Finding]:
    """Try what a run will need on a cluster, and say what is wrong in plain words.

    Parameters
    ----------
    client
        What `connect` returned.
    shared
        A folder, URL or Zarr store that client and workers should all see: where the stores will
        be. A folder of its own is made in it, and removed. Default: the working directory.
    loss
        Also end one worker's process, to see its tasks run again elsewhere. It is left out where
        the cluster is at other work, or holds somebody's data.

    Returns
    -------
    list of Finding
        One or more for each step: workers, versions, threads, shared storage, a tile job (a
        correlation written by the workers, compared with numpy in float64), the loss of a worker.
        Steps that rest on one that failed are left out.

    Notes
    -----
    Takes well under a minute on a cluster that answers. Nothing raises but the loss of the
    client's own connection.
    """
    name = f"lkarray-check-{uuid.uuid4().hex[:8]}"
    findings: list[Finding] = []
    with ExitStack() as at_the_end:
        steps: dict[str, Callable[[], Told]] = {
            "workers": partial(_workers, client),
            "versions": partial(_versions, client),
            "threads": partial(_threads, client),
            "shared storage": lambda: _shared(client, _made(shared, name, at_the_end)),
            "tile job": lambda: _tiles(client, _folder(shared, name)),
            "worker loss": partial(_loss, client) if loss else _left_out,
        }
        for step, work in steps.items():
            try:
                findings += [Finding(step, ok, message) for ok, message in work()]
            except Exception as error:
                findings.append(Finding(step, False, f"{type(error).__name__}: {error}"))
            if findings[-1].ok is False and step in ("versions", "shared storage"):
                break
    return findings


def _folder(shared: StoreLike | None, name: str) -> str | Store:
    """Return what workers, too, open a folder in the shared one by."""
    return address(inner_store(as_store(Path.cwd() if shared is None else shared), name))


def _made(shared: StoreLike | None, name: str, at_the_end: ExitStack) -> str | Store:
    """Make the folder, to be removed at the end."""
    folder = _folder(shared, name)
    at_the_end.callback(_remove, folder)
    create_root(folder)
    return folder


def _workers(client: Client) -> Told:
    info = client.scheduler_info(n_workers=-1)
    workers = list(info["workers"].values())
    hosts = {worker["host"] for worker in workers}
    threads = sum(worker["nthreads"] for worker in workers)
    limits = [worker["memory_limit"] for worker in workers]
    yield True, f"{len(workers)} with {threads} threads on {len(hosts)} hosts"
    if not all(limits):
        yield None, "some have no memory limit: the operating system ends what outgrows the machine"
    else:
        yield True, f"{format_bytes(min(limits))} or more each"
    address = str(info["address"])
    if address.startswith("tcp://") and not address.startswith(("tcp://127.", "tcp://[::1]")):
        yield (
            None,
            (
                f"{address} is not encrypted, and whoever reaches it can run code on the workers; "
                "cluster/tls has certificates"
            ),
        )


def _versions(client: Client) -> Told:
    lines = mismatches(client)
    if lines:
        yield False, "; ".join(lines) + ". Install the same versions everywhere"
    else:
        yield True, "client, scheduler and workers have the same"


def _threads(client: Client) -> Told:
    def ask(dask_worker: Any = None) -> tuple[str, set[int], int]:
        import os
        import socket

        own = os.sched_getaffinity(0)
        told = os.environ.get("OMP_NUM_THREADS", "")
        blas = int(told) if told.isdigit() else len(own)
        return socket.gethostname(), own, dask_worker.state.nthreads * blas

    cores: dict[str, set[int]] = defaultdict(set)  # those of several jobs on a host add up
    threads: dict[str, int] = defaultdict(int)
    for host, own, most in client.run(ask).values():
        cores[host] |= own
        threads[host] += most
    bad = [host for host in cores if threads[host] > len(cores[host])]
    if bad:
        yield (
            None,
            (
                f"{bad[0]} (of {len(bad)} such) may run {threads[bad[0]]} threads, tasks times "
                f"BLAS threads of each, on {len(cores[bad[0]])} cores; start workers with "
                "OMP_NUM_THREADS=1, and no more tasks at once than cores"
            ),
        )
    else:
        yield True, "BLAS threads times tasks stay within the cores"


def _shared(client: Client, folder: str | Store) -> Told:
    token = uuid.uuid4().hex
    _put(folder, "client", token)

    def look(folder: str | Store, token: str, name: str) -> str:
        try:
            if _get(folder, "client") != token:
                return "does not see what the client wrote"
            _put(folder, name, token)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    for number, worker in enumerate(workers):
        told = client.submit(
            look, folder, token, f"worker{number}", workers=[worker], pure=False
        ).result(timeout=_WAIT)
        if not told and _get(folder, f"worker{number}") != token:
            told = "writes, but the client does not see it"
        if told:
            yield (
                False,
                (
                    f"{worker} at {describe(as_store(folder))}: {told}. Give a folder on storage "
                    "that all hosts mount at the same path, or a URL"
                ),
            )
            return
    yield True, f"{len(workers)} workers and the client read and write it"


def _tiles(client: Client, folder: str | Store) -> Told:
    store = address(inner_store(as_store(folder), "kernel.zarr"))
    rng = np.random.default_rng(0)
    values = rng.normal(size=(_CHAINS, _DRAWS, _SAMPLES)).astype(np.float32)
    losses = xr.DataArray(
        values,
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(_SAMPLES)},
        name="loss",
    )
    began = time.perf_counter()
    lazy = correlation(losses.chunk(sample=100), memory="64 MiB")
    with client.as_current():
        stored = save(lazy, store, "derived/correlation")
        difference = np.abs(stored.values - np.corrcoef(values.reshape(-1, _SAMPLES).T)).max()
    seconds = time.perf_counter() - began
    problems = verify(store)
    if difference > 1e-5 or problems:
        yield False, f"a kernel is wrong by {difference:.1e} ({[str(p) for p in problems]})"
    else:
        yield True, f"a correlation of {_SAMPLES} samples agrees with numpy ({seconds:.1f} s)"


def _loss(client: Client) -> Told:
    info = client.scheduler_info(n_workers=-1)["workers"]
    until = time.monotonic() + _FORGETTING
    while busy := {at for at, keys in _kept(client) if keys}:
        if time.monotonic() > until:
            yield None, f"not tried: {len(busy)} workers are at other work, or hold its data"
            return
        time.sleep(0.1)
    nannies = [worker.get("nanny") for worker in info.values()]
    if len(info) < 2 and not all(nannies):
        yield None, "not tried: there is one worker, and no nanny to start it again"
        return

    def die_once(doomed: str) -> int:
        import os

        from distributed import get_worker

        if get_worker().id == doomed:  # one that is started again may have its address
            os._exit(1)
        return 42

    doomed, nanny = next(iter(info)), next(iter(nannies))
    process = client.run(_worker_id, workers=[doomed])[doomed]
    began = time.perf_counter()
    task = client.submit(die_once, process, workers=[doomed], allow_other_workers=True, pure=False)
    if task.result(timeout=_WAIT) != 42:
        yield False, "the task of a worker that was ended gave another number"
        return
    wanted = len(info) if nanny else len(info) - 1
    try:
        client.wait_for_workers(wanted, timeout=_WAIT)
    except TimeoutError:
        yield False, "a worker that was ended did not come back; look at its nanny's log"
        return
    seconds = time.perf_counter() - began
    back = "it was started again" if nanny else "no nanny, so it stays away"
    yield True, f"one was ended, its task ran elsewhere in {seconds:.1f} s; {back}"


def _kept(client: Client) -> Iterator[tuple[str, Any]]:
    """Yield each worker with the keys that it works on, and with those that it holds."""
    yield from client.processing().items()
    yield from client.has_what().items()


def _worker_id(dask_worker: Any = None) -> str:
    return str(dask_worker.id)


def _left_out() -> Told:
    yield None, "left out, as asked"


def _put(folder: str | Store, name: str, text: str) -> None:
    buffer = default_buffer_prototype().buffer.from_bytes(text.encode())
    sync(as_store(folder).set(name, buffer))


def _get(folder: str | Store, name: str) -> str | None:
    buffer = sync(as_store(folder).get(name, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes().decode()


def _remove(folder: str | Store) -> None:
    store = as_store(folder)
    local = local_path(store)
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)
    else:
        with suppress(LkarrayError, OSError, RuntimeError):
            sync(store.delete_dir(""))
