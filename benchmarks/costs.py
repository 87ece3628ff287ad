"""What planning a million samples costs, and the costed plan of docs/scaling.md, n = 1,280,000.

Run: ``python benchmarks/costs.py``. ``--page PATH`` puts the tables there.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Of the plan: ImageNet's training set, rounded, at the settings of "loss-kernel/imagenet".
SAMPLES, CHAINS, DRAWS, BURN_IN, BATCH = 1_280_000, 15, 500, 100, 256
NEIGHBORS, GROUPS, QUERIES, MODES, PASSES = 30, 1000, 1000, 50, 5
#: What a GPU sustains in forward passes, as assumed: operations a second.
ASSUMED = 50e12
#: What the Bayesian-probes paper reports (in its appendix) of GoogLeNet: GPU-hours, images, draws.
REPORTED = (4 * 3, 2_500, 30_000)
#: Of the kernels' plans: what a process may hold, with two tasks at once.
BUDGET, TASKS_AT_ONCE = "16 GiB", 2
NAMES = {"top-30": "30 neighbours", "dense": "dense kernel, written"}


def lazy_losses(n: int) -> Any:
    """Return losses of n samples that no memory holds, in the chunks that a store would have."""
    import dask.array as da
    import xarray as xr

    from lkarray.store.layout import block_draws, loss_chunks

    chunks = loss_chunks(block_draws(DRAWS, n), n)
    data = da.zeros((CHAINS, DRAWS, n), dtype="f4", chunks=chunks)
    return xr.DataArray(data, dims=("chain", "draw", "sample"), name="loss")


def million() -> None:
    """Plan the top-30 of a million samples with 7,500 draws."""
    import lkarray as lk

    began = time.perf_counter()
    near = lk.neighbors(lazy_losses(1_000_000), 30, memory="8 GiB", precision="float32")
    plan = lk.plan(near)
    seconds = time.perf_counter() - began
    print(f"a million samples: planned in {seconds:.2f} s (bar 5), {plan.tasks} tasks (bar 10,000)")
    print(plan)
    assert plan.tasks < 10_000


class Cost(NamedTuple):
    """A line of the plan: what, how much, by which formula, and where that is from."""

    what: str
    value: str
    formula: str
    source: str


def storage_and_sampling() -> list[Cost]:
    """Return what sampling takes, by arithmetic and the library's own layout."""
    from torchvision.models import GoogLeNet_Weights, ResNet50_Weights

    from lkarray.store.layout import block_draws, loss_chunks

    n, s = SAMPLES, CHAINS * DRAWS
    depth = block_draws(DRAWS, n)
    chunk = loss_chunks(depth, n)
    files = CHAINS * -(-DRAWS // depth) * -(-n // chunk[2])
    trained = CHAINS * (BURN_IN + DRAWS) * BATCH
    layout = "computed: `lkarray.store.layout`"
    costs = [
        Cost("loss tensor", f"{4 * n * s / 1e9:.1f} GB", "4 n S", "arithmetic"),
        Cost("a chunk of it", f"{chunk}, {4 * np.prod(chunk) / 1e6:.2f} MB", "", layout),
        Cost("files", f"{files:,}", "chains x blocks of draws x blocks of samples", layout),
        Cost("a chain's open block", f"{4 * depth * n / 1e6:.0f} MB", "4 n x draws", layout),
        Cost("forward passes, observed", f"{n * s:.2e}", "n S", "arithmetic"),
        Cost(
            "images in steps, forward and back",
            f"{trained:.2e}",
            "chains (burn-in + draws) batch",
            "arithmetic",
        ),
    ]
    for name, weights in (("ResNet-50", ResNet50_Weights), ("GoogLeNet", GoogLeNet_Weights)):
        each = 2e9 * weights.IMAGENET1K_V1.meta["_ops"]
        costs += [
            Cost(
                f"{name}, operations",
                f"{n * s * each:.2e}",
                f"n S x {each / 1e9:.2f} G",
                "torchvision's count of multiply-adds, doubled",
            ),
            Cost(
                f"{name}, GPU-hours",
                f"{n * s * each / ASSUMED / 3600:,.0f}",
                f"operations / {ASSUMED / 1e12:.0f} TFLOP/s / 3600",
                "**assumed** rate",
            ),
        ]
    spent, images, draws = REPORTED
    costs.append(
        Cost(
            "GoogLeNet, GPU-hours, as in the paper",
            f"{spent * n * s / (images * draws):,.0f}",
            f"{spent} h x n S / ({images:,} x {draws:,})",
            "Bayesian-probes paper: 3 hours on 4 A100",
        )
    )
    return costs


def operations() -> list[tuple[str, float, str]]:
    """Return operations of what is asked of the losses, with their formulas."""
    n, s = SAMPLES, CHAINS * DRAWS
    half = f"{NEIGHBORS} neighbours of every image, or the dense kernel"
    return [
        (half, n * n * s, "n^2 S"),
        ("... with a tenth of the draws", n * n * s / 10, "n^2 S / 10"),
        ("... of every tenth image among its like", n * n * s / 100, "n^2 S / 100"),
        (f"correlations of {QUERIES:,} images with all", 2 * QUERIES * n * s, "2 q n S"),
        (f"mean kernel of {GROUPS:,} classes", 2 * n * s * GROUPS, "2 n S g"),
        (f"{MODES} modes, {PASSES} passes", 4 * n * s * (MODES + 10) * PASSES, "4 n S (k + 10) p"),
        ("CKA of two such kernels", 3 * 2 * n * s * s, "3 x 2 n S^2"),
    ]


def planned(n: int, way: str) -> Any:
    """Return `lk.plan` of the neighbours or the dense kernel of n samples."""
    return _plan(n, way, BUDGET)


def least_budget(n: int, way: str) -> int:
    """Return the KiB that a refusal says would do, checked to do."""
    from lkarray.errors import MemoryBudgetError

    try:
        _plan(n, way, "1 MiB")
    except MemoryBudgetError as error:
        needed = int(re.search(r"(\d+) KiB can", str(error))[1])  # type: ignore[index]
        _plan(n, way, f"{needed} KiB")
        return needed
    return 1024


def _plan(n: int, way: str, memory: str) -> Any:
    import lkarray as lk

    x = lazy_losses(n)
    if way == "dense":
        return lk.plan(lk.correlation(x, memory=memory, precision="float32"))
    return lk.plan(lk.neighbors(x, NEIGHBORS, memory=memory, precision="float32"))


def size(count: int) -> str:
    """Return bytes as MB, GB or TB."""
    for unit in ("MB", "GB"):
        if count < 1e9:
            return f"{count / 1e6:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count / 1e6:.2f} TB"


def plan_rows() -> list[list[str]]:
    """Return what `lk.plan` says of growing n."""
    rows = []
    for way in NAMES:
        for n in (10_000, 100_000, 1_000_000, SAMPLES):
            plan = planned(n, way)
            rows.append(
                [
                    NAMES[way].removesuffix(", written"),
                    f"{n:,}",
                    f"{plan.side:,}",
                    f"{plan.tiles:,}",
                    f"{plan.tasks:,}",
                    f"{plan.operations:.2e}",
                    size(plan.bytes_read),
                    size(plan.bytes_written),
                    f"{plan.peak / 2**30:.1f} GiB",
                    f"{least_budget(n, way) / 2**20:.2f} GiB",
                ]
            )
    return rows


def hours(rate: float) -> list[list[str]]:
    """Return core-hours of each question at a rate of one core, in GFLOP/s."""
    return [
        [what, f"{count:.2e}", formula, f"{count / rate / 1e9 / 3600:,.2f}"]
        for what, count, formula in operations()
    ]


def core_rate(precision: str = "float32", repeats: int = 7) -> float:
    """Return GFLOP/s of one core in a product of panels like the engine's, at best."""
    from threadpoolctl import threadpool_limits

    from lkarray.engine.blas import multiply
    from lkarray.engine.lowprecision import LowPanel, multiply_coarse

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((DRAWS * CHAINS, 2048), dtype=np.float32) for _ in range(2))
    work = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    with threadpool_limits(1):
        if precision == "float32":
            work_once = lambda: multiply(a, b)  # noqa: E731
        else:
            x, y = LowPanel.of(a), LowPanel.of(b)
            work_once = lambda: multiply_coarse(x, y)  # noqa: E731
        work_once()
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            work_once()
            best = min(best, time.perf_counter() - began)
    return work / best / 1e9


def markdown(head: list[str], rows: list[Any]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(line.replace("|  |", "| |") for line in lines)


COST_HEAD = ["", "value", "formula", "where from"]
HOURS_HEAD = ["question", "operations", "formula", "core-hours"]
PLAN_HEAD = [
    *("", "n", "side", "tiles", "tasks", "operations", "read at most"),
    *("result", "peak", "least budget"),
]


def hours_text(rate: int, low: int) -> str:
    """Return what was measured of a core, and the core-hours that follow."""
    return (
        f"One core multiplies panels of 7,500 x 2,048 at {rate} GFLOP/s in float32 (measured, best "
        f"of 7), at {low} in bfloat16.\n\n{markdown(HOURS_HEAD, hours(rate))}"
    )


def print_plan(page: Path | None) -> None:
    """Print the tables of docs/scaling.md, and put them there if asked."""
    two_tasks()
    costs, plans = markdown(COST_HEAD, storage_and_sampling()), markdown(PLAN_HEAD, plan_rows())
    measured = hours_text(round(core_rate()), round(core_rate("bfloat16")))
    print(costs, plans, measured, sep="\n\n")
    for way in NAMES:
        print(f"\n{NAMES[way]}, n = {SAMPLES:,}:\n{planned(SAMPLES, way)}")
    if page is not None:
        fill(page, costs=costs, plans=plans, hours=measured)


def fill(page: Path, **tables: str) -> None:
    """Put texts between their comments on a page, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    text = page.read_text()
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"
    page.write_text(text)


def two_tasks() -> None:
    """Keep this process to two cores, by which `lk.plan` counts the tasks at once."""
    assert "dask" not in sys.modules
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:TASKS_AT_ONCE])


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path)
    print_plan(parser.parse_args().page)


if __name__ == "__main__":
    report()
