"""A real S3 server on loopback, and what a store on it holds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from lkarray import store as stores
from lkarray.store import leases

KEY, SECRET = "AKIADISTINCTIVEFAKE0", "distinctive/fake/secret/9f8e7d"

#: One request at a time: moto looks and writes in two steps, which S3 does in one.
SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


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


def bare(url):
    """Return obstore's own store at a URL."""
    return stores.as_store(url).store


def keys(url):
    import obstore

    return sorted(item["path"] for item in obstore.list(bare(url)).collect())


def begin(environment):
    """Prepare another process: the server, one thread, and locks that expire soon."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    leases.EXPIRY, leases.RENEWAL = 2.0, 0.2


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
