"""Opening a store of 10,000 chunks: against plain xarray, and against another lkarray.

    python benchmarks/opening.py [--small] [--against CHECKOUT]

``lk.open`` reads records, labels and metadata, checks their checksums, and builds a graph of one
task a chunk; plain xarray reads the same labels and builds the same graph. With ``--against`` the
package of another checkout opens the store too, in processes that take turns with this one's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from measure import FOLDER

CHAINS, BAR = 10, 3.0
TIMED = """
import sys, time, logging
logging.disable(logging.CRITICAL)
import xarray as xr, lkarray as lk
path, way = sys.argv[1:3]
def plain():
    for group in ("losses", "sample_stats"):
        xr.open_zarr(path, group=group, chunks={}, consolidated=False)
work = plain if way == "plain" else lambda: lk.open(path)
work()
times = []
for _ in range(5):
    began = time.perf_counter()
    work()
    times.append(time.perf_counter() - began)
print(min(times))
"""


def store(blocks: int) -> Path:
    """Return a store of ``CHAINS * blocks * 10`` chunks of losses, sampled for real."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import lkarray as lk
    from lkarray.store import layout

    path = FOLDER / f"opening-{blocks}.zarr"
    shutil.rmtree(path, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    layout.block_draws = lambda draws, values: 4
    layout.loss_chunks = lambda depth, samples, tail=(): (1, depth, 10)
    torch.manual_seed(0)
    x = torch.randn(100, 4)
    data = TensorDataset(x, x[:, :3].argmax(1))
    lk.sample(
        lk.LocalPosterior(nn.Linear(4, 3), data, nbeta=10, gamma=50),
        data,
        sampler=lk.SGLD(1e-3),
        chains=CHAINS,
        draws=4 * blocks,
        batch_size=16,
        coords={"label": data.tensors[1].numpy(), "name": [f"image {i}" for i in range(100)]},
        store=path,
        chains_per_device=1,
        progress=False,
    )
    return path


def seconds(path: Path, way: str, checkout: Path) -> float:
    """Return the least time of opening in a fresh process, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", TIMED, str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="400 chunks instead of 10,000")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    path = store(4 if options.small else 100)
    ways = {"plain xarray": ("plain", here), "lk.open": ("open", here)}
    if options.against:
        ways["lk.open, the other version"] = ("open", options.against.resolve())
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 if options.small else 7):
        for name, (way, checkout) in ways.items():
            runs[name].append(seconds(path, way, checkout))
    medians = {name: statistics.median(times) for name, times in runs.items()}
    for name, median in medians.items():
        print(f"{name:30} {1000 * median:8.1f} ms")
    print(
        f"lk.open / plain xarray         {medians['lk.open'] / medians['plain xarray']:8.2f} "
        f"(bar {BAR})"
    )
    if options.against:
        ratio = medians["lk.open"] / medians["lk.open, the other version"]
        print(f"lk.open / the other version    {ratio:8.2f} (bar 1.05)")
    shutil.rmtree(path)


if __name__ == "__main__":
    main()
