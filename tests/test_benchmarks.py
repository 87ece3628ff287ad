"""Benchmarks run at reduced size, and what each compares agrees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAST = ("estimator", "spectra", "lift", "example_gradients", "products", "mixing")
SLOW = ("dense", "gpu_engine", "top_k", "growth", "recording", "gradient_tensor")
SMALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.minutes
@pytest.mark.parametrize("name", SMALL)
def test_benchmark__runs_small(name, tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--small"],
        env=os.environ | {"LKARRAY_BENCHMARKS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bar" in done.stdout
