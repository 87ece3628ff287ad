"""What a sampling step costs beyond the model's own forward and backward pass.

A tiny model, so that the overhead is seen: a linear layer of 10 x 2 on batches of 32, one
thread. The plain loop does the forward and backward passes alone, on one fixed batch, with
the gradient set to None between them; where every step gives a draw, also the forward pass
over 64 observed inputs. Best of several repeats of both, interleaved.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk


def overhead(steps: int = 10_000, repeats: int = 5, *, every: bool = False) -> tuple[float, float]:
    """Return microseconds of a step: of the plain loop, and of `lk.sample` beyond it.

    ``every`` step gives a draw, or only the last one does.
    """
    torch.manual_seed(0)
    inputs = torch.randn(256, 10)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = torch.nn.Linear(10, 2)
    observed = TensorDataset(data.tensors[0][:64], data.tensors[1][:64])
    posterior = lk.LocalPosterior(model, data)

    def plain() -> None:
        x, y = data.tensors[0][:32], data.tensors[1][:32]
        parameters = list(model.parameters())
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = None
            F.cross_entropy(model(x), y).backward()
            if every:
                with torch.inference_mode():
                    F.cross_entropy(model(observed.tensors[0]), observed.tensors[1])

    def ours() -> None:
        lk.sample(
            posterior,
            observed,
            sampler=lk.SGLD(step_size=1e-5),
            chains=1,
            draws=steps if every else 1,
            burn_in=0,
            thin=1 if every else steps,
            batch_size=32,
            store=MemoryStore(),
            progress=False,
        )

    def timed(work) -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / steps * 1e6

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = [(timed(plain), timed(ours)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    base, full = (min(column) for column in zip(*pairs, strict=True))
    return base, full - base


def main() -> None:
    base, extra = overhead()
    print(f"forward and backward of a tiny model   {base:6.1f} us a step")
    print(f"sampling beyond that                   {extra:6.1f} us a step (at most 100)")
    print(f"ratio                                  {(base + extra) / base:6.2f}")
    base, extra = overhead(every=True)
    print(f"with a forward pass for a draw         {base:6.1f} us a step")
    print(f"sampling and storing beyond that       {extra:6.1f} us a step with its draw")
    print(f"ratio                                  {(base + extra) / base:6.2f}")


if __name__ == "__main__":
    main()
