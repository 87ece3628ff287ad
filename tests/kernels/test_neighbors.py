import dask
import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import Forbidding, numpy_correlation, random_losses


@pytest.fixture
def losses(rng):
    return random_losses(rng)


def test_neighbors__refuses_bad_requests(losses):
    for k in (0, 17):
        with pytest.raises(ValueError, match="between 1 and 16"):
            lk.neighbors(losses, k)
    with pytest.raises(
        errors.SchemaError, match="'wnid' is not a coordinate.*\\['label', 'sample'"
    ):
        lk.neighbors(losses, 3, exclude="wnid")
    with pytest.raises(TypeError):
        lk.neighbors(losses, 2.5)


def test_neighbors__names_them_by_the_samples_index(losses):
    shifted = losses.assign_coords(sample=np.arange(17, dtype="uint8") + 200, split="train")
    near = lk.neighbors(shifted, 16, exclude="label").compute()
    assert near["neighbor"].dtype == np.int64
    assert near["neighbor"].max() == 216
    assert (near["neighbor"] == -1).any()
    assert near["split"] == "train"
    bare = lk.neighbors(losses.drop_vars("sample"), 3).compute()
    np.testing.assert_array_equal(bare["neighbor"], lk.neighbors(losses, 3)["neighbor"])
    for wrong in ([f"n{i}" for i in range(17)], np.arange(17) - 3):
        with pytest.raises(errors.SchemaError, match="must be integers of at least 0"):
            lk.neighbors(losses.assign_coords(sample=wrong), 3)


@pytest.mark.parametrize("largest", [True, False])
def test_neighbors__leave_out_what_a_rule_says(rng, largest):
    losses = random_losses(rng, samples=60)

    def rule(a, b):
        return (a["label"] == b["label"]) | (np.abs(a["sample"] - b["sample"]) < 3)

    near = lk.neighbors(losses, 5, exclude=rule, largest=largest, memory="40 KiB").compute()
    exact = numpy_correlation(losses) * (1 if largest else -1)
    at, label = losses["sample"].values, losses["label"].values
    out = (label[:, None] == label) | (np.abs(at[:, None] - at) < 3)
    best = np.argsort(-np.where(out, -np.inf, exact), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(near["neighbor"], best)
    with pytest.raises(ValueError, match=r"rule fails.*'label', 'sample'"):
        lk.neighbors(losses, 5, exclude=lambda a, b: a["colour"] == b["colour"])
    with pytest.raises(ValueError, match="booleans"):
        lk.neighbors(losses, 5, exclude=lambda a, b: a["label"] - b["label"])


@pytest.mark.parametrize("options", [{}, {"memory": "120 KiB"}, {"device": "cpu"}])
@pytest.mark.parametrize("largest", [True, False])
def test_neighbors__of_constant_losses_are_none_and_nobodys(rng, options, largest):
    losses = random_losses(rng, samples=60)
    still = np.arange(60) % 4 == 1
    losses[..., still] = rng.normal(size=still.sum()).astype("f4")  # each at a value of its own
    near = lk.neighbors(losses, 50, largest=largest, **options).compute()
    np.testing.assert_array_equal(near["constant"], still)
    assert (near["neighbor"].values[still] == -1).all()
    assert near["similarity"].isnull().values[still].all()
    assert not np.isin(near["neighbor"], np.flatnonzero(still)).any()
    rest = lk.neighbors(losses.isel(sample=~still), 44, largest=largest, **options).compute()
    np.testing.assert_array_equal(near["neighbor"].values[~still, :44], rest["neighbor"])
    assert (near["neighbor"].values[:, 44:] == -1).all()


def test_neighbors__that_are_constant_are_known_without_a_search(rng):
    losses = random_losses(rng, samples=30)
    losses[..., 3] = 1.5
    near = lk.neighbors(losses.chunk(draw=5, sample=7), 4, memory="40 KiB")
    assert np.flatnonzero(near["constant"].values).tolist() == [3]


@pytest.mark.parametrize("options", [{}, {"memory": "60 KiB"}, {"device": "cpu"}])
@pytest.mark.parametrize("center", ["pooled", "chain", "draw"])
def test_neighbors__crossfitted_are_chosen_by_one_half_and_measured_by_the_other(
    rng, options, center
):
    losses = random_losses(rng, chains=6, draws=20, samples=31).chunk(chain=2, draw=7, sample=9)
    near = lk.neighbors(losses, 5, crossfit=True, center=center, **options)
    near = near.compute()
    halves = [numpy_correlation(losses.isel(chain=slice(f, None, 2)), center) for f in (0, 1)]
    for row in range(31):
        chosen, other = halves[row % 2].copy(), halves[1 - row % 2]
        chosen[row, row] = -np.inf
        best = np.argsort(-chosen[row])[:5]
        np.testing.assert_array_equal(near["neighbor"][row], best)
        np.testing.assert_allclose(near["similarity"][row], other[row, best], atol=1e-5)
    assert (near["similarity_error"] > 0).all()
    assert ((near["q_value"] >= 0) & (near["q_value"] <= 1)).all()
    assert near.attrs["crossfit"] == "chains"


def test_neighbors__of_one_chain_are_crossfitted_over_halves_of_its_draws(rng):
    losses = random_losses(rng, chains=1, draws=81, samples=12)
    losses[..., 3] = 0.25
    near = lk.neighbors(losses, 3, crossfit=True).compute()
    assert near.attrs["crossfit"] == "draws"
    halves = [numpy_correlation(losses.isel(draw=slice(a, a + 40))) for a in (0, 40)]
    expected = halves[1][0, near["neighbor"][0]]
    np.testing.assert_allclose(near["similarity"][0], expected, atol=1e-5)
    assert near["constant"].values.nonzero()[0].tolist() == [3]
    for name in ("similarity", "similarity_error", "q_value"):
        assert near[name].isnull().values[3].all()
    assert (near["neighbor"][3] == -1).all()


def test_neighbors__crossfitted_stay_lazy(rng):
    losses = random_losses(rng, chains=4).chunk()
    with dask.config.set(scheduler=Forbidding()):
        lk.neighbors(losses, 3, crossfit=True)
