"""Models trained elsewhere, and gradients of whole training sets."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lkarray as lk
from lkarray import errors
from tests.helpers.recorded_runs import cross_entropy, examples, network


@pytest.fixture
def trained(train, tmp_path):
    train(tmp_path / "t", steps=6)
    return lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)


def test_mean_gradient__is_autograds_of_the_mean_loss(trained):
    mean = lk.mean_gradient(trained, [0, 4, 6])
    inputs, labels = examples().tensors
    for t, step in enumerate((0, 4, 6)):
        model = network()
        nn.utils.vector_to_parameters(
            torch.from_numpy(trained.parameters(step)), model.parameters()
        )
        slopes = torch.autograd.grad(
            cross_entropy(model(inputs), labels).mean(), list(model.parameters())
        )
        expected = torch.cat([slope.flatten() for slope in slopes])
        np.testing.assert_allclose(mean[t], expected, rtol=1e-12, atol=1e-15)
    assert mean.dims == ("time", "param")
    assert mean["time"].values.tolist() == [0, 4, 6]


def test_mean_gradient__along_modes_is_their_drive(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.training.means._ROWS", 7)  # of several batches
    G = lk.gradient_features(trained, range(50), [6], store=tmp_path / "t", dtype="float64")
    modes = lk.modes(G.isel(time=0), 4).compute()
    mean = lk.mean_gradient(trained, [6]).isel(time=0)
    along = (modes["direction"] * mean).sum("param")
    np.testing.assert_allclose(50 * along, modes["drive"], rtol=1e-9)
    some = lk.mean_gradient(trained, [6], examples=[3, 8]).isel(time=0)
    both = G["gradient"].isel(time=0, example=[3, 8]).mean("example")
    np.testing.assert_allclose(some, both, rtol=1e-12, atol=1e-15)


def test_mean_gradient__bad_input(trained):
    with pytest.raises(ValueError, match="times must ascend"):
        lk.mean_gradient(trained, [7])
    with pytest.raises(ValueError, match="distinct indices"):
        lk.mean_gradient(trained, [0], examples=[50])
    trained.loss = lambda output, target: output.sum(1) / 0
    with pytest.raises(errors.NonFiniteError, match="before step 2"):
        lk.mean_gradient(trained, [2])


def test_snapshot__has_the_model_as_it_is(tmp_path):
    model = network(seed=5)
    before = copy.deepcopy(model.state_dict())
    trace = lk.snapshot(model, examples(), loss=cross_entropy, store=tmp_path / "s")
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    for step in (0, 1):
        np.testing.assert_array_equal(trace.parameters(step), theta)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())
    again = lk.snapshot(model, examples(), loss=cross_entropy, store=tmp_path / "s")
    assert again.steps == 1
    G = lk.gradient_features(trace, range(5), [1], store=tmp_path / "s", dtype="float64")
    inputs, labels = examples().tensors
    for n in range(5):
        slopes = torch.autograd.grad(
            cross_entropy(model(inputs[[n]]), labels[[n]]).sum(), list(model.parameters())
        )
        expected = torch.cat([slope.flatten() for slope in slopes])
        np.testing.assert_allclose(G["gradient"][0, n], expected, rtol=1e-10, atol=1e-15)


def test_snapshot__refuses_another_model_in_its_store(tmp_path):
    lk.snapshot(network(), examples(), loss=cross_entropy, store=tmp_path / "s")
    with pytest.raises(errors.FingerprintError, match="weights"):
        lk.snapshot(network(seed=4), examples(), loss=cross_entropy, store=tmp_path / "s")


def test_snapshot__of_a_named_loss(tmp_path):
    model = network().float()
    data = examples()
    data.tensors = (data.tensors[0].float(), data.tensors[1])
    assert lk.snapshot(model, data, store=tmp_path / "s").steps == 1
