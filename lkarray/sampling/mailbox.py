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
        self._sent: dict[str, Tensor] | None = None
        self._pinned: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way."""
        return self._sent is None

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Start to move tensors; the last ones must have been received."""
        assert self.empty, "the last draw has not been received"
        self._sent = {key: self._start(key, tensor) for key, tensor in tensors.items()}
        if self._pinned:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _start(self, key: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        # Only a copy into pinned memory goes on while the host does; the buffers are kept.
        if key not in self._pinned:
            self._pinned[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
        return self._pinned[key].copy_(tensor, non_blocking=True)

    def receive(self) -> dict[str, np.ndarray]:
        """Return what was sent, once it is here; valid until the next `send`."""
        assert self._sent is not None, "nothing was sent"
        if self._arrived is not None:
            self._arrived.synchronize()
        sent, self._sent = self._sent, None
        return {key: tensor.numpy() for key, tensor in sent.items()}
