"""Labels with an index of their own: in any order the same answer, or a refusal."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors, plots
from lkarray.auditing.grouping import groupings
from lkarray.labels import given_coords
from tests.helpers import labelled
from tests.helpers.labelled import INDEX, ORDER, N
from tests.helpers.losses import random_losses
from tests.helpers.recorded_runs import cross_entropy, examples


@pytest.fixture(scope="module")
def losses():
    return labelled.losses()


@pytest.fixture(scope="module")
def things(losses):
    return labelled.things(losses)


#: Of each function that takes one value for each sample: what it answers to some labels.
TAKE = {
    "group_mean": lambda t, g: lk.group_mean(t["losses"], g),
    "histogram": lambda t, g: lk.histogram(t["losses"], g, bins=4)["count"],
    "residualize": lambda t, g: lk.residualize(t["losses"], g),
    "neighbors, exclude": lambda t, g: lk.neighbors(t["bare"], 4, exclude=g)["neighbor"],
    "attribute_lift": lambda t, g: lk.attribute_lift(t["near"], g)["lift"],
    "attribute_lift, exclude": lambda t, g: lk.attribute_lift(
        t["near"].drop_vars("label"), np.arange(N) % 3, exclude=g
    )["lift"],
    "taxonomic_lift of a table": lambda t, g: lk.taxonomic_lift(
        t["near"].drop_vars("label"), t["tree"], g, replicates=3
    )["lift"],
    "taxonomic_lift of losses": lambda t, g: lk.taxonomic_lift(
        t["bare"], t["tree"], g, k=3, replicates=3, delete_chains=False
    )["lift"],
    "correlation_by_distance": lambda t, g: lk.correlation_by_distance(
        t["bare"], t["tree"], g, replicates=3
    )["correlation"],
    "most_influential": lambda t, g: lk.most_influential(t["audit"], 2, by=g)["helpful"],
    "similarity_by_distance": lambda t, g: lk.similarity_by_distance(t["R"], t["points"], g)[
        "mean"
    ],
    "ips_scores, train_labels": lambda t, g: lk.ips_scores(t["R"], g, np.zeros(N, int))["margin"],
    "ips_scores, predicted": lambda t, g: lk.ips_scores(t["R"], np.arange(N) % 4, g)["margin"],
    "hidden_similarity, train_labels": lambda t, g: lk.hidden_similarity(
        t["hidden"], t["hidden"], g, np.zeros(N, int), k=2
    ),
    "hidden_similarity, predicted": lambda t, g: lk.hidden_similarity(
        t["hidden"], t["hidden"], np.arange(N) % 4, g, k=2
    ),
    "sample_coords": lambda t, g: given_coords({"label": g}, N, index=INDEX)["label"],
    "sample_coords, sample among them": lambda t, g: given_coords({"label": g, "sample": INDEX}, N)[
        "label"
    ],
    "plots.similarity_to_target": lambda t, g: drawn(
        plots.similarity_to_target(t["points"], g, 3).axes[0]
    ),
}


def drawn(axes):
    """The places and values of a scatter, in the order of the places."""
    dots = axes.collections[0]
    table = np.column_stack([dots.get_offsets(), dots.get_array()])
    return table[np.lexsort(table.T)]


def forms(values):
    """Labels of the samples with their index: turned, among others, as a DataArray or a Series."""
    whole = xr.DataArray(values, dims="sample", coords={"sample": INDEX}, name="kind")
    other = xr.DataArray(values[:5], dims="sample", coords={"sample": INDEX[:5] + 1}, name="kind")
    more = xr.concat([whole[ORDER], other], "sample")
    return {
        "in order": whole,
        "turned": whole[ORDER],
        "more of them": more,
        "Series": whole[ORDER].to_series(),
        "Series of more": more.to_series(),
        "of another dim": whole[ORDER].rename(sample="example"),
    }


@pytest.mark.parametrize("name", TAKE)
def test_labels__of_any_order_give_the_same_answer(things, name):
    values = np.random.default_rng(3).permutation(np.arange(N) % 4)
    expected = np.asarray(TAKE[name](things, values))
    for form, given in forms(values).items():
        np.testing.assert_array_equal(np.asarray(TAKE[name](things, given)), expected, form)
    np.testing.assert_array_equal(np.asarray(TAKE[name](things, values.tolist())), expected)
    bare = xr.DataArray(values, dims="sample")  # without labels: in order
    np.testing.assert_array_equal(np.asarray(TAKE[name](things, bare)), expected)


@pytest.mark.parametrize("name", TAKE)
def test_labels__that_cannot_be_told_apart_are_refused(things, name):
    values = np.arange(N) % 4
    twice = np.where(np.arange(N) == 3, INDEX[2], INDEX)
    wrong = {
        r"lacks 17 of the 24": pd.Series(values),  # numbered anew: of which samples?
        r"lacks 1 of the 24 \w+s, the first being 5;": pd.Series(values[1:], INDEX[1:]),
        r"lacks 24 of the 24 .* 5; give": pd.Series(values, INDEX.astype(str)),
        r"has values twice, 11 for one": xr.DataArray(values, dims="s", coords={"s": twice}),
    }
    for message, given in wrong.items():
        with pytest.raises(errors.SchemaError, match=message):
            TAKE[name](things, given)
    with pytest.raises(TypeError, match="one column"):
        TAKE[name](things, pd.DataFrame({"label": values}, INDEX))
    with pytest.raises(errors.SchemaError, match=r"has shape \(23,\)"):
        TAKE[name](things, values[1:])


@pytest.mark.parametrize("missing", [None, np.nan])
def test_labels__that_are_missing_make_no_group(things, missing):
    names = np.array(["a", "b", "c", "d"], dtype=object)[np.arange(N) % 4]
    names[5] = missing
    for given in (names, names.tolist(), pd.Series(names, INDEX)):
        with pytest.raises(errors.SchemaError, match="missing for 1 of 24, first at position 5"):
            lk.group_mean(things["losses"], given)
        with pytest.raises(errors.SchemaError, match="missing for 1 of 24"):
            lk.neighbors(things["bare"], 3, exclude=given)
        with pytest.raises(errors.SchemaError, match="missing values"):
            given_coords({"label": given}, N, index=INDEX)
    with pytest.raises(errors.SchemaError, match="mixes int and str"):
        lk.group_mean(things["losses"], [1, "a"] * (N // 2))


def test_labels__of_what_is_known_by_position_alone(things):
    """Then only labels 0, 1, 2, ... in this order say which is which."""
    values = np.arange(N) % 4
    bare = things["losses"].drop_vars(["sample", "label"])
    expected = lk.group_mean(bare, values)
    numbered = xr.DataArray(values, dims="sample", coords={"sample": np.arange(N)})
    for given in (numbered, pd.Series(values)):
        np.testing.assert_array_equal(lk.group_mean(bare, given), expected)
        np.testing.assert_array_equal(given_coords({"a": given}, N)["a"], values)
    for given in (numbered[::-1], pd.Series(values)[::-1], pd.Series(values, INDEX)):
        with pytest.raises(errors.SchemaError, match="known by position alone"):
            lk.group_mean(bare, given)
        with pytest.raises(errors.SchemaError, match="known by position alone"):
            given_coords({"a": given}, N)


def test_exclude__given_apart_becomes_a_coordinate(things):
    group = np.arange(N) % 3
    near = lk.neighbors(things["bare"], 4, exclude=pd.Series(group, INDEX, name="color")).compute()
    named = things["bare"].assign_coords(color=("sample", group))
    xr.testing.assert_identical(near, lk.neighbors(named, 4, exclude="color").compute())
    assert lk.attribute_lift(near, np.arange(N) % 4).attrs["exclude"] == "color"
    with pytest.raises(errors.SchemaError, match="a coordinate 'label' with other values"):
        lk.neighbors(things["losses"], 4, exclude=pd.Series(group, INDEX, name="label"))


# --- labels given when something is written -----------------------------------------------------


def test_sample__takes_labels_by_their_index(sample, posterior):
    names = posterior.train_set.tensors[1].numpy()
    ids = np.arange(40) + 100
    given = pd.Series(names, ids).sample(frac=1, random_state=0)
    tree = sample(MemoryStore(), coords={"sample": ids, "label": given}, draws=1)
    np.testing.assert_array_equal(tree["losses"]["label"], names)
    with pytest.raises(errors.SchemaError, match="known by position alone"):
        sample(MemoryStore(), coords={"label": pd.Series(names)[::-1]}, draws=1)


def test_gradients_and_audits__take_labels_by_their_index(train):
    store = MemoryStore()
    model, _ = train(store, steps=4)
    trace = lk.open_trace(store, model, examples(), loss=cross_entropy)
    names = np.array(list("abcde"))[np.arange(50) % 5]
    chosen = [40, 3, 17, 9]
    of_all = pd.Series(names).sample(frac=1, random_state=0)
    G = lk.gradient_features(trace, chosen, times=[0], coords={"label": of_all}, store=store)
    assert G["label"].values.tolist() == names[chosen].tolist()
    audit = lk.audit(
        trace,
        chosen,
        coords={"label": of_all},
        examples=[1, 2, 30],
        example_coords={"train_label": of_all},
    )
    assert audit["label"].values.tolist() == names[chosen].tolist()
    assert audit["train_label"].values.tolist() == names[[1, 2, 30]].tolist()
    scores = lk.tracin(trace, chosen, coords={"label": of_all})
    assert scores["label"].values.tolist() == names[chosen].tolist()
    steps = (0, trace.steps)
    parts = groupings({"example": pd.Series(names)}, trace, steps, overlap=False)["example"]
    assert [list(m) for m in parts.members] == [list(range(i, 50, 5)) for i in range(5)]
    for wrong in (of_all, {"a": of_all == "a"}):
        with pytest.raises(errors.SchemaError, match="known by position alone"):
            groupings({"example": wrong}, trace, steps, overlap=False)


# --- missing labels are not empty ones --------------------------------------------------------


def named_kernel(losses, missing):
    names = np.array(["a", missing, ""] * (N // 3), dtype=object)
    return lk.correlation(losses.assign_coords(path=("sample", names)))


@pytest.mark.parametrize("missing", [None, np.nan])
def test_save__refuses_labels_that_are_missing(things, tmp_path, missing):
    kernel = named_kernel(things["bare"], missing)
    with pytest.raises(errors.SchemaError, match="'path' holds (None|nan) at position 1"):
        lk.save(kernel, tmp_path / "k.zarr")
    assert not (tmp_path / "k.zarr").exists()
    saved = lk.save(kernel.drop_vars(["path", "path_2"]), tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match="'path' holds (None|nan)"):
        lk.store.put(tmp_path / "k.zarr", "other", kernel.compute())
    np.testing.assert_allclose(saved, kernel, atol=1e-6)
    full = kernel.assign_coords(
        path=("sample", ["a", "none", ""] * 8), path_2=("sample_2", ["a", "none", ""] * 8)
    )
    lk.store.put(tmp_path / "k.zarr", "other", full.compute())
    assert lk.open(tmp_path / "k.zarr")["derived/other"]["path"].values[:3].tolist() == [
        "a",
        "none",
        "",
    ]


@pytest.mark.parametrize("name", ["group_mean", "residualize", "histogram"])
def test_groups__lists_of_unequal_lengths_are_refused_by_name(rng, name):
    with pytest.raises(TypeError, match=r"groups must be an array, or lists that one can be made"):
        getattr(lk, name)(random_losses(rng, 2, 6, 9), groups=[[1, 2], [3]])
    with pytest.raises(TypeError, match="exclude must be an array"):
        lk.neighbors(random_losses(rng, 2, 6, 9), 3, exclude=[[1, 2], [3]])
