import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from scipy.signal import lfilter

import lkarray as lk
from lkarray import errors
from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.diagnostics import diagnostics
from tests.helpers.losses import numpy_correlation, random_losses

PER_SAMPLE = list(convergence.PER_SAMPLE)


def autoregressive(
    rng: np.random.Generator, rho: float, *, chains: int = 4, draws: int = 500, samples: int = 40
) -> xr.DataArray:
    """Stationary AR(1) series of unit variance: those of different samples are independent."""
    noise = rng.normal(size=(chains, draws + 200, samples)) * np.sqrt(1 - rho**2)
    values = lfilter([1], [1, -rho], noise, axis=1)[:, 200:]
    return xr.DataArray(
        values.astype("f4"),
        dims=("chain", "draw", "sample"),
        coords={"chain": range(chains), "sample": np.arange(samples) * 3},
        name="loss",
    )


def tree_of(losses: xr.DataArray, *, hidden: list[str] | None = None, **attrs) -> xr.DataTree:
    """A tree as `lk.open` returns, with made-up statistics of draws."""
    accepted = attrs.pop("accepted", 0.9)
    settings = {"sampler": {"name": "SGLD", "step_size": 1e-3}, "gamma": 100.0, "burn_in": 50}
    settings |= {"thin": 1, **attrs}
    shape = (losses.sizes["chain"], losses.sizes["draw"])
    known = {"chain": losses["chain"]} if "chain" in losses.coords else {}
    per_draw = {
        "distance": np.tile(np.arange(shape[1], dtype="f4"), (shape[0], 1)),
        "step_size": np.full(shape, settings["sampler"]["step_size"], "f4"),
        "acceptance": np.full(shape, accepted, "f4"),
        "diverged": np.zeros(shape, bool),
    }
    stats = xr.Dataset({k: (("chain", "draw"), v) for k, v in per_draw.items()}, coords=known)
    groups = {"losses": losses.to_dataset(name="loss").assign_attrs(settings)}
    tree = xr.DataTree.from_dict({**groups, "sample_stats": stats})
    tree.attrs["hidden"] = hidden or []
    return tree


def said(tree, **options) -> str:
    """The one verdict on a tree."""
    (line,) = diagnostics(tree, **options).attrs["verdicts"]
    return line


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_ess__of_autoregressive_chains_is_the_known_one(rho):
    x = autoregressive(np.random.default_rng(3), rho, draws=1000, samples=100)
    report = diagnostics(x)
    for name, r in (("ess_bulk", rho), ("kernel_ess", rho**2)):
        expected = 4000 * (1 - r) / (1 + r)
        mean = float(report[name].mean())
        assert mean == pytest.approx(expected, rel=0.04), name
    assert float(report["autocorrelation_draws"]) == pytest.approx((1 + rho) / (1 - rho), rel=0.05)
    np.testing.assert_allclose(report["mcse"].mean(), report["ess_bulk"].mean() ** -0.5, rtol=0.03)


def test_kernel_error__is_the_spread_of_entries_of_r():
    x = autoregressive(np.random.default_rng(4), 0.8, samples=80)
    entries = numpy_correlation(x)[np.triu_indices(80, 1)]
    report = diagnostics(x)
    assert float(report["kernel_error"]) == pytest.approx(entries.std(), rel=0.05)
    # Products are no more correlated than a series, whose own size is far smaller.
    assert float(report["kernel_ess"]) > 1.5 * float(report["ess_bulk"].median())


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


def test_kernel_ess__is_the_median_over_all_pairs_where_they_are_few(rng):
    from arviz_stats.base import array_stats

    losses = random_losses(rng, samples=6).astype("f8")
    x = losses.values - losses.values.mean(axis=(0, 1))
    ess = [
        array_stats.ess(x[..., i] * x[..., j], 0, 1, method="mean")
        for i in range(6)
        for j in range(i)
    ]
    assert float(diagnostics(losses)["kernel_ess"]) == pytest.approx(np.median(ess), rel=1e-9)
    few = [float(diagnostics(losses, pairs=3, seed=seed)["kernel_ess"]) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_drift__is_a_z_score():
    x = autoregressive(np.random.default_rng(5), 0.7, chains=200, draws=400, samples=1)
    z = diagnostics(x)["drift"]
    assert z.dims == ("chain",)
    assert abs(float(z.mean())) < 0.3
    assert float(z.std()) == pytest.approx(1, abs=0.2)
    burning = x + 5 * np.exp(-np.arange(400) / 80).reshape(1, 400, 1)
    assert float((diagnostics(burning)["drift"] < -4).mean()) > 0.9


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "SGLD"},
        {"name": "RMSpropSGLD", "damping": 0.1},
        {"name": "SGHMC", "friction": 0.1},
        {"name": "SGHMC", "friction": 0.9},
    ],
)
def test_relaxation__is_how_long_the_sampler_remembers(sampler):
    """The sampler itself, without loss: the distance of the mean from w* falls as exp(-t / tau)."""
    import torch

    from lkarray.sampling import samplers

    step_size, gamma, options = 1e-3, 20.0, {k: v for k, v in sampler.items() if k != "name"}
    stepper = getattr(samplers, sampler["name"])(step_size=step_size, **options)
    theta = torch.ones(1, 1, dtype=torch.float64)
    state = {name: torch.zeros_like(theta) for name in stepper.carries}
    zero, path = torch.zeros_like(theta), []
    for step in range(4000):
        stepper.step(theta, zero, zero, zero[0], nbeta=1.0, gamma=gamma, step=step, state=state)
        path.append(abs(float(theta)))
    far = np.array(path) / max(path) > 1e-6
    measured = -1 / np.polyfit(np.arange(4000)[far], np.log(np.array(path)[far]), 1)[0]
    steps = convergence.relaxation_steps(step_size, gamma, sampler)
    assert steps == pytest.approx(measured, rel=0.1)


# --- shapes, blocks, budgets ------------------------------------------------------------------


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


def broken(losses: xr.DataArray) -> xr.DataArray:
    values = losses.values.copy()
    values[:, 2] = np.nan
    return losses.copy(data=values)


# --- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_verdicts__on_white_noise_are_none(seed):
    x = autoregressive(np.random.default_rng(seed), 0.0)
    report = diagnostics(tree_of(x))
    assert report.attrs["verdicts"] == []
    assert report.attrs["summary"].startswith("all is well: R-hat at most 1.0")
    assert float(report["kernel_ess"]) == pytest.approx(2000, rel=0.05)
    assert abs(report["drift"]).max() < 4
    np.testing.assert_allclose(report["distance"], np.arange(250, 500).mean())
    one = diagnostics(tree_of(x.isel(sample=[0])))  # no pair, so no kernel to speak of
    assert np.isnan(one["kernel_ess"])
    assert "nan" not in one.attrs["summary"]
    np.testing.assert_allclose(report["acceptance"], 0.9, rtol=1e-6)
    assert float(report["relaxation_steps"]) == pytest.approx(2 / (1e-3 * 100))


def test_verdicts__on_a_shifted_chain_name_samples_and_what_to_change():
    x = autoregressive(np.random.default_rng(0), 0.0)
    x[1, :, :10] += 3
    report = diagnostics(tree_of(x))
    assert (report["rhat"][:10] > 1.2).all()
    assert (report["rhat"][10:] < 1.05).all()
    assert (report["pooling_excess"][:10] > 0.5).all()
    (line,) = report.attrs["verdicts"]
    assert "10 of 40 samples" in line
    assert "raise burn_in (now 50)" in line
    x[1] += 3
    lines = diagnostics(x).attrs["verdicts"]
    assert len(lines) == 3
    assert "40 of 40" in lines[0]
    assert "entries of R carry an error" in lines[1]
    assert 'center="chain"' in lines[2]


@pytest.mark.parametrize("way", ["rises", "falls"])
def test_verdicts__on_a_trend_give_its_size(way):
    x = autoregressive(np.random.default_rng(1), 0.0)
    slope = np.linspace(0, 0.5, 500)[:, None]
    x[2] += slope if way == "rises" else -slope
    report = diagnostics(tree_of(x))
    assert abs(report["drift"][2]) > 8
    assert (abs(report["drift"][[0, 1, 3]]) < 4).all()
    (line,) = report.attrs["verdicts"]
    assert f"the mean loss {way} during 1 of 4 chains" in line
    assert "burn_in" in line


def test_verdicts__on_settings_say_which_number_to_set():
    x = autoregressive(np.random.default_rng(2), 0.0)
    line = said(tree_of(x, burn_in=5))
    assert "burn_in of 5 steps" in line
    assert "raise burn_in to 20, or step_size (now 0.001) or gamma (now 100)" in line
    assert said(tree_of(x, accepted=0.3)).endswith("reduce step_size (now 0.001)")
    assert diagnostics(tree_of(x, accepted=1.0)).attrs["verdicts"] == []
    unknown = diagnostics(tree_of(x, accepted=np.nan, gamma=0.0))
    assert unknown.attrs["verdicts"] == []
    assert np.isnan(unknown["acceptance"]).all()
    assert np.isnan(unknown["relaxation_steps"])
    slow = autoregressive(np.random.default_rng(2), 0.95)
    lines = diagnostics(tree_of(slow, accepted=0.9999)).attrs["verdicts"]
    assert any("step_size (now 0.001) could grow" in line for line in lines)


def test_verdicts__on_few_effective_draws_say_how_many_to_take():
    x = autoregressive(np.random.default_rng(6), 0.9, chains=8, draws=50)
    report = diagnostics(x)
    ess = float(report["kernel_ess"])
    assert 25 < ess < 70
    (line,) = (line for line in report.attrs["verdicts"] if "entries of R" in line)
    assert f"an error of about {ess**-0.5:.2g}" in line
    draws = int(line.rsplit("draws=", 1)[1])
    assert draws == pytest.approx(50 * 100 / ess, abs=1)


def test_verdicts__name_chains_that_are_missing():
    x = autoregressive(np.random.default_rng(7), 0.0)
    hidden = ["chains [1] diverged and are left out", "chains [4] have no draws yet"]
    three = x.isel(chain=[0, 2, 3])
    lines = diagnostics(tree_of(three, hidden=hidden)).attrs["verdicts"]
    assert len(lines) == 2
    assert lines[0].startswith("chains [1] diverged")
    assert "reduce step_size (now 0.001) or raise gamma (now 100)" in lines[0]
    assert "lk.sample" in lines[1]
    assert "chains [1] are not among the losses" in said(three)
    one = diagnostics(x.isel(chain=[0]))
    assert np.isnan(one["rhat"]).all()
    assert np.isnan(one["between_variance"]).all()
    assert (one["pooling_excess"] == 0).all()
    (line,) = one.attrs["verdicts"]
    assert "set chains=4" in line


def test_verdicts__name_a_chain_that_diverged_and_leave_it_out():
    x = autoregressive(np.random.default_rng(7), 0.0)
    x[0, 7:] = np.nan
    tree = tree_of(x)
    for name in ("distance", "step_size", "acceptance"):
        tree["sample_stats"][name][0, 8:] = np.nan
    tree["sample_stats"]["diverged"][0, 7] = True
    report = diagnostics(tree)
    (line,) = report.attrs["verdicts"]
    assert line.startswith("chain 0 turned non-finite at draw 7 and is left out: reduce step_size")
    assert report.attrs["summary"].startswith("1 problem:")
    np.testing.assert_array_equal(report["diverged"], [True, False, False, False])
    rest = diagnostics(tree.isel(chain=slice(1, None)))
    for name in [*PER_SAMPLE, "kernel_ess", "relaxation_steps", "autocorrelation_draws"]:
        np.testing.assert_array_equal(report[name], rest[name], err_msg=name)
    for name in ("drift", "distance", "acceptance"):
        assert np.isnan(report[name][0])
        np.testing.assert_array_equal(report[name][1:], rest[name])
    with pytest.raises(errors.NonFiniteError, match="'chain': \\[0\\]"):
        diagnostics(tree["losses"])
    tree["sample_stats"]["diverged"][:, 9] = True
    with pytest.raises(errors.DivergedError, match="smaller step size"):
        diagnostics(tree)


# --- stores -----------------------------------------------------------------------------------


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


def test_verdicts__count_the_samples_whose_losses_do_not_move(rng):
    losses = random_losses(rng, chains=4, draws=200, samples=20)
    still = losses.where(losses["sample"] >= 3, 0.25)
    (line,) = [v for v in lk.diagnostics(still).attrs["verdicts"] if "rounding" in v]
    assert line.startswith("the losses of 3 of 20 samples do not move beyond rounding")
    assert not [v for v in lk.diagnostics(losses).attrs["verdicts"] if "rounding" in v]
