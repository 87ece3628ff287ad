import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

from lkarray import errors
from lkarray.analysis.gradients.difficulty import difficulty_table, hidden_similarity, ips_scores
from lkarray.analysis.gradients.gradient_kernels import ips
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from tests.helpers.gradients import tensor


@pytest.fixture
def audit(rng):
    return tensor(rng, example=7).chunk({"time": 1, "example": 3, "param": 11})


PREDICTED = np.array([2, 0, 1, 1, 0, 2, 2])


def test_ips_scores__equal_a_direct_computation(G, audit):
    similarity = ips(audit, G).chunk({"example": 3, "example_2": 5})
    labels = np.arange(12) % 3
    scores = ips_scores(similarity, labels, PREDICTED).compute()
    s = similarity.values
    np.testing.assert_allclose(scores["norm"], np.linalg.norm(s, axis=1))
    for n, own in enumerate(PREDICTED):
        means = [s[n, labels == c].mean() for c in range(3)]
        margin = means[own] - max(means[:own] + means[own + 1 :])
        assert float(scores["margin"][n]) == pytest.approx(margin, abs=1e-12)
    assert scores["label"].dims == ("example",)
    named = similarity.assign_coords(guess=("example", PREDICTED))
    xr.testing.assert_allclose(
        ips_scores(named, "label_2", "guess").drop_vars("guess").compute(), scores
    )


def test_ips_scores__take_classes_of_any_kind(G, audit):
    similarity = ips(audit, G)
    names = np.array(["dog", "ant", "cat"])
    scores = ips_scores(similarity, names[np.arange(12) % 3], names[PREDICTED])
    expected = ips_scores(similarity, np.arange(12) % 3, PREDICTED)
    xr.testing.assert_allclose(scores.compute(), expected.compute())


def test_ips_scores__refuse_what_does_not_fit(G, audit):
    similarity, labels = ips(audit, G), np.arange(12) % 3
    with pytest.raises(ValueError, match="ips_scores needs a kernel"):
        ips_scores(similarity.assign_attrs(kernel=INFLUENCE_OPERATOR), labels, PREDICTED)
    with pytest.raises(errors.SchemaError, match="expected rows and columns"):
        ips_scores(similarity[0], labels, PREDICTED)
    with pytest.raises(errors.SchemaError, match="shape \\(11,\\); expected \\(12,\\)"):
        ips_scores(similarity, labels[1:], PREDICTED)
    with pytest.raises(errors.SchemaError, match="shape \\(6,\\); expected \\(7,\\)"):
        ips_scores(similarity, labels, PREDICTED[1:])
    with pytest.raises(errors.SchemaError, match="of the predicted classes \\[7\\]"):
        ips_scores(similarity, labels, np.where(PREDICTED == 2, 7, PREDICTED))
    with pytest.raises(errors.SchemaError, match="at least two classes.*not \\[0\\]"):
        ips_scores(similarity, labels * 0, PREDICTED * 0)
    with pytest.raises(errors.SchemaError, match="'wnid' is no coordinate"):
        ips_scores(similarity, "wnid", PREDICTED)


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("chunk", [True, False])
def test_hidden_similarity__equals_a_direct_computation(rng, k, chunk):
    test = xr.DataArray(rng.normal(size=(7, 9)), dims=("example", "unit"))
    train = xr.DataArray(rng.normal(size=(20, 9)), dims=("example", "unit"))
    labels = np.arange(20) % 3
    a = test / np.linalg.norm(test, axis=1, keepdims=True)
    b = train / np.linalg.norm(train, axis=1, keepdims=True)
    expected = [
        np.sort(a.values[n] @ b.values[labels == own].T)[::-1][:k].mean()
        for n, own in enumerate(PREDICTED)
    ]
    if chunk:
        test, train = test.chunk({"example": 2}), train.chunk({"unit": 4})
    test = test.assign_coords(guess=("example", PREDICTED))
    similarity = hidden_similarity(test, train, labels, "guess", k=k)
    np.testing.assert_allclose(similarity, expected, atol=1e-12)
    assert similarity["guess"].dims == ("example",)


def test_hidden_similarity__refuses_what_does_not_fit(rng):
    x = xr.DataArray(rng.normal(size=(6, 4)), dims=("example", "unit"))
    labels = np.arange(6) % 2
    with pytest.raises(ValueError, match="k must be at least 1"):
        hidden_similarity(x, x, labels, labels, k=0)
    with pytest.raises(errors.SchemaError, match="no training example is of the predicted"):
        hidden_similarity(x, x, labels, labels + 1)
    with pytest.raises(errors.SchemaError, match="train_activations has dims"):
        hidden_similarity(x, x.rename(example="sample"), labels, labels)
    with pytest.raises(errors.SchemaError, match="4 and 3 entries|lack"):
        hidden_similarity(x, x[:, :3], labels, labels)


def test_difficulty_table__equals_its_definitions(rng):
    n = 40
    wrong = np.arange(n) < 8
    loss = rng.exponential(size=n) + wrong
    scores = {"good": -loss, "noise": rng.normal(size=n), "constant": np.ones(n)}
    table = difficulty_table(scores, wrong, xr.DataArray(loss, dims="example"))
    assert table["score"].values.tolist() == ["good", "noise", "constant"]
    for name, score in scores.items():
        row = table.sel(score=name)
        pairs = [
            (score[i] < score[j]) + 0.5 * (score[i] == score[j])
            for i in np.flatnonzero(wrong)
            for j in np.flatnonzero(~wrong)
        ]
        assert float(row["auroc"]) == pytest.approx(np.mean(pairs))
        if name != "constant":
            order = np.argsort(score)
            hits = wrong[order]
            precision = np.cumsum(hits) / np.arange(1, n + 1)
            assert float(row["aupr"]) == pytest.approx(precision[hits].mean())
            ranks = [np.argsort(np.argsort(v)) for v in (score, -loss)]
            assert float(row["spearman"]) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert float(table["spearman"].sel(score="good")) == pytest.approx(1)
    assert np.isnan(table["spearman"].sel(score="constant"))
    assert float(table["aupr"].sel(score="constant")) == pytest.approx(0.2)
    assert table.attrs == {"examples": 40, "share_wrong": 0.2}


def gaussian(rng, right=400, wrong=100, apart=1.0):
    """Scores of unit variance, whose AUROC is Phi(apart / sqrt 2), and losses that go with them."""
    missed = np.arange(right + wrong) < wrong
    score = rng.normal(size=len(missed)) - apart * missed
    return {"score": score}, missed, 0.8 * rng.normal(size=len(missed)) - score


def test_difficulty_table__intervals_have_the_width_of_theory_and_of_fresh_examples(rng):
    table = difficulty_table(*gaussian(rng), replicates=400, seed=3).isel(score=0)
    area = norm.cdf(1 / np.sqrt(2))
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    hanley = area * (1 - area) + 99 * (first - area**2) + 399 * (second - area**2)  # and McNeil
    fresh = xr.concat([difficulty_table(*gaussian(rng)) for _ in range(200)], "run").isel(score=0)
    theory = {"auroc": np.sqrt(hanley / (100 * 400)), "aupr": None, "spearman": None}
    for name, expected in theory.items():
        low, high = float(table[f"{name}_low"]), float(table[f"{name}_high"])
        assert low < float(table[name]) < high
        spread = float(fresh[name].std())
        assert (high - low) / (2 * 1.96) == pytest.approx(expected or spread, rel=0.2)
        assert spread == pytest.approx(expected or spread, rel=0.2)
    assert table.attrs["replicates"] == 400
    assert table.attrs["level"] == 0.95


def test_difficulty_table__replicates_change_no_estimate_and_follow_their_seed(rng):
    scores, wrong, loss = gaussian(rng, 30, 10)
    plain = difficulty_table(scores, wrong, loss)
    tables = [difficulty_table(scores, wrong, loss, replicates=20, seed=s) for s in (5, 5, 6)]
    xr.testing.assert_identical(tables[0], tables[1])
    xr.testing.assert_equal(tables[0][list(plain)], plain)
    assert float(tables[0]["auroc_low"][0]) != float(tables[2]["auroc_low"][0])


def test_difficulty_table__draws_replicates_of_one_kind_again():
    scores = {"good": np.array([0.0, 1.0, 2.0]), "constant": np.ones(3)}
    table = difficulty_table(scores, [True, False, False], np.arange(3.0)[::-1], replicates=50)
    assert table["auroc_low"].values.tolist() == [1, 0.5]
    assert float(table["spearman_high"][0]) == pytest.approx(1)
    assert np.isnan(table["spearman_low"][1])
    with pytest.raises(ValueError, match="replicates must be at least 0"):
        difficulty_table(scores, [True, False, False], np.ones(3), replicates=-1)


def test_difficulty_table__takes_what_ips_scores_returns(G, audit):
    scores = ips_scores(ips(audit, G), np.arange(12) % 3, PREDICTED)
    table = difficulty_table(scores, PREDICTED == 1, np.arange(7.0))
    assert table["score"].values.tolist() == ["norm", "margin"]


@pytest.mark.parametrize(
    ("scores", "wrong", "loss", "message"),
    [
        ({"a": np.ones(3)}, [True, False], np.ones(2), "'a' has shape \\(3,\\) and wrong"),
        ({"a": np.ones(2)}, [True, False], np.ones(3), "'loss' has shape \\(3,\\)"),
        ({"a": [1, np.nan]}, [True, False], np.ones(2), "'a' is NaN for 1 examples; drop"),
        ({"a": np.ones(2)}, [True, True], np.ones(2), "1 scores, and 2 of 2 examples are wrong"),
        ({"a": np.ones(2)}, [False, False], np.ones(2), "0 of 2 examples are wrong"),
        ({}, [False, True], np.ones(2), "there are 0 scores"),
    ],
)
def test_difficulty_table__refuses_what_has_no_answer(scores, wrong, loss, message):
    with pytest.raises(ValueError, match=message):
        difficulty_table(scores, np.array(wrong), loss)
