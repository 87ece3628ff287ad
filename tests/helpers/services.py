"""A real Slurm, and a real SSH server, on the loopback interface."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

INSTALL = "apt-get install --yes --no-install-recommends munge slurm-wlm"
_DAEMONS = ("munged", "slurmctld", "slurmd")
_SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

# More CPUs and memory than there may be, so that jobs are accepted as they are; credentials of
# five seconds, so that a requeued job starts after as many rather than after two minutes.
_CONFIG = """\
ClusterName=lkarray
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=65536
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A Slurm of one node; its commands find it by SLURM_CONF, which is set."""

    folder: Path

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of Slurm; return what it said on both channels."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *command: str, cwd: Path, **variables: str) -> str:
        """Submit a batch script; return the job's number."""
        return self.call("sbatch", "--parsable", *command, cwd=cwd, **variables).split()[0]

    def state(self, job: str) -> str:
        """Return a job's state and its exit code, as ``"COMPLETED 0:0"``."""
        told = dict(
            word.split("=", 1)
            for word in self.call("scontrol", "show", "job", "--oneliner", job).split()
            if "=" in word
        )
        return f"{told['JobState']} {told['ExitCode']}"

    def wait(self, job: str, wanted: Callable[[str], bool], seconds: float = 60) -> str:
        """Wait until a job's state is the one that is wanted; return it."""
        return wait_for(lambda: self.state(job), wanted, seconds)


def wait_for(ask: Callable[[], T], wanted: Callable[[T], bool], seconds: float = 30) -> T:
    """Ask until the answer is wanted; return it."""
    end = time.monotonic() + seconds
    while not wanted(found := ask()):
        assert time.monotonic() < end, f"still {found!r} after {seconds} s"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running Slurm, or a skip that says how to install it."""
    programs = {name: shutil.which(name, path=_SBIN) for name in _DAEMONS}
    if not sys.platform.startswith("linux") or None in programs.values():
        pytest.skip(f"no Slurm here: {INSTALL}")
    # Not pytest's own folder: a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="lk-slurm-"))
    started: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            try:
                _start(folder, programs, started)
            except AssertionError as error:
                logs = "\n".join(path.read_text() for path in folder.glob("*.out"))
                raise AssertionError(f"Slurm does not start: {error}\n{logs}") from None
            found = Slurm(folder)
            yield found
            found.call("scancel", "--user", getuser())
            wait_for(lambda: found.call("squeue", "--noheader"), lambda jobs: not jobs)
        finally:
            for process in reversed(started):  # the node, the controller, munge
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, programs: dict[str, str], started: list[subprocess.Popen[bytes]]) -> None:
    """Start the daemons, adding each to those started, until the node is idle."""
    _configure(folder)
    for command in _commands(folder, programs):
        with (folder / f"{Path(command[0]).name}.out").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        if command[0] == programs["munged"]:
            wait_for((folder / "munge.socket").is_socket, bool)
    wait_for(lambda: _node_state(Slurm(folder)), lambda state: state.startswith("idle"))


def _configure(folder: Path) -> None:
    folder.chmod(0o755)  # munge wants its socket within everybody's reach; the key is not
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    controller, node = _free_ports(2)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        _CONFIG.format(host=host, folder=folder, user=getuser(), controller=controller, node=node)
    )


def _commands(folder: Path, programs: dict[str, str]) -> list[list[str]]:
    config = str(folder / "slurm.conf")
    host = socket.gethostname().partition(".")[0]
    munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
    munge |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    return [
        [programs["munged"], "--foreground", *(f"--{k}={folder / v}" for k, v in munge.items())],
        [programs["slurmctld"], "-D", "-f", config],
        [programs["slurmd"], "-D", "-N", host, "-f", config],
    ]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _node_state(slurm: Slurm) -> str:
    try:
        return slurm.call("sinfo", "--noheader", "--format=%t")
    except AssertionError as error:  # the controller does not listen yet
        return str(error)


@pytest.fixture
def ssh_options(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What `SSHCluster` needs to reach the host ``127.0.0.1``, where an SSH server runs."""
    asyncssh = pytest.importorskip("asyncssh")
    key = tmp_path / "key"
    pair = asyncssh.generate_private_key("ssh-ed25519")
    pair.write_private_key(key)
    pair.write_public_key(f"{key}.pub")
    command = [sys.executable, str(Path(__file__).with_name("ssh_server.py")), str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            connect = {"port": port, "known_hosts": None, "client_keys": [str(key)]}
            connect["username"] = getuser()
            yield {"connect_options": connect, "remote_python": sys.executable}
        finally:
            server.terminate()
