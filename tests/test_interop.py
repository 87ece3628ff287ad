import dask
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray.analysis.losses.diagnostics import diagnostics
from lkarray.interop import to_arviz
from tests.helpers.losses import Forbidding


def squares(model: nn.Module) -> torch.Tensor:
    return sum((w**2).sum() for w in model.parameters())


def test_to_arviz__keeps_values_labels_and_laziness(store):
    tree = lk.open(store)
    before = tree.copy(deep=True)
    with dask.config.set(scheduler=Forbidding()):
        converted = to_arviz(tree)
    assert set(converted.children) == {"posterior", "sample_stats", "constant_data"}
    loss = converted["posterior/loss"]
    assert loss.dims == ("chain", "draw", "observation")
    assert loss.chunks == tree["losses/loss"].chunks
    np.testing.assert_array_equal(loss, tree["losses/loss"])
    assert loss.attrs["units"] == "nat"
    for name, own in (("label", "label"), ("observation", "sample")):
        np.testing.assert_array_equal(converted[f"posterior/{name}"], tree[f"losses/{own}"])
        np.testing.assert_array_equal(converted[f"constant_data/{name}"], tree[f"losses/{own}"])
    center = converted["constant_data"].to_dataset()
    assert set(center.data_vars) == {"center_loss"}
    assert set(center.dims) == {"observation"}
    stats = converted["sample_stats"]
    assert "diverging" in stats
    assert "diverged" not in stats
    assert stats["diverging"].dtype == bool
    np.testing.assert_array_equal(stats["distance"], tree["sample_stats/distance"])
    assert converted["posterior"].attrs["nbeta"] == 10
    assert converted["posterior"].attrs["inference_library"] == "lkarray"
    assert all("sample" not in {*g.dims, *g.variables} for g in converted.subtree)
    assert "inference_library" not in tree["losses"].attrs
    xr.testing.assert_identical(tree, before)


def test_to_arviz__takes_observables_components_and_nodes(sample, tmp_path):
    tree = sample(MemoryStore(), observables={"squares": squares})
    converted = to_arviz(tree)
    np.testing.assert_array_equal(converted["posterior/squares"], tree["observables/squares"])
    parts = sample(tmp_path / "run.zarr", components={"first": ["0.*"], "second": ["2.*"]})
    assert to_arviz(parts)["posterior/loss"].dims == ("component", "chain", "draw", "observation")
    alone = to_arviz(tree["losses"])
    assert set(alone.children) == {"posterior", "constant_data"}
    xr.testing.assert_identical(alone["posterior/loss"], converted["posterior/loss"])


def test_to_arviz__refuses_what_is_no_run(store):
    tree = lk.open(store)
    with pytest.raises(TypeError, match="tree must be an xarray.DataTree"):
        to_arviz(tree["losses"].to_dataset())
    with pytest.raises(errors.SchemaError, match="losses"):
        to_arviz(tree["sample_stats"])
    with pytest.raises(errors.SchemaError, match="lack .'chain'"):
        to_arviz(xr.DataTree(tree["losses"].to_dataset().isel(chain=0)))
    taken = tree["losses"].to_dataset().assign_coords(observation=("sample", np.arange(40)))
    with pytest.raises(errors.SchemaError, match="rename"):
        to_arviz(xr.DataTree(taken))


def test_arrays__of_the_result_give_arviz_what_diagnostics_say(sample):
    from arviz_stats.base import array_stats

    tree = sample(MemoryStore(), draws=30)
    loss, report = to_arviz(tree)["posterior/loss"].load(), diagnostics(tree)
    axes = {"chain_axis": loss.get_axis_num("chain"), "draw_axis": loss.get_axis_num("draw")}
    np.testing.assert_allclose(array_stats.rhat(loss.values, **axes), report["rhat"], rtol=1e-5)
    np.testing.assert_allclose(array_stats.ess(loss.values, **axes), report["ess_bulk"], rtol=1e-5)


def test_arviz__of_the_result_agrees_with_diagnostics(sample):
    pytest.importorskip("arviz_base", reason="needs arviz-stats[xarray]")
    import arviz_stats

    tree = sample(MemoryStore(), draws=30, observables={"squares": squares})
    converted, report = to_arviz(tree).load(), diagnostics(tree)
    pairs = {
        "rhat": arviz_stats.rhat(converted),
        "ess_bulk": arviz_stats.ess(converted, method="bulk"),
        "ess_tail": arviz_stats.ess(converted, method="tail", prob=(0.05, 0.95)),
        "mcse": arviz_stats.mcse(converted),
    }
    for name, value in pairs.items():
        np.testing.assert_allclose(value["loss"], report[name], rtol=1e-5, err_msg=name)
    table = arviz_stats.summary(converted, round_to="none")
    assert len(table) == 41
    assert list(table.index[:2]) == ["loss[0]", "loss[1]"]
    rows = [name for name in table.index if name.startswith("loss")]
    np.testing.assert_allclose(table.loc[rows, "r_hat"].astype(float), report["rhat"], rtol=1e-5)
