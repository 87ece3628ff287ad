"""`connect`: one call for a laptop, hosts over SSH, Slurm, Kubernetes, GPUs, or an address."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Security

from lkarray.cluster.reaching import answering, await_workers, reach
from lkarray.cluster.versions import refuse_mismatch
from lkarray.engine.plan import machine_memory, memory_budget
from lkarray.errors import MissingPackageError

#: Where the dashboard of a cluster that `connect` opens listens: this machine alone.
LOOPBACK = "127.0.0.1:8787"

#: BLAS and OpenMP threads of a worker's process: tasks run side by side instead.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

_MOST_PROCESSES = 8  # of "local": more threads in a process share more of its panel cache
_LEAST_BYTES = 2 * 2**30  # of a worker of "local"; torch alone takes a quarter of that
_MACHINE_SHARE = 0.9  # of the machine's memory that workers of "local" have together
_ADDRESSES = ("tcp", "tls", "ws", "wss", "ucx", "inproc")
_EXTRAS = {"dask_jobqueue": "slurm", "dask_kubernetes.operator": "kubernetes", "dask_cuda": "cuda"}


class _Owner(Client):
    """A client that closes the cluster that was opened for it."""

    def __init__(self, cluster: Any, **options: Any) -> None:
        self._opened = cluster
        super().__init__(cluster, **options)

    def close(self, *args: Any, **options: Any) -> Any:
        """Close the client, then the cluster."""
        try:
            return super().close(*args, **options)
        finally:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.close()


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
        on all. ``"slurm"``: jobs, by dask-jobqueue and its ``jobqueue.yaml``. ``"kubernetes"``
        or ``"kubernetes://name"``: the Dask operator. ``"cuda"``: one worker for each GPU of
        this machine, by dask-cuda.
    workers
        How many: processes of ``"local"``, processes of each host of ``ssh``, jobs of ``slurm``,
        pods of ``kubernetes``. By default one for each core of ``"local"`` up to 8 (memory
        permitting), one for each host, one job, and what the operator's own default is. For an
        address: how many to wait for (1).
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
        configuration says.
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
    else:
        shows = dashboard is not None
        plan = _Plan(rest, workers, threads, limit, security, _free(dashboard), shows, options)
        cluster = reach(lambda: _OPENERS[kind](plan), target)
        try:
            client = reach(lambda: _Owner(cluster, timeout=timeout), target)
        except BaseException:
            cluster.close()
            raise
    try:
        await_workers(client, workers or 1, timeout, target, all_of_them=kind == "local")
        refuse_mismatch(client)
    except BaseException:
        client.close()
        raise
    return client


@dataclass(frozen=True)
class _Plan:
    """What a cluster is opened with."""

    rest: str
    workers: int | None
    threads: int | None
    memory: int | None
    security: Security | None
    dashboard: str
    shows: bool
    options: dict[str, Any]

    def given(self, **named: Any) -> dict[str, Any]:
        """Return the named settings that were given, and the options."""
        return {k: v for k, v in named.items() if v is not None} | self.options


def local_shape(
    workers: int | None, threads: int | None, memory: int | None, *, cores: int, machine: int
) -> tuple[int, int, int]:
    """Return processes, threads of each and bytes of each, for a machine.

    Parameters
    ----------
    workers, threads, memory
        What the user asked for; ``None`` leaves it to the machine.
    cores, machine
        What there is; ``machine`` in bytes.
    """
    share = int(machine * _MACHINE_SHARE)
    if workers is None:
        most = max(1, cores // threads) if threads else min(cores, _MOST_PROCESSES)
        workers = max(1, min(most, share // (memory or _LEAST_BYTES)))
    return workers, threads or max(1, cores // workers), memory or share // workers


def _local(plan: _Plan) -> Any:
    workers, threads, memory = local_shape(
        plan.workers, plan.threads, plan.memory, cores=CPU_COUNT, machine=machine_memory()
    )
    settings = {
        "n_workers": workers,
        "threads_per_worker": threads,
        "memory_limit": memory,
        "dashboard_address": plan.dashboard,
        "scheduler_kwargs": {"dashboard": plan.shows},
        "security": plan.security,
        "host": "127.0.0.1",
    }
    env = ONE_THREAD | plan.options.get("env", {})
    return LocalCluster(**(settings | plan.options | {"env": env}))


def _ssh(plan: _Plan) -> Any:
    _package("asyncssh", "ssh")
    from distributed import SSHCluster

    hosts = [host for host in plan.rest.split(",") if host]
    if not hosts:
        raise ValueError("ssh:// needs hosts: ssh://host1,host2 (the first runs the scheduler)")
    options = dict(plan.options)
    worker = {"n_workers": plan.workers or 1, "env": ONE_THREAD, "dashboard": False}
    if plan.threads:
        worker["nthreads"] = plan.threads
    if plan.memory:
        worker["memory_limit"] = plan.memory
    worker |= options.pop("worker_options", {})
    # Each listens on the address by which its host was named, not on every interface.
    scheduler = {
        "host": hosts[0], "dashboard_address": plan.dashboard, "dashboard": plan.shows
    }  # fmt: skip
    scheduler |= options.pop("scheduler_options", {})
    # What is started over SSH takes its certificates from Dask's configuration, which is sent.
    with dask.config.set(_tls_settings(plan.security)):
        return SSHCluster(
            [hosts[0], *hosts], worker_options=worker, scheduler_options=scheduler,
            security=plan.security, **options,
        )  # fmt: skip


def _tls_settings(security: Any) -> dict[str, Any]:
    """Return Dask's own settings for these certificates."""
    if security is None or not security.require_encryption:
        return {}
    comm = "distributed.comm"
    out: dict[str, Any] = {
        f"{comm}.require-encryption": True,
        f"{comm}.default-scheme": "tls",
        f"{comm}.tls.ca-file": security.tls_ca_file,
    }
    for who in ("client", "scheduler", "worker"):
        for what in ("cert", "key"):
            out[f"{comm}.tls.{who}.{what}"] = getattr(security, f"tls_{who}_{what}")
    return out


def _slurm(plan: _Plan) -> Any:
    jobqueue = _package("dask_jobqueue")
    memory = None if plan.memory is None else f"{plan.memory}B"
    settings = plan.given(cores=plan.threads, memory=memory, security=plan.security)
    # Beside what the user's jobqueue.yaml says, not in its place.
    asked = dask.config.get("jobqueue.slurm", {})
    settings.setdefault(
        "job_script_prologue",
        [f"export {k}={v}" for k, v in ONE_THREAD.items()]
        + list(asked.get("job-script-prologue") or []),
    )
    scheduler = {"dashboard_address": plan.dashboard, "dashboard": plan.shows}
    more = settings.get("scheduler_options", asked.get("scheduler-options") or {})
    settings["scheduler_options"] = scheduler | more
    cluster = jobqueue.SLURMCluster(**settings)
    cluster.scale(jobs=plan.workers or 1)
    return cluster


def _kubernetes(plan: _Plan) -> Any:
    operator = _package("dask_kubernetes.operator")
    options = dict(plan.options)
    resources = options.pop("resources", None)
    if resources is None and plan.memory:
        resources = {"limits": {"memory": str(plan.memory)}}
    env = ONE_THREAD | dict(options.pop("env", {}))
    settings = {"name": plan.rest or None, "n_workers": plan.workers, "resources": resources}
    if plan.threads:
        settings["worker_command"] = ["dask-worker", "--nthreads", str(plan.threads)]
    given = {k: v for k, v in settings.items() if v is not None}
    return operator.KubeCluster(**(given | {"env": env} | options))


def _cuda(plan: _Plan) -> Any:
    dask_cuda = _package("dask_cuda")
    settings = plan.given(
        n_workers=plan.workers, threads_per_worker=plan.threads, memory_limit=plan.memory,
        security=plan.security,
    )  # fmt: skip
    fixed = {"dashboard_address": plan.dashboard, "host": "127.0.0.1", "resources": {"GPU": 1}}
    return dask_cuda.LocalCUDACluster(**(fixed | settings))


_OPENERS: Mapping[str, Callable[[_Plan], Any]] = {
    "local": _local,
    "ssh": _ssh,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "cuda": _cuda,
}


def _split(target: str) -> tuple[str, str]:
    """Return the kind of a target, and what follows it."""
    if not isinstance(target, str):
        raise TypeError(f"target is a string such as 'local', not {type(target).__name__}")
    scheme, mark, rest = target.partition("://")
    if scheme in _OPENERS and (not mark or scheme in ("ssh", "kubernetes")):
        return scheme, rest.strip("/")
    if mark and scheme in _ADDRESSES:
        if scheme != "inproc" and urlsplit(target).port is None:
            raise ValueError(f"{target} names no port; a scheduler's own is {target}:8786")
        return "address", target
    if not mark and target.rpartition(":")[2].isdigit() and ":" in target:
        return "address", f"tcp://{target}"
    raise ValueError(
        f"target {target!r} is not one of {sorted(_OPENERS)}, 'ssh://host1,host2', "
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
        require_encryption=True, tls_ca_file=str(ca),
        **{f"tls_{who}_{what}": str(path) for who in ("client", "scheduler", "worker")
           for what, path in (("cert", cert), ("key", key))},
    )  # fmt: skip


def _free(dashboard: str | None) -> str:
    """Return the address, with any free port where its own is taken.

    Without a dashboard a scheduler still serves its health and metrics somewhere.
    """
    if dashboard is None:
        return "127.0.0.1:0"
    host, mark, port = dashboard.rpartition(":")
    if not mark or not port.isdigit() or not host:
        raise ValueError(f"dashboard is host:port, as {LOOPBACK!r}, not {dashboard!r}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return f"{host}:0"
    return dashboard


def _package(name: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        extra = extra or _EXTRAS[name]
        raise MissingPackageError(
            f"{error.name} is not installed: pip install 'lkarray[{extra}]'"
        ) from None
