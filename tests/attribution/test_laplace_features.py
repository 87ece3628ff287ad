"""`lk.laplace`: features whose products are the loss kernel of a Gaussian posterior."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.attribution import feature_maker
from lkarray.attribution.feature_maker import FeatureMaker, Sketch
from lkarray.nn.gradients import ExampleGradients
from tests.helpers import attacks
from tests.helpers.networks import classification, small_network

NBETA, GAMMA = 30.0, 2.0
QUIET = {"progress": False, "device": "cpu"}


def regression(n=40):
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    inputs = torch.randn(n, 5).double()
    data = TensorDataset(inputs, torch.randn(n, 1).double())
    return lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=GAMMA), data


def classifier(model=None, **options):
    data = classification()
    model = small_network() if model is None else model
    return lk.LocalPosterior(model, data, nbeta=NBETA, gamma=GAMMA, **options), data


def softmax_gradients(model, data, of):
    """Gradients of a linear softmax model by hand, ``(sample, param)``: weight, then bias."""
    x, y = (t.numpy() for t in data.tensors)
    w, b = (p.detach().double().numpy() for p in model.parameters())
    scores = x @ w.T + b
    share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    own = np.eye(w.shape[0])[y]
    error = share - own
    if of == "log_odds":
        others = np.where(own == 1, 0, share)
        error = others / others.sum(1, keepdims=True) - own
    weight = error[:, :, None] * x[:, None, :]
    bend = np.einsum("nc,cd->ncd", share, np.eye(w.shape[0])) - share[:, :, None] * share[:, None]
    with_bias = np.concatenate([x, np.ones((len(x), 1))], 1)
    fisher = np.einsum("ncd,np,nq->cpdq", bend, with_bias, with_bias) / len(x)
    # The model's order is all weights, then the biases.
    c, f = w.shape
    order = [i * (f + 1) + j for i in range(c) for j in range(f)] + [
        i * (f + 1) + f for i in range(c)
    ]
    fisher = fisher.reshape(c * (f + 1), -1)[np.ix_(order, order)]
    return np.concatenate([weight.reshape(len(x), -1), error], 1), fisher


def test_regression__kernel_is_the_closed_form():
    posterior, data = regression()
    x = torch.cat([data.tensors[0], torch.ones(40, 1)], 1).double().numpy()
    sigma = np.linalg.inv(NBETA * 2 * x.T @ x / len(x) + GAMMA * np.eye(6))
    features = lk.laplace(posterior, data, outcome="residual", **QUIET)
    assert features["feature"].dims == ("mode", "sample")
    np.testing.assert_allclose(lk.covariance(features).values, x @ sigma @ x.T, rtol=1e-6)
    residual = (posterior.model(data.tensors[0]) - data.tensors[1]).detach().numpy()[:, 0]
    g = 2 * residual[:, None] * x
    losses = lk.laplace(posterior, data, outcome="loss", **QUIET)
    np.testing.assert_allclose(lk.covariance(losses).values, g @ sigma @ g.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("outcome", ["log_odds", "loss"])
def test_softmax__kernel_is_that_of_the_dense_covariance(outcome):
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    data = classification()
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    posterior = lk.LocalPosterior(model, data, nbeta=NBETA, gamma=GAMMA)
    g, fisher = softmax_gradients(model, data, outcome)
    sigma = np.linalg.inv(NBETA * fisher + GAMMA * np.eye(len(fisher)))
    features = lk.laplace(posterior, data, outcome=outcome, **QUIET)
    np.testing.assert_allclose(lk.covariance(features).values, g @ sigma @ g.T, rtol=1e-6)
    assert features.attrs["captured"] == pytest.approx(1)


def test_correlation__is_the_same_of_any_outcome():
    posterior, data = classifier(small_network().double())
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    posterior.train_set = data
    kernels = [
        lk.correlation(lk.laplace(posterior, data, outcome=outcome, **QUIET)).values
        for outcome in ("loss", "log_odds")
    ]
    np.testing.assert_allclose(*kernels, rtol=1e-9, atol=1e-9)


def test_log_odds__have_gradients_where_the_loss_has_none_left():
    """A network so sure that its loss is 0 in float32, and the loss's gradient with it."""
    model = small_network()
    with torch.no_grad():
        model[2].weight *= 1e4
    posterior, data = classifier(model)
    data = TensorDataset(data.tensors[0], model(data.tensors[0]).argmax(1))
    features = lk.laplace(posterior, data, rank=0, **QUIET)["feature"].values
    assert np.isfinite(features).all()
    assert (np.linalg.norm(features, axis=0) > 1).all()
    losses = lk.laplace(posterior, data, rank=0, outcome="loss", **QUIET)["feature"].values
    assert not losses.any(axis=0).all()


def test_sketch__products_are_unbiased():
    """Over seeds, each product of sketches has the exact one as its mean, within its error."""
    rows = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)).double() + 0.5
    truth = (rows @ rows.T).numpy()
    made = []
    for seed in range(400):
        sketched = Sketch(300, 32, seed=seed, device=torch.device("cpu"))(rows)
        made.append((sketched @ sketched.T).numpy())
    made = np.stack(made)
    z = (made.mean(0) - truth) / (made.std(0, ddof=1) / np.sqrt(len(made)))
    upper = np.abs(z[np.triu_indices(len(z))])
    assert np.mean(upper > 4) < 0.02
    assert np.median(upper) < 1.5
    norms = (rows**2).sum(1).numpy()
    bound = 2 * np.outer(norms, norms) / 32
    assert (made.var(0) < 1.5 * bound).all()


def test_sketch__is_that_of_the_whitened_gradients():
    posterior, data = classifier()
    options = QUIET | {"rank": 5, "seed": 4}
    whole = lk.laplace(posterior, data, sketch=None, **options)["feature"].values
    # A budget that does not hold whole features.
    got = lk.laplace(posterior, data, sketch=16, memory="7 KiB", **options)
    assert got.sizes["mode"] == got.attrs["sketch"] == 16
    sketch = Sketch(len(whole), 16, seed=4, device=torch.device("cpu"))
    expected = sketch(torch.from_numpy(whole.T.copy())).numpy().T
    np.testing.assert_allclose(got["feature"].values, expected, rtol=1e-4, atol=1e-5)


def test_sketch__is_not_made_where_features_fit_or_are_smaller():
    posterior, data = classifier()
    whole = lk.laplace(posterior, data, rank=5, sketch=None, **QUIET)
    larger = lk.laplace(posterior, data, rank=5, sketch=54, **QUIET | {"memory": "50 KiB"})
    fitting = lk.laplace(posterior, data, rank=5, sketch=16, **QUIET)
    for other in (larger, fitting):
        assert other.attrs["sketch"] == "none"
        np.testing.assert_allclose(other["feature"], whole["feature"], rtol=1e-4, atol=1e-6)


def test_gradients__one_by_one_are_those_of_batches(monkeypatch):
    posterior, data = classifier()
    together = lk.laplace(posterior, data, rank=5, **QUIET)
    monkeypatch.setattr(feature_maker, "_ALONE", 0)  # as of a large network
    monkeypatch.setattr(ExampleGradients, "gradients", None)
    alone = lk.laplace(posterior, data, rank=5, **QUIET)
    np.testing.assert_allclose(alone["feature"], together["feature"], rtol=1e-4, atol=1e-6)


@pytest.fixture
def counted(monkeypatch):
    """How many gradients were taken."""
    taken = []
    before = ExampleGradients.gradients

    def counting(self, inputs, target, out=None):
        taken.append(len(target))
        return before(self, inputs, target, out)

    monkeypatch.setattr(ExampleGradients, "gradients", counting)
    return taken


def test_smoothing__grows_and_does_no_draw_again(counted):
    posterior, data = classifier()
    options = QUIET | {"rank": 5, "seed": 3}
    at_once = lk.laplace(posterior, data, smooth=9, **options)
    counted.clear()
    store = MemoryStore()
    lk.laplace(posterior, data, smooth=4, store=store, **options)
    first = sum(counted)
    lk.laplace(posterior, data, smooth=9, store=store, **options)
    probes = first - 4 * 40
    assert sum(counted) == 9 * 40 + 2 * probes
    grown = lk.laplace(posterior, data, smooth=9, store=store, **options)
    assert sum(counted) == 9 * 40 + 2 * probes  # complete: opened, not tried
    xr.testing.assert_identical(grown.compute(), at_once.compute())
    with pytest.raises(lk.errors.FingerprintError, match="smooth=9"):
        lk.laplace(posterior, data, smooth=4, store=store, **options)


def test_smoothing__is_the_mean_of_gradients_at_draws_of_the_law():
    """Of a model that is quadratic in its weight, the mean gradient is that at w*."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            return x * self.weight**2

    data = TensorDataset(torch.tensor([[1.0], [2.0], [-1.0]]), torch.zeros(3, 1))
    posterior = lk.LocalPosterior(Square(), data, "mse", nbeta=0.0, gamma=4.0)
    draws = 100
    features = lk.laplace(posterior, data, outcome="residual", smooth=draws, **QUIET)
    at_center = lk.laplace(posterior, data, outcome="residual", **QUIET)["feature"].values
    error = 2 * 0.5 * 0.5 / np.sqrt(draws)  # of 2 x w Sigma^(1/2), with w of deviation 1/2
    off = np.abs(features["feature"].values - at_center) / [1, 2, 1]
    assert 0 < off.max() < 4 * error
    halves = features["feature_half"]
    np.testing.assert_allclose(halves.mean("half").values, features["feature"].values, rtol=1e-5)
    assert np.abs(halves.diff("half")).max() > 0


def test_smoothing__says_how_reliable_it_is():
    posterior, data = classifier()
    few, many = (lk.laplace(posterior, data, smooth=m, rank=5, **QUIET) for m in (2, 40))
    assert few.attrs["halves_agree"] < many.attrs["halves_agree"] < 1
    h = many["feature_half"]
    kernels = [lk.correlation(h.isel(half=i)).values[np.triu_indices(40, 1)] for i in range(2)]
    assert many.attrs["halves_agree"] == pytest.approx(np.corrcoef(*kernels)[0, 1], abs=1e-5)
    r = many.attrs["halves_agree"]
    assert many.attrs["reliability"] == pytest.approx(2 * r / (1 + r))


@pytest.mark.parametrize("smooth", [0, 3])
def test_store__goes_on_after_a_stop_with_the_same_numbers(smooth, tmp_path, monkeypatch):
    posterior, data = classifier()
    monkeypatch.setattr(
        "lkarray.attribution.feature_request._BLOCK_BYTES", 2000
    )  # blocks of few samples
    options = QUIET | {"rank": 5, "smooth": smooth, "coords": {"label": data.tensors[1].numpy()}}
    whole = lk.laplace(posterior, data, **options)
    path = tmp_path / "features.zarr"
    before, calls = FeatureMaker.features, iter(range(1000))

    def stopped(self, rows):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return before(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureMaker, "features", stopped)
        with pytest.raises(KeyboardInterrupt):
            lk.laplace(posterior, data, store=path, **options)
    assert lk.verify(path) == []
    features = lk.laplace(posterior, data, store=path, **options)
    xr.testing.assert_identical(features.compute(), whole.compute())
    assert lk.verify(path) == []
    np.testing.assert_array_equal(features["label"], data.tensors[1])
    opened = lk.open(path)["features"]
    np.testing.assert_array_equal(opened["feature"].values, whole["feature"].values)
    np.testing.assert_array_equal(lk.correlation(opened).values, lk.correlation(whole).values)
    with pytest.raises(lk.errors.FingerprintError, match="outcome: stored 'log_odds', now 'loss'"):
        lk.laplace(posterior, data, store=path, **(options | {"outcome": "loss"}))


def test_store__damage_is_seen(tmp_path):
    posterior, data = classifier()
    path = tmp_path / "features.zarr"
    lk.laplace(posterior, data, store=path, **QUIET)
    chunk = next(p for p in (path / "features" / "total" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    assert [p.kind for p in lk.verify(path)] == ["corrupt"]
    chunk.unlink()
    assert [p.kind for p in lk.verify(path)] == ["missing"]


@pytest.mark.parametrize("smooth", [0, 2])
def test_store__exchanged_chunks_and_records_are_seen(smooth, tmp_path, monkeypatch):
    posterior, data = classifier()
    monkeypatch.setattr(
        "lkarray.attribution.feature_request._BLOCK_BYTES", 2000
    )  # blocks of few samples
    path, options = tmp_path / "features.zarr", QUIET | {"smooth": smooth}
    lk.laplace(posterior, data, store=path, **options)
    assert lk.verify(path) == []
    total, taken = "features/total/c/0/0/{}/0", "features/taken/c/{}/0"
    attacks.swap(path, total.format(0), total.format(1))
    assert [p.path for p in lk.verify(path)] == ["features/total"] * 2
    if smooth:  # nothing is added to sums of other samples
        with pytest.raises(lk.errors.DamagedError, match="block 0 are not those"):
            lk.laplace(posterior, data, store=path, **options | {"smooth": 4})
    attacks.swap(path, total.format(0), total.format(1))
    attacks.swap(path, taken.format(0), taken.format(1))
    assert any("record of another block" in p.detail for p in lk.verify(path))
    with pytest.raises(lk.errors.DamagedError, match="record of another block"):
        lk.laplace(posterior, data, store=path, **options)


def test_store__an_edited_copy_of_the_metadata_is_seen(tmp_path):
    posterior, data = classifier()
    path = tmp_path / "features.zarr"
    lk.laplace(posterior, data, store=path, **QUIET)
    whole = (path / "zarr.json").read_bytes()
    for change in (
        lambda copy: copy["metadata"]["features"]["attributes"].update(residual=1.0),
        lambda copy: copy["metadata"]["features/total"].update(fill_value=0.0),
        lambda copy: copy["metadata"]["features"].update(zarr_format=4),
        lambda copy: copy.pop("kind"),
    ):
        attacks.edit(path / "zarr.json", lambda m, c=change: c(m["consolidated_metadata"]))
        assert [p.path for p in lk.verify(path)] == ["zarr.json"]
        (path / "zarr.json").write_bytes(whole)
    assert lk.verify(path) == []


def test_gradients__that_are_not_finite_are_named():
    posterior, data = classifier()
    inputs = data.tensors[0].clone()
    inputs[[7, 20]] = torch.nan
    with pytest.raises(lk.errors.NonFiniteError, match=r"\[7, 20\]"):
        lk.laplace(posterior, TensorDataset(inputs, data.tensors[1]), **QUIET)


def test_parts_of_tensors__are_all_that_features_are_about():
    posterior, data = classifier(trainable="0.weight[0:2, :]")
    features = lk.laplace(posterior, data, rank=4, **QUIET)["feature"]
    whole, _ = classifier(trainable="0.weight")
    every = lk.laplace(whole, data, rank=0, **QUIET)["feature"]
    assert features.sizes["mode"] == 12
    flat = lk.laplace(posterior, data, rank=0, **QUIET)["feature"]
    np.testing.assert_allclose(flat.values, every.values[:12], rtol=1e-6)


def test_tokens__are_means_over_what_counts():
    torch.manual_seed(0)

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 7)

        def forward(self, ids):
            return self.table(ids.clamp(min=0))

    ids = torch.randint(0, 7, (5, 6))
    ids[0, 3:] = -100
    model = Bigram()
    posterior = lk.LocalPosterior(model, TensorDataset(ids), "next_token", nbeta=1.0, gamma=2.0)
    got = lk.laplace(posterior, TensorDataset(ids), rank=0, **QUIET)["feature"].values
    for i, row in enumerate(ids):
        row = row[row >= 0]
        scores = model(row[:-1])
        odds = [
            torch.cat([s[:y], s[y + 1 :]]).logsumexp(0) - s[y]
            for s, y in zip(scores, row[1:], strict=True)
        ]
        (slope,) = torch.autograd.grad(torch.stack(odds).mean(), model.table.weight)
        np.testing.assert_allclose(got[:, i], slope.flatten() * 0.5**0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"outcome": "residual"}, "pass outcome='log_odds' or 'loss'"),
        ({"outcome": "luck"}, "outcome must be one of"),
        ({"sketch": 0}, "sketch must be at least 1"),
        ({"smooth": 1}, "two|2 or more"),
        ({"memory": "1 KiB"}, "memory="),
        ({"memory": "10 KiB"}, "rank="),
    ],
)
def test_arguments__are_refused_with_the_remedy(options, match):
    posterior, data = classifier()
    with pytest.raises(ValueError, match=match):
        lk.laplace(posterior, data, **(QUIET | options))


def test_one_class__has_no_log_odds():
    model = nn.Linear(6, 1)
    data = TensorDataset(classification().tensors[0], torch.zeros(40, dtype=torch.long))
    posterior = lk.LocalPosterior(model, data, nbeta=NBETA, gamma=GAMMA)
    with pytest.raises(ValueError, match="two classes"):
        lk.laplace(posterior, data, **QUIET)


def test_localisation__is_needed():
    posterior, data = classifier()
    with pytest.raises(ValueError, match="gamma"):
        lk.laplace(posterior.tempered(gamma=0.0), data, **QUIET)
