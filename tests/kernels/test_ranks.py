import numpy as np
import pytest
import xarray as xr

import lkarray as lk


def test_ranks__of_known_spectra():
    s = xr.DataArray(np.sqrt([[4.0, 4.0, 0.0], [8.0, 1.0, 1.0]]), dims=("time", "mode"))
    np.testing.assert_allclose(lk.participation_ratio(s), [2, 100 / 66])
    np.testing.assert_array_equal(lk.energy_rank(s, 0.9), [2, 2])
    np.testing.assert_array_equal(lk.energy_rank(s, 0.8), [2, 1])
    np.testing.assert_array_equal(lk.energy_rank(s, 1.0), [2, 3])
    assert lk.participation_ratio(np.ones(7)) == 7
    assert lk.energy_rank(s.chunk(mode=1), 0.9).dtype == np.int64
    with pytest.raises(ValueError, match="share"):
        lk.energy_rank(s, 90)
