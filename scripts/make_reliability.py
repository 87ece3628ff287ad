"""Attack real stores, and write down what came of it: the table of docs/reliability.md.

Three small stores are made: of a sampled posterior with what was computed from it, of a recorded
training run with its gradients and an audit, and of features. Then, one fault at a time and undone
after it, bits are flipped, files cut off, emptied, deleted and exchanged, and metadata edited; and
writers are killed, or run out of disk. After each fault the store is opened and read, and verified.

    python scripts/make_reliability.py --rounds 60 --write docs/reliability.md

A fault is *silent* if it changed what the store holds and neither `lk.open`, reading, nor
`lk.verify` says so. Sampling, recording and saving that were killed must continue to the numbers of
an undisturbed run.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from reliability.faults import FAULTS, attack
from reliability.stores import (
    make_attributed,
    make_derived,
    make_features,
    make_recorded,
    make_sampled,
)
from reliability.writers import fill, kill

MARKS = "<!-- attacks -->", "<!-- /attacks -->"
STORES = ("sampled", "recorded", "features")
OUTCOMES = ("open", "read", "verify", "no effect", "silent")
HEADS = {
    "open": "caught by open",
    "read": "when read",
    "verify": "by verify alone",
    "no effect": "no effect",
    "silent": "**silent**",
}


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
        make_features(folder / "features.zarr")
        for kind in FAULTS:
            tally: Counter[str] = Counter()
            for name in STORES:
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
