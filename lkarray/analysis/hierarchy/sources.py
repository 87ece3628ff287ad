"""Where taxonomies come from: WordNet, the file of ImageNet's classes, CSV and JSON."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Hashable, Iterable, Mapping, Sized
from importlib import resources
from io import StringIO
from typing import Any

import numpy as np
import pandas as pd

from lkarray.errors import MissingCorpusError
from lkarray.store.files import write_text
from lkarray.values import path_like

_GET_WORDNET = "python -m nltk.downloader wordnet"

#: What surrounds names in tables that were made by hand: blanks of any kind, byte order marks.
_BLANK = string.whitespace + "\u00a0\u2007\u202f\u200b\ufeff"
#: What tables write where a value is missing, other than nothing.
_MISSING = {"NaN", "nan", "N/A", "<NA>", "None", "null", "NULL"}  # NA is North America

Parents = dict[Any, list[Any]]


def read_imagenet() -> tuple[Parents, dict[str, str], dict[Hashable, str]]:
    """Return parents by synset name, labels (wnid to name) and aliases (number to name)."""
    text = (
        resources.files("lkarray.analysis.hierarchy")
        .joinpath("data/imagenet.json")
        .read_text("utf8")
    )
    stored = json.loads(text)
    names = {wnid: name for wnid, (name, _) in stored["nodes"].items()}
    parents = {name: [names[p] for p in above] for name, above in stored["nodes"].values()}
    labels = {wnid: names[wnid] for wnid in stored["classes"]}
    numbers: dict[Hashable, str] = dict(enumerate(labels.values()))
    return parents, labels, numbers | names


def read_wordnet(synsets: Iterable[str]) -> tuple[Parents, dict[str, str], dict[Hashable, str]]:
    """Return parents by synset name, the name of each asked synset, and aliases (wnids)."""
    wordnet = open_wordnet()
    known, unknown = {}, []
    for synset in dict.fromkeys(synsets):
        try:
            known[synset] = _synset(wordnet, synset)
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
    todo = list(known.values())
    while todo:
        synset = todo.pop()
        if synset.name() in parents:
            continue
        above = synset.hypernyms() + synset.instance_hypernyms()
        parents[synset.name()] = [s.name() for s in above]
        aliases[wnid(synset)] = synset.name()
        todo.extend(above)
    return parents, {asked: synset.name() for asked, synset in known.items()}, aliases


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


def read_csv(path: Any) -> Parents:
    """Return the parents of each node, from a CSV file with the columns ``parent`` and ``child``.

    Rows without anything are passed over, and lines are what messages name.
    """
    reader = csv.reader(StringIO(_text(path), newline=""), skipinitialspace=True)
    lines = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
    names = [name.strip() for name in next(lines, (0, []))[1]]
    missing = {"parent", "child"} - set(names)
    if missing:
        raise ValueError(
            f"{path} has the columns {names}, and lacks {sorted(missing)}: expected one row for "
            "each edge, with its parent and child"
        )
    columns = [names.index(name) for name in ("parent", "child")]
    rows = [(f"{path}, line {n}", [*row, *[""] * len(names)]) for n, row in lines]
    return parents_of((where, (row[columns[0]], row[columns[1]])) for where, row in rows)


def parents_of(edges: Iterable[tuple[str, tuple[Any, Any]]], *, prefixes: bool = False) -> Parents:
    """Return the parents of each node, from edges and where each is from.

    An edge without a parent says that its child is a root. With ``prefixes``, empty text above
    several nodes is a name: that of the root of all words, each below what it begins with.

    Raises
    ------
    ValueError
        An edge has no child, or a node is a root by one edge and has a parent by another.
    """
    rows = [(where, plain(above), plain(below)) for where, (above, below) in edges]
    children = {below for _, _, below in rows}
    empty = (
        prefixes
        and len({below for _, above, below in rows if isinstance(above, str) and not above}) > 1
    )
    parents: Parents = {}
    roots: dict[Any, str] = {}
    said: dict[Any, str] = {}
    for where, above, below in rows:
        if is_missing(below):
            raise ValueError(
                f"{where}: the edge from {above!r} has no child; leave the row out, or leave the "
                "parent empty and name the child, for a root"
            )
        # Some tables spell out what is missing; what has a row of its own is a name all the same.
        root = is_missing(above) or (above in _MISSING and above not in children)
        root = root and not (empty and isinstance(above, str) and not above)
        if not root:
            parents.setdefault(above, [])
        own = parents.setdefault(below, [])
        (roots if root else said).setdefault(below, where)
        if not root and above not in own:
            own.append(above)
    for node, where in roots.items():
        if node in said:
            raise ValueError(
                f"{node!r} has no parent by {where}, and one, {parents[node][0]!r}, by "
                f"{said[node]}; leave out the row that is wrong"
            )
    return parents


def plain(label: Any, name: str = "label") -> Any:
    """Return a name as Python's own type, without blanks around it, so that equal ones match."""
    native = label.item() if isinstance(label, np.generic) else label
    try:
        hash(native)
    except TypeError:
        raise TypeError(
            f"{name}: a {type(native).__name__} cannot be a node or label; use strings or numbers"
        ) from None
    return native.strip(_BLANK) if isinstance(native, str) else native


def is_missing(name: Any) -> bool:
    """Say whether a name is none: None, NaN, or nothing but blanks."""
    if isinstance(name, str):
        return not name.strip(_BLANK)
    return bool(pd.isna(name)) if np.ndim(name) == 0 and not isinstance(name, tuple) else False


def _text(path: Any) -> str:
    """Return the text of a file, without the mark that some programs begin UTF-8 with."""
    place = path_like("path", path)
    try:
        if place.exists() and not place.is_file():
            raise ValueError(f"path: {place} is no file; give the file that the taxonomy is in")
        return place.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"path: {place} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path: {place} is not UTF-8 (at byte {error.start}); save it as UTF-8"
        ) from None


def is_pair(edge: Any) -> bool:
    """Say whether something has two entries, and is no string."""
    try:
        return not isinstance(edge, str) and isinstance(edge, Sized) and len(edge) == 2
    except TypeError:  # a tensor without dims
        return False


def read_json(path: Any) -> tuple[Parents, Any]:
    """Return parents and labels of a file that `write_json` wrote, or of ``{node: [parents]}``."""
    try:
        stored = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no object: expected {{node: [parents]}}")
    if not stored:
        raise ValueError(f"{path} holds an empty object: a taxonomy needs at least one node")
    if stored.get("format") != "lkarray.taxonomy":
        return {n: p if isinstance(p, list) else [p] for n, p in stored.items()}, None
    try:
        return dict(map(tuple, stored["parents"])), dict(map(tuple, stored["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what Taxonomy.to_json wrote ({type(error).__name__}: {error})"
        ) from None


def write_json(path: Any, parents: Mapping[Any, Iterable[Any]], labels: Mapping[Any, Any]) -> None:
    """Write nodes with their parents, and labels with their nodes, as lists of pairs.

    A file is replaced in one move, so that a failure leaves what was there; a link is followed.
    """
    stored = {
        "format": "lkarray.taxonomy",
        "parents": [[node, list(above)] for node, above in parents.items()],
        "labels": [list(pair) for pair in labels.items()],
    }
    text, place = json.dumps(stored, ensure_ascii=False), path_like("path", path).resolve()
    if place.exists() and not place.is_file():  # a pipe, say
        place.write_text(text, "utf8")
    else:
        write_text(place, text)
