"""What one run can record, how chains are stacked, pilots and presets."""

import shutil

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray.sampling import stacking
from tests.helpers.networks import classification, small_network
from tests.helpers.runs import OPTIONS, losses_of


def squares(model):
    return sum(p.square().sum() for p in model.parameters())


# --- what is recorded ---------------------------------------------------------


def test_sample__records_several_observed_sets(tmp_path, posterior, data):
    test = classification(20)
    labels = {"test": {"label": test.tensors[1]}}
    sets = {"train": data, "test": test}
    tree = lk.sample(posterior, sets, store=tmp_path / "s", coords=labels, **OPTIONS)
    alone = lk.sample(posterior, data, store=MemoryStore(), **OPTIONS)
    np.testing.assert_array_equal(losses_of(tree), losses_of(alone))
    assert dict(tree["losses_test"].sizes) == {"chain": 3, "draw": 55, "sample": 20}
    np.testing.assert_array_equal(tree["losses_test"]["label"], test.tensors[1])
    expected = F.cross_entropy(
        posterior.model(test.tensors[0]), test.tensors[1], reduction="none"
    ).detach()
    np.testing.assert_allclose(tree["losses_test/center_loss"], expected, rtol=1e-5)
    assert lk.influence(tree["losses"], tree["losses_test"]).shape == (40, 20)
    assert tree["losses"].attrs["observed_is_train"]
    assert not tree["losses_test"].attrs["observed_is_train"]
    assert lk.verify(tmp_path / "s") == []


@pytest.mark.parametrize("width", [1, 2])
def test_sample__records_observables_of_the_model(tmp_path, posterior, data, width):
    inputs, targets = data.tensors

    def own_losses(model):
        return F.cross_entropy(model(inputs), targets, reduction="none")

    asked = {"size": squares, "own": own_losses, "table": lambda model: model(inputs[:2])}
    tree = lk.sample(
        posterior,
        data,
        store=tmp_path / "s",
        observables=asked,
        chains_per_device=width,
        **OPTIONS,
    )
    observables = tree["observables"]
    assert observables["size"].dims == ("chain", "draw")
    assert observables["own"].dims == ("chain", "draw", "sample")
    assert observables["table"].shape == (3, 55, 2, 3)
    from lkarray.inspect import describe_store

    assert "/observables  own(chain 3, draw 55, sample 40)" in describe_store(tmp_path / "s")
    np.testing.assert_allclose(observables["own"], losses_of(tree), rtol=1e-4, atol=1e-5)
    center = [p.detach() for p in posterior.model.parameters()]
    size = float(sum(p.square().sum() for p in center))
    spread = tree["sample_stats/distance"].values.max()
    assert abs(observables["size"].values - size).max() < 3 * spread * size**0.5
    assert len(np.unique(observables["size"])) == 3 * 55
    assert lk.verify(tmp_path / "s") == []
    with pytest.raises(errors.FingerprintError, match="observables"):
        lk.sample(posterior, data, store=tmp_path / "s", **OPTIONS)


def test_sample__measures_how_many_steps_a_metropolis_test_accepts(posterior, data):
    options = OPTIONS | {"batch_size": None, "draws": 101}

    def acceptance(step_size):
        tree = lk.sample(
            posterior, data, store=MemoryStore(), **options | {"sampler": lk.SGLD(step_size)}
        )
        accepted = tree["sample_stats/acceptance"].values
        assert np.isfinite(accepted).sum() == 3 * 3  # draws 0, 50 and 100 of three chains
        return np.nanmean(accepted)

    small, large = acceptance(1e-4), acceptance(3e-2)
    assert small > 0.99
    assert large < 0.9


def test_acceptance__is_that_of_the_closed_form():
    """On a quadratic, by the ratio of Gaussian densities in float64, the long way."""
    from lkarray.sampling.chain import Schedule
    from lkarray.sampling.job import Job
    from lkarray.sampling.preparing import prepare
    from lkarray.sampling.randomness import ChainRandomness

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 4), torch.randn(30, 1))
    model, eps, nbeta, gamma = nn.Linear(4, 1), 0.06, 20.0, 3.0
    posterior = lk.LocalPosterior(model, data, "mse", nbeta, gamma)
    sampler = lk.SGLD(eps)
    tree = lk.sample(
        posterior,
        data,
        sampler=sampler,
        store=MemoryStore(),
        chains=1,
        draws=1,
        burn_in=0,
        batch_size=None,
        progress=False,
    )
    job = Job(posterior, {"losses": data}, {"losses": {}}, sampler, Schedule(1, 0, 1), None, 0)
    _, target = prepare(job, chains=1, chains_per_device=1)
    center = target.center.double()
    random = ChainRandomness(0, 0, n=30, batch_size=None, like=target.center)
    x = torch.cat([data.tensors[0], torch.ones(30, 1)], 1).double()
    y = data.tensors[1][:, 0].double()

    def energy(w):
        return nbeta * (x @ w - y).square().mean() + gamma / 2 * (w - center).square().sum()

    def force(w):
        return 2 * nbeta * x.T @ (x @ w - y) / 30 + gamma * (w - center)

    noise = random.noise(0)[0] if random.noise(0).ndim > 1 else random.noise(0)
    new = center - eps / 2 * force(center) + eps**0.5 * noise.double()

    def log_proposal(to, start):
        return -(to - start + eps / 2 * force(start)).square().sum() / (2 * eps)

    log = energy(center) - energy(new) + log_proposal(center, new) - log_proposal(new, center)
    expected = float(log.clamp(max=0).exp())
    assert 0.01 < expected < 0.999
    assert float(tree["sample_stats/acceptance"][0, 0]) == pytest.approx(expected, rel=1e-3)


# --- how chains are stacked ---------------------------------------------------


@pytest.mark.parametrize("sampler", [lk.SGLD(1e-3), lk.RMSpropSGLD(1e-3), lk.SGHMC(1e-4)])
@pytest.mark.parametrize("batch_size", [16, None])
def test_sample__a_stack_gives_the_chains_run_alone(posterior, data, sampler, batch_size):
    options = OPTIONS | {"sampler": sampler, "batch_size": batch_size}
    alone, stacked = (
        lk.sample(posterior, data, store=MemoryStore(), chains_per_device=width, **options)
        for width in (1, 2)
    )
    np.testing.assert_allclose(losses_of(stacked), losses_of(alone), rtol=1e-3, atol=1e-4)
    for name, values in alone["sample_stats"].data_vars.items():
        np.testing.assert_allclose(stacked["sample_stats"][name], values, rtol=2e-3, atol=1e-5)


def test_sample__the_layout_is_kept_by_a_resume(tmp_path, posterior, data):
    short = OPTIONS | {"draws": 20, "chains": 2}
    lk.sample(posterior, data, store=tmp_path / "s", chains_per_device=2, **short)
    grown = lk.sample(posterior, data, store=tmp_path / "s", **OPTIONS)
    whole = lk.sample(posterior, data, store=MemoryStore(), chains_per_device=2, **OPTIONS)
    np.testing.assert_array_equal(losses_of(grown), losses_of(whole))


def test_stack__chains_left_at_different_steps_catch_up(tmp_path, posterior, data):
    """As a kill between the commits of two chains of a stack leaves them."""
    from lkarray.store import open_root

    whole = lk.sample(posterior, data, store=tmp_path / "whole", chains_per_device=3, **OPTIONS)
    path = tmp_path / "s"
    slots = []
    for draws in (20, 30):
        lk.sample(posterior, data, store=path, chains_per_device=3, **OPTIONS | {"draws": draws})
        slots.append(open_root(path)["commit/record"][1])
    open_root(path, mode="r+")["commit/record"][1] = slots[0]  # its last commit is undone
    resumed = lk.sample(posterior, data, store=path, **OPTIONS)
    np.testing.assert_array_equal(losses_of(resumed), losses_of(whole))
    assert resumed["sample_stats"].to_dataset().identical(whole["sample_stats"].to_dataset())


def test_layout__stacks_only_where_it_pays(posterior, data, monkeypatch):
    def width(**options):
        store = MemoryStore()
        tree = lk.sample(posterior, data, store=store, **OPTIONS | options)
        return tree.attrs["lkarray"]["losses"]["chains_per_device"]

    assert width() == 1  # far too short to matter
    seconds = {1: 1.0, 3: 1.5, 2: 1.8}
    monkeypatch.setattr(stacking, "_seconds", lambda t, *rest: seconds[t.flat.width])
    assert width() == 3
    seconds |= {3: 2.9, 2: 1.9}
    assert width() == 1
    seconds |= {3: 2.9, 2: 1.1}
    assert width() == 2


class Branching(nn.Module):
    """What torch.func cannot stack: a branch on values."""

    def __init__(self):
        super().__init__()
        self.inner = small_network()

    def forward(self, x):
        out = self.inner(x)
        return out if bool((out.detach() > -1e9).all()) else -out


def test_layout__a_module_that_cannot_be_stacked_runs_alone(data, monkeypatch):
    posterior = lk.LocalPosterior(Branching(), data)
    monkeypatch.setattr(stacking, "WORTH_SECONDS", 0.0)
    tree = lk.sample(posterior, data, store=MemoryStore(), **OPTIONS)
    assert tree.attrs["lkarray"]["losses"]["chains_per_device"] == 1
    with pytest.raises(ValueError, match="cannot be stacked.*chains_per_device=1"):
        lk.sample(posterior, data, store=MemoryStore(), chains_per_device=2, **OPTIONS)


def test_layout__evaluation_rows_follow_the_largest_layer(data):
    from lkarray.nn import Batches, FlatModel

    batches = Batches(data, name="data", device=torch.device("cpu"))
    wide = nn.Sequential(nn.Linear(6, 1 << 18), nn.Linear(1 << 18, 3))
    assert stacking.evaluation_rows(FlatModel(wide), batches) == 4
    assert stacking.evaluation_rows(FlatModel(small_network()), batches) == 40


def test_compile__gives_the_losses_of_plain_passes(posterior, data):
    from torch.utils.cpp_extension import get_cxx_compiler

    if shutil.which(get_cxx_compiler()) is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    few = OPTIONS | {"draws": 5, "chains": 1}
    plain, compiled = (
        lk.sample(posterior, data, store=MemoryStore(), compile=asked, **few)
        for asked in (False, True)
    )
    np.testing.assert_allclose(losses_of(compiled), losses_of(plain), rtol=1e-4, atol=1e-5)


# --- pilots and presets -------------------------------------------------------


def test_suggest__finds_a_step_size_that_mixes_and_does_not_distort(posterior, data):
    grid = lk.suggest(
        posterior,
        data,
        step_sizes=[1e-4, 1e-3, 1e-2, 1.0],
        gammas=[50.0, 100.0],
        batch_size=16,
        samples=20,
        progress=False,
    )
    assert grid["loss_gain"].dims == ("nbeta", "gamma", "step_size")
    assert (grid["diverged"].sel(step_size=1.0) == 2).all()
    assert grid.attrs["best"]["step_size"] in (1e-3, 1e-2)
    assert "effective draws" in grid.attrs["verdict"]
    assert posterior.gamma == 50.0


def test_presets__are_the_rows_of_the_papers_tables(data):
    imagenet = lk.preset("loss-kernel/imagenet")
    assert imagenet.posterior == {"nbeta": 20, "gamma": 4000}
    sampling = imagenet.sampling
    assert sampling.pop("sampler") == lk.SGLD(5e-5)
    assert sampling == {"batch_size": 256, "chains": 15, "draws": 500, "burn_in": 100}
    lk.LocalPosterior(small_network(), data, **imagenet.posterior)
    with pytest.raises(ValueError, match="varies gamma"):
        _ = lk.preset("loss-kernel/imagenet-gamma-sweep").posterior
    with pytest.raises(ValueError, match="choose from"):
        lk.preset("imagenet")


def test_group__that_a_lost_worker_had_finished_is_left_as_it_is(tmp_path, sample, monkeypatch):
    """A worker may finish and be given up before it says so; its task then runs once more."""
    from lkarray.sampling import running

    whole = sample(tmp_path / "whole")
    once = running.run_group

    def twice(*args):
        once(*args)
        return once(*args)

    monkeypatch.setattr(running, "run_group", twice)
    again = sample(tmp_path / "again")
    assert again["losses"].to_dataset().identical(whole["losses"].to_dataset())
    root = zarr.open_group(tmp_path / "again")
    assert [row[0] for row in root["commit/record"][:]] == [9, 9]
