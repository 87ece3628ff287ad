"""Several hosts for real, each with its own address: results, a host cut off, TLS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from distributed import Client

import lkarray as lk
from lkarray import errors
from tests.helpers.hosts import Host, NoHosts, network, start_scheduler, start_worker
from tests.helpers.losses import numpy_correlation, random_losses
from tests.helpers.workers import identical
from tests.helpers.workers import sample as sample_slowly

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]

#: Tests of the engine and the sampler that make their own data and compute where the client is.
ACROSS = [
    "tests/kernels/test_gram.py",
    "tests/test_saving.py",
    "tests/faults/test_workers.py",
]
#: Those left out count tiles by replacing a function of this process, or kill its own workers.
HERE_ONLY = " and ".join(
    f"not {name}"
    for name in (
        "killed",
        "one_gpu",
        "selecting_rows",
        "one_kernel_for_each",
        "a_rerun_computes",
        "another_budget",
    )
)


@contextmanager
def network_or_skip(count: int, subnet: int):
    """Hosts, where they can be made."""
    if shutil.which("ip") is None:
        pytest.skip("apt-get install iproute2")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(network(count, subnet))
        except NoHosts as error:
            pytest.skip(f"network name spaces cannot be made here: {error}")
        yield made


@pytest.fixture(scope="module")
def hosts():
    """Three hosts: one for the scheduler, two for workers."""
    with network_or_skip(3, 7) as made:
        yield made


@pytest.fixture(scope="module")
def address(hosts, tmp_path_factory):
    """A cluster over the hosts; its workers sample slowly, to be cut off in the middle."""
    log = tmp_path_factory.mktemp("logs")
    scheduler, *others = hosts
    url = start_scheduler(scheduler, log / "scheduler.log")
    for host in others:
        start_worker(
            host,
            url,
            log / f"{host.name}.log",
            PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'faults'}",
            LKARRAY_TEST_PAUSE="0.012",
        )
    with Client(url, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
    return url


def hosts_of(client: Client) -> set[str]:
    return {w["host"] for w in client.scheduler_info(n_workers=-1)["workers"].values()}


def test_check__across_hosts(address, hosts, tmp_path):
    with lk.cluster.connect(address, workers=2) as client:
        assert hosts_of(client) == {host.address for host in hosts[1:]}
        findings = lk.cluster.check(client, tmp_path)
        client.wait_for_workers(2, timeout=60)
    assert [str(f) for f in findings if f.ok is False] == []
    assert "on 2 hosts" in findings[0].message
    assert any("is not encrypted" in f.message for f in findings)


def test_engine_and_sampler__pass_their_tests_across_hosts(address, tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *ACROSS, "-k", HERE_ONLY]
    done = subprocess.run(
        [*command, "--basetemp", str(tmp_path / "base")],
        cwd=ROOT,
        env=os.environ | {"LKARRAY_TEST_CLUSTER": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def cut_when(host: Host, ready, done: threading.Event) -> threading.Thread:
    """Cut a host off as soon as work is under way."""

    def wait() -> None:
        while not done.is_set() and not ready():
            time.sleep(0.02)
        if not done.is_set():
            host.cut()
            cut.append(time.monotonic())

    cut: list[float] = []
    thread = threading.Thread(target=wait)
    thread.cut = cut  # type: ignore[attr-defined]
    thread.start()
    return thread


@pytest.fixture
def doomed(hosts):
    """The last host, whose link is mended afterwards, with its worker back."""
    yield hosts[-1]
    hosts[-1].mend()


def test_host_cut_off__while_sampling_changes_nothing(address, doomed, tmp_path):
    options = {"draws": 40, "chains": 4}
    whole = sample_slowly(tmp_path / "whole", None, **options)
    store, done = tmp_path / "cut", threading.Event()

    def under_way() -> bool:
        locks = list(store.glob(".lkarray.region-*.lock"))
        return len([lock for lock in locks if lock.stat().st_size]) >= 2

    with lk.cluster.connect(address, workers=2) as client:
        client.wait_for_workers(2, timeout=60)
        cutter = cut_when(doomed, under_way, done)
        try:
            tree = sample_slowly(store, client, **options)
        finally:
            done.set()
            cutter.join()
        assert cutter.cut, "the work was over before the host was cut off"
        assert doomed.address not in hosts_of(client)
    assert lk.verify(store) == []
    assert identical(tree, whole)


def test_host_cut_off__while_a_kernel_is_written_changes_nothing(address, doomed, tmp_path, rng):
    losses = random_losses(rng, chains=4, draws=400, samples=3000)
    losses.to_dataset().chunk(sample=150).to_zarr(tmp_path / "losses.zarr", consolidated=False)
    kernel, done = tmp_path / "kernel.zarr", threading.Event()

    def under_way() -> bool:
        return len(list(kernel.glob("derived/correlation/correlation/c/*/*"))) >= 3

    start_worker(doomed, address, tmp_path / "worker.log")  # its last one ended when it was cut off
    with lk.cluster.connect(address, workers=2) as client:
        client.wait_for_workers(2, timeout=60)
        lazy = lk.correlation(lk_open(tmp_path / "losses.zarr"), memory="8 MiB")
        assert lk.plan(lazy).tiles > 50
        whole = lk.save(lazy, tmp_path / "whole.zarr").values
        cutter = cut_when(doomed, under_way, done)
        try:
            correlation = lk.save(lazy, kernel).values
        finally:
            done.set()
            cutter.join()
        assert cutter.cut, "the work was over before the host was cut off"
    np.testing.assert_array_equal(correlation, whole)
    np.testing.assert_allclose(correlation, numpy_correlation(losses), atol=2e-5)


def lk_open(path: Path):
    return xr.open_zarr(path, chunks={}, consolidated=False)["loss"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Certificates as cluster/tls makes them."""
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    subprocess.run(
        ["bash", str(ROOT / "cluster/tls/make_certificates.sh"), str(folder), "10.213.8.2"],
        check=True,
        capture_output=True,
    )
    return folder


def test_tls__a_client_without_the_certificate_gets_nothing(certificates, tmp_path):
    """Scheduler and worker on hosts of their own, with TLS; four clients."""
    config = tmp_path / "dask.yaml"
    tls = dict.fromkeys("swc", f"cert: {certificates}/cert.pem, key: {certificates}/key.pem")
    config.write_text(
        "distributed:\n  comm:\n    require-encryption: true\n    tls:\n"
        f"      ca-file: {certificates}/ca.pem\n      scheduler: {{{tls['s']}}}\n"
        f"      worker: {{{tls['w']}}}\n      client: {{{tls['c']}}}\n"
    )
    other = tmp_path / "other"
    subprocess.run(
        ["bash", str(ROOT / "cluster/tls/make_certificates.sh"), str(other), "10.213.8.2"],
        check=True,
        capture_output=True,
    )
    with network_or_skip(2, 8) as (one, two):
        scheduler = start_scheduler(one, tmp_path / "s.log", scheme="tls", DASK_CONFIG=str(config))
        start_worker(two, scheduler, tmp_path / "w.log", DASK_CONFIG=str(config))
        with lk.cluster.connect(scheduler, tls=certificates) as client:
            assert client.submit(sum, [1, 2]).result(timeout=60) == 3
            assert hosts_of(client) == {two.address}
        plain = scheduler.replace("tls://", "tcp://")
        for target, given in [(scheduler, None), (scheduler, other), (plain, None)]:
            began = time.monotonic()
            with pytest.raises(errors.ClusterError, match="cannot reach or start t"):
                lk.cluster.connect(target, tls=given, timeout=5)
            assert time.monotonic() - began < 30
