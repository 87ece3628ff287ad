"""Attacks and what stands beside them, on a linear classifier whose gradients are known."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lkarray_workflows.shared import attacks


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()


@pytest.fixture
def data(model):
    images = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4  # misclassified
    return TensorDataset(images, labels)


def test_attack__fgsm_is_a_step_along_the_sign_of_the_gradient(model, data):
    images, labels = data.tensors
    moved, fooled = attacks.attack(model, images, labels, kind="fgsm", radius=0.07)
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    np.testing.assert_allclose(moved, (images + 0.07 * slope.sign()).clamp(0, 1), atol=1e-6)
    np.testing.assert_array_equal(fooled, model(moved).argmax(1) != labels)


@pytest.mark.parametrize("kind", list(attacks.ATTACKS))
def test_attack__stays_within_its_radius(model, data, kind):
    images, labels = data.tensors
    radius = 0.1 if attacks.ATTACKS[kind][1] == "linf" else 0.4
    before = torch.random.get_rng_state()
    moved, fooled = attacks.attack(model, images, labels, kind=kind, radius=radius, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    order = np.inf if attacks.ATTACKS[kind][1] == "linf" else 2
    sizes = torch.linalg.vector_norm((moved - images).flatten(1), order, dim=1)
    assert float(sizes.max()) <= radius + 1e-5
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert fooled.mean() > float((model(images).argmax(1) != labels).double().mean())
    again, _ = attacks.attack(model, images, labels, kind=kind, radius=radius, seed=3)
    assert torch.equal(moved, again)


def test_attack__few_steps_are_longer(model, data):
    images, labels = data.tensors
    moved, _ = attacks.attack(model, images, labels, radius=0.05, steps=2)
    whole, _ = attacks.attack(model, images, labels, radius=0.05)
    loss = [F.cross_entropy(model(x), labels).item() for x in (images, moved, whole)]
    assert loss[1] - loss[0] > 0.8 * (loss[2] - loss[0])


@pytest.mark.parametrize("kind", ["pgd", "l2_pgd"])
def test_noise_like__has_the_norm_of_the_attack(model, data, kind):
    images, labels = data.tensors
    moved, _ = attacks.attack(model, images, labels, kind=kind, radius=0.2)
    noisy = attacks.noise_like(images, moved - images, kind, seed=1)
    assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
    wanted, norms = (attacks.lengths(x - images).flatten() for x in (moved, noisy))
    np.testing.assert_allclose(norms, wanted, rtol=1e-3)
    # Not 0: at the edge of the range both can only go inwards.
    cosine = torch.cosine_similarity((noisy - images).flatten(1), (moved - images).flatten(1))
    assert abs(float(cosine.mean())) < 0.3


def test_natural_errors__are_the_best_match(rng):
    losses, wrong = rng.exponential(size=7), np.array([1, 0, 1, 1, 0, 1, 1], bool)
    wanted = rng.exponential(size=3)
    matched = attacks.natural_errors(losses, wrong, wanted)
    best = min(
        itertools.permutations(np.flatnonzero(wrong), 3),
        key=lambda at: sum(abs(np.log(losses[list(at)]) - np.log(wanted))),
    )
    np.testing.assert_array_equal(matched, best)
    with pytest.raises(ValueError, match="5 of the images are misclassified, and 6 are needed"):
        attacks.natural_errors(losses, wrong, np.ones(6))


def test_make_pairs__are_of_the_images_that_are_fooled(model, data, tmp_path):
    pairs = attacks.make_pairs(model, data, 9, kind="pgd", radius=0.3, seed=0)
    assert set(pairs.images) == set(attacks.KINDS)
    says = {kind: model(x).argmax(1) == pairs.labels[kind] for kind, x in pairs.images.items()}
    assert says["clean"].all()
    assert not says["adversarial"].any()
    assert not says["natural error"].any()
    assert 0 < pairs.fooled <= 1
    pairs.save(tmp_path / "p.npz")
    again = attacks.Pairs.load(tmp_path / "p.npz")
    assert again.fooled == pairs.fooled
    for kind in attacks.KINDS:
        assert torch.equal(again.images[kind], pairs.images[kind])
        assert torch.equal(again.labels[kind], pairs.labels[kind])
    whole, coords = again.data(count=4), again.coords(count=4)
    assert len(whole) == 16
    assert coords["kind"].tolist() == [kind for kind in attacks.KINDS for _ in range(4)]
    assert coords["pair"].tolist() == [0, 1, 2, 3] * 4
    with pytest.raises(ValueError, match="fools the network on 0 of 45 images, and 2 are needed"):
        attacks.make_pairs(model, data, 2, kind="pgd", radius=1e-9, seed=0)
