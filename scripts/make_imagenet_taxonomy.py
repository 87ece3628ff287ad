"""Make ``lkarray/analysis/hierarchy/data/imagenet.json`` from WordNet 3.0 itself, through nltk.

    NLTK_DATA=... python scripts/make_imagenet_taxonomy.py

``imagenet_wnids.txt`` beside this file lists the 1,000 classes of ILSVRC 2012 in the order that
torchvision numbers them; a test compares it with torchvision's names of the classes.
"""

from __future__ import annotations

import json
from pathlib import Path

from lkarray.analysis.hierarchy.sources import open_wordnet, read_wordnet

HERE = Path(__file__).parent
OUT = HERE.parent / "lkarray" / "taxonomy" / "data" / "imagenet.json"


def main() -> None:
    """Write the file."""
    wnids = (HERE / "imagenet_wnids.txt").read_text().split()
    parents, _, aliases = read_wordnet(wnids)
    ids = {name: wnid for wnid, name in aliases.items()}
    nodes = {ids[name]: [name, [ids[p] for p in above]] for name, above in parents.items()}
    stored = {
        "source": f"WordNet {open_wordnet().get_version()}, Princeton University",
        "classes": wnids,
        "nodes": dict(sorted(nodes.items())),
    }
    text = json.dumps(stored, separators=(",", ":")).replace('],"n', '],\n"n')
    OUT.write_text(text + "\n")
    print(f"{OUT.name}: {len(wnids)} classes, {len(nodes)} nodes, {len(text):,} bytes")


if __name__ == "__main__":
    main()
