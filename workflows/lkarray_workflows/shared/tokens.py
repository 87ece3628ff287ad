"""Tokens of definitions, and what kind of word each is."""

from __future__ import annotations

import re
from typing import Any

UNKNOWN, END = "<unknown>", "<end>"
#: Words of grammar, as definitions use them.
_FUNCTION = frozenset(
    re.findall(
        r"\S+",
        """a an the of in on at by for to from with without into onto over under between among as
        through during before after than that which who whom whose when where and or but not no nor
        if is are was were be been being has have had do does did can may might must will would it
        should its he she they them their his her you your one's one some any all each other others
        such this these those there so up out off about against especially usually often""",
    )
)


def split_text(text: str) -> list[str]:
    """Return words, numbers and marks, in lower case."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]", text.lower())


def frequency(sense: Any) -> int:
    """Return how often a sense was counted in WordNet's texts."""
    return sum(lemma.count() for lemma in sense.lemmas())


def kind_of(token: str, wordnet: Any) -> str:
    """Return what kind of token it is: the part of speech of a word's most frequent sense."""
    if token in (UNKNOWN, END):
        return token
    if not token[0].isalpha():
        return "number" if token.isdigit() else "mark"
    if token in _FUNCTION:
        return "function word"
    senses = wordnet.synsets(token)
    if not senses:
        return "other word"
    frequent = max(senses, key=frequency)
    return {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}[
        frequent.pos()
    ]
