"""Lift against its definition as a triple loop, and against what must come out."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import lkarray as lk
from lkarray.analysis.hierarchy import pairs
from lkarray.errors import SchemaError
from tests.helpers.hierarchies import binary, dags, random_table, table, taxonomic_losses, whole


def defined(neighbor, labels, taxonomy, base, depth):
    """Lift and pairs by the definition: every query, every neighbour, every depth."""
    depths = {node: taxonomy.depth(node, depth) for node in taxonomy.nodes}
    up = {label: set(taxonomy.ancestors(label)) for label in set(labels)}
    deepest = max(depths[a] for label in set(labels) for a in up[label])
    groups = sorted({depths[label] for label in labels})

    def share(queries, candidates):
        hits, total = np.zeros(deepest + 1), 0
        for i in queries:
            for j in candidates(i):
                if j < 0 or labels[i] == labels[j]:
                    continue
                total += 1
                for d in range(deepest + 1):
                    hits[d] += any(depths[a] == d for a in up[labels[i]] & up[labels[j]])
        return hits, total

    everyone = range(len(labels))
    rows, pairs_, expected = [], [], np.zeros(deepest + 1)
    for group in groups:
        queries = [i for i in everyone if depths[labels[i]] == group]
        hits, total = share(queries, lambda i: neighbor[i])
        chance = share(queries if base == "matched" else everyone, lambda i: everyone)
        with np.errstate(all="ignore"):
            rate = chance[0] / np.float64(chance[1])
            rows.append(np.where(rate > 0, hits / np.float64(total) / rate, np.nan))
        expected += np.nan_to_num(total * rate)
        pairs_.append(total)
    return groups, np.array(rows), pairs_


@st.composite
def problems(draw):
    parents = draw(dags(8))
    n = draw(st.integers(2, 9))
    labels = draw(st.lists(st.sampled_from(sorted(parents)), min_size=n, max_size=n))
    k = draw(st.integers(1, 3))
    entries = st.lists(st.integers(-1, n - 1), min_size=k, max_size=k)
    neighbor = draw(st.lists(entries, min_size=n, max_size=n))
    return whole(parents), labels, neighbor


@settings(max_examples=60)
@given(
    problems(),
    st.sampled_from(["matched", "dataset"]),
    st.sampled_from(["shortest", "longest", "first_path"]),
)
def test_lift__equals_the_triple_loop(problem, base, depth):
    taxonomy, labels, neighbor = problem
    lifted = lk.taxonomic_lift(
        table(neighbor, labels), taxonomy, base=base, depth=depth, replicates=3
    )
    groups, lift, counts = defined(neighbor, labels, taxonomy, base, depth)
    assert lifted["query_depth"].values.tolist() == groups
    np.testing.assert_allclose(lifted["lift"], lift, rtol=1e-12)
    assert lifted["pairs"].values.tolist() == counts
    valid = np.asarray(neighbor) >= 0
    assert lifted.attrs["missing_pairs"] == (~valid).sum()
    same = sum(labels[i] == labels[j] for i, row in enumerate(neighbor) for j in row if j >= 0)
    assert lifted.attrs["same_label_pairs_left_out"] == same


def uneven():
    """Leaves at depths 2 to 6, where the printed base rate misleads."""
    edges = [("", word) for word in "ab"]
    for level in range(1, 6):
        edges += [("a" * level, "a" * level + bit) for bit in "ab"]
        edges += [("b" * level, "b" * level + bit) for bit in "cd"] if level < 3 else []
        edges += [("b" * level, "b" * (level + 1))] if level < 3 else []
    return lk.Taxonomy.from_edges(edges)


def test_lift__of_random_neighbours_is_1_under_the_matched_base_rate():
    taxonomy, inside, outside = uneven(), 0, 0
    for seed in range(5):
        near = random_table(taxonomy, 600, 10, np.random.default_rng(seed))
        lifted = lk.taxonomic_lift(near, taxonomy)
        known = np.isfinite(lifted["lift"]) & (lifted["high"] - lifted["low"] > 1e-9)
        held = (lifted["low"] <= 1) & (lifted["high"] >= 1)
        inside += int((known & held).sum())
        outside += int((known & ~held).sum())
        assert (abs(lifted["pooled_lift"] - 1) < 0.2)[:3].all()
        printed = lk.taxonomic_lift(near, taxonomy, base="dataset")
        first = printed["lift"].sel(depth=1).values
        assert np.ptp(first) > 0.1
    assert inside > 12 * outside


def test_lift__of_perfect_neighbours_is_the_largest_there_can_be():
    """Each leaf's neighbours are its sibling's inputs: the rate is 1 down to their parent."""
    levels, each = 4, 6
    taxonomy = binary(levels)
    labels = np.repeat(taxonomy.labels, each)
    sibling = np.array([label[:-1] + "10"[int(label[-1])] for label in labels])
    neighbor = np.array([np.flatnonzero(labels == other)[:4] for other in sibling])
    lifted = lk.taxonomic_lift(table(neighbor, labels), taxonomy, replicates=50)
    # Of the 15 other leaves, 2**(4 - d) - 1 share an ancestor at depth d.
    expected = [15 / (2 ** (levels - d) - 1) for d in range(levels)]
    np.testing.assert_allclose(lifted["lift"].sel(query_depth=levels)[:levels], expected)
    np.testing.assert_allclose(lifted["pooled_lift"][:levels], expected)
    assert np.isnan(lifted["lift"].sel(query_depth=levels, depth=levels))
    assert lifted["queries"].item() == len(labels)
    assert lifted["labels"].item() == 16


def test_lift__standard_errors_are_those_of_other_labels():
    """Over new draws of the labels, estimates scatter no more than the error says, nor far less."""
    taxonomy = binary(6)
    rng = np.random.default_rng(3)
    lifts, errors = [], []
    for _ in range(30):
        chosen = rng.choice(taxonomy.labels, 24, replace=False)
        labels = np.repeat(chosen, 10)
        near = np.array([label[:2] for label in labels])
        neighbor = np.full((len(labels), 5), -1)
        for i in range(len(labels)):
            weight = np.where(near == near[i], 3.0, 1.0) * (labels != labels[i])
            neighbor[i] = rng.choice(len(labels), 5, replace=False, p=weight / weight.sum())
        lifted = lk.taxonomic_lift(table(neighbor, labels), taxonomy, replicates=100)
        lifts.append(float(lifted["pooled_lift"][2]))
        errors.append(float(lifted["pooled_standard_error_labels"][2]))
    assert 0.8 < np.mean(errors) / np.std(lifts) < 3


def test_lift__is_the_same_however_the_table_comes(monkeypatch):
    rng = np.random.default_rng(0)
    taxonomy = uneven()
    near = random_table(taxonomy, 200, 4, rng)
    expected = lk.taxonomic_lift(near, taxonomy, replicates=5)
    node = xr.DataTree.from_dict({"/derived/near": near})["derived/near"]
    assert lk.taxonomic_lift(node, taxonomy, replicates=5).identical(expected)
    lazy = near.chunk(sample=37, rank=2)
    assert lk.taxonomic_lift(lazy, taxonomy, replicates=5).identical(expected)
    named = near.assign_coords(sample=np.arange(200) * 3 + 5)
    named["neighbor"] = named["neighbor"] * 3 + 5
    assert np.array_equal(
        lk.taxonomic_lift(named, taxonomy, replicates=5)["lift"], expected["lift"], equal_nan=True
    )
    monkeypatch.setattr(pairs, "_PAIRS", 64)
    monkeypatch.setattr(pairs, "_DENSE", 1)
    monkeypatch.setattr("lkarray.analysis.hierarchy.lift._BLOCK", 16)
    lifted = lk.taxonomic_lift(near, taxonomy, replicates=5)
    xr.testing.assert_allclose(lifted, expected, rtol=1e-12)


def test_lift__from_losses_searches_and_deletes_chains():
    taxonomy = binary(3)
    losses = taxonomic_losses(taxonomy)
    lifted = lk.taxonomic_lift(losses.chunk(sample=7), taxonomy, k=4, replicates=20)
    near = lk.neighbors(losses, 4, exclude="label")
    table_ = lk.taxonomic_lift(near, taxonomy, replicates=20)
    np.testing.assert_array_equal(lifted["lift"], table_["lift"])
    assert lifted["lift"].sel(query_depth=3, depth=2) > 4
    without = [
        lk.taxonomic_lift(
            lk.neighbors(losses.isel(chain=[c for c in range(5) if c != gone]), 4, exclude="label"),
            taxonomy,
            replicates=0,
        )["lift"].sel(query_depth=3, depth=2)
        for gone in range(5)
    ]
    error = np.sqrt(4 / 5 * ((np.array(without) - np.mean(without)) ** 2).sum())
    np.testing.assert_allclose(
        lifted["standard_error_chains"].sel(query_depth=3, depth=2), error, rtol=1e-9, atol=1e-12
    )
    assert losses.lk.taxonomic_lift(taxonomy, k=4, replicates=20).identical(lifted)
    far = lk.taxonomic_lift(losses, taxonomy, k=4, largest=False, delete_chains=False)
    assert far["lift"].sel(query_depth=3, depth=2) < 0.5
    assert far.attrs["chains_deleted"] == 0


def test_lift__bad_input_is_named():
    taxonomy = binary(2)
    near = table([[1], [0], [3], [2]], ["00", "01", "10", "11"])
    with pytest.raises(ValueError, match="'12', 'x' not in the taxonomy"):
        lk.taxonomic_lift(near.assign_coords(label=("sample", ["00", "x", "12", "11"])), taxonomy)
    with pytest.raises(SchemaError, match="neighbour 9 at row 1, rank 0 is not among the 4"):
        lk.taxonomic_lift(table([[1], [9], [3], [2]], near["label"].values), taxonomy)
    with pytest.raises(SchemaError, match="neighbour -3 at row 2"):
        lk.taxonomic_lift(table([[1], [0], [-3], [2]], near["label"].values), taxonomy)
    with pytest.raises(SchemaError, match="'wnid' is not a coordinate"):
        lk.taxonomic_lift(near, taxonomy, label="wnid")
    with pytest.raises(ValueError, match="base must be one of"):
        lk.taxonomic_lift(near, taxonomy, base="random")
    with pytest.raises(TypeError, match="must be a Taxonomy"):
        lk.taxonomic_lift(near, {"a": "b"})
    with pytest.raises(ValueError, match="have only 12 others of another label"):
        lk.taxonomic_lift(taxonomic_losses(taxonomy), taxonomy, k=13)
    with pytest.raises(SchemaError, match="must hold integers"):
        lk.taxonomic_lift(near.astype(float), taxonomy)


def test_lift__of_constant_losses_is_that_without_them():
    taxonomy = binary(4)
    losses = taxonomic_losses(taxonomy, each=8, chains=4, draws=40) * 0
    losses = losses + np.random.default_rng(2).normal(size=losses.shape)  # noise: lift 1
    still = np.arange(losses.sizes["sample"]) < 30  # all of the first branches
    losses[..., still] = 1.0
    lifted = lk.taxonomic_lift(losses, taxonomy, k=10, replicates=5)
    rest = lk.taxonomic_lift(losses.isel(sample=~still), taxonomy, k=10, replicates=0)
    xr.testing.assert_allclose(lifted["pooled_lift"], rest["pooled_lift"])
    assert lifted.attrs["constant_samples"] == 30
    np.testing.assert_allclose(lifted["pooled_lift"].sel(depth=[1, 2]), 1, atol=0.15)
    one = lk.attribute_lift(lk.neighbors(losses, 10), "label", exclude="label", blocks=5)
    assert one.attrs["constant_samples"] == 30
    assert one["queries"].sum() == 98
    with pytest.raises(SchemaError, match="all 128 samples are constant"):
        lk.taxonomic_lift(losses * 0, taxonomy, k=10)
