"""Sampled kernels against closed forms, judged by their own Monte-Carlo error.

The rule: 16 or more chains, near-independent draws, at most 2% of entries
beyond 4 standard errors from deleting one chain at a time, median |z| below 1.5, and relative
Frobenius error below 8%.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.func import grad as gradient
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk

CHAINS = 16


def half_squared_error(output, target):
    return 0.5 * (output - target).square().sum(-1)


def jackknife(losses, statistic):
    """The statistic of all chains, and its standard error by deleting one chain at a time."""
    chains = losses.sizes["chain"]
    without = [statistic(losses.drop_isel(chain=c)) for c in range(chains)]
    spread = np.array(without) - np.mean(without, axis=0)
    return statistic(losses), np.sqrt((chains - 1) / chains * (spread**2).sum(0))


def assert_by_monte_carlo(estimate, error, expected):
    z = np.abs(estimate - expected) / np.where(error > 0, error, 1)
    assert (z > 4).mean() <= 0.02
    assert np.median(z) < 1.5
    assert np.linalg.norm(estimate - expected) / np.linalg.norm(expected) < 0.08


def sampled(posterior, data, *, step_size, thin, draws, seed):
    tree = lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(step_size=step_size),
        chains=CHAINS,
        draws=draws,
        burn_in=10 * thin,
        thin=thin,
        batch_size=None,
        seed=seed,
        store=MemoryStore(),
        progress=False,
    )
    return tree["losses"]["loss"].compute()


@pytest.mark.parametrize(
    ("seed", "draws"),
    [(1, 100), *(pytest.param(seed, 400, marks=pytest.mark.minutes) for seed in (1, 2, 3))],
)
def test_linear_regression__kernel_has_its_closed_form(seed, draws):
    rng = np.random.default_rng(seed)
    n, dim, nbeta, gamma = 20, 3, 40.0, 10.0
    x = rng.normal(size=(n, dim))
    y = x @ rng.normal(size=dim) + rng.normal(size=n)
    best = np.linalg.solve(x.T @ x, x.T @ y)
    model = nn.Linear(dim, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(best[None]))
    data = TensorDataset(torch.tensor(x).float(), torch.tensor(y[:, None]).float())
    h = nbeta * x.T @ x / n + gamma * np.eye(dim)
    eps = 1.0 / np.linalg.eigvalsh(h).max()
    sigma = np.linalg.inv(h @ (np.eye(dim) - eps * h / 4))
    xs, r = x @ sigma @ x.T, y - x @ best
    expected = xs**2 / 2 + np.outer(r, r) * xs
    thin = int(np.ceil(4 / (eps * np.linalg.eigvalsh(h).min())))
    posterior = lk.LocalPosterior(model, data, half_squared_error, nbeta, gamma)
    losses = sampled(posterior, data, step_size=eps, thin=thin, draws=draws, seed=seed)
    estimate, error = jackknife(losses, lambda part: lk.covariance(part).values)
    assert_by_monte_carlo(estimate, error, expected)
    scale = np.sqrt(np.diag(expected))
    estimate, error = jackknife(losses, lambda part: lk.correlation(part).values)
    np.testing.assert_array_equal(np.diag(estimate), 1)
    off = ~np.eye(n, dtype=bool)
    assert_by_monte_carlo(estimate[off], error[off], (expected / np.outer(scale, scale))[off])


@pytest.mark.minutes
def test_nonlinear_model__kernel_has_its_laplace_limit():
    """K -> g_i' (nbeta Hbar + gamma I)^-1 g_j for small perturbations, finite step included."""
    torch.manual_seed(0)
    x = torch.randn(24, 2)
    data = TensorDataset(x, torch.sin(2 * x[:, :1]) + 0.5 * torch.randn(24, 1))
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    wide = TensorDataset(*(part.double() for part in data.tensors))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3000, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = half_squared_error(model(wide.tensors[0]), wide.tensors[1]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    names, shapes = zip(*((k, p.shape) for k, p in model.named_parameters()), strict=True)
    center = torch.cat([p.detach().flatten() for p in model.parameters()])

    def one_loss(theta, inputs, target):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {k: p.view(s) for k, p, s in zip(names, parts, shapes, strict=True)}
        return half_squared_error(functional_call(model, values, (inputs,)), target)

    def mean_loss(theta):
        return one_loss(theta, *wide.tensors).mean()

    assert gradient(mean_loss)(center).norm() < 1e-5
    g = vmap(gradient(one_loss), in_dims=(None, 0, 0))(center, *wide.tensors).numpy()
    nbeta, gamma = 2e5, 1e5
    h = nbeta * hessian(mean_loss)(center).numpy() + gamma * np.eye(len(center))
    low, high = np.linalg.eigvalsh(h)[[0, -1]]
    assert low > 0.2 * gamma
    assert high > 2 * gamma  # the Hessian matters as much as the localisation
    eps = 1.0 / high
    sigma = np.linalg.inv(h @ (np.eye(len(h)) - eps * h / 4))
    expected = g @ sigma @ g.T
    thin = int(np.ceil(4 / (eps * low)))
    posterior = lk.LocalPosterior(model, wide, half_squared_error, nbeta, gamma)
    losses = sampled(posterior, wide, step_size=eps, thin=thin, draws=200, seed=5)
    estimate, error = jackknife(losses, lambda part: lk.covariance(part).values)
    assert_by_monte_carlo(estimate, error, expected)


class TwoParts(nn.Module):
    """Two sub-models, each for one half of the inputs; ``shared`` adds a common weight."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)
        self.both = nn.Parameter(torch.zeros(1), requires_grad=shared)

    def forward(self, inputs):
        side = inputs[:, :1]
        out = torch.where(side > 0, self.left(inputs[:, 1:]), self.right(inputs[:, 1:]))
        return out + self.both


def permutation_p_value(shared: bool) -> float:
    torch.manual_seed(4)
    inputs = torch.randn(24, 4)
    inputs[:, 0] = torch.tensor([1.0, -1.0]).repeat(12)
    model = TwoParts(shared=shared)
    data = TensorDataset(inputs, model(inputs).detach() + torch.randn(24, 1))
    posterior = lk.LocalPosterior(model, data, half_squared_error, nbeta=20.0, gamma=20.0)
    losses = sampled(posterior, data, step_size=0.02, thin=4, draws=60, seed=6)
    left, right = losses.isel(sample=slice(0, None, 2)), losses.isel(sample=slice(1, None, 2))

    def coupling(order):
        a, b = (part.values.reshape(-1, 12) for part in (left, right[order]))
        a, b = ((part - part.mean(0)) / part.std(0) for part in (a, b))
        return float(((a.T @ b / len(a)) ** 2).mean())

    rng = np.random.default_rng(7)
    observed = float((lk.correlation(left, right) ** 2).mean())
    assert observed == pytest.approx(coupling(np.arange(CHAINS)), rel=1e-3)
    permuted = [coupling(rng.permutation(CHAINS)) for _ in range(2000)]
    return (1 + sum(value >= observed for value in permuted)) / (1 + len(permuted))


def test_disjoint_sub_models__are_uncorrelated():
    assert permutation_p_value(shared=False) > 0.001


def test_disjoint_sub_models__the_test_notices_a_shared_weight():
    assert permutation_p_value(shared=True) <= 0.001


class Powers(nn.Module):
    """``sum_i |w_i| ** p_i / 2``, whatever the input."""

    def __init__(self, powers):
        super().__init__()
        self.powers = powers
        self.weight = nn.Parameter(torch.zeros(len(powers)))

    def forward(self, inputs):
        terms = [w.abs() ** p for w, p in zip(self.weight, self.powers, strict=True)]
        return torch.stack(terms).sum() / 2 + 0 * inputs[:, 0]


@pytest.mark.parametrize(
    ("powers", "gamma"),
    [
        ((2,), 10.0),
        *(pytest.param(p, 0.0, marks=pytest.mark.minutes) for p in ((2,), (2, 2), (4,), (4, 2))),
    ],
)
def test_powers__local_learning_coefficient(powers, gamma):
    """1/p of each, a square's under localisation and a finite step (docs/methods/laplace.md)."""
    nbeta, eps = 30.0, 0.002
    data = TensorDataset(torch.ones(1, 1), torch.zeros(1))
    posterior = lk.LocalPosterior(Powers(powers), data, lambda out, y: out, nbeta, gamma)
    tree = lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(step_size=eps),
        chains=32,
        draws=400,
        burn_in=500,
        thin=25,
        batch_size=None,
        chains_per_device=32,
        seed=2,
        store=MemoryStore(),
        progress=False,
    )
    square = nbeta / (nbeta + gamma) / (1 - eps * (nbeta + gamma) / 4)
    expected = sum(square / 2 if p == 2 else 1 / p for p in powers)
    llc = lk.llc(tree)
    assert abs(float(llc) - expected) < 4 * float(llc["standard_error"]) + 0.01 * expected
    assert float(llc["standard_error"]) < 0.02


def test_sgld__without_noise_is_gradient_descent_exactly(monkeypatch):
    from lkarray.sampling.randomness import ChainRandomness

    def silent(self, step, out=None):
        return (self._noise if out is None else out).zero_()

    monkeypatch.setattr(ChainRandomness, "noise", silent)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 5), torch.randn(64, 2))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    nbeta, eps, draws = 3.0, 0.1, 30
    tree = lk.sample(
        lk.LocalPosterior(model, data, "mse", nbeta, 0.0),
        data,
        sampler=lk.SGLD(step_size=eps),
        chains=1,
        draws=draws,
        burn_in=0,
        batch_size=16,
        store=MemoryStore(),
        observables={"weights": lambda m: torch.cat([p.flatten() for p in m.parameters()])},
        progress=False,
    )
    like = torch.zeros(sum(p.numel() for p in model.parameters()))
    random = ChainRandomness(0, 0, n=64, batch_size=16, like=like)
    optimizer = torch.optim.SGD(model.parameters(), lr=eps / 2 * nbeta)
    for step in range(draws):
        rows = torch.from_numpy(random.indices(step))
        optimizer.zero_grad()
        loss = (model(data.tensors[0][rows]) - data.tensors[1][rows]).square().mean(1)
        torch.autograd.backward(loss, torch.full_like(loss, 1 / 16))
        optimizer.step()
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        np.testing.assert_array_equal(tree["observables/weights"][0, step], now)
