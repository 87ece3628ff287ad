"""`connect`: what each target opens, what it closes, and what it says when that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import dask.array as da
import psutil
import pytest
from distributed import Client, LocalCluster, default_client

import lkarray as lk
from lkarray import errors
from lkarray.cluster import opening, reaching, versions

GIB = 2**30


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_local__closes_what_it_opened():
    with lk.cluster.connect("local", workers=2, memory="1 GiB", dashboard=None) as client:
        assert default_client() is client
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [(w["nthreads"], w["memory_limit"]) for w in workers] == [(1, GIB)] * 2
        pids = list(client.run(os.getpid).values())
        assert set(client.run(os.environ.get, "OMP_NUM_THREADS").values()) == {"1"}
        assert set(client.run(os.environ.get, "OPENBLAS_NUM_THREADS").values()) == {"1"}
        address = client.scheduler.address
    assert alive(pids) == []
    with pytest.raises(ValueError, match="No clients found"):
        default_client()
    with pytest.raises(errors.ClusterError, match="cannot reach or start tcp://"):
        lk.cluster.connect(address, timeout=0.5)
    with pytest.raises(errors.ClusterError, match="certificates"):
        lk.cluster.connect(address.replace("tcp://", "tls://"), timeout=0.5)
    assert da.ones(3, chunks=1).sum().compute() == 3  # not left to a scheduler that is gone


def test_close__does_the_same_as_leaving_the_block():
    client = lk.cluster.connect("local", workers=1, dashboard=None)
    pids = list(client.run(os.getpid).values())
    client.close()
    client.close()
    assert alive(pids) == []


def test_address__leaves_the_cluster_running():
    with LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0") as cluster:
        with lk.cluster.connect(cluster.scheduler_address) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        # Without the scheme, as schedulers print it.
        with lk.cluster.connect(cluster.scheduler_address.removeprefix("tcp://")) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        with pytest.raises(ValueError, match="settings of whoever started it"):
            lk.cluster.connect(cluster.scheduler_address, memory="1 GiB")


def test_local__listens_on_loopback_only():
    """The scheduler, its dashboard, the nannies, the workers, their servers."""
    with lk.cluster.connect("local", workers=2, memory="1 GiB") as client:
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        processes = [psutil.Process(), *map(psutil.Process, client.run(os.getpid).values())]
        listening = {
            (process.pid, c.laddr)
            for process in processes
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
    assert len({pid for pid, _ in listening}) == 3
    assert {address.ip for _, address in listening} == {"127.0.0.1"}


def test_dashboard__takes_another_port_when_its_own_is_taken():
    with (
        lk.cluster.connect("local", workers=1) as one,
        lk.cluster.connect("local", workers=1) as two,
    ):
        assert one.dashboard_link != two.dashboard_link


@pytest.mark.parametrize(
    ("asked", "machine", "shape"),
    [
        # A laptop, a big machine, one with little memory, and what the user says.
        ({}, (2, 24 * GIB), (2, 1, int(24 * GIB * 0.9) // 2)),
        ({}, (64, 512 * GIB), (8, 8, int(512 * GIB * 0.9) // 8)),
        ({}, (16, 8 * GIB), (3, 5, int(8 * GIB * 0.9) // 3)),
        ({}, (4, GIB), (1, 4, int(GIB * 0.9))),
        ({"threads": 4}, (16, 64 * GIB), (4, 4, int(64 * GIB * 0.9) // 4)),
        ({"memory": 4 * GIB}, (16, 24 * GIB), (5, 3, 4 * GIB)),
        ({"workers": 3, "threads": 2, "memory": GIB}, (2, 24 * GIB), (3, 2, GIB)),
    ],
)
def test_local_shape__fits_cores_and_memory(asked, machine, shape):
    given = {"workers": None, "threads": None, "memory": None} | asked
    cores, total = machine
    assert opening.local_shape(**given, cores=cores, machine=total) == shape


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("nowhere", {}, "target 'nowhere' is not one of"),
        ("http://host:80", {}, "is not one of"),
        ("tcp://host", {}, "names no port; a scheduler's own is tcp://host:8786"),
        ("ssh://", {}, "ssh:// needs hosts"),
        ("local", {"workers": 0}, "workers must be at least 1, not 0"),
        ("local", {"threads": 1.5}, "threads must be an integer"),
        ("local", {"memory": "much"}, "memory 'much' is not a number of bytes"),
        ("local", {"dashboard": "8787"}, "dashboard is host:port"),
        ("local", {"tls": "/nowhere"}, r"has no \['ca.pem', 'cert.pem', 'key.pem'\]"),
    ],
)
def test_connect__refuses_before_it_opens_anything(target, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lk.cluster.connect(target, **options)


def test_connect__names_the_extra_of_a_missing_package(monkeypatch):
    for module, target, extra in [
        ("dask_jobqueue", "slurm", "slurm"),
        ("dask_kubernetes.operator", "kubernetes", "kubernetes"),
        ("dask_cuda", "cuda", "cuda"),
        ("asyncssh", "ssh://one", "ssh"),
    ]:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(errors.MissingPackageError, match=rf"lkarray\[{extra}\]"):
            lk.cluster.connect(target)


def test_no_worker__is_said_and_closed(tmp_path):
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        with pytest.raises(errors.ClusterError, match=r"no worker of tcp.* came within 0.3 s"):
            lk.cluster.connect(cluster.scheduler_address, timeout=0.3)
        with pytest.raises(ValueError, match="No clients found"):
            default_client()


def test_silence__is_not_waited_for_without_end():
    """Something listens, and never says a word."""
    code = (
        "import socket, sys, lkarray as lk, dask.array as da\n"
        "if __name__ == '__main__':\n"
        "    listening = socket.create_server(('127.0.0.1', 0))\n"
        "    address = 'tcp://127.0.0.1:%d' % listening.getsockname()[1]\n"
        "    try:\n"
        "        lk.cluster.connect(address, timeout=1)\n"
        "    except lk.errors.ClusterError as error:\n"
        "        print(error)\n"
        "    print(da.ones(9, chunks=3).sum().compute())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "accepts connections but did not answer within 1 s" in done.stdout
    assert "9.0" in done.stdout  # computed here, not waited for there


def test_silence__that_ends_too_late_leaves_no_client(monkeypatch):
    closed = threading.Event()

    def late(*args, **options):
        time.sleep(0.3)
        return SimpleNamespace(close=closed.set)

    monkeypatch.setattr(reaching, "Client", late)
    monkeypatch.setattr(reaching, "_GRACE", 0.0)
    with pytest.raises(errors.ClusterError, match="did not answer within 0.1 s"):
        lk.cluster.connect("tcp://127.0.0.1:1", timeout=0.1)
    assert closed.wait(10)


@pytest.fixture(scope="module")
def other_version(tmp_path_factory):
    """A cluster whose worker says that it has another xarray and no zarr."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'zarr':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return '1999.1' if name == 'xarray' else real(name)\n"
        "m.version = version\n"
    )
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
        worker = subprocess.Popen(
            [*command, "--no-nanny", "--no-dashboard", "--nthreads", "1", "--host", "127.0.0.1"],
            env=os.environ | {"PYTHONPATH": str(folder)},
            stderr=subprocess.DEVNULL,
        )
        with Client(cluster) as client:
            client.wait_for_workers(1, timeout=60)
        yield cluster.scheduler_address
        worker.terminate()
        worker.wait()


def test_versions__that_differ_are_named_before_any_work(other_version, tmp_path, posterior, data):
    with pytest.raises(errors.ClusterError, match=r"xarray 1999.1, here 20") as caught:
        lk.cluster.connect(other_version)
    assert "zarr is not installed, here 3" in str(caught.value)
    assert "nothing was started" in str(caught.value)
    with Client(other_version) as client:
        with pytest.raises(errors.ClusterError, match=r"xarray 1999.1"):
            lk.sample(
                posterior,
                data,
                sampler=lk.SGLD(1e-3),
                chains=1,
                draws=2,
                client=client,
                store=tmp_path / "s",
                progress=False,
            )
        findings = lk.cluster.check(client, tmp_path)
    assert [f.step for f in findings if f.ok is False] == ["versions"]
    assert not (tmp_path / "s").exists()
    assert list(tmp_path.iterdir()) == []


def test_versions__of_scheduler_and_python_are_compared():
    here = {"python": "3.11.7", "dask": "1", "torch": "2"}
    there = {"python": "3.12.1", "dask": "2", "torch": None}
    lines = versions._differences("w", here, there, ("dask",), ("torch",))
    assert lines == ["w: Python 3.12, here 3.11", "w: dask 2, here 1"]
    lines = versions._differences(
        "w", here, here | {"torch": None}, ("dask",), ("torch",), ["torch"]
    )
    assert lines == ["w: torch is not installed, here 2"]


def test_check__finds_nothing_wrong_with_a_sound_cluster(tmp_path):
    with lk.cluster.connect("local", workers=2, memory="1 GiB", dashboard=None) as client:
        findings = lk.cluster.check(client, tmp_path)
    assert [f.step for f in findings if not f.ok] == []
    steps = {f.step for f in findings}
    assert steps == {"workers", "versions", "threads", "shared storage", "tile job", "worker loss"}
    assert list(tmp_path.iterdir()) == []


def test_check__says_what_is_not_shared(tmp_path):
    """A worker whose view of the folder is another: its own mount name space."""
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        serve = (
            f"mount -t tmpfs none {tmp_path} && exec {sys.executable}"
            f" -m distributed.cli.dask_worker {cluster.scheduler_address} --no-nanny"
            " --no-dashboard --nthreads 2 --host 127.0.0.1"
        )
        command = ["unshare", "--mount", "sh", "-c", serve]
        if subprocess.run([*command[:2], "true"], check=False).returncode:
            pytest.skip("private mounts are not allowed here")
        environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        worker = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
        try:
            with lk.cluster.connect(cluster.scheduler_address) as client:
                findings = lk.cluster.check(client, tmp_path)
        finally:
            worker.terminate()
            worker.wait()
    bad = {f.step: f.message for f in findings if f.ok is False}
    assert list(bad) == ["shared storage"]
    assert "does not see what the client wrote" in bad["shared storage"]
    assert "Give a folder on storage that all hosts mount" in bad["shared storage"]
    notes = {f.step: f.message for f in findings if f.ok is None}
    assert "start workers with OMP_NUM_THREADS=1" in notes["threads"]
    assert "no memory limit" in notes.get("workers", "no memory limit")


def test_check__leaves_workers_alone_that_hold_data_and_has_no_credentials(tmp_path, monkeypatch):
    """On an address of somebody else; another working directory is no fault of the storage."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir(), here.mkdir()
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:
        worker = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                cluster.scheduler_address,
                "--no-nanny",
                "--no-dashboard",
                "--nthreads",
                "8",
                "--host",
                "127.0.0.1",
            ],
            cwd=elsewhere,
            env=os.environ | {"OMP_NUM_THREADS": "64"},
            stderr=subprocess.DEVNULL,
        )
        try:
            with Client(cluster) as other, lk.cluster.connect(cluster.scheduler_address) as client:
                held = other.scatter(list(range(3)))
                monkeypatch.chdir(here)
                findings = lk.cluster.check(client, "stores")
                secret = lk.cluster.check(client, "s3://me:sec/ret@bucket/x", loss=False)
                assert other.gather(held) == [0, 1, 2]
        finally:
            worker.terminate()
            worker.wait()
    assert [f for f in findings if f.ok is False] == []
    notes = {f.step: f.message for f in findings if f.ok is None}
    assert "1 workers are at other work, or hold its data" in notes["worker loss"]
    assert "may run 512 threads" in notes["threads"]
    assert [f.step for f in secret if f.ok is False] == ["shared storage"]
    assert "sec/ret" not in "".join(map(str, secret))


def test_workers__of_an_address_are_waited_for():
    local = LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0")
    told = pytest.raises(errors.ClusterError, match=r"1 worker of .* within 0.5 s, not 5")
    with local as cluster, told:
        lk.cluster.connect(cluster.scheduler_address, workers=5, timeout=0.5)
