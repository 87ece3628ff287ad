"""What an audit costs, beside the training that it audits.

Anonymous 2026 has 17.8 times, and 14 with a stride of 2 (A.5).

LeNet-5, batches of 256 of 51,200 images, Adam, 256 audited examples. Each way runs in a process of
its own: plain training; the same steps recorded and audited, at every step and at every second;
half of the audited examples, for what that halves. Peaks are beyond the imports.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import measure


def lenet() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def work(
    *,
    steps: int,
    batch: int,
    train: int,
    audited: int,
    share: float = 1,
    stride: int = 1,
    record: bool = True,
) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset

    import lkarray as lk
    import lkarray.auditing

    data = TensorDataset(torch.rand(train, 1, 28, 28), torch.randint(0, 10, (train,)))
    count = int(share * audited)
    seen = TensorDataset(torch.rand(count, 1, 28, 28), torch.randint(0, 10, (count,)))
    images, labels = data.tensors
    order = torch.cat([torch.randperm(train) for _ in range(-(-steps * batch // train))])
    batches = order.split(batch)[:steps]
    folder = Path(tempfile.mkdtemp(dir=measure.FOLDER))

    def loop(step: Any) -> None:
        for examples in batches:
            with step(examples):
                optimizer.zero_grad()
                F.cross_entropy(model(images[examples]), labels[examples]).backward()
                optimizer.step()

    def run() -> Any:
        if not record:
            from contextlib import nullcontext

            return loop(lambda examples: nullcontext())
        with lk.record(model, optimizer, data, store=folder / "t.zarr") as trace:
            loop(trace.step)
        audit = lk.audit(trace, seen, stride=stride, store=folder / "t.zarr", memory="2 GiB")
        return {key: audit.attrs[key] for key in ("mre", "lc", "closure")}

    try:
        for timing in (False, True):
            model = lenet()
            optimizer = torch.optim.Adam(model.parameters(), 1.5e-5)
            if timing:
                return measure.timed_alone(run)
            F.cross_entropy(model(images[:batch]), labels[:batch]).backward()
            optimizer.step()
    finally:
        shutil.rmtree(folder)
    raise AssertionError


WAYS = {
    "plain training": partial(work, record=False),
    "recorded and audited": work,
    "audited at every second step": partial(work, stride=2),
    "half of the audited examples": partial(work, share=0.5),
}
BARS = {"recorded and audited": 8.0, "audited at every second step": 6.5}


def main() -> None:
    asked = measure.arguments(__doc__)
    if measure.main(WAYS, asked):
        return
    measure.FOLDER.mkdir(parents=True, exist_ok=True)
    size = {"steps": 1000, "batch": 256, "train": 51_200, "audited": 256}
    if asked.small:
        size = {"steps": 4, "batch": 32, "train": 100, "audited": 16}
    ways = measure.compare(list(WAYS), size, asked.repeats)
    measure.table(ways, "plain training", BARS)
    print({key: f"{value:.3g}" for key, value in ways["recorded and audited"]["value"].items()})


if __name__ == "__main__":
    main()
