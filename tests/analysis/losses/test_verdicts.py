import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.diagnostics import diagnostics
from tests.helpers.chains import autoregressive, said, tree_of
from tests.helpers.losses import random_losses

PER_SAMPLE = list(convergence.PER_SAMPLE)


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


def test_verdicts__count_the_samples_whose_losses_do_not_move(rng):
    losses = random_losses(rng, chains=4, draws=200, samples=20)
    still = losses.where(losses["sample"] >= 3, 0.25)
    (line,) = [v for v in lk.diagnostics(still).attrs["verdicts"] if "rounding" in v]
    assert line.startswith("the losses of 3 of 20 samples do not move beyond rounding")
    assert not [v for v in lk.diagnostics(losses).attrs["verdicts"] if "rounding" in v]


def test_verdicts__of_a_transient_that_all_chains_share_name_center_draw(rng):
    noise = rng.normal(size=(4, 200, 3)) @ rng.normal(size=(3, 30)) + rng.normal(size=(4, 200, 30))
    dims = ("chain", "draw", "sample")
    still = lk.diagnostics(xr.DataArray(noise, dims=dims))
    assert not any("same draw" in line for line in still.attrs["verdicts"])
    falling = noise + 10 * np.exp(-np.arange(200) / 20)[:, None]
    report = lk.diagnostics(xr.DataArray(falling, dims=dims))
    (line,) = [line for line in report.attrs["verdicts"] if "same draw" in line]
    assert f"adds {100 * float(report['transient_excess'].median()):.0f}% to" in line
    assert 'use center="draw"' in line
