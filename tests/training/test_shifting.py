"""Inputs moved along mode coefficients: against algorithm 2 written out example by example."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import errors
from lkarray.training.shifting import coefficients, directions
from tests.helpers.recorded_runs import cross_entropy, examples, network


@pytest.fixture
def trace(train, tmp_path):
    train(tmp_path / "t", steps=6)
    return lk.open_trace(tmp_path / "t", network(), examples(), loss=cross_entropy)


@pytest.fixture
def modes(trace, tmp_path):
    G = lk.gradient_features(trace, range(12), [6], store=tmp_path / "t", dtype="float64")
    return lk.modes(G.isel(time=0), 4).compute()


def by_hand(trace, vectors, x, label):
    """Mode coefficients of one input."""
    losses = trace.loss(trace.flat(x[None]), label[None])
    slopes = torch.autograd.grad(losses.sum(), trace.flat.leaves, create_graph=True)
    return vectors @ torch.cat([s.flatten() for s in slopes])


def test_coefficients__are_projections_of_gradients(trace, modes, tmp_path):
    expected = lk.mode_coefficients(
        modes, lk.open(tmp_path / "t")["gradients"].to_dataset().isel(time=0)
    )
    trace.set(6)
    inputs, target = trace.train.take(np.arange(12))
    got = coefficients(trace, directions(trace, modes), inputs, target).detach()
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("labels", ["own", "predicted"])
def test_shift_modes__equals_algorithm_2_by_hand(trace, modes, norm, labels):
    rng = np.random.default_rng(0)
    inputs, own = trace.train.take(np.arange(5))
    away = torch.from_numpy(rng.standard_normal(inputs.shape)).to(inputs) * 0.01
    options = {"shift": 0.3, "radius": 0.05, "norm": norm, "steps": 4, "step_size": 0.02}
    weights = {"match": 2.0, "ortho": 0.7, "loss": 0.5}
    lowest, highest = float(inputs.min()), float(inputs.max()) - 0.01
    moved = lk.shift_modes(
        trace,
        modes,
        range(5),
        6,
        **options,
        **weights,
        labels=labels,
        away_from=away,
        bounds=(lowest, highest),
    )
    trace.set(6)
    vectors, signs = directions(trace, modes), torch.from_numpy(np.sign(modes["drive"].values))
    for n in range(5):
        x0, y = inputs[n], own[n]
        wanted = trace.flat(x0[None]).argmax(1)[0] if labels == "predicted" else y
        target = by_hand(trace, vectors, x0, wanted).detach() - 0.3 * signs
        x = x0.clone()
        for _ in range(4):
            x.requires_grad_()
            delta = (x - x0).flatten()
            length = (delta.square().sum() + 1e-300).sqrt()
            cosine = delta @ away[n].flatten() / (length.clamp_min(1e-12) * away[n].norm())
            loss = trace.loss(trace.flat(x[None]), y[None])[0]
            off = by_hand(trace, vectors, x, wanted) - target
            objective = off.square().sum() + 0.7 * cosine**2 + 0.5 * loss
            (slope,) = torch.autograd.grad(objective, x)
            x = x.detach()
            if norm == "linf":
                x = x - 0.02 * slope.sign()
                x = torch.maximum(torch.minimum(x, x0 + 0.05), x0 - 0.05)
            else:
                x = x - 0.02 * slope / slope.norm()
                off = x - x0
                x = x0 + off * min(1.0, 0.05 / float(off.norm()))
            x = x.clamp(lowest, highest)
        np.testing.assert_allclose(moved[n], x, rtol=1e-7, atol=1e-9)


def test_shift_modes__shifts_against_the_drives(trace, modes):
    inputs, target = trace.train.take(np.arange(8))
    trace.set(6)
    vectors, signs = directions(trace, modes), np.sign(modes["drive"].values)
    before = coefficients(trace, vectors, inputs, target).detach().numpy()
    moved = lk.shift_modes(
        trace,
        modes,
        range(8),
        6,
        shift=0.05,
        radius=0.5,
        labels="own",
        bounds=(-10, 10),
        steps=60,
    )
    assert float((moved - inputs).abs().max()) <= 0.5 + 1e-12
    after = coefficients(trace, vectors, moved, target).detach().numpy()
    off_before = np.square(0.05 * signs).sum()
    off_after = np.square(after - (before - 0.05 * signs)).sum(1)
    assert np.median(off_after) < 0.3 * off_before


def test_shift_modes__bad_input(trace, modes):
    def call(modes=modes, examples=range(3), **options):
        lk.shift_modes(trace, modes, examples, 6, **{"shift": 0.1, "radius": 0.1} | options)

    with pytest.raises(ValueError, match="norm must be"):
        call(norm="l1")
    with pytest.raises(ValueError, match="labels must be"):
        call(labels="true")
    with pytest.raises(ValueError, match="radius must be above 0"):
        call(radius=0)
    with pytest.raises(ValueError, match="away_from has the shape"):
        call(away_from=torch.zeros(3, 2))
    with pytest.raises(errors.SchemaError, match="drive"):
        call(modes=modes.drop_vars("drive"))
    with pytest.raises(errors.SchemaError, match="direction"):
        call(modes=modes.isel(param=slice(10)))
    tokens = TensorDataset(torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be float tensors"):
        call(examples=tokens)
