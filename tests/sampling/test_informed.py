"""`lk.InformedLangevin`: exact for its Gaussian at any step, and what it does elsewhere."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.analysis.losses.convergence import relaxation_steps
from lkarray.sampling.curvature import Curvature
from lkarray.sampling.laplace_law import LaplaceLaw
from lkarray.sampling.samplers import Move, StepInput
from lkarray.sampling.stored_samplers import sampler_from
from tests.helpers.chains import stopped_after
from tests.helpers.networks import classification, small_network

QUIET = {"progress": False, "device": "cpu"}
NBETA, GAMMA = 30.0, 2.0


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def law_of(vectors, values, nbeta=NBETA, gamma=GAMMA):
    """A law of given eigenpairs, float64."""
    values = torch.as_tensor(values, dtype=torch.float64)
    curvature = Curvature(vectors, values, torch.zeros_like(values), math.nan, 1)
    return LaplaceLaw.of(curvature, nbeta=nbeta, gamma=gamma)


def rotation(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q.T.contiguous()  # rows are orthonormal


def step_matrices(sampler, law, hessian):
    """What a step on a quadratic multiplies the deviation and its noise with."""
    size = len(hessian)
    center = torch.arange(size, dtype=torch.float64)

    def moved(offset, noise):
        theta = center + offset
        given = StepInput(theta, offset @ hessian, noise, center, NBETA, GAMMA, law=law)
        sampler.step(given)
        return (theta - center).numpy().T

    unit, none = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    return moved(unit, none), moved(none, unit)


@pytest.mark.parametrize("eps", [0.2, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("known", [0, 2, 4])
def test_step__has_the_stationary_law_that_is_documented(eps, known):
    vectors, curved = rotation(4), torch.tensor([0.5, 0.1, 0.02, 0.0], dtype=torch.float64)
    law = law_of(vectors[:known], curved[:known])
    hessian = vectors.T @ curved.diag() @ vectors
    kept, a = math.exp(-eps / 2), NBETA * curved + GAMMA
    ratio = torch.where(torch.arange(4) < known, 1.0, a / GAMMA)
    drift, spread = step_matrices(lk.InformedLangevin(eps, rank=known), law, hessian)
    # An eigenvector's own factor; where that is beyond 1, there is no stationary law.
    factors = 1 - (1 - kept) * ratio
    rows = vectors.numpy()
    np.testing.assert_allclose(rows @ drift @ rows.T, np.diag(factors), atol=1e-12)
    stable = bool((factors.abs() < 1).all())
    assert stable == bool(((1 - kept) * ratio < 2).all())
    if stable:
        variance = (1 + kept) / (2 - (1 - kept) * ratio) / a
        expected = (vectors.T @ variance.diag() @ vectors).numpy()
        got = solve_discrete_lyapunov(drift, spread @ spread.T)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        if known == 4:
            np.testing.assert_allclose(
                got, np.linalg.inv((NBETA * hessian).numpy() + GAMMA * np.eye(4)), rtol=1e-9
            )


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_step__noise_of_gradients_widens_the_law_as_documented(eps):
    vectors, curved = rotation(3), torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64)
    law, sampler = law_of(vectors, curved), lk.InformedLangevin(eps, rank=3)
    drift, spread = step_matrices(sampler, law, vectors.T @ curved.diag() @ vectors)
    center = torch.zeros(3, dtype=torch.float64)
    moved, unit = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    sampler.step(StepInput(moved, unit, 0 * unit, center, NBETA, GAMMA, law=law))
    root = rotation(3, 1).numpy() * [0.3, 0.2, 0.1]  # of the covariance of a minibatch's gradient
    from_gradient = moved.numpy().T @ root
    got = solve_discrete_lyapunov(drift, spread @ spread.T + from_gradient @ from_gradient.T)
    sigma = np.linalg.inv((vectors.T @ (NBETA * curved + GAMMA).diag() @ vectors).numpy())
    noise = NBETA**2 * root @ root.T
    expected = sigma + math.tanh(eps / 4) * sigma @ noise @ sigma
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_step__a_stack_moves_as_its_rows_do():
    law, sampler = law_of(rotation(40)[:7], np.linspace(2, 0.1, 7)), lk.InformedLangevin(0.7)
    theta, grad, noise = torch.randn(3, 3, 40, dtype=torch.float64)
    center = torch.randn(40, dtype=torch.float64)
    alone = theta.clone()
    sampler.step(StepInput(theta, grad, noise, center, NBETA, GAMMA, law=law))
    for i in range(3):
        row = slice(i, i + 1)
        given = StepInput(alone[row], grad[row], noise[row], center, NBETA, GAMMA, law=law)
        sampler.step(given)
    torch.testing.assert_close(theta, alone, rtol=0, atol=0)


@pytest.mark.parametrize("known", [0, 3])
def test_log_ratio__is_that_of_both_proposals_written_out(known):
    vectors, curved = rotation(5), torch.linspace(0.4, 0.0, 5, dtype=torch.float64)
    law, eps = law_of(vectors[:known], curved[:known]), 0.8
    sampler, center = lk.InformedLangevin(eps, rank=known), torch.ones(5, dtype=torch.float64)
    precision = torch.full((5,), GAMMA, dtype=torch.float64)
    precision[:known] += NBETA * curved[:known]
    inverse = vectors.T @ precision.diag() @ vectors

    def energy(w):
        return NBETA * w.pow(4).sum() + GAMMA / 2 * (w - center).square().sum()

    def force(w):
        return 4 * NBETA * w.pow(3) + GAMMA * (w - center)

    kept = math.exp(-eps / 2)
    noise = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    w = center + 0.1
    moved = w.clone()[None]
    grad = 4 * w.pow(3)[None]
    sampler.step(StepInput(moved, grad, noise[None], center, NBETA, GAMMA, law=law))

    def log_proposal(to, start):
        off = to - start + (1 - kept) * torch.linalg.solve(inverse, force(start))
        return -off @ inverse @ off / (2 * (1 - kept**2))

    new = moved[0]
    fall = energy(w) - energy(new)
    expected = fall + log_proposal(w, new) - log_proposal(new, w)
    move = Move(0, (force(w) + force(new))[None], noise[None], {}, law)
    got = sampler.log_ratio(fall[None].clone(), move)
    assert float(got) == pytest.approx(float(expected), rel=1e-9)


def regression():
    """Linear regression, whose posterior is the law itself, with its curvatures."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    inputs = torch.randn(50, 3) * torch.tensor([2.0, 1.0, 0.2])
    truth = torch.tensor([[1.0], [2.0], [3.0]])
    with torch.no_grad():
        model.weight.copy_(truth.T)
    data = TensorDataset(inputs, inputs @ truth)
    posterior = lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=GAMMA)
    x = inputs.double().numpy()
    return posterior, data, *np.linalg.eigh(2 * x.T @ x / len(x))


def sampled(posterior, data, store=None, **options):
    given = {"sampler": lk.InformedLangevin(1.0, rank=5), "chains": 2, "draws": 20, "burn_in": 5}
    given |= {"batch_size": None} | options
    store = MemoryStore() if store is None else store
    return lk.sample(posterior, data, store=store, **(given | QUIET))


@pytest.mark.parametrize(("eps", "rank"), [(0.5, 5), (1.0, 5), (2.0, 5), (1.0, 2)])
def test_sample__draws_a_regression_exactly_and_another_rank_as_documented(eps, rank):
    posterior, data, curved, rows = regression()
    tree = sampled(
        posterior,
        data,
        sampler=lk.InformedLangevin(eps, rank=rank),
        draws=800,
        burn_in=30,
        observables={"weights": weights},
    )
    kept, a = math.exp(-eps / 2), NBETA * curved + GAMMA  # ascending
    ratio = np.where(np.arange(3) < 3 - rank, a / GAMMA, 1.0)
    variance = (1 + kept) / (2 - (1 - kept) * ratio) / a
    off = tree["observables/weights"].values.astype(float) - weights(posterior.model).numpy()
    white = off @ rows / np.sqrt(variance)  # standard normal, if all is well
    factor = 1 - (1 - kept) * ratio
    n = white.shape[0] * white.shape[1]
    mean_error = np.sqrt((1 + factor) / (1 - factor) / n)
    np.testing.assert_array_less(np.abs(white.mean((0, 1))), 4 * mean_error)
    both = np.outer(factor, factor)
    error = np.sqrt((1 + np.eye(3)) * (1 + both) / (1 - both) / n)
    got = np.einsum("csp,csq->pq", white, white) / n
    np.testing.assert_array_less(np.abs(got - np.eye(3)), 4 * error)
    lag = np.einsum("csp,csp->p", white[:, 1:], white[:, :-1]) / (n - 2) / np.diag(got)
    np.testing.assert_array_less(np.abs(lag - factor), 4 * np.sqrt((1 - factor**2) / n))
    acceptance = tree["sample_stats/acceptance"].values
    acceptance = acceptance[np.isfinite(acceptance)]
    assert len(acceptance) == 32
    if rank == 5:
        np.testing.assert_allclose(acceptance, 1, atol=1e-4)
    else:
        assert acceptance.mean() < 0.99


@pytest.mark.parametrize("eps", [0.5, 5.0])
def test_sample__without_loss_is_the_localisation_alone_at_any_step(eps):
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=0.0, gamma=GAMMA)
    tree = sampled(
        posterior,
        data,
        sampler=lk.InformedLangevin(eps, rank=0),
        draws=300,
        burn_in=30,
        batch_size=16,
    )
    size, kept = len(weights(posterior.model)), math.exp(-eps / 2)
    squares = tree["sample_stats/distance"].values.astype(float) ** 2 * GAMMA
    error = math.sqrt(2 * size / squares.size * (1 + kept**2) / (1 - kept**2))
    assert abs(squares.mean() - size) < 4 * error
    acceptance = tree["sample_stats/acceptance"].values
    np.testing.assert_allclose(acceptance[np.isfinite(acceptance)], 1, atol=1e-4)
    steps = relaxation_steps(eps, GAMMA, {"name": "InformedLangevin"})
    assert math.exp(-1 / steps) == pytest.approx(kept)


@pytest.mark.minutes
@pytest.mark.parametrize("rank", [0, 6])
def test_sample__has_the_gains_and_the_kernel_of_sgld(rank):
    data = classification()
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    inputs, labels = data.tensors
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    posterior = lk.LocalPosterior(model, data, nbeta=20.0, gamma=20.0)
    options = {"chains": 8, "chains_per_device": 8, "outcomes": ("loss", "log_odds")}
    slow = sampled(
        posterior,
        data,
        sampler=lk.SGLD(2e-3),
        draws=100,
        thin=20,
        burn_in=200,
        **options,
    )
    fast = sampled(
        posterior, data, sampler=lk.InformedLangevin(0.3, rank=rank), draws=400, thin=2, **options
    )
    a, b = (lk.loss_gain(tree).mean("sample") for tree in (slow, fast))
    by_chain = [t["losses/loss"].mean(("draw", "sample")).values for t in (slow, fast)]
    error = math.hypot(*(values.std(ddof=1) / math.sqrt(8) for values in by_chain))
    assert abs(float(a - b)) < 4 * error
    assert error < 0.05 * float(a)
    agree = lk.cka(slow["losses/log_odds"], fast["losses/log_odds"], debiased="draws")
    assert float(agree) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_sample__goes_on_after_a_stop_bit_for_bit(width, monkeypatch):
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA)
    options = {"chains": 3, "draws": 12, "chains_per_device": width, "batch_size": 16}
    whole = sampled(posterior, data, **options)
    store = MemoryStore()
    with stopped_after(monkeypatch, 12):
        sampled(posterior, data, store, **options)
    again = sampled(posterior, data, store, **options)
    np.testing.assert_array_equal(again["losses/loss"].values, whole["losses/loss"].values)
    more = sampled(posterior, data, store, **(options | {"draws": 15, "chains": 4}))
    np.testing.assert_array_equal(more["losses/loss"].values[:3, :12], whole["losses/loss"].values)
    alone = sampled(posterior, data, **(options | {"chains_per_device": 1}))
    np.testing.assert_allclose(
        again["sample_stats/distance"].values, alone["sample_stats/distance"].values, rtol=1e-4
    )
    assert lk.verify(store) == []
    replayed = lk.observe(more, classification(7), posterior=posterior, progress=False)
    assert replayed["losses/loss"].shape == (4, 15, 7)
    assert replayed.attrs["replay_error"] == 0.0
    with pytest.raises(lk.errors.FingerprintError, match="sampler"):
        sampled(posterior, data, store, sampler=lk.InformedLangevin(1.0, rank=4), **options)


def test_sample__moves_what_is_trainable_alone():
    data = classification()
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=GAMMA, trainable="0.*")
    tree = sampled(posterior, data, observables={"weights": weights}, draws=5)
    off = tree["observables/weights"].values - weights(posterior.model).numpy()
    moving = sum(p.numel() for p in posterior.model[0].parameters())
    assert (off[..., :moving] != 0).all()
    assert (off[..., moving:] == 0).all()


def test_sampler__is_rebuilt_from_its_settings_and_takes_a_schedule():
    sampler = lk.InformedLangevin(0.5, rank=3, schedule=lk.schedules.Warmup(10))
    assert sampler_from(sampler.settings() | {"law": "0123"}) == sampler
    assert sampler.size(0) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.InformedLangevin(0.0), "step_size must be a positive number"),
        (lambda: lk.InformedLangevin(-1.0), "step_size must be a positive number"),
        (lambda: lk.InformedLangevin(1.0, rank=-1), "rank must be"),
        (lambda: lk.InformedLangevin(1.0, rank=2.5), "rank must be"),
        (lambda: lk.InformedLangevin(1.0, schedule=2), "schedule must map a step"),
    ],
)
def test_sampler__refuses_bad_settings(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_sample__needs_a_localisation():
    posterior, data, *_ = regression()
    with pytest.raises(ValueError, match="gamma above 0"):
        sampled(posterior.tempered(gamma=0.0), data)
