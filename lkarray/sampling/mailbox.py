"""From the device to the host, without waiting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Mailbox:
    """Holds one draw on its way from the device to the host.

    On CUDA, `send` starts copies into pinned buffers behind the work already queued, and
    `receive` waits for these copies alone; meanwhile the next step runs. On the CPU there is
    nothing to copy, and the same calls hand the tensors on.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] | None = None
        self._pinned: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way."""
        return self._parts is None

    def send(self, parts: Mapping[str, Tensor]) -> None:
        """Start to move tensors; the last ones must have been received."""
        assert self.empty, "the last draw has not been received"
        self._parts = {key: self._start(key, part) for key, part in parts.items()}
        if self._pinned:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _start(self, key: str, part: Tensor) -> Tensor:
        if part.device.type != "cuda":
            return part
        if key not in self._pinned:
            self._pinned[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        return self._pinned[key].copy_(part, non_blocking=True)

    def receive(self) -> dict[str, np.ndarray]:
        """Return what was sent, once it is here; valid until the next `send`."""
        assert self._parts is not None, "nothing was sent"
        if self._arrived is not None:
            self._arrived.synchronize()
        parts, self._parts = self._parts, None
        return {key: part.numpy() for key, part in parts.items()}
