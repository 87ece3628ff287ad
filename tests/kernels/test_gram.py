import dask
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.engine import contraction
from tests.helpers.losses import Forbidding, numpy_correlation, numpy_covariance, random_losses


@pytest.fixture
def losses(rng):
    return random_losses(rng)


def test_covariance__is_labelled_on_both_sides(losses):
    kernel = lk.covariance(losses)
    assert kernel.name == "covariance"
    assert kernel.dims == ("sample", "sample_2")
    assert kernel.attrs["units"] == "nat^2"
    assert kernel.attrs["over"] == ["chain", "draw"]
    assert kernel["label_2"].dims == ("sample_2",)
    entry = kernel.sel(sample=3, sample_2=11)
    assert float(entry) == pytest.approx(numpy_covariance(losses)[3, 11], rel=1e-5)


def test_correlation__of_two_tensors_is_rectangular(losses):
    other = losses.isel(sample=[2, 5, 6])
    kernel = lk.correlation(other, losses)
    assert kernel.sizes == {"sample": 3, "sample_2": 17}
    np.testing.assert_allclose(kernel, numpy_correlation(losses)[[2, 5, 6]], atol=1e-6)
    assert kernel["label"].values.tolist() == [2, 1, 2]
    assert kernel["label_2"].values.tolist() == losses["label"].values.tolist()


def test_correlation__of_a_sample_with_itself_is_exactly_one(losses):
    np.testing.assert_array_equal(np.diag(lk.correlation(losses)), 1)


def test_influence__is_minus_the_covariance_with_queries(losses):
    query = losses.isel(sample=[4, 1])
    result = lk.influence(losses.assign_attrs(nbeta=5.0, n_train=17), query)
    assert result.dims == ("sample", "query")
    np.testing.assert_allclose(result, -numpy_covariance(losses)[:, [4, 1]], rtol=1e-4, atol=1e-5)
    assert result["query_label"].values.tolist() == [0, 1]
    assert result.attrs["derivative_scale"] == pytest.approx(5 / 17)


@pytest.mark.parametrize("wrap", ["tree", "node", "dataset", "array", "only variable"])
def test_losses__may_come_in_any_holder(losses, wrap):
    ds = losses.to_dataset(name="loss")
    tree = xr.DataTree.from_dict({"losses": ds})
    holder = {
        "tree": tree,
        "node": tree["losses"],
        "dataset": ds,
        "array": losses,
        "only variable": losses.to_dataset(name="other"),
    }[wrap]
    np.testing.assert_allclose(lk.covariance(holder), numpy_covariance(losses), rtol=1e-4)
    xr.testing.assert_identical(lk.covariance(holder), holder.lk.covariance())


def test_gram__uses_arithmetic_and_selections_made_on_the_variable(store):
    losses = lk.open(store)["losses"]["loss"]
    changed = (losses * 2 + losses.mean("sample")).isel(sample=slice(3, 30, 2), draw=slice(1, None))
    np.testing.assert_allclose(
        lk.covariance(changed), numpy_covariance(changed.compute()), rtol=1e-3, atol=1e-7
    )


def test_gram__reads_a_file_that_was_opened_without_dask(store):
    lazy = xr.open_zarr(store, group="losses", consolidated=False, chunks=None)["loss"]
    assert not lazy.variable._in_memory
    np.testing.assert_allclose(
        lk.covariance(lazy), numpy_covariance(lazy.compute()), rtol=1e-3, atol=1e-7
    )


def test_kernels__compute_nothing_until_asked(losses):
    chunked = losses.chunk({"draw": 5, "sample": 6})
    with dask.config.set(scheduler=Forbidding()):
        kernel = lk.correlation(chunked)
        kernel.sel(sample=3).mean()
        lk.covariance(chunked, center="chain")
        lk.neighbors(chunked, 3, exclude=None)
        lk.influence(chunked, chunked)


def test_view__selecting_rows_computes_only_their_tiles(rng, monkeypatch):
    tiles = []

    def counted(c, tile):
        tiles.append((tile.i, tile.j))
        return compute_tile(c, tile)

    compute_tile = contraction.compute_tile
    monkeypatch.setattr(contraction, "compute_tile", counted)
    losses = random_losses(rng, chains=2, draws=8, samples=256)
    kernel = lk.correlation(losses, memory="40 KiB")
    blocks = kernel.data.numblocks[0]
    assert blocks >= 4
    row = kernel.isel(sample=5).values
    assert len(tiles) == len(set(tiles)) == blocks
    tiles.clear()
    kernel.isel(sample=5, sample_2=250).values  # noqa: B018
    assert len(tiles) == 1
    tiles.clear()
    whole = kernel.values
    assert len(tiles) == len(set(tiles)) == blocks * (blocks + 1) // 2
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(row, numpy_correlation(losses)[5], atol=1e-5)


def test_view__writes_to_zarr_as_it_is(tmp_path, rng):
    losses = random_losses(rng, samples=100)
    kernel = lk.correlation(losses, memory="40 KiB")
    kernel.to_zarr(tmp_path / "r.zarr", consolidated=False)
    back = xr.open_zarr(tmp_path / "r.zarr", consolidated=False)["correlation"]
    assert back.encoding["chunks"] == kernel.data.chunksize
    np.testing.assert_allclose(back, numpy_correlation(losses), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.rename(chain="walker"), "dims .*'walker'.* expected"),
        (lambda x: x.isel(chain=0), "expected \\('chain', 'draw'\\) and one more"),
        (lambda x: x.expand_dims(layer=2), "one more"),
        (lambda x: x.astype("complex64"), "complex64, expected real"),
        (lambda x: x.isel(sample=slice(0)), "empty along \\['sample'\\]"),
        (lambda x: x.isel(draw=slice(0)), "empty along \\['draw'\\]"),
    ],
)
def test_covariance__refuses_wrong_dims_and_kinds(losses, change, message):
    with pytest.raises(errors.SchemaError, match=message):
        lk.covariance(change(losses))


def test_covariance__refuses_one_draw(losses):
    one = losses.isel(chain=[0], draw=[0])
    with pytest.raises(ValueError, match="more than 1 elements .* there are 1, take more draws"):
        lk.covariance(one)
    with pytest.raises(ValueError, match="more than 3 elements"):
        lk.covariance(losses.isel(draw=[0]), center="chain")
    with pytest.raises(ValueError, match="at least two draws"):
        lk.loss_variance(one)


def test_covariance__refuses_what_holds_no_losses(losses):
    with pytest.raises(errors.SchemaError, match="expected a variable 'loss'.*there are"):
        lk.covariance(xr.Dataset({"a": ("x", [1.0])}))
    with pytest.raises(errors.SchemaError, match="neither a variable 'loss' nor a group"):
        lk.covariance(xr.DataTree())
    with pytest.raises(TypeError, match="must be a DataTree, Dataset or DataArray, not ndarray"):
        lk.covariance(losses.values)


@pytest.mark.parametrize("memory", [None, "8 KiB"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_kernels__refuse_non_finite_losses_and_name_the_sample(losses, bad, memory):
    losses[1, 4, 7] = bad
    where = r"'sample': 7.*'chain': \[1\], 'draw': \[4\].*verify"
    for compute in (lk.covariance, lk.correlation):
        with pytest.raises(
            errors.NonFiniteError, match="'sample': 7.*'chain': \\[1\\], 'draw': \\[4\\].*verify"
        ):
            compute(losses, memory=memory).compute()
    with pytest.raises(errors.NonFiniteError, match=where):
        lk.neighbors(losses, 3).compute()
    with pytest.raises(errors.NonFiniteError, match=where):
        lk.gram(losses, over=("chain", "draw"), memory=memory).compute()


def test_gram__refuses_operands_that_do_not_match(losses):
    with pytest.raises(errors.SchemaError, match="20 and 19 entries along 'draw'"):
        lk.covariance(losses, losses.isel(draw=slice(19)))
    left = losses.assign_coords(draw=np.arange(20))
    right = losses.assign_coords(draw=[*range(19), 77])
    with pytest.raises(errors.SchemaError, match="differ along 'draw', first at position 19: 19"):
        lk.covariance(left, right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "step"}, "lack \\['step'\\]"),
        ({"over": "chain"}, "must leave one"),
        ({"over": ()}, "over names no dim"),
        ({"over": ("chain", "draw"), "each": "draw"}, "both over and each"),
        ({"over": ("chain", "draw"), "center": "mean"}, "center must be one of"),
        ({"over": ("chain", "draw"), "normalize": "l2"}, "normalize must be one of"),
        ({"over": ("sample",), "each": "draw", "center": "chain"}, "needs the dim 'chain'"),
    ],
)
def test_gram__refuses_unclear_requests(losses, options, message):
    with pytest.raises(ValueError, match=message):
        lk.gram(losses, **options)


def test_gains__are_means_and_variances_in_float64(rng):
    losses = random_losses(rng)
    ds = losses.to_dataset(name="loss").assign(center_loss=losses.isel(chain=0, draw=0))
    ds = (
        ds.drop_vars("center_loss")
        .assign(center_loss=("sample", losses.values[0, 0]))
        .assign_attrs(nbeta=6.0)
    )
    x = losses.values.astype("f8").reshape(-1, 17)
    gain = x.mean(0) - x[0]
    np.testing.assert_allclose(lk.loss_gain(ds), gain, rtol=1e-12)
    np.testing.assert_allclose(lk.loss_variance(ds), x.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(lk.loss_variance(ds), np.diag(numpy_covariance(losses)), rtol=1e-9)
    assert float(lk.llc(ds)) == pytest.approx(6 * gain.mean())
    assert float(lk.singular_fluctuation(ds)) == pytest.approx(3 * x.var(0, ddof=1).mean())
    with pytest.raises(ValueError, match="nbeta is not among"):
        lk.llc(ds.drop_attrs())
    with pytest.raises(errors.SchemaError, match="needs 'center_loss'"):
        lk.loss_gain(losses)


def test_gram__keeps_the_labels_of_both_sides_apart(losses):
    one = losses.assign_coords(split="train")
    other = losses.isel(sample=slice(5)).rename(sample="example").assign_coords(split="test")
    kernel = lk.gram(one, other, over=("chain", "draw"))
    assert kernel["label"].dims == ("sample",)
    assert kernel["label_2"].dims == ("example",)
    assert "split" not in kernel.coords  # it holds for neither whole
    assert lk.covariance(one)["split"] == "train"
    with pytest.raises(errors.SchemaError, match="'label_2', which x has already"):
        lk.covariance(losses.assign_coords(label_2=losses["label"]))


def test_results__write_to_zarr_after_a_selection_of_chunked_labels(tmp_path, losses):
    chunked = losses.chunk({"sample": 5}).isel(sample=slice(2, None))
    for name, result in {
        "r": lk.correlation(chunked),
        "n": lk.neighbors(chunked, 3, exclude="label"),
        "i": lk.influence(chunked, chunked),
    }.items():
        result.to_zarr(tmp_path / name, consolidated=False)
        back = xr.open_zarr(tmp_path / name, consolidated=False)
        assert back["label"].values.tolist() == losses["label"].values[2:].tolist()


def test_summaries__are_nan_where_a_loss_is(losses):
    losses[0, 0, 3] = np.nan
    ds = losses.to_dataset(name="loss").assign(center_loss=("sample", np.zeros(17)))
    assert np.isnan(lk.loss_gain(ds)[3])
    assert np.isnan(lk.llc(ds, nbeta=1.0))
    assert np.isnan(lk.singular_fluctuation(ds, nbeta=1.0))


@pytest.mark.parametrize("options", [{}, {"memory": "40 KiB"}, {"device": "cpu"}])
def test_center_draw__removes_what_all_chains_share(rng, options):
    losses = random_losses(rng, chains=4, draws=60, samples=17, dtype="float64")
    shared = np.exp(-np.arange(60) / 20)[:, None] * rng.normal(size=17) * 50
    moving = (losses + shared.reshape(1, 60, 17)).chunk(chain=1, draw=7, sample=5)
    by_draw = lk.covariance(moving, center="draw", **options)
    expected = numpy_covariance(losses, "draw")
    np.testing.assert_allclose(by_draw, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())
    assert by_draw.attrs["center"] == "draw"
    near = lk.neighbors(moving, 16, center="draw", **options).compute()
    r = numpy_correlation(losses, "draw")
    np.fill_diagonal(r, -np.inf)
    np.testing.assert_array_equal(near["neighbor"], np.argsort(-r, axis=1)[:, :16])
    mean = lk.group_mean(moving, "label", kernel="covariance", center="draw", **options)
    member = np.eye(4)[losses["label"]] / np.bincount(losses["label"])
    np.testing.assert_allclose(mean, member.T @ expected @ member, rtol=1e-8)
    pooled = lk.covariance(moving, **options)
    assert np.abs(pooled.values - numpy_covariance(losses)).max() > 3 * abs(expected).max()


def test_center_draw__needs_chains(rng):
    losses = random_losses(rng)
    with pytest.raises(ValueError, match="there is one chain; take more"):
        lk.correlation(losses.isel(chain=[0]), center="draw")
    with pytest.raises(errors.SchemaError, match="needs over="):
        lk.gram(losses, over="draw", each="chain", center="draw")
