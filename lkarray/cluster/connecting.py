"""`connect`: one call for a laptop, hosts over SSH, Slurm, Kubernetes, GPUs, or an address."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distributed import Client, Security
from distributed.core import Status

from lkarray.arguments import COUNT, POSITIVE, checked
from lkarray.cluster.opening import LOOPBACK, OPENERS, Plan, tls_settings
from lkarray.cluster.reaching import answering, await_workers, reach, started
from lkarray.cluster.replacing import Keeper
from lkarray.cluster.versions import refuse_mismatch
from lkarray.cluster.watching import end_watch, watch_for_good
from lkarray.engine.plan import memory_budget

logger = logging.getLogger("lkarray")

_ADDRESSES = ("tcp", "tls", "ws", "wss", "ucx", "inproc")
#: Kinds of targets that start all their workers at once, so that all are waited for.
_PART = 10.0  # seconds in which a part of what was opened has closed
_WHOLE = ("local", "cuda", "address")


class _Owner(Client):
    """A client that closes the cluster that was opened for it."""

    def __init__(self, cluster: Any, **options: Any) -> None:
        self._opened = cluster
        super().__init__(cluster, **options)

    def close(self, *args: Any, **options: Any) -> Any:
        """Close the client, then the cluster."""
        end_watch(self)
        try:
            return super().close(*args, **options)
        finally:
            opened, self._opened = self._opened, None
            if opened is not None:
                _close(opened)


def _close(cluster: Any) -> None:
    """Close a cluster, and what is left of one whose scheduler is gone."""
    try:
        cluster.close()
    except (OSError, RuntimeError) as error:
        logger.warning("what was opened did not close as it should: %s", error)
        for part in (*getattr(cluster, "workers", {}).values(), cluster.scheduler):
            with suppress(Exception):
                cluster.sync(part.close, callback_timeout=_PART)
        cluster.status = Status.closed


@checked(workers=COUNT, threads=COUNT, timeout=POSITIVE)
def connect(
    target: str = "local",
    *,
    workers: int | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
    tls: str | Path | None = None,
    dashboard: str | None = LOOPBACK,
    timeout: float = 60.0,
    **options: Any,
) -> Client:
    """Connect to a Dask cluster, starting one where the target says so.

    Parameters
    ----------
    target
        ``"local"``: processes on this machine. ``"tcp://host:8786"`` or ``"tls://host:8786"``:
        a scheduler that runs. ``"ssh://host1,host2"``: a scheduler on the first host and workers
        on all; one that is named by its address listens there and nowhere else. ``"slurm"``: jobs,
        by dask-jobqueue and its ``jobqueue.yaml``. ``"kubernetes://name"``: a ``DaskCluster`` that
        runs; ``"kubernetes"``: a new one, of ``image=``; both by the Dask operator. ``"cuda"``: one
        worker for each GPU of this machine, by dask-cuda.
    workers
        How many: processes of ``"local"``, processes of each host of ``ssh``, jobs of ``slurm``,
        pods of ``kubernetes``. By default one for each core of ``"local"`` up to 8 (memory
        permitting), one for each host, one job, one pod. Of what runs already, an address or
        ``kubernetes://name``: how many to wait for (1).
    threads
        Threads of each worker (of each job of ``slurm``); by default the cores shared evenly on
        ``"local"``, and what the target's own configuration says elsewhere.
    memory
        Limit of each worker (of each job of ``slurm``), in bytes or as in ``"4 GiB"``. A worker
        beyond 95% of it is restarted and its tasks run again; a kernel's budget is half of it.
        Default: nine tenths of this machine's memory shared evenly on ``"local"``.
    tls
        Folder with ``ca.pem``, ``cert.pem`` and ``key.pem``
        (``cluster/tls/make_certificates.sh`` makes them); without it, what Dask's own
        configuration says. Not for ``kubernetes``, whose operator knows none.
    dashboard
        ``host:port`` of the dashboard of a cluster that is opened here; another port where that
        one is taken; ``None`` for none. The default is seen from this machine alone.
    timeout
        Seconds to wait for the scheduler, and for the first workers.
    **options
        Passed on to what opens the cluster: ``LocalCluster``, ``SSHCluster``
        (``connect_options``, ``remote_python``), ``SLURMCluster`` (``queue``, ``walltime``),
        ``KubeCluster`` (``image``, ``namespace``), ``LocalCUDACluster``.

    Returns
    -------
    distributed.Client
        The default client of this process from here on, so that kernels compute there; pass it
        as ``client=`` to `sample` and `audit`. As a context manager, or by ``close()``, it closes
        what was opened for it and nothing else: a cluster reached by its address goes on.

    Raises
    ------
    ValueError
        The target, or an option for it, is not understood.
    ClusterError
        Nothing answers, no worker came in time, or client and cluster differ in a package; what
        was opened is closed again.
    MissingPackageError
        The target needs an optional package.

    Notes
    -----
    While the client is open its workers are watched, and whatever keeps tasks waiting is said by
    the logger ``"lkarray"``. Of a cluster that was opened here, workers that are gone for good are
    started anew: processes of ``"local"``, ``"cuda"`` and ``ssh``, jobs of ``slurm`` that ended
    (those that are queued are waited for); Kubernetes restarts its own pods. Where nothing can be
    started, as of an address, what waits ends with a `ClusterError` within half a minute; so it
    does after five minutes of attempts in vain.

    Workers have one BLAS thread for each of their own threads, whatever opened them (an address:
    see `check`). Schedulers and workers of ``"local"`` listen on the loopback interface.

    Examples
    --------
    >>> import lkarray as lk
    >>> with lk.cluster.connect("local", workers=1, dashboard=None) as client:
    ...     len(client.scheduler_info()["workers"])
    1
    """
    kind, rest = _split(target)
    _check_counts(workers=workers, threads=threads)
    limit = None if memory is None else memory_budget(memory)
    security = _security(tls, target)
    if kind == "address":
        if options or threads is not None or memory is not None:
            given = [*options, *(n for n, v in (("threads", threads), ("memory", memory)) if v)]
            raise ValueError(f"{target} runs already: {given} are settings of whoever started it")
        client: Client = reach(lambda: answering(rest, security, timeout), target)
        watch_for_good(client, target)
    else:
        plan = Plan(rest, workers, threads, limit, security, dashboard, options)
        cluster = reach(lambda: started(lambda: OPENERS[kind](plan), target, timeout), target)
        try:
            client = reach(lambda: _Owner(cluster, timeout=timeout), target)
        except BaseException:
            cluster.close()
            raise
        settings = tls_settings(security) if kind == "ssh" else {}
        watch_for_good(client, target, Keeper(cluster, target, settings))
    try:
        runs = kind in _WHOLE or (kind == "kubernetes" and rest)
        await_workers(client, (workers if runs else None) or 1, timeout, target)
        refuse_mismatch(client)
    except BaseException:
        client.close()
        raise
    return client


def _split(target: str) -> tuple[str, str]:
    """Return the kind of a target, and what follows it."""
    if not isinstance(target, str):
        raise TypeError(f"target is a string such as 'local', not {type(target).__name__}")
    scheme, mark, rest = target.partition("://")
    if scheme in OPENERS and (not mark or scheme in ("ssh", "kubernetes")):
        return scheme, rest.strip("/")
    if mark and scheme in _ADDRESSES:
        if scheme != "inproc" and urlsplit(target).port is None:
            raise ValueError(f"{target} names no port; a scheduler's own is {target}:8786")
        return "address", target
    if not mark and target.rpartition(":")[2].isdigit() and ":" in target:
        return "address", f"tcp://{target}"
    raise ValueError(
        f"target {target!r} is not one of {sorted(OPENERS)}, 'ssh://host1,host2', "
        "'kubernetes://name', or an address as tcp://host:8786"
    )


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise ValueError(f"{name} is a positive number, not {value!r}")


def _security(tls: str | Path | None, target: str) -> Security | None:
    if tls is None:
        return Security() if target.startswith("tls://") else None
    folder = Path(tls).expanduser()
    ca, cert, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    missing = [path.name for path in (ca, cert, key) if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing}; cluster/tls/make_certificates.sh makes them")
    return Security(
        require_encryption=True,
        tls_ca_file=str(ca),
        **{
            f"tls_{who}_{what}": str(path)
            for who in ("client", "scheduler", "worker")
            for what, path in (("cert", cert), ("key", key))
        },
    )
