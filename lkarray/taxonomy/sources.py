"""Where taxonomies come from: WordNet, the file of ImageNet's classes, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lkarray.errors import MissingCorpusError
from lkarray.store.files import write_text

_GET_WORDNET = "python -m nltk.downloader wordnet"

Parents = dict[Any, list[Any]]


def read_imagenet() -> tuple[Parents, dict[str, str], dict[Hashable, str]]:
    """Return parents by synset name, labels (wnid to name) and aliases (number to name)."""
    text = resources.files("lkarray.taxonomy").joinpath("data/imagenet.json").read_text("utf8")
    stored = json.loads(text)
    names = {wnid: name for wnid, (name, _) in stored["nodes"].items()}
    parents = {name: [names[p] for p in above] for name, above in stored["nodes"].values()}
    labels = {wnid: names[wnid] for wnid in stored["classes"]}
    numbers: dict[Hashable, str] = dict(enumerate(labels.values()))
    return parents, labels, numbers | names


def read_wordnet(synsets: Iterable[str]) -> tuple[Parents, dict[str, str], dict[Hashable, str]]:
    """Return parents by synset name, the name of each asked synset, and aliases (wnids)."""
    wordnet = open_wordnet()
    found, unknown = {}, []
    for synset in dict.fromkeys(synsets):
        try:
            found[synset] = _synset(wordnet, synset)
        except Exception:  # nltk raises several kinds for what is not there
            unknown.append(synset)
    if unknown:
        shown = ", ".join(map(repr, unknown[:10])) + (" and more" if len(unknown) > 10 else "")
        raise ValueError(
            f"not in WordNet {wordnet.get_version()}: {shown}; expected wnids such as 'n02085620' "
            "or names such as 'dog.n.01'"
        )
    parents: Parents = {}
    aliases: dict[Hashable, str] = {}
    todo = list(found.values())
    while todo:
        synset = todo.pop()
        if synset.name() in parents:
            continue
        above = synset.hypernyms() + synset.instance_hypernyms()
        parents[synset.name()] = [s.name() for s in above]
        aliases[wnid(synset)] = synset.name()
        todo.extend(above)
    return parents, {asked: synset.name() for asked, synset in found.items()}, aliases


def open_wordnet() -> Any:
    """Return nltk's WordNet corpus.

    Raises
    ------
    MissingCorpusError
        It is not installed; the message says the command that gets it.
    """
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise MissingCorpusError(
            f"nltk's WordNet corpus is missing; get it with: {_GET_WORDNET} (or set NLTK_DATA to "
            "a folder that has corpora/wordnet)"
        ) from error
    return wordnet


def wnid(synset: Any) -> str:
    """Return ImageNet's name of an nltk synset: part of speech and offset, ``n02085620``."""
    return f"{synset.pos()}{synset.offset():08d}"


def _synset(wordnet: Any, name: str) -> Any:
    if len(name) == 9 and name[1:].isdigit():
        return wordnet.synset_from_pos_and_offset(name[0], int(name[1:]))
    return wordnet.synset(name)


def read_csv(path: Any) -> list[tuple[str, str]]:
    """Return the ``(parent, child)`` rows of a CSV file with those columns."""
    with open(path, newline="", encoding="utf8") as file:
        rows = csv.DictReader(file)
        missing = {"parent", "child"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has the columns {rows.fieldnames}, and lacks {sorted(missing)}: expected "
                "one row for each edge, with its parent and child"
            )
        return [(row["parent"], row["child"]) for row in rows]


def read_json(path: Any) -> tuple[Parents, Any]:
    """Return parents and labels of a file that `write_json` wrote, or of ``{node: [parents]}``."""
    try:
        stored = json.loads(Path(path).read_text("utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no object: expected {{node: [parents]}}")
    if stored.get("format") != "lkarray.taxonomy":
        return {n: p if isinstance(p, list) else [p] for n, p in stored.items()}, None
    return dict(map(tuple, stored["parents"])), dict(map(tuple, stored["labels"]))


def write_json(path: Any, parents: Mapping[Any, Iterable[Any]], labels: Mapping[Any, Any]) -> None:
    """Write nodes with their parents, and labels with their nodes, as lists of pairs.

    A file is replaced in one move, so that a failure leaves what was there; a link is followed.
    """
    stored = {
        "format": "lkarray.taxonomy",
        "parents": [[node, list(above)] for node, above in parents.items()],
        "labels": [list(pair) for pair in labels.items()],
    }
    text, place = json.dumps(stored, ensure_ascii=False), Path(path).resolve()
    if place.exists() and not place.is_file():  # a pipe, say
        place.write_text(text, "utf8")
    else:
        write_text(place, text)
