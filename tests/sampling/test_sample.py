import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import SGLD, StepInput
from tests.helpers.networks import in_memory


def losses_of(tree):
    return tree["losses"]["loss"].values


def test_sgld__makes_the_step_of_equation_ten():
    generator = torch.Generator().manual_seed(0)
    w, g, xi, center = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    eps, nbeta, gamma = 0.03, 7.0, 5.0
    expected = w - eps / 2 * (nbeta * g + gamma * (w - center)) + eps**0.5 * xi
    moved = w.clone()
    SGLD(step_size=eps).step(StepInput(moved, g, xi, center, nbeta, gamma))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_sample__equals_a_plain_loop_of_the_same_noise(model, data):
    """The whole chain, written the long way with autograd and a dict of parameters."""
    nbeta, gamma, eps, burn_in, thin, draws = 10.0, 50.0, 1e-3, 3, 2, 5
    posterior = lk.LocalPosterior(model, data, nbeta=nbeta, gamma=gamma)
    tree = lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(step_size=eps),
        chains=2,
        draws=draws,
        burn_in=burn_in,
        thin=thin,
        batch_size=16,
        seed=9,
        store=MemoryStore(),
        progress=False,
    )
    inputs, targets = data.tensors
    for chain in range(2):
        center = [p.detach().clone() for p in model.parameters()]
        weights = [p.clone().requires_grad_() for p in center]
        flat = torch.cat([p.flatten() for p in center])
        random = ChainRandomness(9, chain, n=len(inputs), batch_size=16, like=flat)

        def forward(x, weights=weights):
            a, b, c, d = weights
            return F.linear(torch.tanh(F.linear(x, a, b)), c, d)

        for step in range(burn_in + thin * draws):
            rows = torch.from_numpy(random.indices(step))
            loss = F.cross_entropy(forward(inputs[rows]), targets[rows])
            grads = torch.autograd.grad(loss, weights)
            noise = random.noise(step).split([p.numel() for p in weights])
            with torch.no_grad():
                for w, g, c, xi in zip(weights, grads, center, noise, strict=True):
                    drift = nbeta * g + gamma * (w - c)
                    w += -eps / 2 * drift + eps**0.5 * xi.view(w.shape)
            taken = step + 1 - burn_in
            if taken > 0 and taken % thin == 0:
                expected = F.cross_entropy(forward(inputs), targets, reduction="none").detach()
                draw = losses_of(tree)[chain, taken // thin - 1]
                np.testing.assert_allclose(draw, expected, rtol=1e-4, atol=1e-5)


def test_sample__stores_statistics_of_every_draw(sample, posterior):
    tree = sample(MemoryStore())
    stats = tree["sample_stats"]
    assert stats["distance"].dims == ("chain", "draw")
    for name in ("minibatch_loss", "gradient_norm", "distance"):
        assert (stats[name] > 0).all()
    assert np.unique(stats["step_size"]) == np.float32(1e-3)
    assert not stats["diverged"].any()
    # The chains move apart from w* and from each other.
    assert len(np.unique(stats["distance"])) == 18
    inputs, targets = posterior.train_set.tensors
    expected = F.cross_entropy(posterior.model(inputs), targets, reduction="none").detach()
    np.testing.assert_allclose(tree["losses"]["center_loss"], expected, rtol=1e-5, atol=1e-6)


def test_sample__does_not_change_the_users_model(sample, posterior):
    model = posterior.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample(MemoryStore())
    assert model.training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sample__turns_dropout_off_and_freezes_batch_norm(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    model[1].running_mean += 1
    posterior = lk.LocalPosterior(model.train(), data)
    tree = in_memory(posterior, data, step_size=1e-12, draws=3)
    expected = F.cross_entropy(model.eval()(data.tensors[0]), data.tensors[1], reduction="none")
    np.testing.assert_allclose(losses_of(tree)[0, -1], expected.detach(), rtol=1e-3, atol=1e-4)
    assert float(model[1].running_mean.mean()) == 1


def test_sample__moves_only_what_is_trainable(model, data):
    frozen = lk.LocalPosterior(model, data, trainable="2.*")
    assert frozen.trainable == ["2.weight", "2.bias"]
    tree = in_memory(frozen, data, step_size=1e-3, draws=2)
    assert (tree["sample_stats"]["distance"] > 0).all()


@pytest.mark.parametrize("loss", ["mse", lambda out, y: (out - y).square().sum(1)])
def test_sample__takes_losses_by_name_or_as_callables(loss):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 4), torch.randn(20, 2))
    model = nn.Linear(4, 2)
    posterior = lk.LocalPosterior(model, data, loss)
    tree = in_memory(posterior, data, step_size=1e-5, draws=2)
    error = (model(data.tensors[0]) - data.tensors[1]).square().detach()
    expected = error.mean(1) if loss == "mse" else error.sum(1)
    np.testing.assert_allclose(tree["losses"]["center_loss"], expected, rtol=1e-5)


class Squares(Dataset):
    """A map-style dataset that is not made of tensors."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        if not 0 <= index < 30:
            raise IndexError(index)
        return np.full(6, index / 30, np.float32), index % 3


def test_sample__observes_any_map_style_dataset(posterior, monkeypatch):
    options = {"sampler": lk.SGLD(1e-3), "chains": 1, "draws": 3, "progress": False}
    held = lk.sample(posterior, Squares(), store=MemoryStore(), **options)
    monkeypatch.setattr("lkarray.nn.batches.CACHE_BYTES", 0)
    read = lk.sample(posterior, Squares(), store=MemoryStore(), **options)
    assert held["losses"].sizes["sample"] == 30
    np.testing.assert_array_equal(losses_of(held), losses_of(read))


def test_sample__keeps_labels_of_every_kind(sample):
    n = 40
    coords = {
        "sample": np.arange(n) + 1000,
        "label": torch.arange(n),
        "wnid": [f"n{i:08d}" for i in range(n)],
        "weight": np.linspace(0, 1, n),
        "flag": np.arange(n) % 2 == 0,
    }
    losses = sample(MemoryStore(), coords=coords)["losses"]
    for name, values in coords.items():
        np.testing.assert_array_equal(losses[name], np.asarray(values))
    assert float(losses["loss"].sel(sample=1007)[0, 0]) == float(losses["loss"][0, 0, 7])


def test_sample__a_finished_store_is_reused_and_says_so(tmp_path, sample, caplog):
    first = sample(tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix != ".lock"}
    with caplog.at_level(logging.INFO, "lkarray"):
        again = sample(tmp_path / "s")
    assert "already holds 2 chains of 9 draws" in caplog.text
    np.testing.assert_array_equal(losses_of(first), losses_of(again))
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix != ".lock"}
    assert {p.name for p in after if after[p] != before.get(p)} == set()


def test_sample__grows_to_what_one_long_run_gives(tmp_path, sample):
    sample(tmp_path / "s", chains=1, draws=5)
    sample(tmp_path / "s", chains=2, draws=7)
    grown = sample(tmp_path / "s", chains=3, draws=90)
    whole = sample(tmp_path / "whole", chains=3, draws=90)
    np.testing.assert_array_equal(losses_of(grown), losses_of(whole))
    assert sample(tmp_path / "s", chains=2, draws=4)["losses"].sizes["draw"] == 4
    assert lk.verify(tmp_path / "s") == []


def test_sample__stops_and_flags_a_chain_that_diverges(tmp_path, sample, caplog):
    with pytest.raises(lk.errors.DivergedError, match="smaller step size"):
        sample(tmp_path / "s", sampler=lk.SGLD(step_size=1e6), draws=60)
    assert "turned non-finite at draw" in caplog.text
    assert lk.verify(tmp_path / "s") == []
    with pytest.raises(lk.errors.DivergedError):
        lk.open(tmp_path / "s")


def test_sample__writes_while_it_samples(sample, monkeypatch):
    from lkarray.store import ChainRegion, commit

    monkeypatch.setattr(commit, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(commit, "_COMMIT_SHARE", 0.0)
    writers = set()
    write = ChainRegion._write

    def spy(self, *args):
        writers.add(threading.current_thread().name)
        return write(self, *args)

    monkeypatch.setattr(ChainRegion, "_write", spy)
    sample(MemoryStore())
    assert writers
    assert all(name.startswith("lkarray-writer") for name in writers)


def test_randomness__is_a_function_of_seed_chain_and_step():
    like = torch.zeros(1000)

    def make(seed, chain):
        return ChainRandomness(seed, chain, n=500, batch_size=32, like=like)

    a, b = make(1, 2), make(1, 2)
    for step in (200, 3, 64, 63, 3):
        np.testing.assert_array_equal(a.indices(step), b.indices(step))
        assert torch.equal(a.noise(step).clone(), b.noise(step))
    again = make(1, 2).noise(200)
    assert torch.equal(a.noise(200), again)
    others = [make(1, 3).noise(200), make(2, 2).noise(200), make(1, 2).noise(201)]
    assert all(abs(float(torch.corrcoef(torch.stack([again, o]))[0, 1])) < 0.15 for o in others)
    assert not np.array_equal(make(1, 2).indices(5), make(1, 3).indices(5))


def test_randomness__noise_is_standard_normal_and_batches_are_even():
    like = torch.zeros(64)
    random = ChainRandomness(0, 0, n=50, batch_size=20, like=like)
    noise = torch.stack([random.noise(step).clone() for step in range(4000)])
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.02
    # Successive steps are independent, though their seeds are neighbours.
    assert float((noise[1:] * noise[:-1]).mean(0).abs().max()) < 0.08
    counts = np.bincount(np.concatenate([random.indices(s) for s in range(4000)]), minlength=50)
    assert abs(counts / 4000 - 0.4).max() < 0.04
    assert all(len(set(random.indices(step))) == 20 for step in range(50))


def test_randomness__no_two_steps_share_a_seed():
    random = ChainRandomness(7, 0, n=5, batch_size=None, like=torch.zeros(1))
    words = np.random.default_rng(0).integers(0, 2**32, 20_000)
    words = np.unique(np.concatenate([np.arange(20_000), words]))
    assert len({random._scramble(int(word)) for word in words}) == len(words)
