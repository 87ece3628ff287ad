"""Kernels of a gradient tensor larger than memory: 12.8 GB, all processes under 3 GiB.

LeNet-5 learns Fashion-MNIST for 26 epochs of 20 batches, recorded; the loss gradients of 2,000
examples at the start of each epoch, 26 x 2,000 x 61,706, go to disk. From there: the PLGK of all
examples, the temporal kernel, and the top 50 joint modes of (time, example). Files are dropped
from the page cache before each measurement. Each is compared with the larger of two floors of the
same run: reading the bytes as often as its docstring says, and its operations at the rate of
float32 products. Run: ``python benchmarks/gradient_tensor.py --data FOLDER [--small]``; FOLDER
has Fashion-MNIST's four files.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import FOLDER, arguments, compare, main, timed

PATH = FOLDER / "gradient-tensor.zarr"
MODES = 50


def build(epochs: int, batches: int, examples: int, data: str, memory: str) -> None:
    """Record the run and store its gradients, unless that was done; continue what was begun."""
    import torch
    from example_gradients import lenet
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset

    import lkarray as lk
    from lkarray_workflows.shared.images import read_images

    if data:
        images, labels = read_images(Path(data), "train")
    else:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 255, (2000, 28, 28)).astype(np.uint8)
        labels = rng.integers(0, 10, 2000)
    inputs = torch.from_numpy(images[: batches * 256].copy()).unsqueeze(1) / 255
    targets = torch.from_numpy(labels[: batches * 256].astype(np.int64))
    train = TensorDataset(inputs, targets)
    model = lenet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = np.random.default_rng(0)
    plan = [
        part
        for _ in range(epochs)
        for part in np.array_split(order.permutation(len(train)), batches)
    ]
    with lk.record(model, optimizer, train, store=PATH) as trace:
        for batch in trace.remaining(plan):
            with trace.step(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
    began = time.perf_counter()
    tensor = lk.gradient_features(
        trace, np.arange(examples), store=PATH, memory=memory, coords={"label": targets[:examples]}
    )
    size = tensor["gradient"].nbytes
    seconds = time.perf_counter() - began
    print(f"{size / 1e9:.1f} GB of gradients, {tensor['gradient'].shape}, in {seconds:.0f} s")


def drop() -> None:
    """Ask the system to forget the tensor's files."""
    for path in (PATH / "gradients" / "gradient").rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _opened() -> Any:
    import lkarray as lk

    drop()
    return lk.open(PATH)["gradients"].to_dataset()


def plgk(memory: str) -> dict[str, Any]:
    import lkarray as lk

    G = _opened()
    timing = timed(lambda: lk.plgk(G, memory=memory).values)
    n, m = timing["value"].shape
    operations = G.sizes["time"] * G.sizes["param"] * n * m
    return timing | {"value": [1, operations, float(np.trace(timing["value"], dtype=np.float64))]}


def temporal(memory: str) -> dict[str, Any]:
    import lkarray as lk

    G = _opened()
    timing = timed(lambda: lk.temporal_kernel(G, weight=None, memory=memory).values)
    operations = G.sizes["example"] * G.sizes["param"] * len(timing["value"]) ** 2
    return timing | {"value": [1, operations, float(np.trace(timing["value"], dtype=np.float64))]}


def modes(memory: str) -> dict[str, Any]:
    import lkarray as lk

    G = _opened()
    timing = timed(lambda: lk.svd(G["gradient"], MODES, over="param", memory=memory).compute())
    passes = int(timing["value"]["passes"])
    n, p = G.sizes["time"] * G.sizes["example"], G.sizes["param"]
    # Each pass of the iteration multiplies twice; the projection once.
    operations = (2 * passes - 1) * 2 * n * p * (MODES + 10)
    energy = float((timing["value"]["singular_value"] ** 2).sum())
    return timing | {"value": [passes, operations, energy]}


def read(memory: str) -> dict[str, Any]:
    """Read the tensor's files, one after the other: the floor of reading."""
    drop()
    buffer = bytearray(64 << 20)

    def work() -> int:
        total = 0
        for path in sorted((PATH / "gradients" / "gradient" / "c").rglob("*")):
            if path.is_file():
                with open(path, "rb", buffering=0) as file:
                    while size := file.readinto(buffer):
                        total += size
        return total

    return timed(work)


def products(memory: str) -> dict[str, Any]:
    """Multiply in float32, with shapes that the PLGK takes: the floor of computing."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2000, 8192), dtype=np.float32)
    a @ a.T

    def work() -> float:
        for _ in range(20):
            a @ a.T
        return 20.0 * 2000 * 2000 * 8192

    return timed(work)


WAYS = {"read": read, "products": products, "plgk": plgk, "temporal": temporal, "modes": modes}


def report(options: dict[str, Any], repeats: int) -> None:
    """Run all, and print each beside its floor."""
    timings = compare(list(WAYS), options, repeats)
    disk = timings["read"]["value"] / timings["read"]["seconds"]
    rate = timings["products"]["value"] / timings["products"]["seconds"]
    print(f"disk {disk / 1e9:.2f} GB/s, products {rate / 1e9:.0f} G operations a second")
    for name in ("plgk", "temporal", "modes"):
        passes, operations, _ = timings[name]["value"]
        floors = {"disk": passes * timings["read"]["value"] / disk, "products": operations / rate}
        floor = max(floors, key=lambda key: floors[key])
        ratio = timings[name]["seconds"] / floors[floor]
        print(
            f"{name:10s} {timings[name]['seconds']:7.1f} s {timings[name]['mib']:6.0f} MiB  "
            f"{passes} passes, floor {floors[floor]:6.1f} s ({floor})  {ratio:5.2f}  bar 1.50"
        )
    traces = [timings[name]["value"][2] for name in ("plgk", "temporal")]
    assert abs(traces[0] / traces[1] - 1) < 1e-4, "both traces are the sum of squared gradients"
    assert timings["modes"]["value"][2] <= traces[0] * (1 + 1e-4)


if __name__ == "__main__":
    data = ""
    if "--data" in sys.argv:
        at = sys.argv.index("--data")
        data = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    asked = arguments(__doc__)
    if not main(WAYS, asked):
        FOLDER.mkdir(parents=True, exist_ok=True)
        if asked.small:
            build(3, 4, 200, data, "256 MiB")
        else:
            build(26, 20, 2000, data, "1 GiB")
        report(
            {"memory": "256 MiB" if asked.small else "1536 MiB"},
            1 if asked.small else asked.repeats,
        )
