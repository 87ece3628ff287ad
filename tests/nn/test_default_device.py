"""Nothing is made on torch's default device by accident: here it holds no numbers at all.

A tensor that is made without a device lands on the default one. On a machine whose default is a GPU
it would meet the others there or here; where the default is "meta" it fails at once, anywhere.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk


@contextmanager
def meta():
    """Make torch's default device one without numbers."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        # Not to "cpu": the mode that says so would stand, and every call of torch go through it.
        torch.set_default_device(None)


def make_data():
    inputs = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )


SAMPLERS = {
    "SGLD": (lk.SGLD(1e-3), {}),
    "SGLD, stacked": (lk.SGLD(1e-3), {"chains_per_device": 2}),
    "RMSprop with its drift": (lk.RMSpropSGLD(1e-3, drift_correction=True), {}),
    "SGHMC": (lk.SGHMC(1e-3), {"autocast": "bfloat16"}),
    "informed": (lk.InformedLangevin(0.5, rank=3), {"chains_per_device": 2}),
    "Laplace": (lk.Laplace(rank=3), {"burn_in": 0}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling__is_the_same_whatever_the_default_device(name, tmp_path):
    sampler, own = SAMPLERS[name]
    posterior = lk.LocalPosterior(
        make_model(), make_data(), nbeta=10.0, gamma=100.0, trainable="4.weight[0:1, :]"
    )
    if name != "RMSprop with its drift":
        posterior = lk.LocalPosterior(make_model(), make_data(), nbeta=10.0, gamma=100.0)
    options = {
        "sampler": sampler,
        "chains": 2,
        "draws": 4,
        "burn_in": 1,
        "batch_size": 8,
        "outcomes": ("loss", "log_odds"),
        "observables": {"norm": lambda m: sum((p**2).sum() for p in m.parameters())},
        "device": "cpu",
        "progress": False,
    } | own
    data = make_data()
    plain = lk.sample(posterior, data, store=tmp_path / "plain.zarr", **options)
    with meta():
        tree = lk.sample(posterior, data, store=tmp_path / "meta.zarr", **options)
        more = lk.sample(posterior, data, store=tmp_path / "meta.zarr", **options | {"draws": 6})
    for variable in ("loss", "log_odds"):
        np.testing.assert_array_equal(tree["losses"][variable], plain["losses"][variable])
    assert more["losses"].sizes["draw"] == 6


def test_replay_and_pilots__make_nothing_on_the_default_device(tmp_path):
    posterior = lk.LocalPosterior(make_model(), make_data(), nbeta=10.0, gamma=100.0)
    data, options = make_data(), {"draws": 3, "batch_size": 8, "progress": False}
    tree = lk.sample(posterior, data, sampler=lk.SGLD(1e-3), store=tmp_path / "s.zarr", **options)
    with meta():
        again = lk.observe(tree, data, progress=False)
        lk.suggest(posterior, data, step_sizes=(1e-4,), draws=4, progress=False)
    np.testing.assert_array_equal(again["losses"]["loss"], tree["losses"]["loss"])


@pytest.mark.parametrize(
    "options", [{"sketch": None, "smooth": 2}, {"sketch": 32}], ids=["smoothed", "sketched"]
)
def test_laplace_features__are_the_same_whatever_the_default_device(options):
    posterior = lk.LocalPosterior(make_model(), make_data(), nbeta=10.0, gamma=100.0)
    plain = lk.laplace(posterior, make_data(), rank=3, device="cpu", progress=False, **options)
    data = make_data()
    with meta():
        features = lk.laplace(posterior, data, rank=3, device="cpu", progress=False, **options)
        features = features.load()
    np.testing.assert_array_equal(features["feature"], plain["feature"])


def recorded(path, optimizer_of, **options):
    """Record four steps under any default device; return the trace."""
    model, data = make_model(), make_data()
    optimizer = optimizer_of(model)
    batches = [list(range(k * 6, k * 6 + 6)) for k in range(4)]
    inputs, targets = data.tensors
    with meta():
        with lk.record(model, optimizer, data, store=path, progress=False, **options) as trace:
            for batch in trace.remaining(batches):
                with trace.step(batch):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                    optimizer.step()
        return lk.open_trace(path, model, data)


OPTIMIZERS = {
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), 1e-2), {}),
    "momentum, replayed": (lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9), {"every": 2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recording_and_audits__are_the_same_whatever_the_default_device(name, tmp_path):
    optimizer_of, options = OPTIMIZERS[name]
    trace = recorded(tmp_path / "trace.zarr", optimizer_of, **options)
    examples = torch.tensor([0, 3, 5])  # as a tensor: indices may come from any device
    plain = {key: made.load() for key, made in attributions(trace, examples, tmp_path, "a")}
    with meta():
        later = {key: made.load() for key, made in attributions(trace, examples, tmp_path, "b")}
    for key, value in plain.items():
        for one in value.data_vars.values() if hasattr(value, "data_vars") else [value]:
            other = later[key][one.name] if hasattr(value, "data_vars") else later[key]
            np.testing.assert_array_equal(one, other, err_msg=f"{key}: {one.name}")


def attributions(trace, examples, folder, name):
    """Yield what is computed of a recorded run, by name."""
    audit = lk.audit(trace, examples, supersample=2, progress=False)
    yield "audit", audit.to_dataset() if hasattr(audit, "to_dataset") else audit
    middle = lk.audit(trace, examples, overlap=True, steps=(1, 3), progress=False)
    yield "middle", middle.to_dataset() if hasattr(middle, "to_dataset") else middle
    shared = {"store": folder / f"{name}.zarr"}
    yield "features", lk.gradient_features(trace, examples, times=[0, 2], project=8, **shared)
    yield "factors", lk.gradient_factors(trace, examples, times=[0, 2], **shared)
    yield "tracin", lk.tracin(trace, examples, checkpoints=[0, 2])
    yield "in run", lk.tracin_in_run(trace, examples)
    yield "trak", lk.trak(trace, examples, size=16)
    yield "influence", lk.influence_functions(trace, examples, damping=10.0)


def test_kernels_of_torch__make_nothing_on_the_default_device():
    draws = np.random.default_rng(0).standard_normal((2, 10, 30)).astype(np.float32)
    losses = xr.DataArray(draws, dims=("chain", "draw", "sample"))
    plain = lk.neighbors(losses, 3, device="cpu").load()
    kernel = lk.correlation(losses, device="cpu").load()
    with meta():
        np.testing.assert_array_equal(lk.correlation(losses, device="cpu").load(), kernel)
        near = lk.neighbors(losses, 3, device="cpu").load()
    np.testing.assert_array_equal(near["neighbor"], plain["neighbor"])
