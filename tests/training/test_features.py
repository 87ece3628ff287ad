"""The gradient tensor, against gradients of one example at one time."""

import dask
import numpy as np
import pytest
import torch
from torch import optim
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors, store
from lkarray.inspect import describe_store
from lkarray.nn import Batches
from lkarray.training import Projection, makers
from lkarray.training import features as features_module
from tests.helpers.recorded_runs import cross_entropy, examples, network

KNOWN = "--+-+----+--++---+-+++++"


@pytest.fixture
def trace(train, tmp_path):
    train(tmp_path / "t", steps=22)
    return lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)


def gradient(trace, step, example, number=cross_entropy):
    """The definition: plain autograd of one example at the stored weights."""
    model = network()
    theta = torch.from_numpy(trace.parameters(step))
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    x, y = trace.train.take(np.array([example]))
    number(model(x), y).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()


def test_discard_gradients__leaves_what_was_computed(trace, tmp_path, monkeypatch):
    path = tmp_path / "g"
    made = lk.gradient_features(trace, [3, 7, 30], [0, 5], store=path)
    lk.gradient_factors(trace, [3, 7], [0, 5], store=path)
    store.put(path, "ips", lk.ips(made))
    expected = lk.ips(made).values
    with monkeypatch.context() as broken:  # killed before anything is deleted
        broken.setattr("lkarray.store.discarding.listed", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lk.discard_gradients(path)
    assert lk.verify(path) == []
    for _ in range(2):
        lk.discard_gradients(path)
        assert lk.verify(path) == []
        assert list(lk.open(path).children) == ["derived"]
        assert describe_store(path).splitlines()[-1] == "  /derived/ips  ips(example, example_2)"
        assert not list(path.glob("gradients*"))
        np.testing.assert_array_equal(lk.open(path)["derived/ips"]["ips"], expected)
    again = lk.gradient_features(trace, [3, 7, 30], [0, 5], store=path)  # may be made anew
    np.testing.assert_array_equal(lk.ips(again), expected)
    with pytest.raises(errors.StoreError, match="no store"):
        lk.discard_gradients(tmp_path / "other")


def test_features__are_the_gradients_at_each_time(trace, tmp_path):
    times, index = [0, 5, 22], [3, 7, 30, 49]
    label = examples().tensors[1].numpy()[index]
    tensor = lk.gradient_features(
        trace, index, times, store=tmp_path / "t", dtype="float64", coords={"label": label}
    )
    assert tensor["gradient"].dims == ("time", "example", "param")
    assert tensor["gradient"].chunks is not None
    for t, step in enumerate(times):
        for e, example in enumerate(index):
            expected = gradient(trace, step, example)
            np.testing.assert_allclose(tensor["gradient"][t, e], expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(tensor["time"], times)
    np.testing.assert_array_equal(tensor["example"], index)
    np.testing.assert_array_equal(tensor["label"], label)
    np.testing.assert_array_equal(tensor["learning_rate"], [1e-2, 1e-2, np.nan])
    assert tensor["tensor"].values.tolist() == trace.names
    assert tensor["stop"].values.tolist() == [30, 35, 50, 53]
    assert tensor["module"].values.tolist() == ["0", "0", "2", "2"]
    again = lk.open(tmp_path / "t")["gradients"].to_dataset()
    np.testing.assert_array_equal(again["gradient"], tensor["gradient"])
    assert lk.verify(tmp_path / "t") == []


def test_features__times_by_name(trace, tmp_path):
    data = examples(4)
    epochs = lk.gradient_features(trace, data, store=tmp_path / "a")
    np.testing.assert_array_equal(epochs["time"], [0, 4, 8, 12, 16, 20])
    assert epochs["gradient"].dtype == np.float32
    steps = lk.gradient_features(trace, data, "step", store=tmp_path / "b")
    np.testing.assert_array_equal(steps["time"], np.arange(22))
    np.testing.assert_array_equal(steps["gradient"].sel(time=[0, 4]), epochs["gradient"][:2])


def test_features__of_outputs_and_of_a_function(trace, tmp_path):
    tensor = lk.gradient_features(
        trace, range(5), [2, 9], of="output", store=tmp_path / "t", name="outputs", dtype="float64"
    )
    assert tensor["gradient"].dims == ("time", "example", "output", "param")
    for c in range(3):
        expected = gradient(trace, 9, 4, lambda output, target, c=c: output[:, c])
        np.testing.assert_allclose(tensor["gradient"][1, 4, c], expected, rtol=1e-12)

    def margin(output, target):
        return output.gather(1, target[:, None])[:, 0] - output.mean(1)

    tensor = lk.gradient_features(
        trace, range(5), [2], of=margin, store=tmp_path / "t", name="margin", dtype="float64"
    )
    np.testing.assert_allclose(tensor["gradient"][0, 3], gradient(trace, 2, 3, margin), rtol=1e-12)


def test_features__of_some_parameters(trace, tmp_path):
    whole = lk.gradient_features(trace, range(5), [3], store=tmp_path / "t", dtype="float64")
    for name, pattern, columns in (
        ("a", "2.*", slice(35, 53)),
        ("b", ["0.bias"], slice(30, 35)),
        ("c", "0", slice(0, 35)),
    ):
        part = lk.gradient_features(
            trace, range(5), [3], params=pattern, store=tmp_path / "t", name=name, dtype="float64"
        )
        np.testing.assert_allclose(part["gradient"], whole["gradient"][..., columns], rtol=1e-12)
        assert int(part["stop"][-1]) == part.sizes["param"]


@pytest.mark.parametrize("make", [optim.Adam, optim.RMSprop])
def test_features__preconditioned(make, train, tmp_path):
    train(tmp_path / "t", make=lambda p: make(p, 1e-2))
    trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
    options = {"store": tmp_path / "t", "dtype": "float64", "params": ["0.weight", "2.bias"]}
    plain = lk.gradient_features(trace, range(6), [0, 11], **options)
    tensor = lk.gradient_features(
        trace, range(6), [0, 11], preconditioned=True, name="pre", **options
    )
    keep = np.r_[0:30, 50:53]
    for t, step in enumerate((0, 11)):
        scale = 1 / np.sqrt(trace.denominator(step)[keep])
        np.testing.assert_allclose(tensor["gradient"][t], plain["gradient"][t] * scale, rtol=1e-12)


def test_projection__is_the_same_in_any_chunking():
    projection = Projection(96, 7)
    whole = projection.rows(0, 2000)
    for start, stop in ((0, 1), (255, 257), (700, 1800), (1999, 2000)):
        np.testing.assert_array_equal(projection.rows(start, stop), whole[start:stop])
    assert set(np.unique(whole * np.float32(96**0.5)).round(4)) == {-1, 1}
    # Known signs: a change of generator or of bit order would make stored tensors unreadable.
    assert "".join("+" if v > 0 else "-" for v in whole[1000, :24]) == KNOWN
    assert not np.array_equal(Projection(96, 8).rows(0, 10), whole[:10])
    share = (whole > 0).mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(whole.size)
    inner = whole @ whole.T
    np.fill_diagonal(inner, 0)
    assert abs(inner).max() < 6 / np.sqrt(96)


def test_features__projected(trace, tmp_path):
    options = {"store": tmp_path / "t", "dtype": "float64"}
    whole = lk.gradient_features(trace, range(5), [3, 8], **options)
    tensor = lk.gradient_features(
        trace, range(5), [3, 8], project=64, seed=5, name="projected", **options
    )
    expected = whole["gradient"].values @ Projection(64, 5).rows(0, 53).astype(np.float64)
    np.testing.assert_allclose(tensor["gradient"], expected, rtol=1e-10)
    part = lk.gradient_features(
        trace, range(5), [3, 8], params="2.*", project=64, seed=5, name="part", **options
    )
    expected = whole["gradient"].values[..., 35:] @ Projection(64, 5).rows(35, 53)
    np.testing.assert_allclose(part["gradient"], expected, rtol=1e-10)
    assert "start" not in tensor.coords
    assert tensor.attrs["projection"] == {"size": 64, "seed": 5}


# --- resume ------------------------------------------------------------------------------------


def test_features__go_on_after_a_stop_and_compute_nothing_twice(trace, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "_SHARD_BYTES", 4 * 53 * 8)
    whole = lk.gradient_features(trace, range(18), [1, 2, 3], store=tmp_path / "a", dtype="float64")
    made = []
    shard = makers.Maker.shard

    def count(self, rows):
        if len(made) == limit:
            raise RuntimeError("stopped")
        made.append(rows)
        return shard(self, rows)

    monkeypatch.setattr(makers.Maker, "shard", count)
    monkeypatch.setattr(features_module, "_COMMIT_SECONDS", 0.0)
    limit = 7
    call = {"examples": range(18), "times": [1, 2, 3], "store": tmp_path / "b", "dtype": "float64"}
    with pytest.raises(RuntimeError, match="stopped"):
        lk.gradient_features(trace, **call)
    assert lk.open(tmp_path / "b")["gradients"].sizes["time"] == 1, "only whole times are shown"
    assert lk.verify(tmp_path / "b") == []
    limit = 100
    # Another budget now: the shards stay those that it was begun with.
    monkeypatch.setattr(features_module, "_SHARD_BYTES", 1 << 20)
    tensor = lk.gradient_features(trace, **call)
    assert 15 <= len(made) <= 17
    np.testing.assert_array_equal(tensor["gradient"], whole["gradient"])
    before = len(made)
    lk.gradient_features(trace, **call)
    assert len(made) == before


def test_features__refuse_another_tensor_in_the_group(trace, tmp_path):
    lk.gradient_features(trace, range(5), [3], store=tmp_path / "t")
    with pytest.raises(errors.FingerprintError, match=r"times: stored .*give it a name="):
        lk.gradient_features(trace, range(5), [4], store=tmp_path / "t")
    with pytest.raises(errors.FingerprintError, match="index: stored"):
        lk.gradient_features(trace, range(1, 6), [3], store=tmp_path / "t")


def test_features__have_the_kernels_as_methods_and_show_in_info(trace, tmp_path):
    tensor = lk.gradient_features(trace, range(5), [3, 8], store=tmp_path / "t")
    tree = lk.open(tmp_path / "t")
    for G in (tensor, tree["gradients"], tree):
        np.testing.assert_array_equal(G.lk.plgk(), lk.plgk(tensor))
        np.testing.assert_array_equal(G.lk.ips(weight="lr"), lk.ips(tensor, weight="lr"))
    np.testing.assert_array_equal(
        tensor.lk.params("2.*").lk.lgk(), lk.lgk(tensor.isel(param=slice(35, 53)))
    )
    text = describe_store(tmp_path / "t")
    assert "22 steps committed of Adam, 53 parameters in 4 tensors, every 1 steps" in text
    assert "/gradients  gradient(time 2, example 5, param 53), float32" in text


def test_features__stay_lazy(trace, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        tensor = lk.gradient_features(trace, range(5), [3], store=tmp_path / "t")
        tensor["gradient"].isel(time=0) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": "steps"}, "times must be 'epoch', 'step' or a list"),
        ({"times": [3, 2]}, "ascend within 0 to 22"),
        ({"times": [23]}, "ascend within 0 to 22"),
        ({"params": "fc.*"}, "'fc.\\*' matches none of"),
        ({"of": "logits"}, "of must be 'loss', 'output' or a function"),
        ({"examples": [50]}, "distinct indices from 0 to 49"),
        ({"examples": [1, 1]}, "distinct indices"),
        ({"project": 0}, "projection: size must be a positive integer"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"coords": {"label": [1, 2]}}, r"shape \(2,\); expected \(3,\)"),
        ({"times": [22], "preconditioned": True}, "and steps, not the final parameters"),
        ({"memory": "1 KiB"}, "the gradient of one example takes"),
    ],
)
def test_features__bad_input(options, message, trace):
    store = MemoryStore()
    arguments = {"examples": [1, 2, 3], "times": [1], "store": store} | options
    with pytest.raises(ValueError, match=message):
        lk.gradient_features(trace, **arguments)
    assert not store._store_dict


def test_features__take_a_finished_recorder(train, tmp_path):
    _, recorder = train(tmp_path / "t", steps=8)
    tensor = lk.gradient_features(recorder, examples(), store=tmp_path / "t")
    assert tensor.sizes["time"] == 2
    with pytest.raises(TypeError, match="trace must come from"):
        lk.gradient_features("train.zarr", examples(), store=tmp_path / "t")


def test_features__of_other_examples_than_were_trained_on(trace, tmp_path):
    torch.manual_seed(9)
    other = TensorDataset(torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    tensor = lk.gradient_features(trace, other, [4], store=tmp_path / "t", dtype="float64")
    trace.train_set, trace.train = (
        other,
        Batches(other, name="other", device=torch.device("cpu")),
    )
    np.testing.assert_allclose(tensor["gradient"][0, 2], gradient(trace, 4, 2), rtol=1e-12)
