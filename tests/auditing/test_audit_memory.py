"""Peaks of resident memory of audits, measured in processes of their own."""

import subprocess
import sys

AUDIT = """
import resource, sys
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
import lkarray as lk
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Tanh(), torch.nn.Linear(400, 10))
inputs, labels = torch.randn(600, 400), torch.arange(600) % 10
train = TensorDataset(inputs[:100], labels[:100])
seen = TensorDataset(inputs[100:], labels[100:])
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
with lk.record(model, optimizer, train, store=sys.argv[1]) as trace:
    for batch in torch.arange(100).split(25):
        with trace.step(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
run = trace.trace()
# First what any use of torch and Zarr takes.
lk.audit(run, [0, 1], store=sys.argv[1], name="first", memory="160 MiB")
before = peak()
audit = lk.audit(run, seen, store=sys.argv[1], memory="160 MiB")
carried = 600 * sum(p.numel() for p in model.parameters()) * 4 / 2**20
print(carried, peak() - before, audit.attrs["lc"])
"""


def test_audit__peak_stays_within_the_budget(tmp_path):
    command = [sys.executable, "-c", AUDIT, str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    carried, peak, correlation = (float(number) for number in done.stdout.split())
    assert carried > 350, "what is carried through the run is more than twice the budget"
    assert peak < 160
    assert correlation > 0.99
