"""Where taxonomies come from: WordNet, the file of ImageNet's classes, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any, TextIO

from lkarray.checking import path_like
from lkarray.errors import MissingCorpusError

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


@contextmanager
def _reading(path: Any) -> Iterator[TextIO]:
    """Open a text file, or say which one cannot be read, and why."""
    place = path_like("path", path)
    if place.exists() and not place.is_file():
        raise ValueError(f"path: {place} is no file; give the file that the taxonomy is in")
    try:
        with open(place, newline="", encoding="utf8") as file:
            yield file
    except OSError as error:
        raise ValueError(f"path: {place} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {place} is no text in UTF-8: {error}") from None


def read_csv(path: Any) -> list[tuple[str, str]]:
    """Return the ``(parent, child)`` rows of a CSV file with those columns."""
    with _reading(path) as file:
        rows = csv.DictReader(file)
        missing = {"parent", "child"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has the columns {rows.fieldnames}, and lacks {sorted(missing)}: expected "
                "one row for each edge, with its parent and child"
            )
        found = [(row["parent"], row["child"]) for row in rows]
        if any(name is None for edge in found for name in edge):
            raise ValueError(f"{path} has rows without a parent or a child")
        return found


def read_json(path: Any) -> tuple[Parents, Any]:
    """Return parents and labels of a file that `write_json` wrote, or of ``{node: [parents]}``."""
    with _reading(path) as file:
        try:
            stored = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no object: expected {{node: [parents]}}")
    if stored.get("format") != "lkarray.taxonomy":
        return {n: p if isinstance(p, list) else [p] for n, p in stored.items()}, None
    try:
        return dict(map(tuple, stored["parents"])), dict(map(tuple, stored["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what Taxonomy.to_json wrote ({type(error).__name__}: {error})"
        ) from None


def write_json(path: Any, parents: Mapping[Any, Iterable[Any]], labels: Mapping[Any, Any]) -> None:
    """Write nodes with their parents, and labels with their nodes, as lists of pairs."""
    stored = {
        "format": "lkarray.taxonomy",
        "parents": [[node, list(above)] for node, above in parents.items()],
        "labels": [list(pair) for pair in labels.items()],
    }
    path_like("path", path).write_text(json.dumps(stored, ensure_ascii=False), "utf8")
