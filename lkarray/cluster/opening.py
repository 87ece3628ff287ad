"""What opens a Dask cluster of each kind, and with which settings."""

from __future__ import annotations

import importlib
import ipaddress
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import LocalCluster, Security, SpecCluster
from distributed.deploy.cluster import Cluster

from lkarray.engine.machine import machine_memory
from lkarray.errors import MissingPackageError

#: Where the dashboard of a cluster that `connect` opens listens: this machine alone.
LOOPBACK = "127.0.0.1:8787"

#: BLAS and OpenMP threads of a worker's process: tasks run side by side instead.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

_MOST_PROCESSES = 8  # of "local": more threads in a process share more of its panel cache
_LEAST_BYTES = 2 * 2**30  # of a worker of "local"; torch alone takes a quarter of that
_MACHINE_SHARE = 0.9  # of the machine's memory that workers of "local" have together
_STARTING = 240.0  # seconds in which a worker of "local" has started, or is ended
_EXTRAS = {"dask_jobqueue": "slurm", "dask_kubernetes.operator": "kubernetes", "dask_cuda": "cuda"}


@dataclass(frozen=True)
class Plan:
    """What a cluster is opened with."""

    rest: str
    workers: int | None
    threads: int | None
    memory: int | None
    security: Security | None
    dashboard: str | None
    options: dict[str, Any]

    @property
    def shows(self) -> bool:
        """Whether there is a dashboard."""
        return self.dashboard is not None

    def listens(self) -> str:
        """Return where the dashboard is, on any free port where its own is taken.

        Without one a scheduler still serves its health and metrics somewhere.
        """
        if self.dashboard is None:
            return "127.0.0.1:0"
        host, mark, port = self.dashboard.rpartition(":")
        if not mark or not port.isdigit() or not host:
            raise ValueError(f"dashboard is host:port, as {LOOPBACK!r}, not {self.dashboard!r}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError:
                return f"{host}:0"
        return self.dashboard

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


class _Local(LocalCluster):
    """Processes of this machine, none of which is given up while it starts again.

    Distributed would end it after 15 s, and a busy machine takes longer to start one; `replacing`
    sees which are gone for good.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        Cluster._update_worker_status(self, op, msg)


def _local(plan: Plan) -> Any:
    workers, threads, memory = local_shape(
        plan.workers, plan.threads, plan.memory, cores=CPU_COUNT, machine=machine_memory()
    )
    settings = {
        "n_workers": workers,
        "threads_per_worker": threads,
        "memory_limit": memory,
        "dashboard_address": plan.listens(),
        "scheduler_kwargs": {"dashboard": plan.shows},
        "security": plan.security,
        "host": "127.0.0.1",
        "death_timeout": _STARTING,
    }
    env = ONE_THREAD | plan.options.get("env", {})
    return _Local(**(settings | plan.options | {"env": env}))


def _ssh(plan: Plan) -> Any:
    _package("asyncssh", "ssh")
    from distributed.deploy.ssh import Scheduler, Worker

    hosts = [host for host in plan.rest.split(",") if host]
    if not hosts:
        raise ValueError("ssh:// needs hosts: ssh://host1,host2 (the first runs the scheduler)")
    options = dict(plan.options)
    # Without a dashboard each still serves its health and metrics: to its own host.
    worker = {
        "n_workers": plan.workers or 1,
        "env": ONE_THREAD,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
    }
    if plan.threads:
        worker["nthreads"] = plan.threads
    if plan.memory:
        worker["memory_limit"] = plan.memory
    worker |= options.pop("worker_options", {})
    scheduler = {"dashboard_address": plan.listens(), "dashboard": plan.shows}
    scheduler = _bound(hosts[0]) | scheduler | options.pop("scheduler_options", {})
    worker_class = options.pop("worker_class", "distributed.Nanny")
    settings = {name: options.pop(name, None) for name in ("connect_options", "remote_python")}

    def process(cls: type, at: int, host: str, kwargs: Mapping[str, Any], **more: Any) -> Any:
        """Return what runs on a host; lists of settings name the scheduler first."""
        own = {name: x[at] if isinstance(x, list) else x for name, x in settings.items()}
        own["connect_options"] = own["connect_options"] or {}
        return {"cls": cls, "options": {"address": host, "kwargs": kwargs} | own | more}

    workers = {
        at: process(Worker, at + 1, host, _bound(host) | worker, worker_class=worker_class)
        for at, host in enumerate(hosts)
    }
    # What is started over SSH takes its certificates from Dask's configuration, which is sent.
    with dask.config.set(tls_settings(plan.security)):
        return SpecCluster(
            workers,
            process(Scheduler, 0, hosts[0], scheduler),
            name="SSHCluster",
            security=plan.security,
            **options,
        )


def _bound(host: str) -> dict[str, Any]:
    """Return where a server on a host listens: on the address that names it, and no other.

    One that is known by a name listens on every interface, since what a host takes its own name
    for is often an address that others do not reach.
    """
    try:
        return {"host": str(ipaddress.ip_address(host))}
    except ValueError:
        return {}


def tls_settings(security: Any) -> dict[str, Any]:
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


def _slurm(plan: Plan) -> Any:
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
    configured = asked.get("scheduler-options") or {}
    scheduler = {"dashboard_address": plan.listens(), "dashboard": plan.shows}
    if plan.dashboard == LOOPBACK:  # a default gives way to the user's file, a setting does not
        scheduler |= configured
    settings["scheduler_options"] = configured | scheduler | settings.get("scheduler_options", {})
    cluster = jobqueue.SLURMCluster(**settings)
    cluster.scale(jobs=plan.workers or 1)
    return cluster


def _kubernetes(plan: Plan) -> Any:
    if plan.security is not None:
        raise ValueError(
            "kubernetes takes no tls=: the operator reaches schedulers without; keep others out by "
            "the NetworkPolicy of cluster/kubernetes/daskcluster.yaml"
        )
    operator = _package("dask_kubernetes.operator")
    if plan.rest:
        given = [n for n in ("threads", "memory") if getattr(plan, n) is not None]
        if given:
            raise ValueError(f"{plan.rest} runs already: {given} are settings of its manifest")
        return operator.KubeCluster.from_name(plan.rest, **plan.options)
    options = dict(plan.options)
    if "custom_cluster_spec" not in options:
        options["custom_cluster_spec"] = _dask_cluster(plan, operator, options)
    return operator.KubeCluster(**options)


def _dask_cluster(plan: Plan, operator: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the resource of a new cluster, taking from the options what goes into it.

    The operator's own template names commands that Dask has no more, and leaves the entry point
    of the image before them.
    """
    image = options.pop("image", None)
    if image is None:
        raise ValueError(
            "a new cluster on kubernetes needs image=, with lkarray in it: see "
            "cluster/kubernetes/Containerfile"
        )
    resources = options.pop("resources", None)
    if resources is None and plan.memory:
        # A tenth more, for the process that watches over the worker.
        resources = {"limits": {"memory": str(plan.memory * 10 // 9)}}
    more = ("idle_timeout", "scheduler_service_type")
    spec: dict[str, Any] = operator.make_cluster_spec(
        name=options.pop("name", None) or f"lkarray-{uuid.uuid4().hex[:8]}",
        image=image,
        n_workers=plan.workers or 1,
        resources=resources,
        env=ONE_THREAD | dict(options.pop("env", {})),
        **{name: options.pop(name) for name in more if name in options},
    )
    commands = {
        "scheduler": ["scheduler", "--host", "0.0.0.0"] + ["--no-dashboard"] * (not plan.shows),
        "worker": ["worker", "--name", "$(DASK_WORKER_NAME)", "--no-dashboard"]
        + (["--nthreads", str(plan.threads)] if plan.threads else [])
        + (["--memory-limit", f"{plan.memory}B"] if plan.memory else []),
    }
    for part, words in commands.items():
        (container,) = spec["spec"][part]["spec"]["containers"]
        container |= {"command": ["dask"], "args": words}
    return spec


def _cuda(plan: Plan) -> Any:
    dask_cuda = _package("dask_cuda")
    settings = plan.given(
        n_workers=plan.workers,
        threads_per_worker=plan.threads,
        memory_limit=plan.memory,
        security=plan.security,
    )
    fixed = {"dashboard_address": plan.listens(), "host": "127.0.0.1", "resources": {"GPU": 1}}
    return dask_cuda.LocalCUDACluster(**(fixed | settings))


def _package(name: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        extra = extra or _EXTRAS[name]
        raise MissingPackageError(
            f"{error.name} is not installed: pip install 'lkarray[{extra}]'"
        ) from None


#: By kind of target.
OPENERS: Mapping[str, Callable[[Plan], Any]] = {
    "local": _local,
    "ssh": _ssh,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "cuda": _cuda,
}
