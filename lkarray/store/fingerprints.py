"""Comparing what something was made with to what is asked for now."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lkarray.errors import FingerprintError


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], where: str, *, remedy: str
) -> None:
    """Raise `FingerprintError`, naming each field that differs, unless both are equal."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        lines = "; ".join(f"{k}: stored {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise FingerprintError(
            f"{where} holds a run made with other settings ({lines}). Nothing was touched: {remedy}"
        )


def hash_labels(labels: Mapping[str, np.ndarray]) -> str:
    """Return a hash of the labels of an observed set, by their names."""
    digest = hashlib.sha256()
    for name, values in sorted(labels.items()):
        digest.update(repr((name, values.tolist())).encode())
    return digest.hexdigest()[:16]
