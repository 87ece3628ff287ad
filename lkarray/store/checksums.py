"""CRC-32C of bytes and of JSON."""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import numpy as np


def crc(content: bytes | bytearray | memoryview | np.ndarray) -> int:
    """Return the CRC-32C of some bytes, as Zarr's codec of that name appends it to a chunk."""
    return int(google_crc32c.value(content))


def extend_crc(before: int, content: np.ndarray) -> int:
    """Return the CRC-32C of some bytes after others, whose own is ``before``."""
    return int(google_crc32c.extend(before, content))


def json_digest(value: Any) -> int:
    """Return a checksum of a value as JSON, whatever the order of keys and the spaces."""
    return crc(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
