import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import INFLUENCE
from tests.helpers.gradients import tensor
from tests.helpers.losses import Forbidding

M, N, OUTPUTS, LAYERS, EPOCHS = 57, 9, 3, 2, 4
CHUNKS = {"example": 10, "audit": 4, "layer": 1, "epoch": 1}
FULL = ("example", "audit", "output", "layer", "epoch")


def influence(rng, dims=FULL):
    sizes = dict(zip(FULL, (M, N, OUTPUTS, LAYERS, EPOCHS), strict=True))
    coords = {
        "example": np.arange(M) * 2 + 5,
        "train_label": ("example", rng.integers(0, 5, M)),
        "label": ("audit", rng.integers(0, 5, N)),
        "layer": ["conv", "dense"],
        "epoch": np.arange(EPOCHS) + 1,
    }
    kept = {
        name: c for name, c in coords.items() if (c[0] if isinstance(c, tuple) else name) in dims
    }
    return xr.DataArray(
        rng.normal(size=[sizes[dim] for dim in dims]).astype("f4"),
        dims=dims,
        coords=kept,
        name="influence",
        attrs={"kernel": INFLUENCE, "units": "nat"},
    )


def cut(x, chunks=CHUNKS):
    return x.chunk({dim: size for dim, size in chunks.items() if dim in x.dims})


def summed(x):
    return x.astype(float).sum([dim for dim in ("layer", "epoch", "window") if dim in x.dims])


@pytest.fixture(params=["memory", "dask"])
def audit(request, rng):
    x = influence(rng)
    return (cut(x) if request.param == "dask" else x).to_dataset()


@pytest.fixture
def epochs(rng):
    true = rng.normal(size=(EPOCHS, N)).cumsum(0)
    rebuilt = true + 0.1 * rng.normal(size=true.shape)
    return xr.Dataset(
        {
            "reconstruction": (("epoch", "audit"), rebuilt),
            "epoch_change": (("epoch", "audit"), true, {"units": "nat"}),
        },
        coords={"epoch": np.arange(EPOCHS) + 1},
        attrs={"complete": True, "mre": 0.1},
    )


# --- completeness -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, {"audit": 4}])
def test_completeness__is_mre_and_lc_of_each_epoch(epochs, chunks):
    table = lk.completeness(epochs if chunks is None else epochs.chunk(chunks))
    a, b = epochs["reconstruction"].values, epochs["epoch_change"].values
    np.testing.assert_allclose(table["mre"], np.abs(a - b).mean(1))
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(table["lc"], expected)
    assert table["epoch"].values.tolist() == [1, 2, 3, 4]
    assert table["mre"].attrs["units"] == "nat"
    assert table.attrs == {"complete": True}
    assert table["mre"].chunks is None


def test_completeness__counts_outputs_as_numbers(rng):
    a, b = rng.normal(size=(2, EPOCHS, N, 3))
    dims = ("epoch", "audit", "output")
    ds = xr.Dataset({"reconstruction": (dims, a), "epoch_change": (dims, b)})
    turned = ds.assign(epoch_change=ds["epoch_change"].transpose("output", "epoch", "audit"))
    for given in (ds, turned):
        table = lk.completeness(given)
        np.testing.assert_allclose(table["mre"], np.abs(a - b).mean((1, 2)))
        expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(table["lc"], expected)


def test_completeness__has_no_correlation_without_variance(epochs):
    assert np.isnan(lk.completeness(epochs.isel(audit=[0]))["lc"]).all()
    constant = epochs.assign(epoch_change=epochs["epoch_change"] * 0 + 0.1)
    assert np.isnan(lk.completeness(constant)["lc"]).all()
    exact = epochs.assign(reconstruction=epochs["epoch_change"])
    np.testing.assert_allclose(lk.completeness(exact)["lc"], 1, rtol=1e-14)
    assert (lk.completeness(exact)["mre"] == 0).all()


def test_completeness__refuses_what_is_no_audit(epochs):
    with pytest.raises(errors.SchemaError, match="no variable 'reconstruction'"):
        lk.completeness(epochs.drop_vars("reconstruction"))
    with pytest.raises(errors.SchemaError, match="expected \\('epoch', 'audit'\\)"):
        lk.completeness(epochs.isel(epoch=0))
    with pytest.raises(TypeError, match="must be the Dataset that lk.audit"):
        lk.completeness(epochs["reconstruction"])


# --- most influential -------------------------------------------------------------------------


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


# --- concentration ----------------------------------------------------------------------------


def test_concentration__is_the_share_of_the_largest(audit):
    share = lk.concentration(audit)
    size = np.sort(np.abs(summed(audit["influence"]).values), axis=0)[::-1]
    counts = share["examples"].values
    np.testing.assert_allclose(share, (size.cumsum(0) / size.sum(0))[counts - 1])
    assert share.dims == ("examples", "audit", "output")
    assert (counts[0], counts[-1]) == (1, M)
    assert share["label"].dims == ("audit",)


def test_concentration__has_few_points_and_no_share_of_nothing(rng):
    x = xr.DataArray(rng.normal(size=(30_000, 2)), dims=("example", "audit"))
    share = lk.concentration(x.chunk({"example": 7_000}) * [1, 0])
    counts = share["examples"].values
    assert len(counts) <= 200
    assert counts[-1] == 30_000
    assert (np.diff(counts) > 0).all()
    assert float(share[-1, 0]) == pytest.approx(1)
    assert np.isnan(share[:, 1]).all()


# --- net and gross ----------------------------------------------------------------------------


def test_net_and_gross_influence__keep_what_influence_is_split_by(audit):
    x = audit["influence"].astype(float).values
    net, gross = lk.net_influence(audit), lk.gross_influence(audit)
    assert net.dims == gross.dims == ("audit", "output", "layer", "epoch")
    np.testing.assert_allclose(net, x.sum(0))
    np.testing.assert_allclose(gross, np.abs(x).sum(0))
    assert net["layer"].values.tolist() == ["conv", "dense"]
    assert net.attrs == {"units": "nat"}
    assert net.dtype == gross.dtype == np.float64


def test_net_and_gross_influence__accumulate_before_magnitudes_are_taken(audit):
    so_far = audit["influence"].astype(float).values.cumsum(-1)
    np.testing.assert_allclose(lk.net_influence(audit, cumulative=True), so_far.sum(0))
    np.testing.assert_allclose(lk.gross_influence(audit, cumulative=True), np.abs(so_far).sum(0))


def test_gross_influence__ends_at_that_of_influence_over_time(rng):
    """Of gradients, step by step, and of the audit that they make."""
    G, other = tensor(rng), tensor(rng, example=7)
    steps = [
        -rate / 12 * G.values[t] @ other.values[t].T
        for t, rate in enumerate(G["learning_rate"].values)
    ]
    x = xr.DataArray(np.stack(steps, -1), dims=("example", "audit", "epoch"))
    expected = lk.influence_over_time(G, other)
    net, gross = (
        f(x, cumulative=True).transpose("epoch", "audit")
        for f in (lk.net_influence, lk.gross_influence)
    )
    np.testing.assert_allclose(net, expected["net"], atol=1e-12)
    np.testing.assert_allclose(gross, expected["gross"])


def test_net_influence__accumulates_over_time_only(rng):
    x = influence(rng, ("example", "audit"))
    with pytest.raises(errors.SchemaError, match="groups={'time': 'epoch'}"):
        lk.net_influence(x, cumulative=True)
    windows = influence(rng, ("example", "audit", "epoch")).rename(epoch="window")
    net = lk.net_influence(windows, cumulative=True)
    np.testing.assert_allclose(net[:, -1], windows.values.astype(float).sum((0, 2)))


# --- laziness, and what influence is not ------------------------------------------------------


def test_audits__large_tables_compute_nothing_until_asked(rng, monkeypatch):
    monkeypatch.setattr("lkarray.analysis.audits.sums._SMALL", 5)
    x = cut(influence(rng))
    x = x.assign_coords(train_label=x["train_label"].compute())  # labels are read at once
    with dask.config.set(scheduler=Forbidding()):
        results = [
            lk.most_influential(x, 3),
            lk.most_influential(x, 3, by="train_label"),
            lk.concentration(x),
            *(f(x, cumulative=c) for f in (lk.net_influence, lk.gross_influence) for c in (0, 1)),
        ]
    assert all(dask.is_dask_collection(table) for table in results)


class Largest:
    """A scheduler's view of the largest array that any task returns."""

    def __init__(self):
        self.bytes = 0

    def _posttask(self, key, result, dsk, state, worker):
        self.bytes = max(self.bytes, getattr(result, "nbytes", 0))


@pytest.mark.parametrize(
    ("what", "share"),
    [
        (lambda x: lk.most_influential(x, 4), 1 / 40),
        (lambda x: lk.gross_influence(x, cumulative=True), 1 / 40),
        (lk.concentration, 1 / 4),  # all training examples of some audited ones
    ],
)
def test_audits__hold_blocks_and_never_the_influence(rng, what, share):
    values = rng.normal(size=(4000, 12, 3)).astype("f4")
    x = xr.DataArray(values, dims=("example", "audit", "epoch"))
    x = cut(x, {"example": 100, "audit": 4, "epoch": 1})
    largest = Largest()
    with (
        dask.config.set(scheduler="synchronous"),
        dask.callbacks.Callback(pretask=None, posttask=largest._posttask),
    ):
        what(x.copy(data=x.data.map_blocks(np.positive))).compute()
    assert 0 < largest.bytes <= share * values.nbytes


def test_audits__are_methods_of_an_audit(audit, epochs):
    xr.testing.assert_identical(
        audit.lk.most_influential(4, by="train_label").compute(),
        lk.most_influential(audit, 4, by="train_label").compute(),
    )
    xr.testing.assert_identical(epochs.lk.completeness(), lk.completeness(epochs))
    assert audit.lk.concentration().name == "share"
    assert audit["influence"].lk.net_influence().name == "net_influence"
    assert audit.lk.gross_influence(cumulative=True).name == "gross_influence"


def test_kernels__refuse_influence(rng):
    x = influence(rng, ("example", "audit"))
    for given in (x, x.drop_attrs(), x.to_dataset()):
        for what in (lk.chord_distance, lk.angle_distance, lk.embed):
            with pytest.raises(ValueError, match=f"{what.__name__} needs a kernel"):
                what(given)
    with pytest.raises(ValueError, match="audit_modes needs a kernel"):
        lk.audit_modes(x, 2, scale=1)
