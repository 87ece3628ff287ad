import numpy as np
import pytest

from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.diagnostics import diagnostics
from tests.helpers.chains import autoregressive
from tests.helpers.losses import numpy_correlation, random_losses


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_ess__of_autoregressive_chains_is_the_known_one(rho):
    x = autoregressive(np.random.default_rng(3), rho, draws=1000, samples=100)
    report = diagnostics(x)
    for name, r in (("ess_bulk", rho), ("kernel_ess", rho**2)):
        expected = 4000 * (1 - r) / (1 + r)
        mean = float(report[name].mean())
        assert mean == pytest.approx(expected, rel=0.04), name
    assert float(report["autocorrelation_draws"]) == pytest.approx((1 + rho) / (1 - rho), rel=0.05)
    np.testing.assert_allclose(report["mcse"].mean(), report["ess_bulk"].mean() ** -0.5, rtol=0.03)


def test_kernel_error__is_the_spread_of_entries_of_r():
    x = autoregressive(np.random.default_rng(4), 0.8, samples=80)
    entries = numpy_correlation(x)[np.triu_indices(80, 1)]
    report = diagnostics(x)
    assert float(report["kernel_error"]) == pytest.approx(entries.std(), rel=0.05)
    # Products are no more correlated than a series, whose own size is far smaller.
    assert float(report["kernel_ess"]) > 1.5 * float(report["ess_bulk"].median())


def test_kernel_ess__is_the_median_over_all_pairs_where_they_are_few(rng):
    from arviz_stats.base import array_stats

    losses = random_losses(rng, samples=6).astype("f8")
    x = losses.values - losses.values.mean(axis=(0, 1))
    ess = [
        array_stats.ess(x[..., i] * x[..., j], 0, 1, method="mean")
        for i in range(6)
        for j in range(i)
    ]
    assert float(diagnostics(losses)["kernel_ess"]) == pytest.approx(np.median(ess), rel=1e-9)
    few = [float(diagnostics(losses, pairs=3, seed=seed)["kernel_ess"]) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_drift__is_a_z_score():
    x = autoregressive(np.random.default_rng(5), 0.7, chains=200, draws=400, samples=1)
    z = diagnostics(x)["drift"]
    assert z.dims == ("chain",)
    assert abs(float(z.mean())) < 0.3
    assert float(z.std()) == pytest.approx(1, abs=0.2)
    burning = x + 5 * np.exp(-np.arange(400) / 80).reshape(1, 400, 1)
    assert float((diagnostics(burning)["drift"] < -4).mean()) > 0.9


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "SGLD"},
        {"name": "RMSpropSGLD", "damping": 0.1},
        {"name": "SGHMC", "friction": 0.1},
        {"name": "SGHMC", "friction": 0.9},
    ],
)
def test_relaxation__is_how_long_the_sampler_remembers(sampler):
    """The sampler itself, without loss: the distance of the mean from w* falls as exp(-t / tau)."""
    import torch

    from lkarray.sampling import samplers

    step_size, gamma, options = 1e-3, 20.0, {k: v for k, v in sampler.items() if k != "name"}
    stepper = getattr(samplers, sampler["name"])(step_size=step_size, **options)
    theta = torch.ones(1, 1, dtype=torch.float64)
    state = {name: torch.zeros_like(theta) for name in stepper.carries}
    zero, path = torch.zeros_like(theta), []
    for step in range(4000):
        given = samplers.StepInput(theta, zero, zero, zero[0], 1.0, gamma, step, state)
        stepper.step(given)
        path.append(abs(float(theta)))
    far = np.array(path) / max(path) > 1e-6
    measured = -1 / np.polyfit(np.arange(4000)[far], np.log(np.array(path)[far]), 1)[0]
    steps = convergence.relaxation_steps(step_size, gamma, sampler)
    assert steps == pytest.approx(measured, rel=0.1)
