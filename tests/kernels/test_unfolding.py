import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr

from lkarray import errors
from lkarray.analysis.gradients.gradient_kernels import (
    plgk,
)
from lkarray.kernels.unfolding import params, unfold
from tests.helpers.gradients import SIZES, tensor
from tests.helpers.losses import Forbidding

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
