"""Stores on a real S3 server on loopback: the numbers are those of a local store."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from dask.utils import format_bytes
from torch import optim

import lkarray as lk
from lkarray import store as stores
from lkarray.cli import main
from lkarray.store import objects
from tests.helpers.networks import classification
from tests.helpers.object_store import bare, keys
from tests.helpers.workers import identical

pytest.importorskip("moto.server")
obstore = pytest.importorskip("obstore")

pytestmark = pytest.mark.services


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
