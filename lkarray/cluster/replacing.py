"""Workers of a cluster that was opened here, and are gone for good, are started anew.

Distributed itself forgets a worker that stayed away for 15 s (``lost-worker-timeout``) and starts
none in its place; one whose nanny gave up while it started stays in the list of workers as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import dask
from distributed import Nanny, SpecCluster
from distributed.core import Status

logger = logging.getLogger("lkarray")

#: Seconds that a worker without a process may take until it counts as gone for good: a nanny
#: starts another within one, on a quiet machine.
SETTLE = 10.0

#: Seconds that a job whose workers have gone may take to bring one back.
AWAY = 30.0

_CLOSING = 10.0  # seconds that what is gone gets to close
_MOST_PAUSE = 60.0  # seconds at most between attempts
_ATTEMPTS, _ATTEMPTING = 6, 120.0  # so many in vain, over so many seconds, are enough
_QUEUE = 20.0  # seconds between questions to a queue


class Keeper:
    """Keeps a cluster at the workers that were asked for.

    Parameters
    ----------
    cluster
        What `connect` opened. One that is no `SpecCluster`, as of Kubernetes, replaces its own.
    name
        Of the cluster, in messages.
    settings
        Of Dask, under which its workers are started.
    """

    def __init__(self, cluster: Any, name: str, settings: Mapping[str, Any]) -> None:
        self._cluster, self._name, self._settings = cluster, name, settings
        self._running: Future[None] | None = None
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lacking: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._asked_queue = 0.0
        self._ended_jobs: set[str] = set()
        self._stopped = False
        self.begin_again()

    def begin_again(self) -> None:
        """Forget the attempts so far."""
        self._attempts, self._began, self._next = 0, 0.0, 0.0
        self._failure = ""

    @property
    def patience(self) -> float | None:
        """How long to wait without a worker: without end for a queue, or what restarts its own."""
        queued = not isinstance(self._cluster, SpecCluster) or expects_more(self._cluster)
        return float("inf") if queued else None

    @property
    def hopeless(self) -> bool:
        """Whether workers were started again and again, and none came."""
        return self._attempts >= _ATTEMPTS and time.monotonic() - self._began > _ATTEMPTING

    def why(self) -> str:
        """Return how the attempts failed, if any did."""
        if not self._attempts:
            return ""
        last = f" ({self._failure})" if self._failure else ""
        return f", though new ones were started {self._attempts} times{last}; look into their logs"

    def look(self) -> None:
        """See what is gone for good, and start it anew, on the cluster's own loop."""
        if not isinstance(self._cluster, SpecCluster) or self._stopped:
            return
        if self._running is None or self._running.done():
            loop = self._cluster.loop.asyncio_loop  # type: ignore[union-attr]
            self._running = asyncio.run_coroutine_threadsafe(self._correct(), loop)

    def stop(self) -> None:
        """Start nothing more, and wait until what is being started is there, to be closed."""
        self._stopped = True
        if self._running is not None:
            with suppress(Exception):
                self._running.result(_CLOSING)

    async def _correct(self) -> None:
        cluster = self._cluster
        if cluster.status is not Status.running or cluster._lock.locked():
            return
        await self._ask_queue()
        gone = [
            name for name in cluster.workers if name in cluster.worker_spec and self._gone(name)
        ]
        missing = set(cluster.worker_spec) - set(cluster.workers)
        if not gone and not missing:
            if all(self._here(name) for name in cluster.worker_spec):
                self.begin_again()
            return
        if time.monotonic() >= self._next and not self._stopped:
            await self._replace(gone, len(gone) + len(missing))

    async def _replace(self, gone: list[Any], count: int) -> None:
        cluster, now = self._cluster, time.monotonic()
        if not self._attempts:
            self._began = now
            logger.warning(
                "%d of %d workers of %s are gone for good; starting new ones",
                count,
                len(cluster.worker_spec),
                self._name,
            )
        self._attempts += 1
        self._next = now + min(2.0**self._attempts, _MOST_PAUSE)
        closing = [
            asyncio.wait_for(worker.close(), _CLOSING)
            for name in gone
            if (worker := cluster.workers.pop(name, None)) is not None
        ]
        await asyncio.gather(*closing, return_exceptions=True)
        try:
            with dask.config.set(self._settings):
                await cluster._correct_state()  # brings the workers to what is asked for
            self._failure = ""
        except Exception as error:
            self._failure = str(error).strip() or type(error).__name__
            logger.warning("a new worker of %s did not start: %s", self._name, self._failure)

    def _here(self, name: Any) -> bool:
        """Say whether the scheduler knows a worker of this name."""
        cluster = self._cluster
        names = {worker["name"] for worker in cluster.scheduler_info["workers"].values()}
        if not names.isdisjoint(_names(name, cluster.worker_spec.get(name) or {})):
            return True
        # What is started over SSH goes by names of its own.
        worker = cluster.workers.get(name)
        return _is_ssh(worker) and not _ended(worker)

    def _gone(self, name: Any) -> bool:
        """Say whether what should be a worker will never be one again."""
        worker, now = self._cluster.workers[name], time.monotonic()
        if worker.status in (Status.closed, Status.failed):
            return True
        if self._here(name):
            self._seen.add(worker)
            self._lacking.pop(worker, None)
            return False
        patience = self._lacks(worker)
        if patience is None:
            self._lacking.pop(worker, None)
            return False
        return now - self._lacking.setdefault(worker, now) > patience

    def _lacks(self, worker: Any) -> float | None:
        """Return for how long a worker may stay as it is, if it is not well."""
        if isinstance(worker, Nanny):
            return None if worker.process is not None and worker.process.is_alive() else SETTLE
        if _is_ssh(worker):
            return SETTLE if _ended(worker) else None
        if getattr(worker, "job_id", None) in self._ended_jobs:
            return SETTLE
        return AWAY if worker in self._seen else None

    async def _ask_queue(self) -> None:
        """Find the jobs of Slurm that ended before a worker came of them."""
        jobs = {
            str(worker.job_id)
            for worker in self._cluster.workers.values()
            if getattr(worker, "submit_command", "") == "sbatch"
            and getattr(worker, "job_id", None)
            and worker not in self._seen
        }
        now = time.monotonic()
        if not jobs or now - self._asked_queue < _QUEUE:
            return
        self._asked_queue = now
        with suppress(OSError, TimeoutError):
            process = await asyncio.create_subprocess_exec(
                "squeue",
                "--noheader",
                "--format=%A",
                "--me",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            told, _ = await asyncio.wait_for(process.communicate(), _CLOSING)
            if process.returncode == 0:
                self._ended_jobs = jobs - set(told.decode().split())


def expects_more(cluster: Any) -> bool:
    """Say whether a cluster's own object still has workers to come: jobs in a queue, scaling.

    Those may take hours; who waits for them waits for no fault.
    """
    adaptive = getattr(cluster, "_adaptive", None)
    if getattr(adaptive, "periodic_callback", None) is not None:
        return True
    workers = getattr(cluster, "workers", None)
    return isinstance(workers, Mapping) and any(
        getattr(worker, "job_id", None) for worker in workers.values()
    )


def _names(name: Any, spec: Mapping[str, Any]) -> set[Any]:
    return {f"{name}{suffix}" for suffix in spec.get("group", ())} or {name}


def _is_ssh(worker: Any) -> bool:
    return hasattr(worker, "proc") and hasattr(worker, "connection")


def _ended(worker: Any) -> bool:
    """Say whether what was started over SSH has ended, or its connection has."""
    process = worker.proc
    try:
        return process is None or process.exit_status is not None or process.is_closing()
    except (AssertionError, AttributeError):  # of a channel that is gone
        return True
