"""Writers that are killed, or run out of disk."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.stores import counted, make_features, make_recorded, make_sampled, shown

ROOT = Path(__file__).resolve().parents[2]


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
    "laplace": (None, lambda path, pause: make_features(path, pause=10 * pause)),
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
from reliability import writers as made
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
