"""Kernels from factors equal those from gradients; what hidden layers and inputs do."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import errors
from tests.helpers.networks import convolutional
from tests.helpers.recorded_runs import batches_of, cross_entropy, examples, network


def images(n=40, seed=2):
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.arange(n) % 3)


@pytest.fixture
def trace(tmp_path):
    model, data = convolutional(), images()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with lk.record(model, optimizer, data, loss=cross_entropy, store=tmp_path / "t") as recorder:
        for batch in batches_of(9, n=40):
            with recorder.step(batch):
                optimizer.zero_grad()
                loss = cross_entropy(model(data.tensors[0][batch]), data.tensors[1][batch])
                loss.mean().backward()
                optimizer.step()
    return recorder.trace()


@pytest.fixture
def both(trace, tmp_path):
    """Gradients and factors of the training examples, and of others."""
    out = {}
    for name, data in (("train", range(40)), ("other", images(17, seed=8))):
        options = {"times": [0, 4, 8], "store": tmp_path / "t", "dtype": "float64"}
        dense = lk.gradient_features(trace, data, name=name, **options)
        ghost = lk.gradient_factors(trace, data, name=f"{name}_factors", **options)
        out[name] = dense, ghost
    return out


KERNELS = {
    "lgk": lk.lgk,
    "plgk": lk.plgk,
    "lr": lambda G, y=None: lk.plgk(G, y, weight="lr"),
    "lr2": lambda G, y=None: lk.plgk(G, y, weight="lr2"),
    "ips": lk.ips,
    "ips lr": lambda G, y=None: lk.ips(G, y, weight="lr"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels__from_factors_equal_those_from_gradients(name, both):
    (dense, ghost), (other, other_ghost) = both["train"], both["other"]
    kernel = KERNELS[name]
    for by_factors, expected in (
        (kernel(ghost), kernel(dense)),
        (kernel(other_ghost, ghost), kernel(other, dense)),
    ):
        assert by_factors.dims == expected.dims
        assert by_factors.name == expected.name
        scale = float(abs(expected).max())
        np.testing.assert_allclose(by_factors, expected, rtol=1e-10, atol=1e-10 * scale)
    if name.startswith("ips"):
        np.testing.assert_array_equal(np.diag(kernel(ghost)), 1)
        assert lk.chord_distance(kernel(ghost)).shape == (40, 40)


def test_factors__are_fewer_numbers_and_one_time_will_do(both, trace):
    dense, ghost = both["train"]
    assert ghost["factor"].sizes["element"] < dense.sizes["param"] / 4
    assert set(ghost["role"].values.tolist()) == {"dense", "in", "out"}
    kernel = lk.plgk(ghost.isel(time=1))
    np.testing.assert_allclose(kernel, lk.plgk(dense.isel(time=1)), rtol=1e-10, atol=1e-12)
    assert "factored" in str(lk.gradient_plan(trace))
    assert lk.gradient_plan(trace).cost == ghost["factor"].sizes["element"]


def test_factors__survive_the_store_and_stay_lazy(both, tmp_path):
    again = lk.open(tmp_path / "t")["gradients_train_factors"]
    assert again["factor"].chunks is not None
    assert lk.plgk(again).chunks is not None
    np.testing.assert_array_equal(lk.plgk(again), lk.plgk(both["train"][1]))
    assert lk.verify(tmp_path / "t") == []


def test_factors__bad_input(both):
    ghost = both["train"][1]
    with pytest.raises(errors.SchemaError, match="pass the Dataset"):
        lk.plgk(ghost["factor"])
    with pytest.raises(errors.SchemaError, match="made in another form"):
        lk.plgk(ghost, both["other"][1].isel(part=slice(1, None)))
    with pytest.raises(errors.SchemaError, match="expected a variable 'gradient'"):
        lk.temporal_kernel(ghost)


# --- hidden layers and inputs -------------------------------------------------------------------


def test_activations__are_the_modules_output_at_each_time(trace):
    units = lk.activations(trace, range(5), [0, 9], module="4", coords={"label": [0, 1, 2, 0, 1]})
    assert units.dims == ("time", "example", "unit")
    trace.set(9)
    with torch.no_grad():
        expected = trace.flat.module[:5](trace.train.take(np.arange(5))[0])
    np.testing.assert_allclose(units[1], expected, rtol=1e-6)
    np.testing.assert_array_equal(units["label"], [0, 1, 2, 0, 1])
    overlap = lk.activation_overlap(units)
    np.testing.assert_allclose(overlap[-1], 1, rtol=1e-6)
    with pytest.raises(ValueError, match="module 'fc' is none of"):
        lk.activations(trace, range(5), [0], module="fc")
    with pytest.raises(errors.MemoryBudgetError, match="the activations take"):
        lk.activations(trace, range(5), [0], module="4", memory=100)


def test_sensitivity__equals_finite_differences_of_the_coefficients(trace, both):
    dense, _ = both["train"]
    modes = lk.modes(dense.isel(time=-1), 3).compute()
    moves = lk.mode_sensitivity(trace, modes, range(6), 8)
    trace.set(8)
    slopes = lk.mode_sensitivity(trace, modes, range(6), 8, whole=True)["slope"]
    directions = torch.from_numpy(modes["direction"].values)

    def coefficients(inputs, target):
        losses = trace.loss(trace.flat(inputs), target)
        slopes = torch.autograd.grad(losses.sum(), trace.flat.leaves)
        return directions @ torch.cat([s.flatten() for s in slopes])

    for example in (0, 5):
        inputs, target = trace.train.take(np.array([example]))
        gradient = np.zeros((3, inputs.numel()))
        for i in range(inputs.numel()):
            step = torch.zeros(inputs.numel(), dtype=torch.float64)
            step[i] = 1e-5
            up, down = (coefficients(inputs + s * step.view_as(inputs), target) for s in (1, -1))
            gradient[:, i] = ((up - down) / 2e-5).numpy()
        np.testing.assert_allclose(slopes[example], gradient, rtol=1e-4, atol=1e-6)
        expected = np.linalg.norm(gradient, axis=1)
        np.testing.assert_allclose(moves["sensitivity"][example], expected, rtol=1e-6)
        norm = np.linalg.norm(dense["gradient"][-1, example])
        np.testing.assert_allclose(moves["corrected"][example], expected / norm, rtol=1e-6)
    with pytest.raises(errors.SchemaError, match="direction"):
        lk.mode_sensitivity(trace, modes.isel(param=slice(10)), range(6), 8)


def test_tokens__cannot_be_moved(train, tmp_path):
    train(tmp_path / "t", steps=4)
    trace = lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)
    G = lk.gradient_features(trace, range(9), [2], store=tmp_path / "t", dtype="float64")
    modes = lk.modes(G.isel(time=0), 2)
    tokens = TensorDataset(torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    trace.flat.module[0].forward = lambda x: x[:, :5].double()
    with pytest.raises(TypeError, match="must be float tensors"):
        lk.mode_sensitivity(trace, modes, tokens, 2)
