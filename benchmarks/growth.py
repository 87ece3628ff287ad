"""How time and memory grow with the samples, and what planning a million costs.

n = 5, 10, 20, 40 thousand at S = 7,500 under one budget, which the smallest fills already:
top-30 and the dense kernel; the exponent of time (bar 2.1), and the spread of peak memory (bar
15%). Run: ``python benchmarks/growth.py [--small]``. ``--json PATH`` keeps what is measured, and
measures nothing again that PATH has; ``--figure PATH`` draws it, and ``--page PATH`` puts it there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from costs import CHAINS, DRAWS, NAMES, fill, markdown, million
from measure import FOLDER, arguments, compare, losses, main, open_losses, timed


def top(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    x = open_losses(path)
    run = timed(lambda: lk.neighbors(x, 30, precision="float32", memory=memory).compute())
    return run | {"value": None}


def dense(path: str, memory: str) -> dict[str, Any]:
    import lkarray as lk

    out = FOLDER / "growth.zarr"
    shutil.rmtree(out, ignore_errors=True)
    run = timed(lambda: lk.save(lk.correlation(open_losses(path), memory=memory), out))
    shutil.rmtree(out)
    return run | {"value": None}


WAYS = {"top-30": top, "dense": dense}


def measure(small: bool, kept: Path | None) -> dict[str, Any]:
    """Return seconds and MiB by way and n; those that ``kept`` has are taken from there."""
    sizes = (500, 1000, 2000) if small else (5_000, 10_000, 20_000, 40_000)
    chains, draws = (4, 25) if small else (CHAINS, DRAWS)
    memory = "64 MiB" if small else "256 MiB"
    measured: dict[str, Any] = {"draws": chains * draws, "memory": memory, "rows": {}}
    if kept is not None and kept.exists():
        before = json.loads(kept.read_text())
        same = all(before[key] == measured[key] for key in ("draws", "memory"))
        if not same:
            sys.exit(f"{kept} was measured with other settings; choose another --json")
        measured = before
    for n in sizes:
        if str(n) not in measured["rows"]:
            path = str(losses(n, chains, draws))
            ways = compare(list(WAYS), {"path": path, "memory": memory}, 1)
            measured["rows"][str(n)] = {
                way: {"seconds": run["seconds"], "mib": run["mib"]} for way, run in ways.items()
            }
            if kept is not None:
                kept.write_text(json.dumps(measured, indent=1) + "\n")
        for way, run in measured["rows"][str(n)].items():
            print(f"{way:8s} n = {n:6d} {run['seconds']:8.2f} s {run['mib']:6.0f} MiB")
    return measured


def curves(measured: dict[str, Any]) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the n, and seconds and MiB of each way."""
    sizes = sorted(map(int, measured["rows"]))
    return np.array(sizes), {
        way: tuple(  # type: ignore[misc]
            np.array([measured["rows"][str(n)][way][what] for n in sizes])
            for what in ("seconds", "mib")
        )
        for way in WAYS
    }


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw time and memory against n, on logarithmic axes, with the line of n squared."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    sizes, ways = curves(measured)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (way, (seconds, mib)), color, marker in zip(
        ways.items(), ("#1f77b4", "#d95f02"), "os", strict=True
    ):
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        label = f"{NAMES[way]}: $n^{{{slope:.2f}}}$"
        left.plot(sizes, seconds, marker=marker, color=color, label=label)
        left.plot(sizes, seconds[0] * (sizes / sizes[0]) ** 2.0, color=color, ls=":", lw=1)
        right.plot(sizes, mib, marker=marker, color=color, label=NAMES[way])
    left.plot([], [], color="0.4", ls=":", lw=1, label="$n^2$ from the first")
    budget = float(measured["memory"].split()[0])
    right.axhline(budget, color="0.4", ls="--", lw=1, label=f"budget, {measured['memory']}")
    whole = 4 * measured["draws"] * sizes / 2**20
    right.plot(sizes, whole, color="0.4", ls=":", lw=1, label="the losses alone")
    for axes, what in ((left, "seconds"), (right, "peak MiB beyond the interpreter")):
        axes.set(xscale="log", yscale="log", xlabel="samples n", ylabel=what)
        axes.set_xticks(sizes, minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def growth_text(measured: dict[str, Any], figure: str) -> str:
    """Return the figure, and a table of what was measured."""
    sizes, ways = curves(measured)
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


def summarise(measured: dict[str, Any]) -> None:
    """Print exponents and spreads."""
    sizes, ways = curves(measured)
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
    parser.add_argument("--page", type=Path)
    own, sys.argv[1:] = parser.parse_known_args()
    return own


def report() -> None:
    own = own_arguments()
    asked = arguments(__doc__)
    if main(WAYS, asked):
        return
    measured = measure(asked.small, own.json)
    summarise(measured)
    if own.figure is not None:
        draw(measured, own.figure)
        if own.page is not None:
            figure = os.path.relpath(own.figure, own.page.parent)
            fill(own.page, growth=growth_text(measured, figure))
    million()


if __name__ == "__main__":
    report()
