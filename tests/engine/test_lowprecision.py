"""When products are made in low precision."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray.engine import lowprecision
from tests.helpers.losses import numpy_correlation, random_losses


def test_auto__is_float32_for_small_or_exact_work_and_says_what_it_used(monkeypatch, rng):
    losses = random_losses(rng)
    assert lk.correlation(losses, precision="auto").attrs["precision"] == "float32"
    monkeypatch.setattr(lowprecision, "_WORTH", 0)
    monkeypatch.setattr(lowprecision, "_WORTH_LOADED", 0)
    monkeypatch.setattr(lowprecision, "_is_faster", lambda: True)
    kernel = lk.correlation(losses, precision="auto")
    assert kernel.attrs["precision"] == "bfloat16"
    np.testing.assert_allclose(kernel, numpy_correlation(losses), atol=6e-3)
    assert lk.correlation(losses).attrs["precision"] == "float32"
    assert lk.correlation(losses.astype("f8"), precision="auto").attrs["precision"] == "float32"
    near = lk.neighbors(losses, 4, exclude="label")
    assert near.attrs["precision"] == "bfloat16"
    expected = lk.neighbors(losses, 4, exclude="label", precision="float32")
    xr.testing.assert_equal(near["neighbor"].compute(), expected["neighbor"].compute())
    with pytest.raises(ValueError, match="precision"):
        lk.neighbors(losses, 4, precision="half")


def test_auto__without_torch_is_float32(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lkarray.engine import lowprecision\n"
        "import numpy as np\n"
        "assert lowprecision.choose('auto', 1e15, np.dtype('f4')) == 'float32'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
