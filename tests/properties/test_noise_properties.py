"""Intervals that hold what they promise, and estimates without bias, on made data."""

import numpy as np
import pytest

from lkarray.analysis.hierarchy.intervals import interval, jackknife


@pytest.mark.parametrize(("chains", "labels"), [(4, 0.0), (8, 0.0), (4, 0.5), (6, 2.0)])
def test_interval__holds_the_truth_as_often_as_it_says(chains, labels):
    rng = np.random.default_rng(chains)
    values = rng.normal(size=(chains, 500)) * np.sqrt(chains)  # the mean has variance 1
    mean = values.mean(0)
    error = jackknife([(values.sum(0) - value) / (chains - 1) for value in values])
    known = np.full(500, labels) * np.sqrt(rng.chisquare(29, 500) / 29)
    estimate = mean + labels * rng.normal(size=500)
    low, high = interval(estimate, [(error, chains - 1), (known, 29)], 0.95)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97


def test_interval__of_exact_values_is_a_point():
    low, high = interval(np.array([2.0, 3.0]), [(np.array([0.0, np.nan]), 3)], 0.95)
    np.testing.assert_array_equal([low[0], high[0]], [2, 2])
    assert np.isnan(low[1])
