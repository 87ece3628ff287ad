"""Outcomes of runs: beside losses, at the same draws, kept as losses are."""

import json
import os

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors, inspect
from lkarray import store as stores
from lkarray.store import commit, layout
from lkarray.store.location import ENTRIES
from tests.helpers.networks import classification, small_network

OPTIONS = {
    "sampler": lk.SGLD(step_size=1e-3),
    "chains": 2,
    "draws": 10,
    "burn_in": 2,
    "batch_size": 8,
    "chains_per_device": 1,
    "progress": False,
}
BOTH = ("loss", "log_odds")


@pytest.fixture
def data():
    return classification(n=24)


@pytest.fixture
def posterior(data):
    return lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0)


def flip_bit(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def sampled(posterior, store=None, observed=None, **options):
    store = MemoryStore() if store is None else store
    observed = posterior.train_set if observed is None else observed
    return lk.sample(posterior, observed, store=store, **(OPTIONS | {"outcomes": BOTH} | options))


def softplus(odds):
    with np.errstate(invalid="ignore"):  # of padding
        return np.logaddexp(0, odds.values.astype(np.float64))


def test_sample__stores_log_odds_beside_losses(posterior, data):
    store = MemoryStore()
    tree = sampled(posterior, store)
    losses = tree["losses"]
    odds = losses["log_odds"]
    assert odds.dims == ("chain", "draw", "sample")
    assert odds.chunks == losses["loss"].chunks
    assert (odds.dtype, odds.attrs["link"]) == (np.float32, "softplus")
    assert "units" not in odds.attrs
    np.testing.assert_allclose(softplus(odds), losses["loss"], rtol=1e-5, atol=1e-6)
    scores = posterior.model(data.tensors[0]).detach()
    others = scores.scatter(1, data.tensors[1][:, None], -torch.inf).logsumexp(1)
    expected = others - scores.gather(1, data.tensors[1][:, None])[:, 0]
    np.testing.assert_allclose(losses["center_log_odds"], expected, rtol=1e-5, atol=1e-6)
    assert losses["center_log_odds"].attrs["link"] == "softplus"
    assert lk.verify(store) == []


def test_sample__losses_are_the_same_bits_with_outcomes_or_without(posterior):
    alone, both = sampled(posterior, outcomes=("loss",)), sampled(posterior)
    assert alone["losses/loss"].values.tobytes() == both["losses/loss"].values.tobytes()
    assert set(alone["losses"].data_vars) == {"loss", "center_loss"}


def test_sample__runs_the_model_once_a_draw(posterior):
    seen = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = posterior.model

        def forward(self, inputs):
            seen.append(len(inputs))
            return self.inner(inputs)

    counts = []
    for outcomes in (("loss",), BOTH):
        counting = lk.LocalPosterior(Counting(), posterior.train_set, nbeta=10.0, gamma=50.0)
        passes = []
        for draws in (4, 8):
            seen.clear()
            sampled(counting, draws=draws, outcomes=outcomes)
            passes.append(len(seen))
        counts.append(passes[1] - passes[0])
    assert counts[0] == counts[1] > 0


def test_sample__fingerprints_of_losses_alone_are_as_they_were(posterior):
    alone = sampled(posterior, outcomes=("loss",)).attrs[ENTRIES]["losses"]
    assert "outcomes" not in alone
    both = sampled(posterior).attrs[ENTRIES]["losses"]
    known = {"function": "log_odds", "link": "softplus", "units": ""}
    assert both == alone | {"outcomes": {"log_odds": known}}


@pytest.mark.parametrize("before", [("loss",), BOTH])
def test_resume__with_other_outcomes_is_refused(posterior, tmp_path, before):
    (after,) = {("loss",), BOTH} - {before}
    sampled(posterior, tmp_path / "s.zarr", outcomes=before)
    with pytest.raises(errors.FingerprintError, match="outcomes"):
        sampled(posterior, tmp_path / "s.zarr", outcomes=after)


def small_blocks(monkeypatch):
    monkeypatch.setattr(layout, "block_draws", lambda draws, values: 4)
    monkeypatch.setattr(layout, "loss_chunks", lambda depth, n, tail=(): (1, depth, 16, *tail))


def whole(tree, group="losses"):
    return tree[group].to_dataset().load()


@pytest.mark.parametrize("width", [1, 2])
def test_resume__gives_the_same_bits(posterior, tmp_path, monkeypatch, width):
    small_blocks(monkeypatch)
    options = {"chains_per_device": width}
    expected = whole(sampled(posterior, **options))
    store = tmp_path / "s.zarr"
    written, step = [], commit.ChainRegion._write

    def killed(self, *args):
        written.append(self)
        if len(written) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(commit.ChainRegion, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        sampled(posterior, store, **options)
    monkeypatch.setattr(commit.ChainRegion, "_write", step)
    xr.testing.assert_identical(whole(sampled(posterior, store, **options)), expected)
    assert lk.verify(store) == []


def test_grow__draws_and_chains(posterior, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    store = tmp_path / "s.zarr"
    sampled(posterior, store, chains=1, draws=5)
    grown = whole(sampled(posterior, store))
    xr.testing.assert_identical(grown, whole(sampled(posterior)))
    assert lk.verify(store) == []


def test_grow__that_is_killed_halfway_opens(posterior, tmp_path):
    """Outcomes grow before losses, which readers take their sizes from."""
    store = tmp_path / "s.zarr"
    before = whole(sampled(posterior, store))
    path = store / "losses/log_odds/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][0] += 3
    path.write_text(json.dumps(metadata))
    xr.testing.assert_identical(whole(lk.open(store)), before)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("log_odds/c/0/0/1", lambda path: flip_bit(path, 77)),
        ("log_odds/c/1/2/0", lambda path: flip_bit(path, 77)),
        ("log_odds/c/1/2/0", os.unlink),
        ("center_log_odds/c/0", lambda path: os.truncate(path, 9)),
    ],
)
def test_damage__is_found_and_mended(posterior, tmp_path, monkeypatch, name, damage):
    small_blocks(monkeypatch)
    store = tmp_path / "s.zarr"
    before = whole(sampled(posterior, store))
    damage(store / "losses" / name)
    assert [problem.path for problem in lk.verify(store)] == [f"losses/{name}"]
    if "/0/0/" not in name:  # a resume reads no block that is full
        with pytest.raises(errors.DamagedError, match="log_odds"):
            sampled(posterior, store, draws=14)
    repairs = lk.repair(store, progress=False)
    assert [(r.path, r.mended) for r in repairs] == [(f"losses/{name}", True)]
    assert lk.verify(store) == []
    xr.testing.assert_identical(whole(lk.open(store)), before)


def test_damage__chunks_in_each_others_places(posterior, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    store = tmp_path / "s.zarr"
    sampled(posterior, store)
    one, other = (store / f"losses/{name}/c/0/0/0" for name in ("loss", "log_odds"))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    paths = {problem.path for problem in lk.verify(store)}
    assert paths == {"losses/loss/c/0/0/0", "losses/log_odds/c/0/0/0"}


def test_resume__notices_another_outcome_at_the_center(posterior, tmp_path):
    """What a hash of the function cannot see: what it reads from elsewhere."""
    shift = {"by": 0.0}

    class Odds:
        def __call__(self, output, target):
            return F.softplus(output[:, 0]) + shift["by"]

    loss = lambda output, target: F.softplus(output[:, 0]).exp()  # noqa: E731
    own = lk.Outcome("own", Odds(), ("exponential", np.exp))
    of = lk.LocalPosterior(posterior.model, posterior.train_set, loss, 10.0, 50.0)
    options = {"outcomes": ("loss", own)}
    tree = sampled(of, tmp_path / "s.zarr", **options)
    assert tree["losses/own"].attrs["link"] == "exponential"
    shift["by"] = 0.003  # less than the link is checked to, more than rounding
    with pytest.raises(errors.FingerprintError, match="the own at w"):
        sampled(of, tmp_path / "s.zarr", draws=12, **options)


def test_sample__of_several_sets_components_and_checkpoints(posterior, data, tmp_path):
    other = TensorDataset(*(column[:7] for column in data.tensors))
    tree = sampled(posterior, observed={"train": data, "other": other}, draws=4)
    assert tree["losses_other/log_odds"].sizes["sample"] == 7
    same = tree["losses/log_odds"][..., :7]
    np.testing.assert_allclose(tree["losses_other/log_odds"], same, rtol=1e-5, atol=1e-6)
    components = {"first": "0.*", "last": "2.*"}
    parts = sampled(posterior, tmp_path / "parts.zarr", draws=4, components=components)
    odds = parts["losses/log_odds"]
    assert odds.dims == ("component", "chain", "draw", "sample")
    assert odds.attrs["link"] == "softplus"
    np.testing.assert_allclose(softplus(odds), parts["losses/loss"], rtol=1e-5, atol=1e-6)
    models = [posterior.model, small_network()]
    around = sampled(posterior, tmp_path / "around.zarr", draws=4, checkpoints=models)
    assert around["losses/log_odds"].dims[0] == "checkpoint"
    assert "checkpoint" in around["losses/center_log_odds"].dims


@pytest.mark.parametrize("options", [{"chains_per_device": 2}, {"autocast": "bfloat16"}])
def test_sample__in_stacks_and_in_other_precision(posterior, options):
    tree = sampled(posterior, draws=4, **options)["losses"]
    np.testing.assert_allclose(softplus(tree["log_odds"]), tree["loss"], rtol=1e-5, atol=1e-6)
    if "autocast" not in options:
        alone = sampled(posterior, draws=4)["losses"]
        np.testing.assert_allclose(tree["log_odds"], alone["log_odds"], rtol=1e-3, atol=1e-4)


def test_sample__tokens(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(6, (5, 7))
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    items = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 6)

        def forward(self, input_ids, attention_mask):
            return self.table(input_ids)

    posterior = lk.LocalPosterior(Model(), items, "next_token", 10.0, 50.0)
    store = tmp_path / "s.zarr"
    tree = sampled(posterior, store, draws=4)["losses"]
    assert tree["log_odds"].dims == ("chain", "draw", "sample", "token")
    np.testing.assert_array_equal(tree["log_odds"].isnull(), tree["loss"].isnull())
    np.testing.assert_allclose(softplus(tree["log_odds"]), tree["loss"], rtol=1e-5, atol=1e-6)
    assert lk.verify(store) == []


def test_sample__residuals_and_binary_losses():
    torch.manual_seed(0)
    inputs = torch.randn(12, 3)
    model = nn.Linear(3, 1)
    data = TensorDataset(inputs, inputs[:, :1] + 0.3)
    tree = sampled(lk.LocalPosterior(model, data, "mse"), draws=3, outcomes=("loss", "residual"))
    errors_ = tree["losses/residual"]
    assert errors_.attrs["link"] == "square"
    np.testing.assert_allclose(errors_.values**2, tree["losses/loss"], rtol=1e-5)
    at_center = (model(inputs) - data.tensors[1])[:, 0].detach()
    np.testing.assert_allclose(tree["losses/center_residual"], at_center, rtol=1e-5)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    tree = sampled(lk.LocalPosterior(model, data, "binary_cross_entropy"), draws=3)
    sign = 1 - 2 * data.tensors[1].numpy()
    np.testing.assert_allclose(
        tree["losses/center_log_odds"], sign * model(inputs)[:, 0].detach().numpy(), rtol=1e-6
    )


def test_sample__saturated_networks(data):
    """Where losses are 0 in float32, log-odds vary; nothing is taken for a divergence."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(200 * torch.eye(3, 6))
        model.bias.zero_()
    inputs = 2 * F.one_hot(data.tensors[1], 6).float() + 0.1 * data.tensors[0]
    sure = TensorDataset(inputs, data.tensors[1])
    tree = sampled(lk.LocalPosterior(model, sure, nbeta=10.0, gamma=50.0), draws=5)["losses"]
    assert (tree["loss"] == 0).all()
    assert (tree["log_odds"] < -80).all()
    assert (tree["log_odds"].var(("chain", "draw")) > 0).all()
    assert lk.correlation(tree["log_odds"]).compute().notnull().all()


def test_sample__chains_that_diverge_are_flagged(posterior, tmp_path):
    """Also where an outcome is not finite and the loss is, as no store may hold unsaid."""

    def odds(output, target):
        others = output.scatter(1, target.unsqueeze(1), -torch.inf).logsumexp(1)
        values = others - output.gather(1, target.unsqueeze(1))[:, 0]
        return torch.where(values.abs() < 2, values, torch.inf)

    own = lk.Outcome("own", odds, "softplus")
    store = tmp_path / "s.zarr"
    far = lk.SGLD(step_size=0.2)
    with pytest.raises(errors.DivergedError):
        sampled(posterior, store, sampler=far, outcomes=("loss", own), draws=40)
    assert lk.verify(store) == []
    root = stores.open_root(store, mode="r+")
    assert root["sample_stats/diverged"][:].any(1).all()
    last = root["sample_stats/diverged"][0].argmax()
    assert np.isfinite(root["losses/loss"][0, last]).all()
    assert np.isinf(root["losses/own"][0, last]).any()
    root["sample_stats/diverged"][:] = False
    said = [problem.detail for problem in lk.verify(store)]
    assert any("non-finite own at chain 0" in line for line in said)


def test_sample__classes_that_are_masked(posterior, data):
    class Masked(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.inner, self.keep = small_network(classes=5), keep

        def forward(self, inputs):
            scores = self.inner(inputs)
            gone = torch.arange(5) >= self.keep
            return scores.masked_fill(gone, -torch.inf)

    of = lk.LocalPosterior(Masked(3), data, nbeta=10.0, gamma=50.0)
    tree = sampled(of, draws=3)["losses"]
    assert np.isfinite(tree["log_odds"]).all()
    np.testing.assert_allclose(softplus(tree["log_odds"]), tree["loss"], rtol=1e-5, atol=1e-6)
    lone = TensorDataset(data.tensors[0], torch.zeros_like(data.tensors[1]))
    with pytest.raises(errors.NonFiniteError, match="log_odds at w.*24 of 24.*but one masked"):
        sampled(lk.LocalPosterior(Masked(1), lone), draws=3)


def test_sample__labels_that_do_not_count(posterior, data):
    target = data.tensors[1].clone()
    target[[2, 5]] = -100
    with pytest.raises(ValueError, match=r"observed: examples \[2, 5\] have no loss"):
        sampled(posterior, observed=TensorDataset(data.tensors[0], target))


def test_sample__one_class(data):
    alike = TensorDataset(data.tensors[0], torch.zeros_like(data.tensors[1]))
    of = lk.LocalPosterior(small_network(classes=1), alike)
    with pytest.raises(ValueError, match="'log_odds'.*two classes or more"):
        sampled(of)


def test_sample__probabilities_of_classes(data):
    soft = TensorDataset(data.tensors[0], F.one_hot(data.tensors[1], 3).float())
    with pytest.raises(ValueError, match="'log_odds'.*probabilities"):
        sampled(lk.LocalPosterior(small_network(), soft))


def test_sample__custom_losses_take_outcomes_of_their_own(posterior):
    def loss(output, target):
        return output[:, 0].square()

    of = lk.LocalPosterior(posterior.model, posterior.train_set, loss)
    with pytest.raises(ValueError, match=r"function of your own.*lk\.Outcome"):
        sampled(of)
    own = lk.Outcome("first", lambda output, target: output[:, 0], "square", units="V")
    store = MemoryStore()
    tree = sampled(of, store, draws=3, outcomes=["loss", own])["losses"]
    assert tree["first"].attrs["units"] == "V"
    np.testing.assert_allclose(tree["first"].values ** 2, tree["loss"], rtol=1e-5)
    assert lk.covariance(tree["first"]).attrs["units"] == "V^2"
    assert lk.verify(store) == []
    wrong = lk.Outcome("second", lambda output, target: output[:, 1], "square")
    with pytest.raises(ValueError, match="'second': its link 'square' makes"):
        sampled(of, outcomes=("loss", wrong))


@pytest.mark.parametrize(
    "name", ["label", "draw", "sample", "center_loss", "norm", "token", "Loss"]
)
def test_sample__outcomes_with_names_that_are_taken(posterior, data, name):
    own = lk.Outcome(name, lambda output, target: output[:, 0], "square")
    norm = {"norm": lambda model: model[0].bias.norm()}
    options = {"coords": {"label": data.tensors[1].numpy()}, "observables": norm}
    with pytest.raises(ValueError, match=f"outcomes: '{name}' is the name of something else"):
        sampled(posterior, outcomes=("loss", own), **options)
    pair = [lk.Outcome(n, lambda output, target: output[:, 0], "square") for n in ("a", "center_a")]
    with pytest.raises(ValueError, match="'center_a' is the name"):
        sampled(posterior, outcomes=("loss", *pair))


# --- after sampling ------------------------------------------------------------------------------


def test_observe__gives_the_log_odds_of_a_run_of_losses(posterior, data):
    alone = sampled(posterior, outcomes=("loss",))
    again = lk.observe(alone, data, outcomes=BOTH, progress=False)["losses"]
    both = sampled(posterior)["losses"]
    np.testing.assert_array_equal(again["log_odds"], both["log_odds"])
    with pytest.raises(ValueError, match="must begin with 'loss'"):
        lk.observe(alone, data, outcomes=("log_odds",), progress=False)


def test_repair__asks_for_outcomes_that_it_does_not_know(posterior, tmp_path, monkeypatch):
    def loss(output, target):
        return output[:, 0].square()

    own = lk.Outcome("first", lambda output, target: output[:, 0], "square")
    of = lk.LocalPosterior(posterior.model, posterior.train_set, loss)
    store = tmp_path / "s.zarr"
    sampled(of, store, draws=3, outcomes=("loss", own))
    flip_bit(store / "losses/first/c/0/0/0", 50)
    monkeypatch.setattr("lkarray.sampling.repairing.remembered", lambda *a, **k: None)
    (told,) = lk.repair(store, of, progress=False)
    assert not told.mended
    assert "pass outcomes=" in told.detail
    (told,) = lk.repair(store, of, outcomes=("loss", own), progress=False)
    assert told.mended
    assert lk.verify(store) == []


def test_info__shows_outcomes(posterior, tmp_path):
    sampled(posterior, tmp_path / "s.zarr", draws=3)
    said = inspect.describe_store(tmp_path / "s.zarr")
    assert "/losses  log_odds(chain 2, draw 3, sample 24)" in said
    assert "outcomes: {'log_odds'" in said


def test_arviz__has_outcomes_at_draws_and_at_the_center(posterior):
    tree = lk.to_arviz(sampled(posterior, draws=3))
    assert set(tree["posterior"].data_vars) == {"loss", "log_odds"}
    assert set(tree["constant_data"].data_vars) == {"center_loss", "center_log_odds"}


def test_functions_of_losses__take_outcomes(posterior, data):
    """As a variable of the tree; a node, and the tree, are the losses still."""
    tree = sampled(posterior, chains=3, draws=12, coords={"label": data.tensors[1].numpy()})
    odds, loss = tree["losses"]["log_odds"], tree["losses/loss"]
    values = odds.values.reshape(-1, 24).astype(np.float64)
    np.testing.assert_allclose(lk.correlation(odds), np.corrcoef(values.T), atol=1e-5)
    of_losses = np.cov(loss.values.reshape(-1, 24).T.astype(np.float64))
    np.testing.assert_allclose(lk.covariance(tree["losses"]), of_losses, rtol=1e-4, atol=1e-7)
    assert lk.covariance(odds).attrs["units"] == "1"
    assert lk.covariance(loss).attrs["units"] == "nat^2"
    assert lk.influence(loss, odds).attrs["units"] == "nat"
    assert lk.influence(odds, loss.isel(sample=[0])).attrs["units"] == "nat"
    assert lk.loss_variance(odds).attrs["units"] == "1"
    assert lk.mcse(odds)["covariance"].attrs["units"] == "1"
    assert lk.mcse(odds)["loss_gain"].attrs["units"] == "1"
    assert "units" not in lk.diagnostics(odds)["mcse"].attrs
    assert lk.diagnostics(loss)["mcse"].attrs["units"] == "nat"
    for of in (odds, odds.load(), tree["losses"].to_dataset()[["log_odds"]]):
        assert lk.neighbors(of, 3, exclude="label").sizes["rank"] == 3
        assert lk.group_mean(of, "label").compute().notnull().all()
        assert float(lk.cka(of, of)) == pytest.approx(1, abs=1e-5)
        lk.histogram(of, "label", bins=3).compute()
        lk.residualize(of, "label").compute()
    assert odds.lk.correlation().identical(lk.correlation(odds))
