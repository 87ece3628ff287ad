"""Whether two checkouts of lkarray give the same numbers, bit for bit.

Run: ``python scripts/same_numbers.py --against CHECKOUT``. Each checkout samples, records, audits
and analyses the same small problem in a process of its own; every array is then compared by its
bytes, and every array that differs is named with how far apart it is. ``--write FILE`` keeps the
arrays of this checkout instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
FACTORS: dict[str, Any] = {"over": ("chain", "draw")}


def data(n: int, seed: int) -> TensorDataset:
    """Return made inputs (n, 6), each labelled by the largest of its first three numbers."""
    inputs = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 6))).float()
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network() -> nn.Module:
    """Return a small classifier with weights that depend on nothing but a seed."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def of_losses(lk: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is sampled, and what is computed of losses."""
    train, model = data(40, 0), network()
    posterior = lk.LocalPosterior(model, train, nbeta=10.0, gamma=50.0)
    taxonomy = lk.Taxonomy.from_edges([("ab", 0), ("ab", 1), ("all", "ab"), ("all", 2)])
    label = {"label": train.tensors[1].numpy()}
    options = {"chains": 3, "draws": 9, "burn_in": 3, "batch_size": 16, "progress": False}
    for sampler in (lk.SGLD(step_size=1e-3), lk.RMSpropSGLD(1e-3), lk.SGHMC(1e-3)):
        name = type(sampler).__name__
        store = folder / f"{name}.zarr"
        tree = lk.sample(posterior, train, sampler=sampler, coords=label, store=store, **options)
        for group in ("losses", "sample_stats"):
            yield f"{name}/{group}", tree[group].to_dataset()
        losses = tree["losses"]
        for function in (lk.covariance, lk.correlation, lk.loss_gain, lk.loss_variance, lk.mcse):
            yield f"{name}/{function.__name__}", function(losses)
        lk.save(lk.correlation(losses), store, group="derived/correlation")
        yield f"{name}/saved", lk.open(store)["derived/correlation"].to_dataset()
    yield "llc", lk.llc(tree)
    yield "diagnostics", lk.diagnostics(tree)
    near = lk.neighbors(losses, 5, exclude="label")
    yield "neighbors", near
    yield "influence", lk.influence(losses, losses)
    yield "svd", lk.svd(losses["loss"], 3, **FACTORS)
    yield "group_mean", lk.group_mean(losses, "label")
    yield "residualize", lk.residualize(losses)
    yield "shrunk", lk.ledoit_wolf(losses)
    yield "lift", lk.taxonomic_lift(near, taxonomy)
    half = losses["loss"].isel(draw=slice(0, 5))
    for debiased in (False, "samples", "draws"):
        yield f"cka {debiased}", lk.cka(losses["loss"], half, debiased=debiased)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each example."""
    return F.cross_entropy(output, target, reduction="none")


def recorded(lk: Any, store: Path, make: Any) -> Any:
    """Train for eight steps, recorded; return the trace."""
    train, model = data(40, 0), network()
    optimizer = make(model.parameters())
    inputs, labels = train.tensors
    order = np.random.default_rng(3).permutation(80) % 40
    with lk.record(model, optimizer, train, loss=loss, store=store) as trace:
        for batch in order.reshape(8, 10):
            with trace.step(batch):
                optimizer.zero_grad()
                loss(model(inputs[batch]), labels[batch]).mean().backward()
                optimizer.step()
    return lk.open_trace(store, network(), train, loss=loss)


def of_training(lk: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is recorded, and what is computed of gradients and audits."""
    test = data(6, 1)
    rules = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    }
    for name, make in rules.items():
        store = folder / f"{name}.zarr"
        trace = recorded(lk, store, make)
        G = lk.gradient_features(trace, test, store=store, progress=False)
        yield f"{name}/gradients", G
        for function in (lk.plgk, lk.ips):
            yield f"{name}/{function.__name__}", function(G)
        yield f"{name}/temporal", lk.temporal_kernel(G)
        audit = lk.audit(trace, test, progress=False)
        yield f"{name}/audit", audit
        yield f"{name}/completeness", lk.completeness(audit)
        yield f"{name}/most", lk.most_influential(audit, 3)
        for credit in ("seen", "acted"):
            by_epoch = lk.audit(
                trace,
                test,
                groups={"time": "epoch"},
                credit=credit,
                progress=False,
            )
            yield f"{name}/audit by epoch, {credit}", by_epoch
        yield f"{name}/tracin", lk.tracin(trace, test, progress=False)
        yield f"{name}/similarity", lk.gradient_similarity(trace, test, progress=False)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Return every array of the small problem by its name."""
    import lkarray as lk

    torch.set_num_threads(1)
    out = {}
    for make in (of_losses, of_training):
        for name, value in make(lk, folder):
            table = value.to_dataset(name="value") if isinstance(value, xr.DataArray) else value
            for variable in sorted(map(str, table.data_vars)):
                array = table[variable].compute().values
                out[f"{name}: {variable}"] = array.astype(str) if array.dtype == object else array
    return out


def write(path: Path, checkout: Path) -> None:
    """Let a checkout write its arrays, in a process that sees that checkout only."""
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--write", str(path)]
    subprocess.run(command, env=env, check=True)


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Return a line for every array that is not the same, bit for bit, in both."""
    lines = [f"{name}: only in one of both" for name in sorted(set(one) ^ set(other))]
    for name in sorted(set(one) & set(other)):
        a, b = one[name], other[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            lines.append(f"{name}: {a.dtype} {a.shape}, {b.dtype} {b.shape}")
        elif a.tobytes() != b.tobytes():
            far = np.nanmax(np.abs(a - b)) if a.dtype.kind in "fiu" else "other values"
            lines.append(f"{name}: {far}")
    return lines


def main() -> int:
    """Write the arrays of this checkout, or compare them with another's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--write", type=Path, help="file for the arrays of this one (.npz)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.write:
            np.savez_compressed(options.write, **arrays(Path(folder)))  # type: ignore[arg-type]
            return 0
        files = []
        for number, checkout in enumerate((ROOT, options.against.resolve())):
            files.append(Path(folder) / f"{number}.npz")
            write(files[-1], checkout)
        one, other = (dict(np.load(file)) for file in files)
    lines = differences(one, other)
    print("\n".join(lines) or f"{len(one)} arrays are the same, bit for bit")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
