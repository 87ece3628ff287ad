"""Draws per second on a GPT-2-shaped language model: devinterp 2.0.1, a plain loop, lkarray.

Two layers, width 128, 4 heads, 64 tokens, 470,528 parameters, trained for 60 Adam steps on
synthetic sequences. Every way takes SGLD steps on minibatches of 32 sequences, each of which
gives a draw, and observes the per-token losses of 512 sequences at each: 4 chains x 25 draws.
devinterp evaluates them in batches of its ``batch_size`` and writes them to Zarr, with those of the
minibatches; the plain loop keeps them in memory; lkarray writes them to Zarr. Seconds are those of
steady draws: the time of the whole less that of a call with 2 chains of 1 draw, which has what a
call costs at first; what the very first call costs beyond that, imports and compilation, is
reported apart as warm-up.

devinterp needs an environment of its own::

    python -m venv peer && peer/bin/pip install devinterp==2.0.1 torch==2.14.1 transformers
    LKARRAY_PEER_PYTHON=peer/bin/python python benchmarks/language_model.py

Without it, lkarray is compared with the plain loop alone. Needs ``pip install transformers``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import measure

VOCABULARY, TOKENS, OBSERVED, BATCH = 512, 64, 512, 32
NBETA, GAMMA, STEP = 30.0, 1000.0, 1e-5
CHAINS, DRAWS = 4, 25


def model():
    """Return the trained model, from a file that all ways share."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    shape = {"n_positions": TOKENS, "n_embd": 128, "n_layer": 2, "n_head": 4}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **off, **ends))
    path = measure.FOLDER / "gpt2.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    ids = sequences(4096)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(60):
        batch = ids[step * 64 : (step + 1) * 64]
        optimizer.zero_grad()
        net(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    measure.FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


def sequences(n: int):
    """Return token ids of a noisy cycle: each token is mostly the last one plus a fixed stride."""
    import torch

    generator = torch.Generator().manual_seed(1)
    stride = torch.randint(1, 8, (n, 1), generator=generator)
    start = torch.randint(0, VOCABULARY, (n, 1), generator=generator)
    ids = (start + stride * torch.arange(TOKENS)) % VOCABULARY
    noise = torch.rand(n, TOKENS, generator=generator) < 0.1
    return torch.where(noise, torch.randint(0, VOCABULARY, (n, TOKENS), generator=generator), ids)


def steady(run, chains: int, draws: int) -> dict:
    """Time ``run(chains, draws)``: what draws take, less what two chains of one draw take."""
    began = time.perf_counter()
    run(2, 1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    run(2, 1)
    start = time.perf_counter() - began
    began = time.perf_counter()
    run(chains, draws)
    seconds = time.perf_counter() - began - start
    return {"seconds": seconds, "mib": 0.0, "value": {"warm-up": first - start}}


def with_devinterp(chains: int, draws: int) -> dict:
    import torch
    from datasets import Dataset
    from devinterp.slt.sampling import sample

    net = model()
    train = Dataset.from_dict({"input_ids": sequences(4096).tolist()}).with_format("torch")
    seen = Dataset.from_dict({"input_ids": sequences(OBSERVED).tolist()}).with_format("torch")
    folder = Path(tempfile.mkdtemp())

    def run(chains: int, draws: int) -> None:
        sample(
            net,
            train,
            {"seen": (seen, OBSERVED // BATCH)},
            lr=STEP,
            n_beta=NBETA,
            localization=GAMMA,
            num_chains=chains,
            num_draws=draws,
            batch_size=BATCH,
            num_init_loss_batches=1,
            output_path=folder / f"{time.monotonic_ns()}",
            device="cpu",
        )

    torch.manual_seed(0)
    try:
        return steady(run, chains, draws)
    finally:
        shutil.rmtree(folder)


def plain(chains: int, draws: int) -> dict:
    """Run the forward and backward passes alone, in eager PyTorch, in batches of 32."""
    import torch
    from torch.nn import functional as F

    net, train, seen = model().eval(), sequences(4096), sequences(OBSERVED)

    def losses(ids):
        scores = net(input_ids=ids, use_cache=False).logits[:, :-1]
        flat = F.cross_entropy(
            scores.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none"
        )
        return flat.view(len(ids), -1)

    def run(chains: int, draws: int) -> None:
        for step in range(chains * draws):
            net.zero_grad()
            at = step * BATCH % 4096
            losses(train[at : at + BATCH]).mean().backward()
            with torch.inference_mode():
                torch.cat([losses(part) for part in seen.split(BATCH)])

    return steady(run, chains, draws)


def ours(chains: int, draws: int, **options) -> dict:
    from torch.utils.data import TensorDataset

    import lkarray as lk

    net, train, seen = model(), sequences(4096), sequences(OBSERVED)
    posterior = lk.LocalPosterior(
        net, TensorDataset(train), loss="next_token", nbeta=NBETA, gamma=GAMMA
    )
    folder = Path(tempfile.mkdtemp())
    trees = []

    def run(chains: int, draws: int) -> None:
        trees.append(
            lk.sample(
                posterior,
                TensorDataset(seen),
                sampler=lk.SGLD(step_size=STEP),
                chains=chains,
                draws=draws,
                burn_in=0,
                batch_size=BATCH,
                chains_per_device=1,
                store=folder / f"{time.monotonic_ns()}",
                progress=False,
                **options,
            )
        )

    try:
        timing = steady(run, chains, draws)
        r = lk.correlation(trees[-1]["losses/loss"].mean("token")).compute()
        path = measure.FOLDER / f"r-{'-'.join(map(str, options.values())) or 'float32'}.npy"
        import numpy as np

        np.save(path, r.values)
        timing["value"]["kernel"] = str(path)
        return timing
    finally:
        shutil.rmtree(folder)


WAYS = {
    "devinterp": with_devinterp,
    "plain loop": plain,
    "lkarray": ours,
    "lkarray, compiled": lambda **o: ours(**o, compile=True),
    "lkarray, bfloat16": lambda **o: ours(**o, autocast="bfloat16"),
    "lkarray, bfloat16 compiled": lambda **o: ours(**o, autocast="bfloat16", compile=True),
}


def main() -> None:
    asked = measure.arguments(__doc__)
    if measure.main(WAYS, asked):
        return
    import numpy as np

    peer = os.environ.get("LKARRAY_PEER_PYTHON")
    options = {"chains": 2, "draws": 3} if asked.small else {"chains": CHAINS, "draws": DRAWS}
    model()
    ways = [way for way in WAYS if peer or way != "devinterp"]
    results = measure.compare(
        ways, options, 1 if asked.small else asked.repeats, pythons={"devinterp": peer}
    )
    count = options["chains"] * options["draws"]
    base = results["devinterp" if peer else "plain loop"]["seconds"]
    for way, timing in results.items():
        rate = count / timing["seconds"]
        warm = timing["value"]["warm-up"]
        print(
            f"{way:38s} {rate:6.2f} draws/s  {base / timing['seconds']:5.2f} x "
            f"{'devinterp' if peer else 'plain loop'}   warm-up {warm:5.1f} s"
        )
    exact = np.load(results["lkarray"]["value"]["kernel"])
    for way in ("lkarray, compiled", "lkarray, bfloat16", "lkarray, bfloat16 compiled"):
        other = np.load(results[way]["value"]["kernel"])
        distance = np.linalg.norm(other - exact) / np.linalg.norm(exact)
        print(f"R of {way}: relative Frobenius distance from float32 {distance:.2e}")


if __name__ == "__main__":
    sys.exit(main())
