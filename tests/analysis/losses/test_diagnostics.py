import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.diagnostics import diagnostics
from tests.helpers.chains import autoregressive, broken, said, tree_of
from tests.helpers.losses import random_losses

PER_SAMPLE = list(convergence.PER_SAMPLE)


def test_figures__equal_those_of_arviz_sample_by_sample(rng):
    from arviz_stats.base import array_stats

    losses = random_losses(rng, chains=3, draws=31)
    losses[..., 4] *= 1e-12  # ArviZ itself would take the products of these for constants
    report = diagnostics(losses)
    for i in range(losses.sizes["sample"]):
        one = losses.values[..., i].astype("f8")
        expected = {
            "rhat": array_stats.rhat(one, 0, 1, method="rank"),
            "ess_bulk": array_stats.ess(one, 0, 1, method="bulk"),
            "ess_tail": array_stats.ess(one, 0, 1, method="tail", prob=(0.05, 0.95)),
            "mcse": array_stats.mcse(one, 0, 1, method="mean"),
            "within_variance": one.var(axis=1, ddof=1).mean(),
            "between_variance": 31 * one.mean(axis=1).var(ddof=1),
        }
        for name, value in expected.items():
            assert float(report[name][i]) == pytest.approx(float(value), rel=1e-9), name
    np.testing.assert_allclose(report["mcse"], lk.mcse(losses)["loss_gain"], rtol=1e-5)
    pooled, apart = (
        np.diag(lk.covariance(losses.astype("f8"), center=c)) for c in ("pooled", "chain")
    )
    np.testing.assert_allclose(report["pooling_excess"], pooled / apart - 1, rtol=1e-6, atol=1e-9)
    about = lk.covariance(losses.astype("f8"), center="draw").values.diagonal()
    np.testing.assert_allclose(report["transient_excess"], pooled / about - 1, rtol=1e-6, atol=1e-9)


def test_diagnostics__of_constant_losses_are_nan_and_warn_of_nothing(rng):
    losses = random_losses(rng, draws=40)
    losses[..., 3] = 0.25
    report = diagnostics(losses)
    for name in ("rhat", "ess_bulk", "ess_tail", "pooling_excess"):
        assert np.isnan(report[name][3])
        assert np.isfinite(report[name]).sum() == 16
    for name in ("mcse", "within_variance", "between_variance"):
        assert report[name][3] == 0
    assert "no loss varies" in said(xr.zeros_like(losses))
    between = xr.zeros_like(losses) + np.arange(3.0).reshape(3, 1, 1)
    assert np.isposinf(diagnostics(between)["pooling_excess"]).all()


def test_diagnostics__do_not_depend_on_blocks_and_read_once(rng, monkeypatch):
    losses = autoregressive(rng, 0.3, draws=100, samples=256)
    reads, blocks, figures = [], [], convergence.per_sample
    monkeypatch.setattr(convergence, "per_sample", lambda x: blocks.append(len(x)) or figures(x))

    def count(block: np.ndarray, block_info=None) -> np.ndarray:
        reads.append(block_info[0]["chunk-location"])
        return block

    lazy = losses.chunk(chain=1, sample=32)
    lazy = lazy.copy(data=da.map_blocks(count, lazy.data, dtype=lazy.dtype, meta=lazy.data._meta))
    whole = diagnostics(losses, pairs=20)
    for scheduler in ("synchronous", "threads"):
        reads.clear()
        with dask.config.set(scheduler=scheduler):
            blocks.clear()
            report = diagnostics(lazy, pairs=20, memory="3800 KiB")
        assert len(blocks) > 1
        assert sum(blocks) == 256
        assert sorted(reads) == sorted(set(reads)) == list(np.ndindex(4, 1, 8))
        xr.testing.assert_allclose(report, whole, rtol=1e-12)
    with pytest.raises(errors.MemoryBudgetError, match=r"\d+ KiB can"):
        diagnostics(lazy, pairs=20, memory="20 KiB")


def test_diagnostics__keep_leading_dims_and_tokens(rng):
    x = random_losses(rng, chains=2, draws=12, samples=30)
    tokens = xr.DataArray(
        x.values.reshape(2, 12, 10, 3),
        dims=("chain", "draw", "sample", "token"),
        coords={"label": ("sample", np.arange(10) % 2), "token": [5, 6, 7]},
        name="loss",
    )
    several = xr.concat([tokens, 2 * tokens, tokens + 1], xr.Variable("component", list("abc")))
    several = several.expand_dims(checkpoint=[10])
    report = diagnostics(several.chunk(sample=4))
    assert report["rhat"].dims == ("checkpoint", "component", "sample", "token")
    assert report["drift"].dims == ("checkpoint", "component", "chain")
    assert report["kernel_ess"].dims == ("checkpoint", "component")
    assert set(report.coords) == {"checkpoint", "component", "sample", "label", "token"} - {
        "sample"
    }
    flat = diagnostics(x)
    for at, factor in (("a", 1), ("b", 2)):
        one = report.sel(component=at, checkpoint=10)
        for name in PER_SAMPLE:
            scale = {"mcse": factor, "between_variance": factor**2, "within_variance": factor**2}
            expected = flat[name].values.reshape(10, 3) * scale.get(name, 1)
            np.testing.assert_allclose(one[name], expected, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(one["drift"], flat["drift"], rtol=1e-5)
    lines = report.attrs["verdicts"]
    assert lines
    assert all(line.startswith("checkpoint 10, component ") for line in lines)
    assert any("component a; checkpoint 10, component b; " in line for line in lines)


MEASURE = """
import resource, sys
import dask.array as da, numpy as np, xarray as xr
from lkarray.analysis.losses.diagnostics import diagnostics
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def tree(n):
    noise = da.random.default_rng(0).normal(size=(2, 2000, n), chunks=(1, 2000, 25))
    return xr.DataArray(noise, dims=("chain", "draw", "sample"), name="loss")
diagnostics(tree(4), pairs=5)
before = peak()
diagnostics(tree(700), pairs=20, memory="16 MiB")
print(peak() - before)
"""


def test_memory__measured_peak_stays_within_the_budget():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 2**20  # of 21 MiB of losses


def test_diagnostics__refuse_what_they_cannot_judge(rng):
    losses = random_losses(rng)
    with pytest.raises(ValueError, match="at least 4 draws.*have 3.*lk.sample"):
        diagnostics(losses.isel(draw=slice(3)))
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        diagnostics(losses, pairs=0)
    with pytest.raises(TypeError, match="DataArray"):
        diagnostics(losses.values)
    with pytest.raises(errors.SchemaError, match="rename or select"):
        diagnostics(losses.rename(draw="time"))
    with pytest.raises(errors.SchemaError, match="rename or select"):
        diagnostics(losses.expand_dims(colour=2))
    with pytest.raises(errors.NonFiniteError, match="'draw': \\[2\\]"):
        diagnostics(
            losses.where(losses["draw"] != 2) if "draw" in losses.coords else broken(losses)
        )
    tree = tree_of(losses)
    tree["losses"] = tree["losses"].isel(chain=slice(2))
    with pytest.raises(errors.SchemaError, match=r"tree.isel\(chain"):
        diagnostics(tree)
    few = diagnostics(losses.isel(draw=slice(7)))
    assert np.isnan(few["drift"]).all()
    assert np.isfinite(few["rhat"]).all()


def test_diagnostics__of_a_sampled_store(store):
    tree = lk.open(store)
    report = diagnostics(tree)
    assert set(report["rhat"].coords) == {"sample", "label"}
    assert report["rhat"].notnull().all()
    assert float(report["relaxation_steps"]) == pytest.approx(2 / (1e-3 * 50))
    assert (report["distance"] > 0).all()
    assert any("raise burn_in to 40" in line for line in report.attrs["verdicts"])
    alone = diagnostics(tree["losses"])
    xr.testing.assert_identical(alone["rhat"], report["rhat"])
    assert "distance" not in alone
    assert "acceptance" not in alone
    assert all(isinstance(value.data, np.ndarray) for value in report.values())
    strided = diagnostics(tree.isel(sample=slice(None, None, 4)))
    np.testing.assert_allclose(strided["ess_bulk"], report["ess_bulk"][::4])


def test_diagnostics__of_components_sampled_together(sample, tmp_path):
    tree = sample(tmp_path / "run.zarr", components={"first": ["0.*"], "second": ["2.*"]})
    report = diagnostics(tree)
    assert report["rhat"].dims == ("component", "sample")
    assert report["distance"].dims == ("component", "chain")
    assert report["relaxation_steps"].dims == ("component",)
    expected = diagnostics(tree.isel(component=1))
    np.testing.assert_allclose(report["ess_bulk"][1], expected["ess_bulk"])
    lines = [line for line in report.attrs["verdicts"] if "burn_in to 40" in line]
    assert len(lines) == 1
    assert lines[0].startswith("component first; component second: ")
