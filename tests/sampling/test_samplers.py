"""Samplers, on plain vectors: their equations, and the variances they must have."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lkarray as lk
from lkarray.sampling.samplers import StepInput
from lkarray.sampling.stored_samplers import SAMPLERS, sampler_from

SETTINGS = {
    "SGLD": {},
    "RMSpropSGLD": {"decay": 0.9, "damping": 0.5, "drift_correction": True},
    "SGHMC": {"friction": 0.3},
}


def states(sampler, like):
    return {name: torch.zeros_like(like) for name in sampler.carries}


def variance(sampler, h, *, steps, chains=20_000, gamma=0.0, seed=1):
    """The stationary variance of many chains on a quadratic of curvature h, times h."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(chains, 1, generator=generator, dtype=torch.float64) / math.sqrt(h)
    center, carried, variances = w.new_zeros(1), states(sampler, w), []
    for step in range(steps):
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        curvature = torch.full_like(w, h - gamma) if sampler.needs_curvature else None
        grad = (h - gamma) * w
        sampler.step(StepInput(w, grad, noise, center, 1.0, gamma, step, carried, curvature))
        if step >= steps // 2:
            variances.append(float(w.square().mean()))
    return np.mean(variances) * h


def test_sghmc__makes_its_steps():
    w, g, xi, center = torch.randn(4, 50, dtype=torch.float64)
    eps, nbeta, gamma, a = 0.03, 7.0, 5.0, 0.2
    sampler = lk.SGHMC(step_size=eps, friction=a)
    moved, momentum, carried = w.clone(), torch.zeros_like(w), states(sampler, w)
    expected = w.clone()
    for step in range(3):
        force = nbeta * g + gamma * (expected - center)
        momentum = (1 - a) * momentum - eps / 2 * force + math.sqrt(a * eps) * xi
        expected = expected + momentum
        sampler.step(StepInput(moved, g, xi, center, nbeta, gamma, step, carried))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_sghmc__with_full_friction_is_sgld():
    w, g, xi, center = torch.randn(4, 50, dtype=torch.float64)
    a, b = w.clone(), w.clone()
    sghmc = lk.SGHMC(step_size=0.02, friction=1.0)
    sghmc.step(StepInput(a, g, xi, center, nbeta=3.0, gamma=2.0, state=states(sghmc, a)))
    lk.SGLD(step_size=0.02).step(StepInput(b, g, xi, center, nbeta=3.0, gamma=2.0))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rmsprop__makes_its_steps():
    generator = torch.Generator().manual_seed(0)
    w, xi, center = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    grads = torch.randn(4, 50, dtype=torch.float64, generator=generator)
    eps, nbeta, gamma, a, damping = 0.03, 7.0, 5.0, 0.8, 0.1
    sampler = lk.RMSpropSGLD(step_size=eps, decay=a, damping=damping)
    moved, expected, v, carried = w.clone(), w.clone(), 0.0, states(sampler, w)
    for step, g in enumerate(grads):
        v = a * v + (1 - a) * g**2
        scale = 1 / ((v / (1 - a ** (step + 1))).sqrt() + damping)
        force = nbeta * g + gamma * (expected - center)
        expected = expected - eps / 2 * scale * force + (eps * scale).sqrt() * xi
        sampler.step(StepInput(moved, g, xi, center, nbeta, gamma, step, carried))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_samplers__a_stack_moves_as_its_rows_do(name):
    sampler = SAMPLERS[name](step_size=0.01, **SETTINGS[name])
    theta, grad, noise, curvature = torch.randn(4, 3, 40, dtype=torch.float64)
    center = torch.randn(40, dtype=torch.float64)
    carried = {key: torch.rand_like(theta) for key in sampler.carries}
    rows = [{key: value[i].clone() for key, value in carried.items()} for i in range(3)]
    alone = [theta[i].clone() for i in range(3)]
    needs = sampler.needs_curvature
    stack = StepInput(
        theta, grad, noise, center, 2.0, 3.0, 5, carried, curvature if needs else None
    )
    sampler.step(stack)
    for i in range(3):
        chain = {"theta": alone[i], "grad": grad[i], "noise": noise[i], "state": rows[i]}
        sampler.step(replace(stack, **chain, curvature=curvature[i] if needs else None))
        torch.testing.assert_close(theta[i], alone[i], rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_sgld__has_the_variance_of_its_finite_step(gamma):
    h, eps = 2.0, 0.6
    expected = 1 / (1 - eps * h / 4)
    measured = variance(lk.SGLD(step_size=eps), h, steps=200, gamma=gamma)
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("friction", [0.1, 0.5])
def test_sghmc__has_the_variance_of_its_finite_step(friction):
    h, eps = 2.0, 1.0
    expected = 1 / (1 - eps * h / (4 * (2 - friction)))
    measured = variance(lk.SGHMC(step_size=eps, friction=friction), h, steps=400)
    assert measured == pytest.approx(expected, rel=0.01)
    assert expected > 1.1


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_rmsprop__needs_the_drift_correction_for_the_right_variance(decay):
    options = {"step_size": 0.02, "decay": decay, "damping": 1.0}
    without = variance(lk.RMSpropSGLD(**options), 2.0, steps=400)
    corrected = variance(lk.RMSpropSGLD(**options, drift_correction=True), 2.0, steps=400)
    assert without > 1.3
    assert corrected == pytest.approx(1, abs=0.03)


def test_schedules__have_their_shapes():
    decay = lk.schedules.PolynomialDecay(scale=100, power=0.5)
    assert [decay(0), decay(300)] == [1.0, 0.5]
    warm = lk.schedules.Warmup(4)
    assert [warm(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cycle = lk.schedules.Cyclical(10)
    assert cycle(0) == cycle(10) == 1
    assert cycle(5) == pytest.approx(0.5)
    for bad in (lambda: lk.schedules.Warmup(0), lambda: lk.schedules.PolynomialDecay(-1.0)):
        with pytest.raises(ValueError, match="must be"):
            bad()


@pytest.mark.parametrize("name", SETTINGS)
def test_samplers__are_rebuilt_from_their_settings(name):
    schedule = lk.schedules.PolynomialDecay(50)
    sampler = SAMPLERS[name](step_size=0.01, schedule=schedule, **SETTINGS[name])
    assert sampler_from(sampler.settings()) == sampler
    own = SAMPLERS[name](step_size=0.01, schedule=lambda step: 1 / (1 + step))
    assert own.size(3) == pytest.approx(0.0025)
    with pytest.raises(ValueError, match="pass sampler="):
        sampler_from(own.settings())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.SGHMC(1e-3, friction=0.0), "friction must be"),
        (lambda: lk.RMSpropSGLD(1e-3, decay=1.0), "decay must be"),
        (lambda: lk.RMSpropSGLD(1e-3, damping=0.0), "damping must be a positive number"),
        (lambda: lk.RMSpropSGLD(-1.0), "step_size must be a positive number"),
        (lambda: lk.SGLD(1e-3, schedule=0.5), "schedule must map a step"),
        (lambda: lk.SGLD(1e-3, schedule=lambda step: 0.0).size(2), "gave step 2 the size 0.0"),
    ],
)
def test_samplers__refuse_bad_settings(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
