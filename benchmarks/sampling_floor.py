"""What sampling costs beyond the forward and backward passes, on three kinds of model.

For each model, the plain loop takes the backward pass of a minibatch of 256 (32 sequences) at every
step and the forward passes over the observed set at every draw, in the same batches as lkarray,
and keeps nothing. lkarray also draws the minibatch and the noise, moves the weights, and writes
losses and statistics to Zarr. One process of all threads, both interleaved, median of the ratios of
each repeat. At most 1.10.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray.sampling.stacking import evaluation_rows


class Transformer(nn.Module):
    """Two causal layers of width 128 over 64 tokens: logits of the class of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(512, 128), nn.Embedding(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 512)
        mask = nn.Transformer.generate_square_subsequent_mask(64)
        self.register_buffer("mask", mask)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def models() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor, str, int]]:
    """Return by name: model, inputs, targets, loss, batch size."""
    torch.manual_seed(0)
    images = torch.randn(10_000, 1, 28, 28)
    labels = torch.randint(0, 10, (10_000,))
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    lenet = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    ids = torch.randint(0, 512, (512, 64))
    return {
        "MLP 784-512-10": (mlp, images, labels, "cross_entropy", 256),
        "LeNet-5": (lenet, images, labels, "cross_entropy", 256),
        "transformer, 2 x 128": (Transformer(), ids, ids, "next_token_mean", 32),
    }


def ratio(name: str, draws: int, thin: int) -> tuple[float, float]:
    """Return seconds of the plain loop and of lkarray."""
    model, inputs, targets, loss, batch = models()[name]
    data = TensorDataset(inputs, targets)
    posterior = lk.LocalPosterior(model, data, loss=loss, nbeta=20.0, gamma=1000.0)
    function = posterior.loss
    plain_model = model.eval()

    def plain(rows: int) -> None:
        for step in range(draws * thin):
            plain_model.zero_grad()
            at = step * batch % (len(inputs) - batch + 1)
            part = slice(at, at + batch)
            function(plain_model(inputs[part]), targets[part]).mean().backward()
            if step % thin == thin - 1:
                with torch.inference_mode():
                    pairs = zip(inputs.split(rows), targets.split(rows), strict=True)
                    for x, y in pairs:
                        function(plain_model(x), y)

    def ours() -> float:
        folder = Path(tempfile.mkdtemp())
        try:
            seconds = []
            for count in (1, draws + 1):  # what a run costs before its draws is taken off
                began = time.perf_counter()
                lk.sample(
                    posterior,
                    data,
                    sampler=lk.SGLD(1e-6),
                    chains=1,
                    draws=count,
                    burn_in=0,
                    thin=thin,
                    batch_size=batch,
                    chains_per_device=1,
                    store=folder / str(count),
                    progress=False,
                )
                seconds.append(time.perf_counter() - began)
            return seconds[1] - seconds[0]
        finally:
            shutil.rmtree(folder)

    from lkarray.nn import Batches, FlatModel

    rows = evaluation_rows(FlatModel(model), Batches(data, name="data", device=torch.device("cpu")))
    plain(rows)
    began = time.perf_counter()
    plain(rows)
    return time.perf_counter() - began, ours()


def main() -> None:
    asked = measure.arguments(__doc__)
    for name in models():
        for thin in (1, 10):
            draws = 2 if asked.small else (60 if thin == 1 else 20)
            pairs = [ratio(name, draws, thin) for _ in range(1 if asked.small else asked.repeats)]
            ratio = statistics.median(ours / plain for plain, ours in pairs)
            said = "met" if ratio <= 1.1 else "NOT met"
            print(
                f"{name:22s} a draw each {thin:2d} steps: {ratio:5.2f} of the plain loop "
                f"(bar 1.10: {said})"
            )


if __name__ == "__main__":
    main()
