"""How time and memory grow with the samples, and what planning a million costs.

n = 5, 10, 20, 40 thousand at S = 7,500 under one budget, which the smallest fills already:
top-30 and the dense kernel; the exponent of time (bar 2.1), and the spread of peak memory (bar
15%). Run: ``python benchmarks/growth.py [--small]``. ``--json PATH`` keeps what is measured, and
measures nothing again that PATH has; ``--figure PATH`` draws it. ``--plan`` measures no growth: it
prints the costed plan of docs/scaling.md, for n = 1,280,000. ``--page PATH`` puts either there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import FOLDER, arguments, compare, losses, main, open_losses, timed

#: Of the plan: ImageNet's training set, rounded, at the settings of "loss-kernel/imagenet".
SAMPLES, CHAINS, DRAWS, BURN_IN, BATCH = 1_280_000, 15, 500, 100, 256
NEIGHBORS, GROUPS, QUERIES, MODES, PASSES = 30, 1000, 1000, 50, 5
#: What a GPU sustains in forward passes, as assumed: operations a second.
ASSUMED = 50e12
#: What the Bayesian-probes paper reports (in its appendix) of GoogLeNet: GPU-hours, images, draws.
REPORTED = (4 * 3, 2_500, 30_000)
#: Of the kernels' plans: what a process may hold, with two tasks at once.
BUDGET, TASKS_AT_ONCE = "16 GiB", 2


def top(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    x = open_losses(path)
    found = timed(lambda: lk.neighbors(x, 30, precision="float32", memory=memory).compute())
    return found | {"value": None}


def dense(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    out = FOLDER / "growth.zarr"
    shutil.rmtree(out, ignore_errors=True)
    found = timed(lambda: lk.save(lk.correlation(open_losses(path), memory=memory), out))
    shutil.rmtree(out)
    return found | {"value": None}


WAYS = {"top-30": top, "dense": dense}
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


# --- the costed plan ------------------------------------------------------------------------------


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
    for way in WAYS:
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
    for way in WAYS:
        print(f"\n{NAMES[way]}, n = {SAMPLES:,}:\n{planned(SAMPLES, way)}")
    if page is not None:
        fill(page, costs=costs, plans=plans, hours=measured)


def fill(page: Path, **parts: str) -> None:
    """Put texts between their marks on a page, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    text = page.read_text()
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{part}\n<!-- /{name} -->{after}"
    page.write_text(text)


def two_tasks() -> None:
    """Keep this process to two cores, by which `lk.plan` counts the tasks at once."""
    assert "dask" not in sys.modules
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:TASKS_AT_ONCE])


# --- growth ---------------------------------------------------------------------------------------


def measure(small: bool, kept: Path | None) -> dict[str, Any]:
    """Return seconds and MiB by way and n; those that ``kept`` has are taken from there."""
    sizes = (500, 1000, 2000) if small else (5_000, 10_000, 20_000, 40_000)
    chains, draws = (4, 25) if small else (CHAINS, DRAWS)
    memory = "64 MiB" if small else "256 MiB"
    found: dict[str, Any] = {"draws": chains * draws, "memory": memory, "rows": {}}
    if kept is not None and kept.exists():
        before = json.loads(kept.read_text())
        same = all(before[key] == found[key] for key in ("draws", "memory"))
        if not same:
            sys.exit(f"{kept} was measured with other settings; choose another --json")
        found = before
    for n in sizes:
        if str(n) not in found["rows"]:
            path = str(losses(n, chains, draws))
            ways = compare(list(WAYS), {"path": path, "memory": memory}, 1)
            found["rows"][str(n)] = {
                way: {"seconds": one["seconds"], "mib": one["mib"]} for way, one in ways.items()
            }
            if kept is not None:
                kept.write_text(json.dumps(found, indent=1) + "\n")
        for way, one in found["rows"][str(n)].items():
            print(f"{way:8s} n = {n:6d} {one['seconds']:8.2f} s {one['mib']:6.0f} MiB")
    return found


def curves(found: dict[str, Any]) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the n, and seconds and MiB of each way."""
    sizes = sorted(map(int, found["rows"]))
    return np.array(sizes), {
        way: tuple(  # type: ignore[misc]
            np.array([found["rows"][str(n)][way][what] for n in sizes])
            for what in ("seconds", "mib")
        )
        for way in WAYS
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw time and memory against n, on logarithmic axes, with the line of n squared."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    sizes, ways = curves(found)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (way, (seconds, mib)), color, mark in zip(
        ways.items(), ("#1f77b4", "#d95f02"), "os", strict=True
    ):
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        label = f"{NAMES[way]}: $n^{{{slope:.2f}}}$"
        left.plot(sizes, seconds, marker=mark, color=color, label=label)
        left.plot(sizes, seconds[0] * (sizes / sizes[0]) ** 2.0, color=color, ls=":", lw=1)
        right.plot(sizes, mib, marker=mark, color=color, label=NAMES[way])
    left.plot([], [], color="0.4", ls=":", lw=1, label="$n^2$ from the first")
    budget = float(found["memory"].split()[0])
    right.axhline(budget, color="0.4", ls="--", lw=1, label=f"budget, {found['memory']}")
    whole = 4 * found["draws"] * sizes / 2**20
    right.plot(sizes, whole, color="0.4", ls=":", lw=1, label="the losses alone")
    for axes, what in ((left, "seconds"), (right, "peak MiB beyond the interpreter")):
        axes.set(xscale="log", yscale="log", xlabel="samples n", ylabel=what)
        axes.set_xticks(sizes, minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def growth_text(found: dict[str, Any], figure: str) -> str:
    """Return the figure, and a table of what was measured."""
    sizes, ways = curves(found)
    rows = []
    for way, (seconds, peaks) in ways.items():
        slopes = np.diff(np.log(seconds)) / np.diff(np.log(sizes))
        fit = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        for what, values in (("s", seconds), ("peak MiB", peaks)):
            grows = f"n^{fit:.2f}, last step n^{slopes[-1]:.2f}" if what == "s" else ""
            cells = [f"{value:.1f}" if what == "s" else f"{value:.0f}" for value in values]
            rows.append([f"{NAMES[way]}, {what}", *cells, grows])
    head = ["n", *(f"{n:,}" for n in sizes), "grows as"]
    return f"![Time and memory against the number of samples]({figure})\n\n{markdown(head, rows)}"


def summarise(found: dict[str, Any]) -> None:
    """Print exponents and spreads."""
    sizes, ways = curves(found)
    for way, (seconds, peaks) in ways.items():
        steps = np.diff(np.log(seconds)) / np.diff(np.log(sizes))
        fit = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        spread = peaks / np.median(peaks) - 1
        print(f"{way}: time grows as n^{fit:.2f} (last step n^{steps[-1]:.2f}; bar 2.1)")
        print(
            f"  peaks within {spread.max():+.0%} and {spread.min():+.0%} of their median (bar 15%)"
        )


def own_arguments() -> argparse.Namespace:
    """Take from the command line what other benchmarks do not have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--page", type=Path)
    own, sys.argv[1:] = parser.parse_known_args()
    return own


def report() -> None:
    own = own_arguments()
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    if own.plan:
        print_plan(own.page)
        return
    found = measure(asked.small, own.json)
    summarise(found)
    if own.figure is not None:
        draw(found, own.figure)
        if own.page is not None:
            figure = os.path.relpath(own.figure, own.page.parent)
            fill(own.page, growth=growth_text(found, figure))
    million()


if __name__ == "__main__":
    report()
