"""`start=`: chains that begin in the law that they have where the loss is quadratic."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray.sampling.laplace_law import laplace_law
from lkarray.sampling.randomness import MAX_STEPS, ChainRandomness
from lkarray.sampling.starting import first_offset
from lkarray.store.location import ENTRIES
from tests.helpers.chains import stopped_after
from tests.helpers.networks import classification, small_network

QUIET = {"progress": False, "device": "cpu"}
NBETA, GAMMA, EPS = 30.0, 2.0, 0.01


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def regression():
    """Linear regression at its minimum, and the precision of its posterior."""
    torch.manual_seed(0)
    inputs = torch.randn(50, 3) * torch.tensor([2.0, 1.0, 0.2])
    targets = inputs @ torch.tensor([[1.0], [2.0], [3.0]]) + 0.3 * torch.randn(50, 1)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    data = TensorDataset(inputs, targets)
    x = inputs.double().numpy()
    precision = NBETA * 2 * x.T @ x / len(x) + GAMMA * np.eye(3)
    return lk.LocalPosterior(model, data, "mse", nbeta=NBETA, gamma=GAMMA), data, precision


def run(posterior, data, store=None, **options):
    given = {"sampler": lk.SGLD(EPS), "chains": 2, "draws": 6, "batch_size": None} | options
    store = MemoryStore() if store is None else store
    return lk.sample(posterior, data, store=store, **(given | QUIET))


def offsets(posterior, data, chains, seeds, rank=3):
    """First offsets of chains, by the law of the regression, ``(seed and chain, param)``."""
    flat = lk.nn.FlatModel(posterior.model)
    batches = lk.nn.Batches(data, name="train_set", device=torch.device("cpu"))
    law = laplace_law(posterior, flat, batches, 50, rank=rank, step_size=EPS)
    each = []
    for seed in seeds:
        for chain in chains:
            random = ChainRandomness(seed, chain, n=50, batch_size=None, like=flat.theta[0])
            random.noise(7)  # what was drawn before does not matter
            each.append(first_offset(law, random))
    return torch.stack(each)


def test_start__is_a_draw_of_the_stationary_law():
    posterior, data, precision = regression()
    off = offsets(posterior, data, range(256), range(4)).double().numpy()
    sigma = np.linalg.inv(precision @ (np.eye(3) - EPS / 4 * precision))
    white = off @ np.linalg.cholesky(np.linalg.inv(sigma))
    np.testing.assert_allclose(white.T @ white / 1024, np.eye(3), atol=4 * np.sqrt(2 / 1024))


def test_start__is_a_function_of_seed_and_chain_whose_noise_no_step_has():
    posterior, data, _ = regression()
    one, two, other = (offsets(posterior, data, *of) for of in (([1], [0]), ([2], [0]), ([1], [1])))
    assert torch.equal(offsets(posterior, data, [1], [0]), one)
    assert not torch.equal(two, one)
    assert not torch.equal(other, one)
    with pytest.raises(ValueError, match="no noise for their start"):
        run(posterior, data, start="laplace", draws=1, burn_in=MAX_STEPS - 1)


@pytest.mark.parametrize("width", [1, 2])
def test_start__goes_on_after_a_stop_and_is_replayed(width, monkeypatch, tmp_path):
    data = classification(n=24)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=NBETA, gamma=50.0)
    options = {"start": lk.Laplace(rank=4), "chains_per_device": width, "batch_size": 8}
    options |= {"sampler": lk.SGLD(1e-3)}
    whole = run(posterior, data, **options)
    store = tmp_path / "s.zarr"
    with stopped_after(monkeypatch, 4):
        run(posterior, data, store, **options)
    again = run(posterior, data, store, **options)
    np.testing.assert_array_equal(again["losses/loss"].values, whole["losses/loss"].values)
    replay = lk.observe(lk.open(store), data, progress=False)
    np.testing.assert_allclose(replay["losses/loss"].values, whole["losses/loss"].values, rtol=1e-4)
    (store / "losses/loss/c/0/0/0").unlink()
    assert all(repair.mended for repair in lk.repair(store, progress=False))
    assert lk.verify(store) == []


def test_start__is_part_of_what_a_store_was_made_with():
    posterior, data, _ = regression()
    store = MemoryStore()
    tree = run(posterior, data, store, start=lk.Laplace(rank=2))
    stored = tree.attrs[ENTRIES]["losses"]
    assert stored["start"]["rank"] == 2
    assert tree["losses"].attrs["start"] == stored["start"]
    for other in ("center", lk.Laplace(rank=1)):
        with pytest.raises(lk.errors.FingerprintError, match="start"):
            run(posterior, data, store, start=other, burn_in=0)
    assert not any("relaxation" in line for line in lk.diagnostics(tree).attrs["verdicts"])
    plain = run(posterior, data)
    assert any("relaxation" in line for line in lk.diagnostics(plain).attrs["verdicts"])
    at_center = plain.attrs[ENTRIES]["losses"]
    assert "start" not in at_center
    assert at_center["burn_in"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "w*"}, "start must be 'center'"),
        ({"start": lk.Laplace(step_size=0.1)}, "the law has step_size=0.1"),
        ({"start": "laplace", "sampler": lk.SGHMC(EPS)}, "not SGHMC"),
        (
            {"start": "laplace", "sampler": lk.SGLD(EPS, lk.schedules.Warmup(3))},
            "not SGLD with a schedule",
        ),
        ({"start": "laplace", "sampler": lk.Laplace(rank=2)}, "no chain starts anywhere"),
    ],
)
def test_start__is_refused_where_there_is_no_law(options, message):
    posterior, data, _ = regression()
    with pytest.raises(ValueError, match=message):
        run(posterior, data, **options)
