"""`control=`: linear chains beside chains, and what they predict of outcomes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.sampling import control as controls
from lkarray.store.location import ENTRIES
from tests.helpers.chains import stopped_after
from tests.helpers.networks import classification, small_network

QUIET = {"progress": False, "device": "cpu"}
BOTH = ("loss", "log_odds")
NBETA, GAMMA, EPS = 30.0, 50.0, 1e-3


@pytest.fixture
def data():
    return classification(n=24)


@pytest.fixture
def posterior(data):
    return lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA)


def run(posterior, data, store=None, **options):
    given = {"sampler": lk.SGLD(EPS), "chains": 2, "draws": 6, "batch_size": 8}
    given |= {"control": lk.Laplace(rank=4), "outcomes": BOTH, "thin": 2, "chains_per_device": 1}
    store = MemoryStore() if store is None else store
    return lk.sample(posterior, data, store=store, **(given | options | QUIET))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_control__is_the_chain_itself_where_the_loss_is_quadratic():
    torch.manual_seed(0)
    inputs = torch.randn(40, 3)
    targets = inputs @ torch.tensor([[1.0], [2.0], [3.0]]) + 0.3 * torch.randn(40, 1)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    data = TensorDataset(inputs, targets)
    posterior = lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=2.0)
    options = {"outcomes": ("loss", "residual"), "batch_size": None, "sampler": lk.SGLD(0.01)}
    tree = run(posterior, data, **options, draws=20)
    losses = tree["losses"]
    moved = losses["residual"] - losses["center_residual"]
    np.testing.assert_allclose(losses["residual_prediction"], moved, atol=2e-5)


def test_control__of_a_network_goes_along_with_it(posterior, data):
    tree = run(posterior.tempered(gamma=2000.0), data, sampler=lk.SGLD(1e-4), draws=100)
    losses = tree["losses"]
    predicted, moved = losses["log_odds_prediction"], losses["log_odds"] - losses["center_log_odds"]
    assert predicted.dims == ("chain", "draw", "sample")
    assert predicted.dtype == np.float32
    r = [
        np.corrcoef(predicted.values[..., i].ravel(), moved.values[..., i].ravel())[0, 1]
        for i in range(data.tensors[0].shape[0])
    ]
    assert np.median(r) > 0.95


def test_control__says_what_law_it_is_of(posterior, data):
    store = MemoryStore()
    tree = run(posterior, data, store)
    attrs = tree["losses/log_odds_prediction"].attrs
    stored = tree.attrs[ENTRIES]["losses"]
    assert attrs["outcome"] == stored["control"]["outcome"] == "log_odds"
    assert (attrs["rank"], attrs["step_size"], attrs["gamma"]) == (4, EPS, GAMMA)
    assert attrs["law"] == stored["control"]["law"] == stored["start"]["law"]
    assert stored["state"] == ["parameters", "control"]
    assert stored["burn_in"] == 0
    assert lk.verify(store) == []
    assert "control" not in run(posterior, data, control=None).attrs[ENTRIES]["losses"]
    for other in ({"control": lk.Laplace(rank=2)}, {"control": None, "start": lk.Laplace(rank=4)}):
        with pytest.raises(lk.errors.FingerprintError, match="control"):
            run(posterior, data, store, **other)


def test_control__moves_no_bit_of_the_chain(posterior, data):
    alone = run(posterior, data, control=None, start=lk.Laplace(rank=4))
    beside = run(posterior, data)
    for name in BOTH:
        np.testing.assert_array_equal(beside[f"losses/{name}"], alone[f"losses/{name}"])


@pytest.mark.parametrize("width", [1, 2])
def test_control__goes_on_after_a_kill_bit_for_bit(width, posterior, data, monkeypatch, tmp_path):
    options = {"chains_per_device": width}
    whole = run(posterior, data, **options)["losses"].to_dataset().load()
    store = tmp_path / "s.zarr"
    with stopped_after(monkeypatch, 5):
        run(posterior, data, store, **options)
    again = run(posterior, data, store, **options)["losses"].to_dataset().load()
    assert again.identical(whole)
    (store / "losses/log_odds_prediction/c/0/0/0").unlink()
    assert {p.path for p in lk.verify(store)} == {"losses/log_odds_prediction/c/0/0/0"}
    assert all(repair.mended for repair in lk.repair(store, progress=False))
    assert lk.open(store)["losses"].to_dataset().load().identical(whole)
    alone = run(posterior, data, chains_per_device=1)["losses/log_odds_prediction"]
    np.testing.assert_allclose(whole["log_odds_prediction"], alone, rtol=1e-3, atol=1e-5)


def test_control__of_independent_draws_is_their_own_offset(posterior, data):
    options = {"sampler": lk.Laplace(rank=4), "thin": 1, "observables": {"weights": weights}}
    tree = run(posterior, data, **options, control="laplace")
    assert tree.attrs[ENTRIES]["losses"]["state"] == ["parameters"]
    off = tree["observables/weights"].values - weights(posterior.model).numpy()
    features = lk.laplace(posterior, data, rank=0, sketch=None, progress=False)
    gradients = features["feature"].values * GAMMA**0.5  # (mode, sample): whitened by 1 / gamma
    predicted = tree["losses/log_odds_prediction"]
    np.testing.assert_allclose(predicted, off @ gradients, rtol=1e-3, atol=1e-4)


class NoForward(torch.autograd.Function):
    """An identity that torch cannot differentiate forwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope


class Stubborn(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return NoForward.apply(self.inner(inputs))


def test_control__goes_backwards_where_it_cannot_go_forwards(posterior, data, monkeypatch):
    expected = run(posterior, data)["losses/log_odds_prediction"].values
    stubborn = lk.LocalPosterior(Stubborn(posterior.model), data, nbeta=NBETA, gamma=GAMMA)
    passes = []
    monkeypatch.setattr(
        controls,
        "_backwards",
        lambda *args, own=controls._backwards: passes.append(1) or own(*args),
    )
    got = run(stubborn, data)["losses/log_odds_prediction"].values
    assert passes
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_control__of_parts_of_a_model_and_several_sets(data, tmp_path):
    posterior = lk.LocalPosterior(
        small_network(), data, nbeta=NBETA, gamma=GAMMA, trainable=["0.weight"]
    )
    few = TensorDataset(data.tensors[0][:5], data.tensors[1][:5])
    tree = run(posterior, {"all": data, "few": few})
    first = tree["losses/log_odds_prediction"].values[..., :5]
    np.testing.assert_allclose(tree["losses_few/log_odds_prediction"], first, rtol=1e-4, atol=1e-6)
    parts = run(posterior, data, tmp_path / "s.zarr", components={"a": "0.weight", "b": "2.*"})
    assert parts["losses/log_odds_prediction"].dims == ("component", "chain", "draw", "sample")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "center"}, 'leave start="center" out'),
        ({"control": "linear"}, "control must be None, 'laplace'"),
        ({"start": lk.Laplace(rank=3)}, "start has rank 3 and control 4"),
        ({"sampler": lk.RMSpropSGLD(EPS)}, "not RMSpropSGLD"),
        ({"sampler": lk.Laplace(rank=3), "thin": 1}, "another rank or step size"),
        ({"coords": {"log_odds_prediction": range(24)}}, "log_odds_prediction"),
    ],
)
def test_control__is_refused_where_it_has_no_law(posterior, data, options, message):
    with pytest.raises(ValueError, match=message):
        run(posterior, data, **options)
