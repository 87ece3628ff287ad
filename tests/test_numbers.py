"""Numbers that a change of structure must not move; `scripts/same_numbers.py` compares all bits."""

import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def same_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("same_numbers")


def test_numbers__are_those_of_0_1_0(tmp_path, same_numbers):
    """Of a store, kernels, an audit and lift, as 0.1.0 gave them.

    Intervals of lift are those of Student's t, and CKA without noise is over all pairs of chains.

    The last bits of sums depend on the processor, so that the script alone asks for all bits.
    """
    now = same_numbers.arrays(tmp_path)
    with np.load(Path(__file__).parent / "data" / "numbers.npz") as file:
        before = dict(file)
    assert set(before) <= set(now)
    for name, array in before.items():
        assert now[name].dtype == array.dtype, name
        if array.dtype.kind == "f":
            tolerance = {"rtol": 2e-4, "atol": 2e-5 * np.nanmax(np.abs(array), initial=1e-3)}
            np.testing.assert_allclose(now[name], array, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(now[name], array, err_msg=name)


def test_numbers__that_differ_are_named(same_numbers):
    arrays = {"loss": np.arange(3.0), "label": np.array(["a", "b"])}
    assert same_numbers.differences(arrays, dict(arrays)) == []
    other = {"loss": np.nextafter(arrays["loss"], 9), "label": np.array(["a", "c"])}
    lines = same_numbers.differences(arrays, other)
    assert [line.split(":")[0] for line in lines] == ["label", "loss"]
    assert "only in one" in same_numbers.differences(arrays, {"loss": arrays["loss"]})[0]
