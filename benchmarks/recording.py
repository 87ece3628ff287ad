"""What recording costs a training loop: LeNet-5, batches of 256, Adam, every step stored.

Blocks of steps with and without `lk.record` alternate in one process, on the same batches, to a
store on disk; medians of seconds a step. With ``--every K`` only each K-th state is stored.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time

import torch
from example_gradients import lenet
from measure import FOLDER
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk


def run(steps: int, repeats: int, every: int) -> tuple[float, float]:
    """Return seconds of a step: of the plain loop, and of the recorded one."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(10_000, 1, 28, 28), torch.randint(0, 10, (10_000,))
    data = TensorDataset(inputs, labels)
    path = FOLDER / "recording.zarr"
    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(repeats + 1):
        for recorded in (False, True):
            shutil.rmtree(path, ignore_errors=True)
            model = lenet()
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            order = torch.randperm(len(data))

            def update(batch: torch.Tensor) -> None:
                optimizer.zero_grad()  # noqa: B023
                F.cross_entropy(model(inputs[batch]), labels[batch]).backward()  # noqa: B023
                optimizer.step()  # noqa: B023

            batches = [order[i * 256 % 9700 :][:256] for i in range(steps)]
            began = time.perf_counter()
            if recorded:
                with lk.record(model, optimizer, data, store=path, every=every) as trace:
                    began = time.perf_counter()
                    for batch in batches:
                        with trace.step(batch):
                            update(batch)
            else:
                for batch in batches:
                    update(batch)
            if repeat:
                times[recorded].append((time.perf_counter() - began) / steps)
    shutil.rmtree(path, ignore_errors=True)
    return statistics.median(times[False]), statistics.median(times[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    plain, recorded = run(*((5, 1) if args.small else (400, 5)), args.every)
    print(f"a training step           {1e3 * plain:6.1f} ms")
    print(f"the same, recorded        {1e3 * recorded:6.1f} ms")
    print(f"ratio                     {recorded / plain:6.2f}    bar 1.30")


if __name__ == "__main__":
    main()
