"""What is refused of an object store, and that credentials appear nowhere."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time

import pytest
import zarr
from click.testing import CliRunner

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.cli import main
from lkarray.store.location import address, describe, inner_store
from tests.helpers.object_store import KEY, SECRET, bare, keys
from tests.helpers.workers import identical

pytest.importorskip("moto.server")
obstore = pytest.importorskip("obstore")

pytestmark = pytest.mark.services

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
