"""Attack real stores, and write down what came of it: the table of docs/reliability.md.

Two small stores are made, of a sampled posterior with what was computed from it and of a recorded
training run with its gradients and an audit. Then, one fault at a time and undone after it, bits
are flipped, files cut off, emptied, deleted and exchanged, and metadata edited; and writers are
killed, or run out of disk. After each fault the store is opened and read, and verified.

    python scripts/make_reliability.py --rounds 60 --write docs/reliability.md

A fault is *silent* if it changed what the store holds and neither `lk.open`, reading, nor
`lk.verify` says so. Sampling, recording and saving that were killed must continue to the numbers of
an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- attacks -->", "<!-- /attacks -->"
OUTCOMES = ("open", "read", "verify", "no effect", "silent")
HEADS = {
    "open": "caught by open",
    "read": "when read",
    "verify": "by verify alone",
    "no effect": "no effect",
    "silent": "**silent**",
}
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


# The faults -------------------------------------------------------------------------------------

Edit = dict[Path, bytes | None]


def flip(files: list[Path], rng: random.Random) -> Edit:
    """Flip one bit."""
    at = rng.choice(files)
    content = bytearray(at.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    return {at: bytes(content)}


def truncate(files: list[Path], rng: random.Random) -> Edit:
    """Cut a file off, or leave none of it."""
    at = rng.choice(files)
    content = at.read_bytes()
    return {at: content[: rng.choice([0, rng.randrange(len(content))])]}


def delete(files: list[Path], rng: random.Random) -> Edit:
    """Delete a file."""
    return {rng.choice(files): None}


def swap(files: list[Path], rng: random.Random) -> Edit:
    """Exchange two files of one size that differ."""
    sizes = Counter(p.stat().st_size for p in files)
    for _ in range(1000):
        a = rng.choice([p for p in files if sizes[p.stat().st_size] > 1])
        same = [p for p in files if p.stat().st_size == a.stat().st_size and p != a]
        b = rng.choice(same)
        if a.read_bytes() != b.read_bytes():
            return {a: b.read_bytes(), b: a.read_bytes()}
    raise AssertionError("no two files to exchange")


def edit(files: list[Path], rng: random.Random) -> Edit:
    """Change, add one to, or remove one value of some metadata."""
    at = rng.choice([p for p in files if p.name == "zarr.json"])
    content = json.loads(at.read_text())
    leaves = [(c, key) for c, key in _leaves(content) if "consolidated_metadata" not in str(key)]
    holder, key = rng.choice(leaves)
    value = holder[key]
    if rng.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + 1
    elif isinstance(value, str):
        holder[key] = value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    else:
        holder[key] = "edited"
    return {at: json.dumps(content, indent=2).encode()}


def _leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if isinstance(value, dict | list) and value:
            yield from _leaves(value)
        else:
            yield node, key


FAULTS: dict[str, Callable[[list[Path], random.Random], Edit]] = {
    "a bit flipped": flip,
    "a file cut off or emptied": truncate,
    "a file deleted": delete,
    "two files exchanged": swap,
    "metadata edited": edit,
}


def attack(
    path: Path, kind: str, rounds: int, rng: random.Random, silent: list[str]
) -> Counter[str]:
    """Try one kind of fault, each undone before the next; return the outcomes."""
    before, files, idle = shown(path), counted(path), spare(path)
    tally: Counter[str] = Counter()
    for _ in range(rounds):
        change = FAULTS[kind](files, rng)
        kept = {at: at.read_bytes() for at in change}
        same_json = all(_same_json(kept[at], new) for at, new in change.items())
        try:
            for at, new in change.items():
                at.unlink() if new is None else at.write_bytes(new)
            result = outcome(path, before, harmless=same_json or set(change) <= idle)
        except Exception as error:
            result = "silent"
            silent.append(f"{kind}: {_names(change, path)}: {type(error).__name__}: {error}")
        else:
            if result == "silent":
                silent.append(f"{kind}: {_names(change, path)}")
        finally:
            for at, content in kept.items():
                at.write_bytes(content)
        tally[result] += 1
    assert shown(path) == before, "a fault was not undone"
    return tally


def _names(change: Edit, path: Path) -> str:
    return ", ".join(str(at.relative_to(path)) for at in change)


def _same_json(old: bytes, new: bytes | None) -> bool:
    """Say whether two files of metadata say the same."""
    try:
        return new is not None and json.loads(old) == json.loads(new)
    except ValueError:
        return False


# Writers that are killed, or run out of disk ----------------------------------------------------


def _save(path: Path, pause: float = 0.0) -> None:
    import lkarray as lk
    from lkarray import saving

    if pause:
        write = saving._save_block

        def slowly(*args: Any, **options: Any) -> int:
            time.sleep(pause)
            return write(*args, **options)

        saving._save_block = slowly
    losses = lk.open(path)["losses"]
    lk.save(lk.correlation(losses).chunk({"sample": 25, "sample_2": 25}), path, "derived/again")


def _put(path: Path, pause: float = 0.0) -> None:
    import lkarray as lk
    from lkarray import store as stores

    stores.put(path, "gains", lk.loss_gain(lk.open(path)).compute())


WRITERS: dict[str, tuple[Callable[[Path], None] | None, Callable[..., None]]] = {
    "sample": (None, lambda path, pause: make_sampled(path, pause=pause)),
    "record": (None, lambda path, pause: make_recorded(path, pause=pause)),
    "save": (lambda path: make_sampled(path), _save),
    "put": (lambda path: make_sampled(path), _put),
}


def kill(rounds: int, rng: random.Random, folder: Path, silent: list[str]) -> Counter[str]:
    """Kill writers at random moments; what is left must be sound, and go on to the same numbers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lkarray.sampling", "lkarray.training"])
    tally: Counter[str] = Counter()
    names = list(WRITERS)
    for number in range(rounds):
        name = names[number % len(names)]
        before, work = WRITERS[name]
        path, whole = folder / f"{name}-{number}.zarr", folder / f"{name}-whole.zarr"
        if not whole.exists():
            if before:
                before(whole)
            work(whole, 0.0)
        if before:
            before(path)
        killed = _start(context, work, path, 0.01)
        time.sleep(rng.uniform(0.0, 1.2))
        killed.kill()
        killed.join()
        after = _judge(path, killed.exitcode)
        again = _start(context, work, path, 0.0)
        again.join()
        if again.exitcode != 0:
            after = "silent"
            silent.append(f"killed while it ran {name}: the rerun failed")
        elif not _same(path, whole):
            after = "silent"
            silent.append(f"killed while it ran {name}: the rerun gives other numbers")
        elif after == "silent":
            silent.append(f"killed while it ran {name}: a wrong store verifies")
        tally[after] += 1
        shutil.rmtree(path)
    return tally


def _start(context: Any, work: Callable[..., None], path: Path, pause: float) -> Any:
    name = next(name for name, (_, of) in WRITERS.items() if of is work)
    process = context.Process(target=_work, args=(name, path, pause))
    process.start()
    return process


def _work(name: str, path: Path, pause: float) -> None:
    logging.getLogger("lkarray").setLevel(logging.ERROR)
    WRITERS[name][1](path, pause)


def _judge(path: Path, code: int) -> str:
    """Return whether a store that was cut off says what it is: whole so far, or unfinished."""
    import lkarray as lk

    if not path.exists():
        return "no effect"
    try:
        lk.open(path)
    except lk.errors.LkarrayError:
        return "open"
    kinds = {problem.kind for problem in lk.verify(path)}
    if kinds - {"unfinished"}:
        return "silent"  # killed, and called damaged
    return "no effect" if not kinds else "open"


def _same(path: Path, whole: Path) -> bool:
    import lkarray as lk

    mine, its = shown(path), shown(whole)
    mine, its = ({k: v for k, v in of.items() if k != "/ attributes"} for of in (mine, its))
    return mine == its and not lk.verify(path)


_FULL = """
import sys; sys.path[:0] = [{root!r}, {scripts!r}]
import logging; logging.disable(logging.CRITICAL)
from pathlib import Path
import make_reliability as made
import lkarray as lk
before, work = made.WRITERS[{name!r}]
path = Path({path!r})
if before: before(path)
room = {room}
written = 0
from zarr.storage import _local
put = _local._put
def limited(path, value, *args, **options):
    global written
    written += len(value)
    if written > room:
        raise OSError(28, "No space left on device")
    return put(path, value, *args, **options)
_local._put = limited
try:
    work(path, 0.0)
    print("done")
except lk.errors.StoreError as error:
    print("named" if "disk is full" in str(error) else "other " + str(error))
"""


def fill(rounds: int, rng: random.Random, folder: Path, silent: list[str]) -> Counter[str]:
    """Let the disk be full after some bytes; the error is named, and a rerun finishes."""
    tally: Counter[str] = Counter()
    names = list(WRITERS)
    for number in range(rounds):
        name = names[number % len(names)]
        path, whole = folder / f"full-{name}-{number}.zarr", folder / f"{name}-whole.zarr"
        before, work = WRITERS[name]
        if not whole.exists():
            if before:
                before(whole)
            work(whole, 0.0)
        size = sum(p.stat().st_size for p in counted(whole))
        code = _FULL.format(
            root=str(ROOT),
            scripts=str(ROOT / "scripts"),
            name=name,
            path=str(path),
            room=int(size * rng.uniform(0.0, 0.4 if before else 1.0)),
        )
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        word = said.stdout.strip().splitlines()[-1] if said.stdout.strip() else said.stderr[-500:]
        if word not in ("named", "done"):
            silent.append(f"a full disk while it ran {name}: {word}")
            tally["silent"] += 1
            continue
        after = _judge(path, 0)
        work(path, 0.0)
        if after == "silent" or not _same(path, whole):
            silent.append(f"a full disk while it ran {name}: what is left is wrong")
            after = "silent"
        tally["open" if word == "named" and after != "silent" else after] += 1
        shutil.rmtree(path)
    return tally


# The table --------------------------------------------------------------------------------------


def table(rounds: int, kills: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return how each kind of fault ended, and what was silent."""
    logging.getLogger("lkarray").setLevel(logging.CRITICAL)
    silent: list[str] = []
    tallies: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sampled(folder / "sampled.zarr")
        make_derived(folder / "sampled.zarr")
        make_recorded(folder / "recorded.zarr")
        make_attributed(folder / "recorded.zarr")
        for kind in FAULTS:
            tally: Counter[str] = Counter()
            for name in ("sampled", "recorded"):
                rng = random.Random(f"{seed} {kind} {name}")
                tally += attack(folder / f"{name}.zarr", kind, rounds, rng, silent)
            tallies[kind] = tally
            print(f"{kind}: {dict(tally)}", flush=True)
        if kills:
            rng = random.Random(seed)
            tallies["the writer killed"] = kill(kills, rng, folder, silent)
            print(f"killed: {dict(tallies['the writer killed'])}", flush=True)
            tallies["the disk full"] = fill(kills, rng, folder, silent)
            print(f"full: {dict(tallies['the disk full'])}", flush=True)
    return tallies, silent


def markdown(tallies: dict[str, Counter[str]]) -> str:
    """Return the table of outcomes."""
    heads = ["fault", "tried", *HEADS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for kind, tally in tallies.items():
        cells = [kind, str(tally.total()), *(str(tally[name]) for name in OUTCOMES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, and write it into the page that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="faults of a kind and store")
    parser.add_argument("--kills", type=int, default=24, help="writers killed, and disks filled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    tallies, silent = table(options.rounds, options.kills, options.seed)
    text = markdown(tallies)
    print(text)
    for line in silent:
        print("silent:", line)
    if options.write:
        page = options.write.read_text()
        start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
        said = f"`--rounds {options.rounds} --kills {options.kills} --seed {options.seed}`"
        about = f"\n{text}\n\n{said}, Python {platform.python_version()}.\n"
        options.write.write_text(page[:start] + about + page[end:])
    return len(silent)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(min(main(), 1))
