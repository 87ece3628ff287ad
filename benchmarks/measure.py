"""What the benchmarks share: inputs on disk, ways in processes of their own, one table of ratios.

Each way runs in a fresh process, which imports what it needs first and then reports seconds and
the peak of resident memory beyond that. Ways are interleaved and repeated; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Where inputs and results go: several GB at full size.
FOLDER = Path(
    os.environ.get("LKARRAY_BENCHMARKS", Path(__file__).parent.parent / "runs" / "benchmarks")
)


def losses(n: int, chains: int, draws: int, seed: int = 0) -> Path:
    """Return a Zarr of losses: shared directions of falling strength, noise, offsets, scales."""
    import numpy as np
    import zarr
    from zarr.codecs import Crc32cCodec

    path = FOLDER / f"losses-{n}-{chains}-{draws}-{seed}.zarr"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    rng = np.random.default_rng(seed)
    modes = 200
    shared = rng.standard_normal((chains * draws, modes), dtype=np.float32)
    shared *= np.arange(1, modes + 1, dtype=np.float32) ** -0.8
    group = zarr.create_group(partial, zarr_format=3)
    array = group.create_array(
        "loss",
        shape=(chains, draws, n),
        chunks=(1, draws, min(2048, n)),
        dtype="float32",
        fill_value=np.nan,
        compressors=(Crc32cCodec(),),
        dimension_names=("chain", "draw", "sample"),
    )
    for start in range(0, n, 2048):
        width = min(2048, n - start)
        block = shared @ rng.standard_normal((modes, width), dtype=np.float32)
        block += 0.5 * rng.standard_normal(block.shape, dtype=np.float32)
        block *= np.exp(rng.standard_normal(width, dtype=np.float32) / 2)
        block += 3
        array[:, :, start : start + width] = block.reshape(chains, draws, width)
    for name, values in {"sample": np.arange(n), "label": np.arange(n) % 100}.items():
        coord = group.create_array(name, shape=(n,), dtype="int64", dimension_names=("sample",))
        coord[:] = values
    partial.replace(path)
    return path


def open_losses(path: Path | str) -> Any:
    """Open the losses lazily, by their stored chunks."""
    import xarray as xr

    return xr.open_zarr(path, consolidated=False, chunks={})["loss"]


def _tree(root: int) -> list[int]:
    """Return the processes below one, itself among them."""
    pids = [root]
    for pid in pids:  # grows while it is walked
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                pids += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return pids


def _resident() -> int:
    """Return the memory of this process and its children, shared pages counted once."""
    total = 0
    for pid in _tree(os.getpid()):
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
        except OSError:
            continue
    return total


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Run ``work`` here; return its seconds, peak memory beyond now, and what it returned."""
    base, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"seconds": seconds, "mib": (max(peak[0], base) - base) / 2**20, "value": value}


def timed_alone(work: Callable[[], Any]) -> dict[str, Any]:
    """Do the same without a watcher, which slows what allocates much: for work of one process."""
    base = _resident()
    began = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"seconds": seconds, "mib": max(peak - base, 0) / 2**20, "value": value}


def arguments(description: str | None) -> argparse.Namespace:
    """Parse what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="reduced sizes: correctness, not time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main(ways: dict[str, Callable[..., dict[str, Any]]], asked: argparse.Namespace) -> bool:
    """In the process of one way, run it and print its result; return whether that was so."""
    if asked.way is None:
        return False
    print(json.dumps(ways[asked.way](**json.loads(asked.options))))
    return True


def compare(
    ways: list[str],
    options: dict[str, Any],
    repeats: int,
    once: tuple[str, ...] = (),
    pythons: dict[str, str | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run ways of the calling script, interleaved; return the medians of each.

    ``pythons`` names the interpreters of ways that need another than this one.
    """
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways:
            if repeat and way in once:
                continue
            python = (pythons or {}).get(way) or sys.executable
            command = [python, sys.argv[0], "--way", way, "--options", json.dumps(options)]
            env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        way: {
            "seconds": statistics.median(run["seconds"] for run in own),
            "mib": max(run["mib"] for run in own),
            "value": own[-1]["value"],
        }
        for way, own in runs.items()
    }


def table(results: dict[str, dict[str, Any]], reference: str, bars: dict[str, float]) -> None:
    """Print seconds, peaks and ratios to a reference, with the bar of each."""
    base = results[reference]["seconds"]
    for way, result in results.items():
        ratio = result["seconds"] / base
        bar = ""
        if way in bars:
            bar = f"bar {bars[way]:.2f}: {'met' if ratio <= bars[way] else 'NOT met'}"
        print(f"{way:34s} {result['seconds']:8.2f} s {result['mib']:8.0f} MiB {ratio:7.2f}  {bar}")
