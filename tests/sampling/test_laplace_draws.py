"""`lk.Laplace`: independent draws of the Gaussian law, in the stores of any run."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.chains import stopped_after
from tests.helpers.networks import classification, small_network

QUIET = {"progress": False, "device": "cpu"}
NBETA, GAMMA = 30.0, 2.0


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def regression():
    """Linear regression, whose posterior is the law itself, with its covariance in closed form."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    inputs = torch.randn(50, 3) * torch.tensor([2.0, 1.0, 0.2])
    data = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [2.0], [3.0]]))
    posterior = lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=GAMMA)
    x = inputs.double().numpy()
    precision = NBETA * 2 * x.T @ x / len(x) + GAMMA * np.eye(3)
    return posterior, data, precision


def draws_of(posterior, data, store=None, **options):
    given = {"sampler": lk.Laplace(rank=5), "chains": 2, "draws": 20} | options
    store = MemoryStore() if store is None else store
    return lk.sample(posterior, data, store=store, **(given | QUIET))


@pytest.mark.parametrize("step_size", [0.0, 0.005])
def test_draws__have_the_covariance_of_the_law(step_size):
    posterior, data, precision = regression()
    tree = draws_of(
        posterior,
        data,
        sampler=lk.Laplace(step_size, rank=5),
        draws=1500,
        observables={"weights": weights},
    )
    got = tree["observables/weights"].values.reshape(-1, 3).astype(float)
    sigma = np.linalg.inv(precision @ (np.eye(3) - step_size / 4 * precision))
    off = got - weights(posterior.model).numpy()
    root = np.linalg.cholesky(np.linalg.inv(sigma))
    white = off @ root  # standard normal, if all is well
    n = len(white)
    np.testing.assert_allclose(white.mean(0), 0, atol=4 / np.sqrt(n))
    np.testing.assert_allclose(white.T @ white / n, np.eye(3), atol=4 * np.sqrt(2 / n))
    lag = np.einsum("sp,sp->p", white[1:], white[:-1]) / n
    np.testing.assert_allclose(lag, 0, atol=4 / np.sqrt(n))


def test_draws__need_no_burn_in_and_leave_statistics_of_steps_unknown():
    posterior, data, _ = regression()
    store = MemoryStore()
    tree = draws_of(posterior, data, store)
    stats = tree["sample_stats"]
    for name in ("minibatch_loss", "gradient_norm", "acceptance", "step_size"):
        assert np.isnan(stats[name].values).all(), name
    assert np.isfinite(stats["distance"].values).all()
    assert not stats["diverged"].values.any()
    assert lk.verify(store) == []
    assert int(lk.diagnostics(tree)["chain"].size) == 2
    assert np.isfinite(lk.correlation(tree["losses"]).values).all()


@pytest.mark.parametrize("options", [{"burn_in": 3}, {"thin": 2}])
def test_draws__refuse_burn_in_and_thinning(options):
    posterior, data, _ = regression()
    with pytest.raises(ValueError, match="independent"):
        draws_of(posterior, data, **options)


def test_draws__refuse_a_schedule_and_to_be_tuned():
    posterior, data, _ = regression()
    with pytest.raises(ValueError, match="no schedule"):
        lk.Laplace(schedule=lk.schedules.Warmup(10))
    with pytest.raises(ValueError, match="no step size to choose"):
        lk.suggest(posterior, data, sampler=lk.Laplace(), progress=False)
    with pytest.raises(ValueError, match="gamma above 0"):
        draws_of(posterior.tempered(gamma=0.0), data)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_draws__go_on_after_a_stop_bit_for_bit(width, monkeypatch):
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA)
    options = {"chains": 3, "draws": 12, "chains_per_device": width}
    whole = draws_of(posterior, data, **options)
    store = MemoryStore()
    with stopped_after(monkeypatch, 7):
        draws_of(posterior, data, store, **options)
    again = draws_of(posterior, data, store, **options)
    np.testing.assert_array_equal(again["losses/loss"].values, whole["losses/loss"].values)
    more = draws_of(posterior, data, store, **(options | {"draws": 15, "chains": 4}))
    np.testing.assert_array_equal(more["losses/loss"].values[:3, :12], whole["losses/loss"].values)
    # Each chain is drawn by itself: the width moves last bits of forward passes only.
    alone = draws_of(posterior, data, chains=3, draws=12, chains_per_device=1)
    np.testing.assert_allclose(
        again["sample_stats/distance"].values, alone["sample_stats/distance"].values, rtol=1e-6
    )
    assert lk.verify(store) == []


def test_draws__take_no_gradient_of_the_training_set(monkeypatch):
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA)

    def none(self, *args, **kwargs):
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr("lkarray.sampling.target.Target.gradient", none)
    tree = draws_of(posterior, data, sampler=lk.Laplace(rank=0))
    # Without curvature the law is N(w*, I / gamma).
    size = sum(p.numel() for p in posterior.model.parameters())
    squares = tree["sample_stats/distance"].values ** 2 * GAMMA
    assert abs(squares.mean() - size) < 4 * np.sqrt(2 * size / squares.size)


def test_draws__of_another_law_are_refused_and_those_of_the_store_replayed():
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA)
    store = MemoryStore()
    tree = draws_of(posterior, data, store)
    with pytest.raises(lk.errors.FingerprintError, match="sampler"):
        draws_of(posterior, data, store, sampler=lk.Laplace(rank=4))
    replayed = lk.observe(tree, classification(7), posterior=posterior, progress=False)
    assert replayed["losses/loss"].shape == (2, 20, 7)
    assert replayed.attrs["replay_error"] == 0.0
