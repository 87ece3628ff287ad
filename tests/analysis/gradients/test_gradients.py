import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lkarray as lk
from lkarray import engine, errors
from lkarray.analysis.gradients.gradient_kernels import (
    INFLUENCE,
    angle_distance,
    chord_distance,
    ips,
    lgk,
    plgk,
    require_kernel,
    root_weight,
    temporal_kernel,
    weighted,
)
from lkarray.analysis.gradients.tangent_kernels import lntk, pntk
from lkarray.kernels.unfolding import params, unfold
from tests.helpers.gradients import RATES, SIZES, WEIGHTS, tensor
from tests.helpers.losses import Forbidding


@pytest.fixture
def G(rng):
    return tensor(rng).chunk({"time": 1, "example": 5, "param": 11})


@pytest.fixture
def outputs(rng):
    values = rng.normal(size=(5, 7, 3, 30))
    coords = {
        "time": np.arange(5) * 10,
        "output": ["a", "b", "c"],
        "label": ("example", np.arange(7)),
    }
    array = xr.DataArray(values, dims=("time", "example", "output", "param"), coords=coords)
    return array.chunk({"time": 1, "example": 2, "output": 3, "param": 11})


@pytest.fixture
def stored(tmp_path, rng):
    """A float32 tensor as a store holds it, opened again."""
    ds = tensor(rng, "float32").to_dataset()
    encoding = {"gradient": {"chunks": (1, 5, 11)}}
    ds.to_zarr(tmp_path / "g.zarr", encoding=encoding, consolidated=False)
    return xr.open_zarr(tmp_path / "g.zarr", consolidated=False)


# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_plgk__is_the_weighted_sum_over_time(G, weight):
    expected = sum(
        w * g @ g.T for w, g in zip(WEIGHTS[weight], G.values, strict=True)
    )  # eq. 11, or with eta inside
    result = plgk(G, weight=weight)
    assert result.dims == ("example", "example_2")
    assert result.name == "plgk"
    assert result.attrs["weight"] == (weight or "none")
    assert result["label_2"].values.tolist() == G["label"].values.tolist()
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_plgk__of_other_examples_uses_the_rates_of_the_first(G, weight):
    other = G.isel(example=[3, 1]).drop_vars("learning_rate")
    result = plgk(G, other, weight=weight)
    np.testing.assert_allclose(result, plgk(G, weight=weight)[:, [3, 1]], rtol=1e-12)


def test_plgk__of_one_time_is_its_term(G):
    g = G.values[2]
    np.testing.assert_allclose(plgk(G.isel(time=2)), g @ g.T)
    np.testing.assert_allclose(plgk(G.isel(time=2), weight="lr2"), g @ g.T * RATES[2] ** 2)
    np.testing.assert_allclose(plgk(G.isel(time=[2]), weight="lr"), g @ g.T * RATES[2])


def test_plgk__under_one_learning_rate_for_all_times(G):
    constant = G.drop_vars("learning_rate").assign_coords(learning_rate=0.5)
    np.testing.assert_allclose(plgk(constant, weight="lr"), plgk(G) / 2)
    np.testing.assert_allclose(temporal_kernel(constant), temporal_kernel(G, weight=None) / 4)


@pytest.mark.parametrize("wrap", ["tree", "node", "dataset", "array", "rate is a variable"])
def test_gradients__may_come_in_any_holder(G, wrap):
    ds = G.to_dataset()
    tree = xr.DataTree.from_dict({"gradients": ds})
    holder = {
        "tree": tree,
        "node": tree["gradients"],
        "dataset": ds,
        "array": G,
        "rate is a variable": ds.reset_coords("learning_rate"),
    }[wrap]
    expected = np.einsum("t,tmp,tnp->mn", RATES, G.values, G.values)
    np.testing.assert_allclose(plgk(holder, weight="lr"), expected)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weighting__keeps_the_precision(rng, weight, dtype):
    g = tensor(rng, dtype)
    result = plgk(g.chunk({"time": 1}), weight=weight)
    assert result.dtype == np.result_type(dtype, np.float32)
    x = g.values.astype(np.float64)
    expected = np.einsum("t,tmp,tnp->mn", WEIGHTS[weight], x, x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("over", "rows"),
    [
        (("time", "param"), "example"),
        (("time", "example"), "param"),
        (("example", "param"), "time"),
    ],
)
def test_weighting__leaves_reading_chunk_by_chunk(stored, weight, over, rows):
    g = stored["gradient"].assign_coords(learning_rate=stored["learning_rate"])
    plain = engine.Operand(g, over=over, each=(), rows=rows, center=None, cosine=False)
    scaled = engine.Operand(
        weighted(g, root_weight(g, weight)),
        over=over,
        each=(),
        rows=rows,
        center=None,
        cosine=False,
    )
    assert scaled.source_chunk() == plain.source_chunk() == 4 * 5 * 11
    assert scaled.variable.chunks == plain.variable.chunks
    assert scaled.name == "gradient"


def test_weighting__of_a_file_opened_without_dask_stays_lazy(tmp_path, stored):
    lazy = xr.open_zarr(tmp_path / "g.zarr", consolidated=False, chunks=None)
    assert not lazy["gradient"].variable._in_memory
    with dask.config.set(scheduler=Forbidding()):
        result = plgk(lazy, weight="lr")
    assert not lazy["gradient"].variable._in_memory
    np.testing.assert_allclose(result, plgk(stored.compute(), weight="lr"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", [slice(None), 3])
def test_lgk__is_the_gram_at_each_time(G, times):
    part = G.isel(time=times)
    result = lgk(part)
    assert result.dims == (*part.dims[:-2], "example", "example_2")
    np.testing.assert_allclose(result, np.einsum("...mp,...np->...mn", part.values, part.values))
    np.testing.assert_allclose(lgk(part, part.isel(example=[2])), result[..., [2]])


def test_ips__is_the_cosine_of_path_features(G):
    result = ips(G).compute()
    path = G.transpose("example", "time", "param").values.reshape(12, -1)
    path /= np.linalg.norm(path, axis=1, keepdims=True)
    np.testing.assert_array_equal(np.diag(result), 1)
    np.testing.assert_allclose(result, path @ path.T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ips(G, G.isel(example=[4])), result[:, [4]], atol=1e-14)
    assert not np.allclose(ips(G, weight="lr"), result)
    assert result.attrs["units"] == "1"


def test_ips__of_an_example_without_gradient_is_zero(G):
    silent = G.where(xr.DataArray(np.arange(12) != 4, dims="example"), 0)
    result = ips(silent)
    assert not result[4].any()
    assert not result[:, 4].any()
    assert chord_distance(silent)[4, 4] == pytest.approx(2**0.5)


def test_distances__are_those_of_the_unit_sphere(G):
    path = G.transpose("example", "time", "param").values.reshape(12, -1)
    path /= np.linalg.norm(path, axis=1, keepdims=True)
    chord = np.linalg.norm(path[:, None] - path, axis=-1)
    for given_ in (G, ips(G), xr.DataTree.from_dict({"gradients": G.to_dataset()})):
        np.testing.assert_allclose(chord_distance(given_), chord, atol=1e-7)
        np.testing.assert_allclose(angle_distance(given_), 2 * np.arcsin(chord / 2), atol=1e-7)
    assert not np.diag(chord_distance(G)).any()
    assert not np.diag(angle_distance(G)).any()
    assert angle_distance(G).attrs["units"] == "rad"
    assert angle_distance(G)["label_2"].dims == ("example_2",)


def test_distances__clip_what_rounding_left_outside(G):
    k = ips(G).compute()
    k[0, 1], k[0, 2] = 1 + 1e-7, -1 - 1e-7
    assert chord_distance(k)[0, 1] == 0
    assert chord_distance(k)[0, 2] == 2
    assert angle_distance(k)[0, 2] == pytest.approx(np.pi)


def test_distances__accept_a_loss_correlation(rng):
    losses = xr.DataArray(rng.normal(size=(2, 9, 4)), dims=("chain", "draw", "sample"))
    assert chord_distance(lk.correlation(losses)).dims == ("sample", "sample_2")


def test_distances__refuse_what_is_no_cosine(G, outputs):
    for distance in (chord_distance, angle_distance):
        with pytest.raises(ValueError, match="needs a cosine kernel.*'normalize' is 'none'"):
            distance(plgk(G))
        with pytest.raises(ValueError, match="'normalize' is None"):
            distance(ips(G).drop_attrs())
        with pytest.raises(ValueError, match="distance needs a kernel, and 'pntk' is an influence"):
            distance(pntk(G, outputs))
        with pytest.raises(ValueError, match="needs a cosine kernel"):
            distance(chord_distance(G))


def test_kernels__compute_nothing_until_asked(G, outputs):
    with dask.config.set(scheduler=Forbidding()):
        plgk(G, weight="lr").sel(example=3).mean()
        plgk(G, G, weight="lr2")
        lgk(G)
        chord_distance(G)
        angle_distance(ips(G))
        temporal_kernel(G)
        pntk(G, outputs, weight="lr")
        lntk(G, outputs)
        for keep in ("time", "example", "param", ("time", "example")):
            unfold(G, keep=keep)


def test_learning_rates__may_be_chunked(stored):
    assert stored["learning_rate"].chunks is not None
    assert plgk(stored, weight="lr").shape == (12, 12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
@pytest.mark.parametrize("weight", ["lr", "lr2"])
def test_weights__refuse_missing_learning_rates(G, bad, weight):
    rates = RATES.copy()
    rates[[1, 3]] = bad
    G = G.assign_coords(learning_rate=("time", rates))
    for function in (plgk, ips, temporal_kernel):
        with pytest.raises(errors.SchemaError, match=r"negative at the times \[10, 30\]; select"):
            function(G, weight=weight)
        with pytest.raises(errors.SchemaError, match="no coordinate learning_rate\\(time\\); add"):
            function(G.drop_vars("learning_rate"), weight=weight)
    bare = G.drop_vars("time")
    with pytest.raises(errors.SchemaError, match=r"at the times \[1, 3\]"):
        plgk(bare, weight=weight)
    with pytest.raises(errors.SchemaError, match=r"at the times \[0\]"):
        plgk(bare.isel(time=1), weight=weight)
    np.testing.assert_allclose(plgk(G), np.einsum("tmp,tnp->mn", G.values, G.values))


def test_kernels__refuse_what_does_not_fit(G):
    with pytest.raises(ValueError, match="weight must be one of"):
        plgk(G, weight="eta")
    with pytest.raises(errors.SchemaError, match="lack \\['example'\\]"):
        plgk(G.isel(example=0))
    with pytest.raises(errors.SchemaError, match="lack \\['time'\\]"):
        plgk(G, G.isel(time=0))
    with pytest.raises(errors.SchemaError, match="differ along 'time', first at position 0"):
        plgk(G, G.assign_coords(time=np.arange(5) + 3))
    with pytest.raises(errors.SchemaError, match="30 and 29 entries along 'param'"):
        lgk(G, G.isel(param=slice(29)))
    with pytest.raises(errors.SchemaError, match="lack \\['time'\\]"):
        temporal_kernel(G.isel(time=0))
    with pytest.raises(TypeError, match="y must be"):
        ips(G, G.values)


@st.composite
def chunked(draw):
    sizes = {dim: draw(st.integers(1, most)) for dim, most in SIZES.items()}
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    g = tensor(rng, draw(st.sampled_from(["float32", "float64"])), **sizes)
    g = g.transpose(*draw(st.permutations(g.dims)))
    if draw(st.booleans()):
        g = g.chunk({dim: draw(st.integers(1, n)) for dim, n in sizes.items()})
    return g


@settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chunked(), st.sampled_from(list(WEIGHTS)))
def test_plgk__is_positive_semi_definite(g, weight):
    kernel = plgk(g, weight=weight).values.astype(np.float64)
    x = g.transpose("time", "example", "param").values.astype(np.float64)
    expected = np.einsum("t,tmp,tnp->mn", WEIGHTS[weight][: len(x)], x, x)
    bound = (1e-5 if g.dtype == np.float32 else 1e-12) * max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(kernel, expected, atol=bound)
    np.testing.assert_array_equal(kernel, kernel.T)
    assert np.linalg.eigvalsh(kernel).min() >= -10 * bound
    assert np.linalg.eigvalsh(ips(g, weight=weight).values.astype(float)).min() >= -1e-4


# --- the temporal kernel ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_temporal_kernel__has_the_squared_gradients_as_its_trace(G, weight):
    result = temporal_kernel(G, weight=weight)
    root = WEIGHTS[weight][:, None, None] ** 0.5
    scaled = G.values * root
    assert result.dims == ("time", "time_2")
    assert float(np.trace(result)) == pytest.approx((scaled**2).sum(), rel=1e-12)
    np.testing.assert_allclose(result, np.einsum("tmp,smp->ts", scaled, scaled), rtol=1e-12)
    assert result["time_2"].values.tolist() == G["time"].values.tolist()
    assert temporal_kernel(G.astype("float32"), weight=weight).dtype == np.float32


# --- influence operators ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_pntk__equals_einsum(G, outputs, weight):
    result = pntk(G, outputs, weight=weight)
    expected = np.einsum("t,tmp,tndp->mnd", WEIGHTS[weight], G.values, outputs.values)
    assert result.dims == ("example", "example_2", "output")
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
    assert result["output"].values.tolist() == ["a", "b", "c"]
    assert result["label"].dims == ("example",)
    assert result["label_2"].values.tolist() == list(range(7))
    assert result.attrs["kernel"] == INFLUENCE


@pytest.mark.parametrize("times", [slice(None), 2])
def test_lntk__equals_einsum_at_each_time(G, outputs, times):
    g, o = G.isel(time=times), outputs.isel(time=times)
    result = lntk(g, o)
    assert result.dims[-3:] == ("example", "example_2", "output")
    expected = np.einsum("...mp,...ndp->...mnd", g.values, o.values)
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lntk(G, outputs).sum("time"), pntk(G, outputs), atol=1e-10)


@pytest.mark.parametrize("chunks", [{}, {"output": 1}, {"example": 3, "output": 2, "param": 7}])
@pytest.mark.parametrize("memory", [None, "200 KiB"])
def test_pntk__is_the_same_for_every_chunking(rng, chunks, memory):
    g = tensor(rng, example=40)
    o = xr.DataArray(rng.normal(size=(5, 30, 3, 30)), dims=("time", "example", "output", "param"))
    expected = np.einsum("tmp,tndp->mnd", g.values, o.values)
    chunk = o.chunk({"time": 1} | chunks) if chunks else o
    result = pntk(g.drop_vars("time"), chunk.transpose("param", ...), memory=memory)
    np.testing.assert_allclose(result, expected, atol=1e-10)


def test_pntk__refuses_what_does_not_fit(G, outputs):
    with pytest.raises(errors.SchemaError, match="output_G.* lack \\['output'\\]"):
        pntk(G, G)
    with pytest.raises(errors.SchemaError, match="loss_G and output_G differ along 'time'"):
        pntk(G, outputs.assign_coords(time=np.arange(5)))
    with pytest.raises(errors.SchemaError, match="5 and 4 entries along 'time'"):
        pntk(G, outputs.isel(time=slice(4)))
    with pytest.raises(errors.SchemaError, match="must leave one"):
        pntk(outputs, outputs)


def test_require_kernel__refuses_influence_operators_only(G, outputs):
    require_kernel(plgk(G), "this")
    with pytest.raises(
        ValueError, match="this needs a kernel, and 'lntk' is an influence operator"
    ):
        require_kernel(lntk(G, outputs), "this")


def test_embed__refuses_an_influence_operator(G):
    square = ips(G).compute().assign_attrs(kernel=INFLUENCE)
    with pytest.raises(ValueError, match="embed needs a kernel"):
        lk.embed(square)


# --- unfoldings -------------------------------------------------------------------------------

UNFOLDINGS = [
    ("time", ("time", "example_param"), (0, 1, 2)),
    ("example", ("example", "time_param"), (1, 0, 2)),
    ("param", ("param", "time_example"), (2, 0, 1)),
    (("time", "example"), ("time_example", "param"), (0, 1, 2)),
    (("example", "time"), ("example_time", "param"), (1, 0, 2)),
    (("time", "param"), ("time_param", "example"), (0, 2, 1)),
]


@pytest.mark.parametrize(("keep", "dims", "order"), UNFOLDINGS)
@pytest.mark.parametrize(
    "chunks", [None, {"time": 1, "example": 5, "param": 11}, {"time": 2, "example": 12}, {}]
)
@pytest.mark.parametrize("limit", [128 << 20, 3000, 100])
def test_unfold__equals_numpy(rng, monkeypatch, keep, dims, order, chunks, limit):
    monkeypatch.setattr("lkarray.kernels.unfolding._CHUNK", limit)
    g = tensor(rng)
    matrix = unfold(g if chunks is None else g.chunk(chunks), keep=keep)
    sizes = [int(np.prod([SIZES[d] for d in name.split("_")])) for name in dims]
    assert matrix.dims == dims
    np.testing.assert_array_equal(matrix, g.values.transpose(order).reshape(sizes))
    if chunks is not None:
        source = int(np.prod(g.chunk(chunks).data.chunksize))
        assert 8 * int(np.prod(matrix.data.chunksize)) <= max(limit, 8 * source)


def test_unfold__repeats_the_coordinates_of_merged_dims(G):
    matrix = unfold(G, keep="param")
    assert matrix["time"].dims == matrix["label"].dims == ("time_example",)
    np.testing.assert_array_equal(matrix["time"], np.repeat(G["time"], 12))
    np.testing.assert_array_equal(matrix["label"], np.tile(G["label"], 5))
    rows = unfold(G, keep="time")
    assert rows.indexes["time"].equals(G.indexes["time"])
    assert "label" not in rows.coords


def test_unfold__moves_nothing_where_times_are_stored_one_by_one(G):
    assert unfold(G, keep=("time", "example")).chunks == ((5, 5, 2) * 5, (11, 11, 8))
    assert unfold(G, keep="time").chunks == ((1,) * 5, (150, 150, 60))


def test_unfold__of_one_time_and_of_outputs(G, outputs):
    np.testing.assert_array_equal(unfold(G.isel(time=0), keep="param"), G.values[0].T)
    matrix = unfold(outputs, keep=("example", "output"))
    assert matrix.dims == ("example_output", "time_param")
    expected = outputs.values.transpose(1, 2, 0, 3).reshape(21, 150)
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize(
    "keep", [(), "draw", ("time", "time"), ("time", "example", "param"), ("time", "draw")]
)
def test_unfold__refuses_dims_that_make_no_matrix(G, keep):
    with pytest.raises(errors.SchemaError, match="must name some of the dims"):
        unfold(G, keep=keep)


# --- parameters -------------------------------------------------------------------------------

NAMES = ["fc1.weight", "fc1.bias", "conv.weight", "fc2.weight", "fc2.bias"]
BOUNDS = [0, 8, 10, 18, 27, 30]


@pytest.fixture
def named(G):
    return G.to_dataset().assign_coords(
        tensor=NAMES,
        start=("tensor", BOUNDS[:-1]),
        stop=("tensor", BOUNDS[1:]),
        module=("tensor", [name.split(".")[0] for name in NAMES]),
    )


PATTERNS = [
    ("fc1.*", [0, 1]),
    ("fc1", [0, 1]),
    ("*.weight", [0, 2, 3]),
    (["fc2.bias", "conv*"], [2, 4]),
    ("*", [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("pattern", "chosen"), PATTERNS)
@pytest.mark.parametrize("form", ["dask", "numpy", "tree", "variables"])
def test_params__selects_tensors_and_counts_anew(named, pattern, chosen, form):
    given_ = {
        "dask": named,
        "numpy": named.compute(),
        "tree": xr.DataTree.from_dict({"gradients": named}),
        "variables": named.reset_coords(["start", "stop", "module"]),
    }[form]
    with dask.config.set(scheduler=Forbidding()):
        part = params(given_, pattern)
    index = np.concatenate([np.arange(BOUNDS[i], BOUNDS[i + 1]) for i in chosen])
    expected = named["gradient"].values[:, :, index]
    np.testing.assert_array_equal(part["gradient"], expected)
    assert part["tensor"].values.tolist() == [NAMES[i] for i in chosen]
    assert part["gradient"].dims == named["gradient"].dims
    assert ("start" in part.coords) == (form != "variables")
    assert part["learning_rate"].identical(named["learning_rate"])
    for i, start, stop in zip(chosen, part["start"].values, part["stop"].values, strict=True):
        again = part["gradient"].values[:, :, start:stop]
        np.testing.assert_array_equal(
            again, named["gradient"].values[..., BOUNDS[i] : BOUNDS[i + 1]]
        )
    np.testing.assert_allclose(plgk(part), np.einsum("tmp,tnp->mn", expected, expected), rtol=1e-10)
    assert params(part, "*").identical(part)


def test_params__of_a_file_opened_without_dask_stays_lazy(tmp_path, named):
    text = np.dtypes.StringDType()
    named = named.assign_coords({n: named[n].astype(text) for n in ("tensor", "module")})
    named.to_zarr(tmp_path / "g.zarr", consolidated=False)
    lazy = xr.open_zarr(tmp_path / "g.zarr", consolidated=False, chunks=None)
    part = params(lazy, "*.weight")
    assert not part["gradient"].variable._in_memory
    np.testing.assert_array_equal(part["gradient"], params(named, "*.weight")["gradient"])


def test_params__keeps_tensors_without_parameters_and_any_order(named):
    ds = xr.Dataset(
        {"gradient": (("example", "param"), np.arange(10.0).reshape(2, 5))},
        coords={
            "tensor": ["b", "empty", "a"],
            "start": ("tensor", [2, 2, 0]),
            "stop": ("tensor", [5, 2, 2]),
        },
    )
    part = params(ds, ["a", "b", "empty"])
    assert part["tensor"].values.tolist() == ["a", "empty", "b"]
    np.testing.assert_array_equal(part["gradient"], ds["gradient"])


def test_params__refuses_with_the_remedy(named):
    with pytest.raises(TypeError, match="which a DataArray cannot say; pass the Dataset"):
        params(named["gradient"], "fc1.*")
    with pytest.raises(errors.SchemaError, match="G lacks \\['start', 'stop'\\]"):
        params(named.drop_vars(["start", "stop"]), "fc1.*")
    with pytest.raises(errors.SchemaError, match="up to 30, but 'param' has 7 of them"):
        params(named.isel(param=slice(7)), "fc1.*")
    with pytest.raises(errors.SchemaError, match="or there are gaps"):
        params(named.isel(tensor=[0, 2, 3, 4]), "fc1.*")
    with pytest.raises(errors.SchemaError, match="no tensor matches \\['fc3.\\*'\\]; there are"):
        params(named, "fc3.*")
    with pytest.raises(errors.SchemaError, match="neither a variable 'gradient'"):
        params(xr.DataTree(), "fc3.*")
    assert isinstance(params(named, "fc1")["gradient"].data, da.Array)
