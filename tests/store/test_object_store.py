"""Stores on a real S3 server on loopback: the numbers, kills, locks, errors and credentials."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from dask.utils import format_bytes
from torch import optim

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.cli import main
from lkarray.store import leases, objects
from lkarray.store.location import address, describe, exists, inner_store
from tests.helpers.networks import classification, small_network

pytest.importorskip("moto.server")
obstore = pytest.importorskip("obstore")

KEY, SECRET = "AKIADISTINCTIVEFAKE0", "distinctive/fake/secret/9f8e7d"

pytestmark = pytest.mark.services

#: One request at a time: moto looks and writes in two steps, which S3 does in one.
SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of S3's protocol, and the environment that reaches it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(port)]
    log = tmp_path_factory.mktemp("moto") / "requests.log"
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with open(log, "wb") as file, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            for name, value in environment.items():
                patch.setenv(name, value)
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/").close()
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield Server(environment, log)
        finally:
            process.terminate()
            process.wait()


class Server:
    def __init__(self, environment, log):
        self.environment, self.log = environment, log
        self.url = environment["AWS_ENDPOINT_URL"]

    def request(self, path, method="PUT", body=None):
        kind = {"Content-Type": "application/json"}
        made = urllib.request.Request(f"{self.url}/{path}", data=body, method=method, headers=kind)
        urllib.request.urlopen(made).close()

    def requests(self):
        """Return the requests so far, as ``METHOD /path``."""
        lines = self.log.read_text().splitlines()
        return [line.split('"')[1].rsplit(" ", 1)[0] for line in lines if line.count('"') >= 2]


@pytest.fixture
def bucket(server, request):
    """The URL of a new bucket."""
    name = f"b{abs(hash(request.node.name)):x}-{time.monotonic_ns()}"
    server.request(name)
    return f"s3://{name}"


@pytest.fixture
def quick(monkeypatch):
    """Locks that expire within seconds."""
    monkeypatch.setattr(leases, "EXPIRY", 2.0)
    monkeypatch.setattr(leases, "RENEWAL", 0.2)


def bare(url):
    """Return obstore's own store at a URL."""
    return stores.as_store(url).store


def keys(url):
    return sorted(item["path"] for item in obstore.list(bare(url)).collect())


def identical(a, b):
    groups = ("losses", "sample_stats")
    return all(a[g].to_dataset().compute().identical(b[g].to_dataset().compute()) for g in groups)


# --- the numbers ---------------------------------------------------------------------------------


def test_sample__equals_a_local_store_bit_for_bit(bucket, tmp_path, sample):
    url = f"{bucket}/runs/first"
    there, here = sample(url), sample(tmp_path / "run.zarr")
    assert identical(there, here)
    kernels = [lk.correlation(lk.open(at)["losses"]["loss"]) for at in (url, tmp_path / "run.zarr")]
    np.testing.assert_array_equal(*(kernel.values for kernel in kernels))
    saved = lk.save(kernels[0], url)
    np.testing.assert_array_equal(saved.values, kernels[1].values)
    near = [
        lk.neighbors(lk.open(at)["losses"]["loss"], 3).compute()
        for at in (url, tmp_path / "run.zarr")
    ]
    assert near[0].identical(near[1])
    for _ in range(2):  # the second replaces the first
        stores.put(url, "near", near[0])
    assert not [key for key in keys(url) if key.startswith("derived/.")]
    np.testing.assert_array_equal(lk.open(url)["derived/near"]["similarity"], near[0]["similarity"])
    assert lk.verify(url) == []
    assert identical(sample(url, draws=14), sample(tmp_path / "run.zarr", draws=14))
    for command in ("info", "verify"):
        done = CliRunner().invoke(main, [command, url])
        assert done.exit_code == 0, done.output
        assert url in done.output
    size = sum(item["size"] for item in obstore.list(bare(url)).collect())
    assert f"{format_bytes(size)} stored" in CliRunner().invoke(main, ["info", url]).output


def test_sample__several_components_each_at_a_url_of_its_own(bucket, sample):
    tree = sample(f"{bucket}/parts", components={"first": "0.*", "the last": "2.*"})
    assert tree["losses"].sizes["component"] == 2
    assert lk.verify(f"{bucket}/parts") == []
    part = lk.open(f"{bucket}/parts/component/the%20last")
    np.testing.assert_array_equal(
        part["losses"]["loss"], tree["losses"]["loss"].sel(component="the last")
    )


def test_observe__replays_a_run_from_a_url(bucket, posterior, sample):
    data = classification(n=12)
    tree = sample(f"{bucket}/run")
    more = lk.observe(
        tree,
        data,
        posterior=posterior,
        sampler=lk.SGLD(step_size=1e-3),
        store=f"{bucket}/more",
        progress=False,
    )
    assert more["losses"].sizes["sample"] == 12
    assert lk.verify(f"{bucket}/more") == []


def test_training__is_recorded_resumed_and_differentiated_at_a_url(bucket, tmp_path):
    from tests.helpers.recorded_runs import batches_of, cross_entropy, examples, network

    made = {}
    for where in (f"{bucket}/run", tmp_path / "run"):
        for steps in (5, 9):
            model, data = network(), examples()
            optimizer = optim.Adam(model.parameters(), 1e-2)
            recorder = lk.record(model, optimizer, data, loss=cross_entropy, store=where)
            with recorder as trace:
                for batch in trace.remaining(batches_of(steps)):
                    with trace.step(batch):
                        optimizer.zero_grad()
                        inputs, labels = (part[batch] for part in data.tensors)
                        cross_entropy(model(inputs), labels).mean().backward()
                        optimizer.step()
        trace = lk.open_trace(where, network(), examples(), loss=cross_entropy)
        assert trace.steps == 9
        gradients = lk.gradient_features(trace, [3, 7], [0, 5], store=where)
        made[where] = trace.parameters(9), gradients["gradient"].values
        assert lk.verify(where) == []
    for there, here in zip(*made.values(), strict=True):
        np.testing.assert_array_equal(there, here)
    stores.discard_trace(f"{bucket}/run")
    assert not [key for key in keys(f"{bucket}/run") if key.startswith("trajectory")]
    assert "gradient" in lk.open(f"{bucket}/run")["gradients"]


# --- kills ---------------------------------------------------------------------------------------

CHAINS, DRAWS = 2, 50


def begin(environment):
    """Prepare another process: the server, one thread, and locks that expire soon."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    leases.EXPIRY, leases.RENEWAL = 2.0, 0.2


def sample_slowly(environment, url, pause):
    """Sample with a commit at every draw, so that kills fall inside commits."""
    from lkarray.store import commit, layout

    begin(environment)
    commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0.0
    layout.block_draws = lambda draws, values: 32

    class Slow(lk.SGLD):
        def step(self, given):
            super().step(given)
            time.sleep(pause)

    Slow.__name__ = "SGLD"
    sample_here(url, sampler=Slow, draws=DRAWS)


def save_slowly(environment, source, url, pause):
    from lkarray import saving

    begin(environment)
    compute = saving.compute_tile

    def slow(contraction, tile):
        time.sleep(pause)
        return compute(contraction, tile)

    saving.compute_tile = slow
    lk.save(kernel_of(source), url, group="derived/k")


def kernel_of(source):
    losses = lk.open(source)["losses"]["loss"]
    return lk.correlation(losses, memory="40 KiB")


@pytest.fixture(scope="module")
def start():
    """Start a function in another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lkarray.sampling", "tests.helpers.networks"])
    started = []

    def call(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.join()
        process.close()


def wait_until(true, process, seconds=60.0):
    limit = time.monotonic() + seconds
    while not true():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.02)


def draws_of(url):
    with contextlib.suppress(errors.StoreError, KeyError):
        if exists(stores.as_store(url)):
            root = stores.open_root(url)
            return [stores.read_record(root, chain).draws for chain in range(CHAINS)]
    return [0] * CHAINS


def test_sample__killed_while_it_commits_resumes_bit_for_bit(server, bucket, tmp_path, start):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sample_here(tmp_path / "whole", draws=DRAWS)
    torch.set_num_threads(threads)
    url, committed = f"{bucket}/killed", [0]
    for more in (3, DRAWS + 5):
        process = start(sample_slowly, server.environment, url, 0.003)
        wait_until(lambda least=more: sum(draws_of(url)) >= least, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        committed.append(sum(draws_of(url)))
        assert lk.verify(url) == []
    assert committed == sorted(set(committed))
    assert committed[-1] < CHAINS * DRAWS
    last = start(sample_slowly, server.environment, url, 0.0)
    last.join()
    assert last.exitcode == 0
    assert identical(lk.open(tmp_path / "whole"), lk.open(url))
    assert lk.verify(url) == []


def test_save__killed_half_way_writes_only_what_is_missing(server, bucket, tmp_path, start):
    source, url = tmp_path / "run", f"{bucket}/kernel"
    sample_here(source)
    whole = lk.save(kernel_of(source), tmp_path / "whole", group="derived/k").values
    tiles = len(list((tmp_path / "whole/derived/k/correlation/c").glob("*/*")))

    def written():
        return [k for k in keys(url) if k.startswith("derived/k/correlation/c/")]

    process = start(save_slowly, server.environment, str(source), url, 0.2)
    wait_until(lambda: len(written()) >= 3, process)
    process.kill()
    process.join()
    before = set(written())
    assert 3 <= len(before) < tiles
    seen = len(server.requests())
    np.testing.assert_array_equal(lk.save(kernel_of(source), url, group="derived/k"), whole)
    puts = [
        line.rpartition("/c/")[2]
        for line in server.requests()[seen:]
        if line.startswith("PUT") and "/c/" in line and "correlation" in line
    ]
    assert sorted(puts) == sorted(k.rpartition("/c/")[2] for k in set(written()) - before)
    assert len(written()) == tiles


def sample_here(path, *, sampler=lk.SGLD, draws=20):
    data = classification(n=60)
    lk.sample(
        lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0),
        data,
        sampler=sampler(step_size=1e-3),
        chains=CHAINS,
        draws=draws,
        burn_in=2,
        batch_size=16,
        store=path,
        chains_per_device=1,
        progress=False,
    )


def test_workers__two_processes_write_disjoint_chains_and_panels_as_one_does(
    server, bucket, sample, monkeypatch
):
    from distributed import Client, LocalCluster

    from tests.helpers.audited_runs import audited, recorded

    monkeypatch.setattr("lkarray.auditing.describing.panel_size", lambda problem, budget: 3)
    trace = recorded(lambda p: optim.Adam(p, 1e-2), store=f"{bucket}/trace")
    alone = lk.audit(trace, audited(), store=f"{bucket}/alone")
    options = {"chains": 4, "draws": 12, "chains_per_device": 1}
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            env=server.environment,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        there = sample(f"{bucket}/there", client=client, **options)
        kernel = lk.correlation(there["losses"]["loss"])
        saved = lk.save(kernel, f"{bucket}/there").values
        panels = lk.audit(trace, audited(), store=f"{bucket}/trace", client=client)
        np.testing.assert_array_equal(panels["influence"], alone["influence"])
        assert lk.verify(f"{bucket}/trace") == []
    threads = torch.get_num_threads()
    torch.set_num_threads(there.attrs["lkarray"]["losses"]["threads"])
    try:
        here = sample(f"{bucket}/here", **options)
    finally:
        torch.set_num_threads(threads)
    assert identical(there, here)
    np.testing.assert_array_equal(saved, lk.correlation(here["losses"]["loss"]).values)


# --- locks ---------------------------------------------------------------------------------------


def hold(environment, url, held):
    begin(environment)
    with stores.writer_lock(stores.as_store(url)):
        held.set()
        time.sleep(60)


def holding(start, server, url):
    held = multiprocessing.get_context("forkserver").Event()
    process = start(hold, server.environment, url, held)
    assert held.wait(60)
    return process


def test_lock__a_second_writer_is_refused_and_a_killed_one_replaced(
    server, bucket, start, quick, sample, caplog
):
    url = f"{bucket}/run"
    process = holding(start, server, url)
    told = rf"in use by process {process.pid} on \S+ since .* UTC"
    with pytest.raises(errors.LockedError, match=told):
        sample(url)
    assert not exists(stores.as_store(url))
    process.kill()
    process.join()
    began = time.monotonic()
    sample(url)
    assert time.monotonic() - began < 30
    assert f"took over the lock of process {process.pid}" in caplog.text
    assert lk.verify(url) == []


def test_lock__a_holder_that_was_stopped_too_long_writes_nothing_more(
    server, bucket, quick, monkeypatch
):
    store = stores.as_store(f"{bucket}/run")
    with stores.writer_lock(store):
        root = zarr.create_group(store, zarr_format=3)
        (lease,) = objects.guards[store.url]
        lease._over.set()  # as a stopped process: it renews no more
        lease._thread.join()
        other = stores.as_store(f"{bucket}/run")
        monkeypatch.setattr(objects, "guards", {})  # as another process
        taken = leases._acquire(other, ".lkarray.writer.lock")
        monkeypatch.undo()
        time.sleep(0.5)
        with pytest.raises(errors.LockedError, match=f"taken over by process {os.getpid()}"):
            root.attrs["late"] = True
    assert "late" not in zarr.open_group(other, mode="r").attrs
    # What the first one left did not free the lock of the second.
    body = json.loads(bytes(obstore.get(bare(other.url), ".lkarray.writer.lock").bytes()))
    assert body["id"] == taken.body["id"]
    assert "free" not in body


def test_lock__of_many_that_take_a_stale_lock_over_one_succeeds(bucket, quick):
    url = f"{bucket}/run"
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")  # and never renewed
    time.sleep(3.1)
    won, refused = [], []

    def take():
        try:
            lease = leases._acquire(stores.as_store(url), ".lkarray.writer.lock")
            lease.start()
            won.append(lease)
        except errors.LockedError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    won[0].stop()
    with stores.writer_lock(stores.as_store(url)):  # free again at once
        pass


def test_put__that_fails_leaves_the_old_result(bucket, sample, monkeypatch):
    url = f"{bucket}/run"
    means = sample(url)["losses"]["loss"].mean("draw").rename("means")
    stores.put(url, "means", means)
    old = lk.open(url)["derived/means"]["means"]
    stores.put(url, "means", old + 1)  # computed from what it replaces
    kept = means.values + 1
    np.testing.assert_array_equal(lk.open(url)["derived/means"]["means"], kept)
    monkeypatch.setattr(objects.UrlStore, "move", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stores.put(url, "means", means * 5)
    np.testing.assert_array_equal(lk.open(url)["derived/means"]["means"], kept)


def test_lock__an_answer_that_was_lost_is_not_taken_for_another_writer(bucket, quick):
    store = stores.as_store(f"{bucket}/run")
    with stores.writer_lock(store):
        (lease,) = objects.guards[store.url]
        with lease._turn:
            before = lease._version
            assert lease.put(before)
            lease._version, lease._until = before, 0.0  # as if it had not been heard of
        zarr.create_group(store, zarr_format=3)


def test_lock__a_server_that_ignores_conditions_is_refused(bucket, monkeypatch):
    real = obstore.put

    def put(store, path, file, *, mode=None, **options):
        return real(store, path, file, **options)

    monkeypatch.setattr(obstore, "put", put)
    with (
        pytest.raises(errors.StoreError, match="no conditional put"),
        stores.writer_lock(stores.as_store(f"{bucket}/run")),
    ):
        pass


def test_write__outlives_an_outage_in_which_its_lock_grew_old(bucket, quick, monkeypatch):
    store, real = stores.as_store(f"{bucket}/run"), obstore.put
    failures = [obstore.exceptions.GenericError("HTTP error: error sending request")] * 2

    def put(*args, **options):
        if failures:
            raise failures.pop()
        return real(*args, **options)

    with stores.writer_lock(store):
        (lease,) = objects.guards[store.url]
        lease._over.set()
        lease._thread.join()
        lease._until = 0.0
        monkeypatch.setattr(obstore, "put", put)
        zarr.create_group(store, zarr_format=3)
    assert failures == []


def test_lock__a_slow_taker_does_not_take_it_early(bucket, quick, monkeypatch):
    url, real = f"{bucket}/run", leases._server_time
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")  # and never renewed
    began = time.monotonic()

    def slow(store):
        time.sleep(1.5)
        return real(store)

    monkeypatch.setattr(leases, "_server_time", slow)
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")
    assert time.monotonic() - began > leases.EXPIRY


def test_write__under_a_lock_is_repeated_when_nothing_answered(bucket, quick, monkeypatch):
    store, real = stores.as_store(f"{bucket}/run"), obstore.put_async
    failures = [obstore.exceptions.GenericError("HTTP error: error sending request")]

    async def put(*args, **options):
        if failures:
            raise failures.pop()
        return await real(*args, **options)

    monkeypatch.setattr(obstore, "put_async", put)
    with stores.writer_lock(store):
        zarr.create_group(store, zarr_format=3)
    failures.append(obstore.exceptions.GenericError("HTTP error: error sending request"))
    with pytest.raises(errors.StoreError, match="cannot be reached"):
        zarr.create_group(store, zarr_format=3, overwrite=True)


# --- credentials ---------------------------------------------------------------------------------


def assert_no_credentials(text):
    for secret in (KEY, SECRET):
        assert secret not in str(text)


def test_credentials__appear_nowhere(server, bucket, sample, caplog, capfd, quick):
    caplog.set_level(logging.DEBUG)
    url = f"{bucket}/run"
    tree = sample(url)
    lk.save(lk.correlation(tree["losses"]["loss"]), url)
    for key in keys(bucket):
        raw = bytes(obstore.get(bare(bucket), key).bytes())
        assert not any(secret.encode() in raw for secret in (KEY, SECRET)), key
    store = stores.as_store(url)
    loss = tree["losses"]["loss"]
    for made in (store, stores.open_root(url), tree, loss, loss.data, store.store, address(store)):
        assert_no_credentials(f"{made!r} {made}")
        assert KEY.encode() not in pickle.dumps(made)
        assert SECRET.encode() not in pickle.dumps(made)
    assert (describe(store), address(store)) == (url, url)
    assert pickle.loads(pickle.dumps(store)) == store
    assert_no_credentials(caplog.text)
    assert_no_credentials(capfd.readouterr())


@pytest.mark.parametrize(
    "url", [f"s3://{KEY}:{SECRET}@bucket/run", f"s3://{KEY}@bucket/run", f"s3://b/run?key={SECRET}"]
)
def test_credentials__in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(errors.StoreError, match="by the environment: AWS_ACCESS_KEY_ID") as told:
        lk.open(url)
    assert_no_credentials(told.value)


def test_describe__strips_credentials_of_other_urls():
    store = stores.as_store(f"https://{KEY}:{SECRET}@host.invalid/run.zarr?sig={SECRET}")
    assert describe(store) == "https://host.invalid/run.zarr"
    assert describe(stores.as_store("memory://a/b")) == "memory://a/b"


# --- what is refused, before any work ------------------------------------------------------------


def refused(sample, url, match, **options):
    began = time.monotonic()
    with pytest.raises(errors.StoreError, match=match) as told:
        sample(url, **options)
    assert_no_credentials(told.value)
    assert time.monotonic() - began < 15
    return told.value


@pytest.fixture
def no_work(monkeypatch):
    from lkarray.sampling import running

    def prepare(*args, **options):
        raise AssertionError("began to work")

    monkeypatch.setattr(running, "prepare", prepare)


def test_refused__a_missing_bucket(server, sample, no_work):
    refused(sample, "s3://no-such-bucket/run", "no such bucket.*make it, or correct")
    for call in (lk.open, lk.verify):
        with pytest.raises(errors.StoreError, match="no such bucket"):
            call("s3://no-such-bucket/run")


def test_refused__a_server_that_does_not_answer(server, sample, no_work, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(sample, "s3://bucket/run", "cannot be reached; check the network and .*AWS_ENDPOINT")


def test_refused__http_that_was_not_allowed(server, sample, no_work, monkeypatch):
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    refused(sample, "s3://bucket/run", "AWS_ALLOW_HTTP=true")


@pytest.mark.parametrize("action", ["s3:GetObject", "s3:PutObject"])
def test_refused__access_that_is_denied(server, bucket, sample, no_work, action):
    name = bucket.removeprefix("s3://")
    rule = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": action,
        "Resource": f"arn:aws:s3:::{name}/*",
    }
    server.request(
        f"{name}?policy", body=json.dumps({"Version": "2012-10-17", "Statement": [rule]}).encode()
    )
    refused(sample, f"{bucket}/run", "access is denied.*AWS_SECRET_ACCESS_KEY")


def test_refused__what_is_not_a_store(bucket, sample, no_work):
    obstore.put(bare(bucket), "run/thesis.tex", b"years of work")
    refused(sample, f"{bucket}/run", r"holds \['thesis.tex'\] and is not a Zarr v3 store")
    assert keys(bucket) == ["run/thesis.tex"]


def test_open__nothing_there(bucket):
    with pytest.raises(errors.StoreError, match=f"there is no store at {bucket}/run"):
        lk.open(f"{bucket}/run")


def test_open__without_obstore_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(errors.MissingPackageError, match=r"pip install 'lkarray\[storage\]'"):
        lk.open("s3://bucket/run")


def test_as_store__takes_a_store_of_obstore_as_it_is_configured(server, bucket, sample):
    from obstore.store import S3Store

    given = zarr.storage.ObjectStore(S3Store(bucket.removeprefix("s3://"), prefix="mine"))
    sample(given)
    assert describe(stores.as_store(given)) == f"{bucket}/mine"
    assert identical(lk.open(given), lk.open(f"{bucket}/mine"))
    inner = inner_store(stores.as_store(given), "losses")
    assert describe(pickle.loads(pickle.dumps(inner))) == f"{bucket}/mine/losses"


# --- faults --------------------------------------------------------------------------------------


def test_verify__finds_a_deleted_and_a_truncated_object(bucket, sample):
    url = f"{bucket}/run"
    sample(url)
    lost, cut = "losses/loss/c/0/0/0", "sample_stats/distance/c/1/0"
    raw = bytes(obstore.get(bare(url), cut).bytes())
    obstore.delete(bare(url), lost)
    obstore.put(bare(url), cut, raw[:-3])
    assert {(p.kind, p.path) for p in lk.verify(url)} == {("missing", lost), ("truncated", cut)}
    done = CliRunner().invoke(main, ["verify", url])
    assert done.exit_code == 1
    assert f"missing: {lost}" in done.output
    obstore.put(bare(url), cut, b"")
    assert ("truncated", cut) in {(p.kind, p.path) for p in lk.verify(url)}


# --- what it costs -------------------------------------------------------------------------------


def test_commit__is_one_put_of_each_chunk_and_the_record_comes_last(server, bucket, sample):
    seen = len(server.requests())
    sample(f"{bucket}/run", chains=1)
    puts = [line.partition("/run/")[2] for line in server.requests()[seen:] if line[:3] == "PUT"]
    chunks = [key for key in puts if "/c/" in key and "sample/" not in key and "label" not in key]
    commit = chunks[2:]  # the losses at w* and the chain's zero record come first
    assert commit[-1] == "commit/record/c/0/0"
    assert commit[-2] == "state/parameters/c/0/1/0"
    # Losses, statistics, their checksums, state, record.
    assert len(commit) == len(set(commit)) == 1 + 6 + 1 + 1 + 1
