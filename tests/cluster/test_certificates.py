"""`cluster/tls`: certificates let in who holds them, and nobody else."""

from __future__ import annotations

import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import psutil
import pytest
import yaml
from distributed import Client, LocalCluster, Security

import lkarray as lk
from tests.helpers.deployment import TLS, keys_of, said

pytestmark = pytest.mark.services


def test_certificates__are_valid_for_the_names_and_readable_by_their_owner(
    certificates: Path,
) -> None:
    told = said(
        "openssl",
        "verify",
        "-x509_strict",
        "-CAfile",
        certificates / "ca.pem",
        certificates / "cert.pem",
    )
    assert told.strip().endswith("OK")
    text = said("openssl", "x509", "-in", certificates / "cert.pem", "-noout", "-text")
    names = re.findall(r"(?:DNS|IP Address):([^,\s]+)", text)
    assert names == ["localhost", "127.0.0.1", "0:0:0:0:0:0:0:1", "*.example.org"]
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in text
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in certificates.iterdir()}
    assert modes == {"ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600}
    assert stat.S_IMODE(certificates.stat().st_mode) == 0o700


def test_certificates__are_not_overwritten(certificates: Path) -> None:
    before = {path: path.read_bytes() for path in certificates.iterdir()}
    told = said(TLS / "make_certificates.sh", certificates, "localhost", code=1)
    assert "is not overwritten" in told
    assert {path: path.read_bytes() for path in certificates.iterdir()} == before


@pytest.mark.parametrize("words", [[], ["only-a-folder"], ["folder", "no host"], ["folder", "-x"]])
def test_certificates__of_no_host_are_refused(words: list[str], tmp_path: Path) -> None:
    said(TLS / "make_certificates.sh", *words, code=2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def security(folder: Path) -> Security:
    pair = {
        f"tls_{who}_{what}": str(folder / f"{what}.pem")
        for who in ("client", "scheduler", "worker")
        for what in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / "ca.pem"), **pair)


def tls_settings(certificates: Path) -> dict[str, Any]:
    """Return what tls/dask.yaml says, of another folder."""
    text = (TLS / "dask.yaml").read_text().replace("/etc/lkarray/tls", str(certificates))
    return dict(keys_of(yaml.safe_load(text)))


@pytest.fixture
def secured(certificates: Path) -> Iterator[str]:
    """The address of a cluster that wants certificates, as tls/dask.yaml sets it up."""
    with (
        dask.config.set(tls_settings(certificates)),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            host="127.0.0.1",
            dashboard_address=None,
            security=Security(),
        ) as cluster,
    ):
        assert cluster.scheduler_address.startswith("tls://127.0.0.1:")
        address = cluster.scheduler_address
        with Client(address) as client:  # by the same file
            assert client.submit(sum, [1, 2, 3]).result(timeout=20) == 6
        yield address


def refused(address: str, security: Security | None) -> None:
    with pytest.raises(OSError):  # of a closed connection, or of a certificate that does not match
        Client(address, security=security, timeout=2)


def test_certificates__let_in_who_holds_them_and_nobody_else(
    secured: str, certificates: Path, tmp_path: Path
) -> None:
    with Client(secured, security=security(certificates)) as client:
        assert client.submit(sum, [1, 2, 3]).result(timeout=20) == 6

    others = tmp_path / "others"
    said(TLS / "make_certificates.sh", others, "localhost", "127.0.0.1")
    with dask.config.set({"distributed.comm.require-encryption": False}):
        refused(secured.replace("tls://", "tcp://"), Security(require_encryption=False))
        refused(secured, security(others))

    host, port = secured.removeprefix("tls://").split(":")
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with (
        socket.create_connection((host, int(port)), timeout=5) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        ask_without_certificate(context, raw, host)


def ask_without_certificate(context: ssl.SSLContext, raw: socket.socket, host: str) -> None:
    """Talk to a scheduler knowing its authority, without a certificate of one's own."""
    with context.wrap_socket(raw, server_hostname=host) as channel:
        channel.sendall(bytes(64))
        if not channel.recv(1):
            raise ConnectionError("closed")


def test_certificates__are_used_by_hosts_reached_by_ssh(
    ssh_options: dict[str, Any], certificates: Path
) -> None:
    with (
        dask.config.set(tls_settings(certificates)),
        lk.cluster.connect(
            "ssh://127.0.0.1", threads=1, dashboard="127.0.0.1:0", **ssh_options
        ) as client,
    ):
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2, 3]).result() == 6
        worker = psutil.Process(*client.run(os.getpid).values())
        started = [worker, worker.parent(), psutil.Process(client.run_on_scheduler(os.getpid))]
        listening = {
            (process.pid, c.laddr.ip)
            for process in started
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
    assert len({pid for pid, _ in listening}) == 3  # worker, its nanny, scheduler
    assert {address for _, address in listening} == {"127.0.0.1"}
