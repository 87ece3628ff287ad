"""Hosts of a test's own: network name spaces on one machine, each with its address and link."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 8786


class NoHosts(Exception):
    """Name spaces cannot be made here."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Host:
    """One name space; its link can be cut, and its processes are its own."""

    def __init__(self, name: str, address: str, bridge: str) -> None:
        self.name, self.address = name, address
        number = address.rpartition(".")[2]
        self.link = f"{bridge}-{number}"
        self.processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", self.link, "master", bridge)
        ip("link", "set", self.link, "up")
        ip("-n", name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")

    def start(self, *command: str, log: Path, **environ: str) -> subprocess.Popen[bytes]:
        with open(log, "ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=os.environ | environ,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Cut the link: nothing comes or goes, and nobody is told."""
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        ip("link", "set", self.link, "up")

    def pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, check=True)
        return [int(word) for word in done.stdout.split()]

    def remove(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for _ in range(100):
            if not (left := self.pids()):
                break
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, 9)
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        assert not left, f"processes {left} outlived their host"


@contextmanager
def network(count: int, subnet: int) -> Iterator[list[Host]]:
    """Make hosts on one bridge, ``10.213.SUBNET.2`` and on; remove all of it at the end.

    They are seen from this machine alone; the first address is this process's side.
    """
    bridge = f"lk{os.getpid() % 100_000}b{subnet}"
    made: list[Host] = []
    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("addr", "add", f"10.213.{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number in range(2, 2 + count):
            made.append(Host(f"{bridge}-{number}", f"10.213.{subnet}.{number}", bridge))
        yield made
    finally:
        try:
            for host in made:
                host.remove()
        finally:
            subprocess.run(["ip", "link", "del", bridge], check=False)


#: A host that falls silent is given up within seconds, not minutes.
IMPATIENT = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "6 s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12 s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "6 s",
}


def start_scheduler(host: Host, log: Path, *more: str, scheme: str = "tcp", **environ: str) -> str:
    """Start a scheduler on a host, listening on its own address; return that address."""
    host.start(
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        host.address,
        "--port",
        str(PORT),
        "--no-dashboard",
        "--dashboard-address",
        "127.0.0.1:0",
        *more,
        log=log,
        **(IMPATIENT | environ),
    )
    return f"{scheme}://{host.address}:{PORT}"


def start_worker(host: Host, scheduler: str, log: Path, *more: str, **environ: str) -> None:
    """Start a worker of one thread on a host."""
    host.start(
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        scheduler,
        "--host",
        host.address,
        "--nworkers",
        "1",
        "--nthreads",
        "1",
        "--memory-limit",
        "2GiB",
        "--no-dashboard",
        "--death-timeout",
        "60",
        *more,
        log=log,
        OMP_NUM_THREADS="1",
        **IMPATIENT,
        **environ,
    )
