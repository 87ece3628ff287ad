"""Small stores that are attacked, and who notices what came of a fault."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

#: Files that do not count: locks, and what a killed write leaves beside its chunk.
_UNCOUNTED = (".lkarray", ".partial", ".part")

# What is attacked -------------------------------------------------------------------------------


def _problem() -> tuple[Any, Any]:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(150, 6, generator=generator)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return net, TensorDataset(inputs, inputs[:, :3].argmax(1))


def _small_blocks() -> None:
    """Make blocks and chunks small, so that a small store has several of each."""
    from lkarray.store import commit, layout, trace_layout

    commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0.0
    layout.block_draws = lambda draws, values: 32
    layout.loss_chunks = lambda depth, samples, tail=(): (1, depth, 64)
    trace_layout._BLOCK_STEPS = 8


def make_sampled(path: Path, *, draws: int = 70, pause: float = 0.0) -> None:
    """Sample a posterior into a store, and compute from it what stores hold."""
    import lkarray as lk
    from lkarray.sampling import StepInput

    _small_blocks()
    net, data = _problem()

    class Slow(lk.SGLD):
        def step(self, given: StepInput) -> None:
            super().step(given)
            if pause:
                time.sleep(pause)

    Slow.__name__ = "SGLD"
    first = [data[i] for i in range(100)]
    labels = {"label": [int(y) for _, y in first], "name": [f"image {i:03}" for i in range(100)]}
    lk.sample(
        lk.LocalPosterior(net, data, nbeta=10.0, gamma=50.0),
        {"train": first, "test": [data[i] for i in range(100, 150)]},
        sampler=Slow(step_size=1e-3),
        chains=2,
        draws=draws,
        burn_in=5,
        batch_size=16,
        coords={"train": labels},
        observables={"norm": lambda module: module[0].weight.norm()},
        outcomes=("loss", "log_odds"),
        store=path,
        chains_per_device=1,
        progress=False,
    )


def make_derived(path: Path) -> None:
    """Compute and keep kernels and neighbours beside the losses."""
    import lkarray as lk
    from lkarray import store as stores

    tree = lk.open(path)
    kernel = lk.correlation(tree["losses"]).chunk({"sample": 50, "sample_2": 50})
    lk.save(kernel, path)
    stores.put(path, "neighbors", lk.neighbors(tree["losses"], k=3).compute())


def make_recorded(path: Path, *, steps: int = 20, every: int = 1, pause: float = 0.0) -> None:
    """Record a training run into a store."""
    import torch
    from torch.nn import functional as F

    import lkarray as lk

    _small_blocks()
    net, data = _problem()
    x, y = data.tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    order = np.random.default_rng(0)
    batches = [order.choice(150, 16, replace=False) for _ in range(steps)]
    with lk.record(net, optimizer, data, store=path, every=every) as trace:
        for rows in trace.remaining(batches):
            with trace.step(rows):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
                if pause:
                    time.sleep(pause)


def make_attributed(path: Path) -> None:
    """Store gradients, their factors and an audit of the recorded run."""
    import lkarray as lk

    net, data = _problem()
    trace = lk.open_trace(path, net, data)
    names = {"name": [f"image {i:03}" for i in range(30)]}
    lk.gradient_features(trace, range(30), times=[0, 10], store=path, coords=names)
    lk.gradient_factors(trace, range(30), times=[0, 10], store=path)
    lk.audit(trace, range(12), store=path)


def make_features(path: Path, *, pause: float = 0.0) -> None:
    """Store features of the posterior's Gaussian limit, in several blocks of samples."""
    import lkarray as lk
    from lkarray.attribution import feature_maker, feature_request

    features = feature_maker.FeatureMaker.features

    def slowly(self: Any, rows: Any) -> Any:
        time.sleep(pause)
        return features(self, rows)

    if pause:
        feature_maker.FeatureMaker.features = slowly  # type: ignore[method-assign]
    feature_request._BLOCK_BYTES = 1 << 14  # of some forty samples
    net, data = _problem()
    names = {"name": [f"image {i:03}" for i in range(len(data))]}
    posterior = lk.LocalPosterior(net, data, nbeta=10.0, gamma=50.0)
    lk.laplace(posterior, data, rank=5, smooth=2, coords=names, store=path, progress=False)


# What came of a fault ---------------------------------------------------------------------------


def shown(path: Path) -> dict[str, Any]:
    """Return all that `lk.open` shows of a store, computed."""
    import lkarray as lk

    tree = lk.open(path)
    contents: dict[str, Any] = {"hidden": list(tree.attrs.get("hidden", []))}
    for node in tree.subtree:
        contents[f"{node.path} attributes"] = _plain(
            {k: v for k, v in node.attrs.items() if k != "hidden"}
        )
        for name, variable in node.to_dataset(inherit=False).variables.items():
            values = np.asarray(variable.values)
            text = values.tolist() if values.dtype.kind in "OT" else values.tobytes()
            about = (variable.dims, str(values.dtype), _plain(variable.attrs))
            contents[f"{node.path}/{name}"] = about, text
    return contents


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def outcome(path: Path, before: dict[str, Any], *, harmless: bool) -> str:
    """Return who notices a fault: opening, reading, verifying, or nobody."""
    import lkarray as lk

    try:
        tree = lk.open(path)
        if tree.attrs.get("hidden"):
            return "open"
    except lk.errors.LkarrayError:
        return "open"
    try:
        after = shown(path)
    except Exception:  # a checksum of Zarr's, or an error of ours
        after = None
    problems = lk.verify(path)
    if after is None:
        return "read" if problems else "silent"
    if problems:
        return "verify"
    if after == before and harmless:
        return "no effect"
    return "silent"


def counted(path: Path) -> list[Path]:
    """Return the files of a store that hold anything of it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in files if not any(word in p.name for word in _UNCOUNTED)]


def spare(path: Path) -> set[Path]:
    """Return the files that do not count: states in slots that no record names."""
    import zarr

    from lkarray import store as stores

    root = stores.open_root(path)
    paths: set[Path] = set()
    if "state" in root:
        chains = root["commit/record"].shape[0]
        slots = {chain: stores.read_record(root, chain).slot for chain in range(chains)}
        for chain, slot in slots.items():
            paths.update(path.glob(f"state/*/c/{chain}/{1 - slot}/**/*"))
    last = root.get("trajectory/last")
    if isinstance(last, zarr.Group):
        slot = int(np.asarray(root["trajectory/record"][:])[1])
        paths.update(path.glob(f"trajectory/last/*/c/{1 - slot}/**/*"))
    return {p for p in paths if p.is_file()}
