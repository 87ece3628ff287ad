import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import numpy_correlation, random_losses


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
