import dask.array as da
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from lkarray.engine.plan import make_plan, memory_budget
from tests.helpers.losses import random_losses
from tests.helpers.operands import operand


def test_budget__comes_from_the_argument_the_environment_or_the_machine(monkeypatch):
    assert memory_budget("2 GiB") == 2 << 30
    monkeypatch.setenv("LKARRAY_MEMORY", "300 MB")
    assert memory_budget(None) == 300_000_000
    assert memory_budget(5) == 5
    monkeypatch.delenv("LKARRAY_MEMORY")
    assert memory_budget(None) > 1 << 28
    for wrong in ("lots", "-1 GB"):
        with pytest.raises(errors.MemoryBudgetError, match="memory"):
            memory_budget(wrong)


def test_plan__stays_under_ten_thousand_tasks_and_prints(monkeypatch):
    huge = xr.DataArray(
        da.zeros((15, 500, 1_000_000), dtype="f4", chunks=(1, 100, 8192)),
        dims=("chain", "draw", "sample"),
    )
    plan = make_plan(operand(huge), memory="3 GB")
    tiles = len(plan.rows) * (len(plan.rows) + 1) // 2
    assert tiles <= 10_000
    assert "tiles of side" in str(plan)
    assert "within 2.79 GiB a process" in str(plan)


def test_plan__refuses_a_budget_below_one_chunk_of_the_source(rng):
    wide = random_losses(rng, chains=2, draws=100, samples=500).chunk()
    with pytest.raises(errors.MemoryBudgetError, match=r"KiB can.*\.chunk\(\) the tensor smaller"):
        lk.correlation(wide, memory="100 KB")
