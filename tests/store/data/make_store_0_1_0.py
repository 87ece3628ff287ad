"""Makes `store_0_1_0.tar.gz`: a small store as lkarray 0.1.0 wrote it, without seals.

Run with that version on the path (commit 983d00e):
``PYTHONPATH=FOLDER python make_store_0_1_0.py store_0_1_0.tar.gz``.
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk


def make(store: Path, *, draws: int = 9) -> None:
    """Sample a small store."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 3)
    data = TensorDataset(inputs, inputs.argmax(1))
    posterior = lk.LocalPosterior(nn.Linear(3, 3), data, nbeta=10.0, gamma=50.0)
    lk.sample(
        posterior,
        data,
        sampler=lk.SGLD(step_size=1e-3),
        store=store,
        chains=2,
        draws=draws,
        burn_in=1,
        batch_size=4,
        coords={"label": data.tensors[1].numpy(), "name": list("abcdefgh")},
        progress=False,
    )


def main() -> None:
    """Write the archive, without times and owners."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sys.argv[1], "w:gz") as archive:
        store = Path(folder) / "store.zarr"
        make(store)
        for path in sorted(store.rglob("*")):
            if path.is_file() and not path.name.startswith(".lkarray"):
                entry = tarfile.TarInfo(f"store.zarr/{path.relative_to(store)}")
                content = path.read_bytes()
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
