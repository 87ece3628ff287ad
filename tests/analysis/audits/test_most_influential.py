import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers.influences import M, N, cut, influence, summed


@pytest.fixture(params=["memory", "dask"])
def audit(request, rng):
    x = influence(rng)
    return (cut(x) if request.param == "dask" else x).to_dataset()


@pytest.mark.parametrize("k", [1, 7, 25, M, 100])
def test_most_influential__is_the_ends_of_a_sort(audit, k):
    top = lk.most_influential(audit, k).compute()
    values, kept = summed(audit["influence"]).values, min(k, M)
    order = np.argsort(values, axis=0)
    for name, best in (("helpful", order[:kept]), ("harmful", order[::-1][:kept])):
        assert top[name].dims == ("rank", "audit", "output")
        np.testing.assert_array_equal(top[name], best * 2 + 5)
        expected = np.take_along_axis(values, best, axis=0)
        np.testing.assert_allclose(top[f"{name}_influence"], expected)
    assert top.sizes["rank"] == kept
    assert top["label"].dims == ("audit",)
    assert top["helpful_influence"].attrs["units"] == "nat"


@pytest.mark.parametrize("k", [3, 12])
def test_most_influential__by_class_is_that_of_each_class(audit, k):
    top = lk.most_influential(audit["influence"], k, by="train_label").compute()
    assert top["helpful"].dims == ("train_label", "rank", "audit", "output")
    assert top["train_label"].values.tolist() == [0, 1, 2, 3, 4]
    for value in range(5):
        own = audit["influence"].isel(example=audit["train_label"].values == value)
        alone = lk.most_influential(own, k).compute()
        there = top.sel(train_label=value)
        rest = there.isel(rank=slice(alone.sizes["rank"], None))
        for name in ("helpful", "harmful"):
            head = there.isel(rank=slice(alone.sizes["rank"]))
            np.testing.assert_array_equal(head[name], alone[name])
            np.testing.assert_allclose(head[f"{name}_influence"], alone[f"{name}_influence"])
            assert (rest[name] == -1).all()
            assert np.isnan(rest[f"{name}_influence"]).all()


@pytest.mark.parametrize("chunk", [1, 2, 5, 57])
def test_most_influential__gives_ties_to_the_first_however_it_is_cut(rng, chunk):
    x = influence(rng, ("example", "audit"))
    tied = cut(x.copy(data=rng.integers(-1, 2, x.shape).astype("f4")), {"example": chunk})
    top = lk.most_influential(tied, 20)
    values = tied.values
    for name, sign in (("helpful", 1), ("harmful", -1)):
        best = np.argsort(sign * values, axis=0, kind="stable")[:20]
        np.testing.assert_array_equal(top[name], best * 2 + 5)


def test_most_influential__names_groups_and_positions(rng):
    x = influence(rng, ("example", "audit"))
    bare = x.drop_vars(list(x.coords))
    best = bare.values.argmin(0)
    np.testing.assert_array_equal(lk.most_influential(bare, 1)["helpful"][0], best)
    names = np.array([f"g{i}" for i in range(M)])
    grouped = bare.rename(example="group").assign_coords(
        group=names, kind=("group", np.arange(M) % 2)
    )
    for x in (grouped, grouped.astype("f8").chunk({"group": 9})):
        top = lk.most_influential(x, 30, by="kind").compute()
        assert top["helpful"].sel(kind=1)[0].values.tolist() == [
            names[1::2][i] for i in bare.values[1::2].argmin(0)
        ]
        assert (top["helpful"].sel(kind=1)[-1] == "").all()  # 28 of one kind, 29 of the other
        assert top.attrs["source"] == "group"


def test_most_influential__takes_classes_of_stored_strings(rng):
    x = influence(rng, ("example", "audit"))
    names = np.array(["ant", "bee", "cat"], np.dtypes.StringDType())[np.arange(M) % 3]
    top = lk.most_influential(x.assign_coords(kind=("example", names)), 2, by="kind")
    best = top["harmful"].sel(kind="bee")[0]
    np.testing.assert_array_equal(best, x["example"].values[1::3][x.values[1::3].argmax(0)])


def test_most_influential__takes_one_audited_example(rng):
    x = influence(rng, ("example", "audit"))
    one = lk.most_influential(x.isel(audit=3), 5)
    assert one["helpful"].dims == ("rank",)
    np.testing.assert_array_equal(one["helpful"], lk.most_influential(x, 5)["helpful"][:, 3])
    assert one["label"].item() == x["label"].values[3]


def test_most_influential__refuses_what_does_not_fit(rng, audit):
    with pytest.raises(ValueError, match="k must be at least 1"):
        lk.most_influential(audit, 0)
    with pytest.raises(errors.SchemaError, match="'label' is no coordinate of 'example'"):
        lk.most_influential(audit, by="label")
    with pytest.raises(errors.SchemaError, match="has dims .*an influence has 'example'"):
        lk.most_influential(audit["influence"].rename(audit="sample"))
    with pytest.raises(errors.SchemaError, match="no variable 'influence'"):
        lk.most_influential(audit.drop_vars("influence"))
    with pytest.raises(TypeError, match="must be the Dataset"):
        lk.most_influential(audit["influence"].values)
    with pytest.raises(errors.SchemaError, match="influence is empty along"):
        lk.most_influential(audit.isel(example=slice(0)))


def test_most_influential__refuses_influence_that_is_missing(rng):
    x = influence(rng, ("example", "audit")).where(np.arange(N) != 2)
    for what in (lk.most_influential, lk.concentration):
        with pytest.raises(errors.NonFiniteError, match="lk.verify"):
            what(x).compute()
        assert what(cut(x).isel(audit=[0, 1])).compute() is not None
