"""Controlled kernels of sampled runs against closed forms and long runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from tests.helpers.networks import classification, small_network

QUIET = {"progress": False, "device": "cpu"}
NBETA, GAMMA, EPS = 30.0, 2.0, 0.01


def both(tree, name):
    return tree["losses"].to_dataset()[[name, f"{name}_prediction"]].load()


def test_linear_regression__controlled_kernel_is_the_closed_form():
    torch.manual_seed(0)
    inputs = torch.randn(50, 3, dtype=torch.float64)
    targets = inputs @ torch.tensor([[1.0], [2.0], [3.0]]).double()
    targets += 0.3 * torch.randn(50, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    data = TensorDataset(inputs, targets)
    posterior = lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=GAMMA)
    tree = lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(EPS),
        control=lk.Laplace(rank=3),
        outcomes=("loss", "residual"),
        store=MemoryStore(),
        chains=2,
        draws=20,
        batch_size=None,
        **QUIET,
    )
    options = {"outcome": "residual", "rank": 3, "step_size": EPS, "sketch": None}
    features = lk.laplace(posterior, data, **options, progress=False)
    x = inputs.numpy()
    precision = NBETA * 2 * x.T @ x / len(x) + GAMMA * np.eye(3)
    sigma = np.linalg.inv(precision @ (np.eye(3) - EPS / 4 * precision))
    truth = x @ sigma @ x.T
    k1 = lk.covariance(features)
    np.testing.assert_allclose(k1, truth, rtol=1e-6, atol=1e-6 * np.abs(truth).max())
    k = lk.covariance(both(tree, "residual"), control=features)
    assert k.attrs["control_removed"] > 0.99
    plain = lk.covariance(tree["losses/residual"])
    error, before = (np.abs(v.values - truth).max() / np.abs(truth).max() for v in (k, plain))
    assert error < 1e-4 < 0.05 < before
    # Losses are squares of Gaussian residuals of mean r.
    losses = tree["losses"].to_dataset().load()
    k = lk.covariance(losses, control=features, estimator="gaussian").values
    r = losses["center_residual"].values.astype(float)
    expected = 2 * truth**2 + 4 * np.outer(r, r) * truth
    assert np.abs(k - expected).max() < 1e-3 * np.abs(expected).max()
    other = lk.laplace(posterior, data, **(options | {"step_size": 0.0}), progress=False)
    with pytest.raises(ValueError, match="not of the law"):
        lk.covariance(losses, control=other)


def of_pairs(losses, kernel, size):
    """The kernel by each few of the chains: mean, and standard error of the mean."""
    starts = range(0, losses.sizes["chain"], size)
    each = np.array([kernel(losses.isel(chain=slice(a, a + size))).values for a in starts])
    return each.mean(0), each.std(0, ddof=1) / np.sqrt(len(each))


@pytest.mark.filterwarnings("ignore:the control takes:lkarray.errors.UnreliableWarning")
def test_bent_network__controlled_kernel_is_that_of_a_long_run():
    data = classification(n=24)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=30.0, gamma=10.0)
    options = {"sampler": lk.SGLD(5e-3), "chains": 16, "thin": 4, "batch_size": 12}
    options |= {"outcomes": ("loss", "log_odds"), "chains_per_device": 16, "burn_in": 200} | QUIET
    long = lk.sample(posterior, data, store=MemoryStore(), draws=200, seed=1, **options)
    law = lk.Laplace(rank=10)
    tree = lk.sample(posterior, data, store=MemoryStore(), draws=60, control=law, **options)
    features = lk.laplace(
        posterior, data, rank=10, step_size=5e-3, sketch=None, progress=False, device="cpu"
    )
    truth, noise = of_pairs(long["losses/log_odds"].load(), lk.covariance, 1)

    def controlled(losses):
        return lk.covariance(losses, control=features)

    got, error = of_pairs(both(tree, "log_odds"), controlled, 2)
    z = np.abs(got - truth) / np.hypot(error, noise)
    assert np.median(z) < 1.5
    assert (z > 5).mean() < 0.02  # of Student's t with 7 degrees of freedom
    removed = controlled(both(tree, "log_odds")).attrs["control_removed"]
    assert 0 < removed < 0.95  # it predicts something, and far from all
