"""Peaks of resident memory, measured in processes of their own."""

import subprocess
import sys

import pytest

FEATURES = """
import resource, sys
import numpy as np, torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
import lkarray as lk
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(500, 500), torch.nn.Tanh(), torch.nn.Linear(500, 10))
inputs, labels = torch.randn(400, 500), torch.arange(400) % 10
data = TensorDataset(inputs, labels)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
with lk.record(model, optimizer, data, store=sys.argv[1]) as trace:
    for batch in torch.arange(400).split(40):
        with trace.step(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
run = trace.trace()
# First what any use of torch and Zarr takes.
lk.gradient_features(run, [0, 1], [0], store=sys.argv[1], name="first")
before = peak()
G = lk.gradient_features(run, data, [0, 5], store=sys.argv[1], memory="64 MiB")
print(G.nbytes / 2**20, peak() - before)
"""

RECORD = """
import resource, sys
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
import lkarray as lk
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Tanh(), torch.nn.Linear(200, 10))
inputs, labels = torch.randn(400, 200), torch.arange(400) % 10
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
with lk.record(model, optimizer, TensorDataset(inputs, labels), store=sys.argv[1]) as trace:
    for step in range(int(sys.argv[2])):
        batch = torch.arange(step % 300, step % 300 + 20)
        with trace.step(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def run(script, *args):
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(part) for part in done.stdout.split()]


@pytest.mark.minutes
def test_features__peak_stays_within_the_budget(tmp_path):
    size, peak = run(FEATURES, tmp_path / "t")
    assert size > 750, "the tensor is many times the budget"
    assert peak < 64


@pytest.mark.minutes
def test_record__peak_does_not_grow_with_the_steps(tmp_path):
    """From 60 to 240 steps the trace grows by 60 MB."""
    (short,), (long,) = (run(RECORD, tmp_path / str(steps), steps) for steps in (60, 240))
    assert long - short < 20
