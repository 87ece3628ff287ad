"""What `verify` says of a fault."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One fault of a store.

    Attributes
    ----------
    kind
        ``missing``, ``truncated``, ``corrupt``, ``mismatch`` or ``unfinished``.
    path
        The piece: a chunk's key, or an array's or group's path.
    detail
        What was expected, and what is there.
    """

    kind: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}: {self.detail}"
