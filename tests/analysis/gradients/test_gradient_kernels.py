import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lkarray as lk
from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import (
    angle_distance,
    chord_distance,
    ips,
    lgk,
    plgk,
    temporal_kernel,
)
from lkarray.analysis.gradients.tangent_kernels import lntk, pntk
from lkarray.kernels.unfolding import unfold
from tests.helpers.gradients import RATES, SIZES, WEIGHTS, tensor
from tests.helpers.losses import Forbidding


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
