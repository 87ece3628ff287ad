"""Clients that answer in time, and failures to reach a cluster in words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import dask
from distributed import Client, Security, default_client

from lkarray.errors import ClusterError, MissingPackageError

logger = logging.getLogger("lkarray")

_GRACE = 2.0  # seconds beyond a timeout until an answer is given up
_PAUSE = 1.0  # seconds until a cluster is opened again
_DIED = "Nanny failed to start worker process"  # a process that ended without an error of its own


def answering(address: str, security: Security | None, timeout: float) -> Client:
    """Return a client, unless whatever listens at the address never says anything.

    Distributed itself would wait for its answer without end.
    """
    answer: Future[Client] = Future()

    def call() -> None:
        try:
            answer.set_result(Client(address, security=security, timeout=timeout))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True, name="lkarray-connect").start()
    try:
        return answer.result(timeout + _GRACE)
    except TimeoutError:
        if answer.done() and answer.exception():
            raise
        answer.add_done_callback(lambda late: late.exception() or late.result().close())
        raise ClusterError(
            f"{address} accepts connections but did not answer within {timeout:g} s; is a Dask "
            "scheduler what listens there, and is it well?"
        ) from None


def reach(call: Callable[[], Any], target: str) -> Any:
    """Return what a call opens; turn its failure into words."""
    before, scheduler = _default(), dask.config.get("scheduler", None)
    try:
        return call()
    except BaseException as error:
        # A client that fails leaves itself as Dask's scheduler, where everything would wait for it.
        left = _default()
        if left is not None and left is not before:
            with suppress(Exception):
                left.close(timeout=1)
        dask.config.set(scheduler=scheduler)
        if isinstance(error, ClusterError | MissingPackageError):
            raise
        if not isinstance(error, Exception):
            raise
        if isinstance(error, TypeError | ValueError) and not target.startswith("tls://"):
            raise  # an option that what opens the cluster does not know
        cause = str(error).strip() or type(error).__name__
        raise ClusterError(
            f"cannot reach or start {target}: {cause}. Is its scheduler up, are the address and "
            "the certificates right? Nothing was started"
        ) from error


def started(call: Callable[[], Any], target: str, timeout: float) -> Any:
    """Return what a call opens, called again if a worker's process dies while it starts."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except RuntimeError as error:
            if _DIED not in str(error.__cause__) or time.monotonic() > deadline:
                raise
            logger.warning("a worker of %s died while it started; starting again", target)
            time.sleep(_PAUSE)


def _default() -> Client | None:
    with suppress(ValueError):
        return default_client()
    return None


def await_workers(client: Client, workers: int, timeout: float, target: str) -> None:
    """Wait for so many workers, and say how many there are where they do not come."""
    try:
        client.wait_for_workers(workers, timeout=timeout)
    except TimeoutError:
        came = len(client.scheduler_info(n_workers=-1)["workers"])
        raise ClusterError(
            f"{came or 'no'} worker{'s' * (came > 1)} of {target} came within {timeout:g} s, not "
            f"{workers}; look at the queue, or the workers' logs, or wait longer with timeout="
        ) from None
