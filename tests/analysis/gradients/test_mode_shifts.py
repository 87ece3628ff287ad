import numpy as np
import pytest
from scipy.stats import spearmanr

from lkarray import errors, mode_coefficients, mode_shifts
from lkarray.analysis.gradients.modes import modes
from tests.helpers.gradients import tensor


@pytest.fixture
def at_end(rng):
    G = tensor(rng).isel(time=-1)
    return modes(G, 5).compute(), G


@pytest.fixture
def moved(rng, at_end):
    modes, G = at_end
    before = mode_coefficients(modes, G).compute()
    return before, before + rng.normal(size=before.shape) * [5, 3, 2, 1, 0.5]


def test_mode_shifts__are_means_over_examples(at_end, moved, rng):
    modes, _ = at_end
    before, after = moved
    felt = before.copy(data=rng.uniform(size=before.shape))
    out = mode_shifts(modes, before, after, felt)
    delta, drive = (after - before).values, np.abs(modes["drive"].values)
    np.testing.assert_allclose(out["change"], delta.mean(0))
    np.testing.assert_allclose(out["shift"], np.abs(delta).mean(0))
    np.testing.assert_allclose(out["contribution"], np.abs(delta * drive).mean(0))
    np.testing.assert_allclose(out["sensitivity"], felt.mean("example"))
    assert float(out["share"].sum()) == pytest.approx(1)
    assert out["singular_value"].dims == ("mode",)
    for factor, w in (("shift", np.abs(delta).mean(0)), ("drive", drive)):
        effective = w.sum() ** 2 / (w**2).sum()
        assert float(out["effective_modes"].sel(factor=factor)) == pytest.approx(effective)
    pair = {"factor": "drive", "factor_2": "sensitivity"}
    expected = np.corrcoef(drive, felt.mean("example"))[0, 1]
    assert float(out["correlation"].sel(pair)) == pytest.approx(expected)
    ranks = spearmanr(drive, felt.mean("example")).statistic
    assert float(out["rank_correlation"].sel(pair)) == pytest.approx(ranks)


def test_mode_shifts__add_up_to_the_change_of_a_step(at_end, moved):
    """One example: contributions, signed, are what the step's effect on its loss changed by."""
    modes, _ = at_end
    before, after = (c.isel(example=[0]) for c in moved)
    out = mode_shifts(modes, before, after)
    signed = (out["drive"] * out["change"]).sum("mode")
    step = (modes["drive"] * (after - before)).sum()
    assert float(signed) == pytest.approx(float(step))
    np.testing.assert_allclose(abs(out["drive"] * out["change"]), out["contribution"])
    assert "sensitivity" not in out["factor"].values


def test_mode_shifts__bad_input(at_end, moved):
    modes, _ = at_end
    before, after = moved
    with pytest.raises(errors.SchemaError, match="the same examples and modes"):
        mode_shifts(modes, before, after.isel(example=slice(3)))
    with pytest.raises(errors.SchemaError, match="before has dims .* expected"):
        mode_shifts(modes, modes["direction"], modes["direction"])
    with pytest.raises(errors.SchemaError, match="drive"):
        mode_shifts(modes.drop_vars("drive"), before, after)
    few = {"mode": slice(2)}
    with pytest.raises(errors.SchemaError, match="at least three"):
        mode_shifts(modes.isel(few), before.isel(few), after.isel(few))
    with pytest.raises(errors.SchemaError, match="sensitivity is of 2 modes"):
        mode_shifts(modes, before, after, before.isel(few))
