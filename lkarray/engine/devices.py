"""Which device multiplies: the cores through numpy, or a device of torch with a byte budget.

torch is loaded inside functions, and only once a device was asked for. ``"cpu"`` is torch on the
processor: the same code as on a GPU, so that it can be tested where there is none.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from dask.utils import format_bytes

from lkarray.engine.blas import product_slot
from lkarray.engine.cache import DEVICE_PANELS
from lkarray.engine.machine import machine_memory
from lkarray.errors import DeviceError, MemoryBudgetError
from lkarray.values import byte_count
from lkarray.waiting import current_client

_SHARE = 0.8  # of the free memory: other processes, and torch's own work space, need some
_SHORTEST = 64  # contracted elements that a product takes at once, at least
_WIDEST = 1 << 20  # side of a tile that anybody would ask for
_STAGED = 32 << 20  # bytes of page-locked memory through which a panel goes up
_NAMES = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Device:
    """A device of torch, and the bytes of its memory that a process may use."""

    name: str
    budget: int


@dataclass(frozen=True)
class Placed:
    """How a plan runs on a device.

    Attributes
    ----------
    device
        The device, and its budget.
    length
        Contracted elements of the panels that are multiplied at once.
    cache
        Bytes of panels that stay on the device.
    peak
        Bytes that all tasks together hold there besides, at most.
    """

    device: Device
    length: int
    cache: int
    peak: int


def as_device(device: str | None, device_memory: int | str | None = None) -> Device | None:
    """Return the device to multiply on; None for numpy on the cores.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. ``None`` takes ``LKARRAY_DEVICE`` where it is set,
        and numpy otherwise.
    device_memory
        Bytes of its memory to use; by default 0.8 of what is free (of ``"cpu"``, of a quarter of
        the machine). On a cluster, of the worker that has least.

    Raises
    ------
    DeviceError
        There is no torch, no CUDA, or no such device.
    ValueError
        The name is no device's, or memory is given without a device.
    """
    given = device if device is not None else os.environ.get("LKARRAY_DEVICE") or None
    if given is None:
        if device_memory is not None:
            raise ValueError(
                "device_memory is for products on a device: give device= too, or memory= for the "
                "budget of the cores"
            )
        return None
    if not _NAMES.fullmatch(given):
        what = "device" if device is not None else "device (LKARRAY_DEVICE)"
        raise ValueError(f"{what} must be 'cpu', 'cuda' or 'cuda:1', not {given!r}")
    client = current_client()
    if client is None:
        free = free_bytes(given)
    else:
        # The workers multiply, and this process may have no GPU. Each worker has one of its own.
        free = min(client.run(free_bytes, given).values(), default=0)
    budget = byte_count("device_memory", device_memory) if device_memory is not None else free
    return Device(given, int(budget if device_memory is not None else _SHARE * free))


def free_bytes(name: str) -> int:
    """Return the bytes of a device's memory that are free, what lkarray keeps there included."""
    try:
        import torch
    except ImportError:
        raise DeviceError(
            f"device={name!r} needs torch, which is not installed: pip install torch, or leave "
            "device= out"
        ) from None
    if name == "cpu":
        return machine_memory() // 4
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device={name!r} needs CUDA, which torch {torch.__version__} does not find: look at "
            "nvidia-smi, install a torch built for CUDA, or leave device= out for the cores"
        )
    number = torch.cuda.device_count()
    place = torch.device(name)
    if place.index is not None and place.index >= number:
        there = ", ".join(f"cuda:{i}" for i in range(number))
        raise DeviceError(f"device={name!r} does not exist; there are {there}")
    free, _ = torch.cuda.mem_get_info(place)
    # What torch holds for later, and panels of earlier kernels, make room for this one.
    return int(free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)) + (
        DEVICE_PANELS.nbytes
    )


def made_on(device: Device | None, dtype: np.dtype) -> dict[str, str]:
    """Return the attributes of a result that say where and how products were made."""
    return {} if device is None else {"device": device.name, "precision": dtype.name}


def check_dtype(dtype: np.dtype, device: Device) -> None:
    """Raise unless torch has the operands' type."""
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(
            f"device={device.name!r} multiplies float32 and float64, and the operands are {dtype}: "
            "convert them with .astype('float64'), or leave device= out"
        )


def refuse(device: Device, needed: int, what: str) -> None:
    """Raise the error that a device's budget cannot hold something; ``needed`` is its bytes."""
    raise MemoryBudgetError(
        f"{format_bytes(device.budget)} of the device {device.name!r} cannot hold {what}; "
        f"{ceil(needed * 4 / 3 / 2**10) + 1} KiB can: set device_memory="
    )


@dataclass(frozen=True)
class Demand:
    """What tiles need on a device: bytes of an element, of what is made of it, and how many tasks.

    ``length`` elements are contracted, some at a time where not all fit.
    """

    device: Device
    item: int
    sink: int
    length: int
    tasks: int

    def peak(self, side: int, length: int, *, summed: bool) -> int:
        """Return the bytes of all tasks: two panels each, a tile, and the sum of several."""
        tile = side * side * (self.item + self.sink + (8 if summed else 0))
        return self.tasks * (tile + 2 * side * length * self.item)

    @property
    def _allowed(self) -> int:
        return 3 * self.device.budget // 4  # a quarter stays for panels that are kept

    def widest(self, least: int) -> int:
        """Return the largest side of a tile that fits.

        Raises
        ------
        MemoryBudgetError
            Tiles of the side ``least`` do not; the message says what would hold them.
        """
        shortest = min(self.length, _SHORTEST)
        self._require(least, shortest)
        low, high = least, max(least, _WIDEST)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.peak(middle, shortest, summed=True) <= self._allowed
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def place(self, side: int, pieces: list[int]) -> Placed:
        """Return how tiles run: whole pieces of the contracted dims at once, or what fits."""
        length, several = max(pieces), len(pieces) > 1
        peak = self.peak(side, length, summed=several)
        if peak > self._allowed:
            empty = self.peak(side, 0, summed=True)
            self._require(side, shortest := min(length, _SHORTEST))
            part = (self._allowed - empty) // (self.tasks * 2 * side * self.item)
            length = ceil(length / ceil(length / max(part, shortest)))
            peak = self.peak(side, length, summed=True)
        return Placed(self.device, length, self.device.budget - peak, peak)

    def _require(self, side: int, length: int) -> None:
        needed = self.peak(side, length, summed=True)
        if needed > self._allowed:
            refuse(self.device, needed, f"tiles of {side} rows with {self.tasks} tasks at once")


def upload(array: np.ndarray, device: Device, dtype: np.dtype | None = None) -> Any:
    """Return an array as a tensor on a device, in the order of its memory.

    To a GPU by way of page-locked memory, a stretch at a time, which copies at full speed.
    """
    import torch

    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = np.array(array)
    tensor = torch.from_numpy(array)
    kind = tensor.dtype if dtype is None else getattr(torch, np.dtype(dtype).name)
    if device.name == "cpu":
        return tensor.to(kind, copy=True)
    if tensor.dim() == 2 and tensor.stride(0) < tensor.stride(1):
        return upload(array.T, device, dtype).T  # rows of the memory, whichever dim they are
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device.name)
    step = max(1, _STAGED * len(tensor) // max(array.nbytes, 1)) if tensor.dim() else 1
    for start in range(0, len(tensor), step):
        # torch keeps a page-locked block from being used again until its copy is over.
        staged = tensor[start : start + step].pin_memory()
        out[start : start + step].copy_(staged, non_blocking=True)
    return out.to(kind)


class Returning:
    """A tensor on its way back: the copy runs beside the products that follow."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._event: Any = None
        self._tensor = tensor
        if tensor.is_cuda:
            after = torch.cuda.Stream(tensor.device)
            after.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(after):
                self._tensor = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
                )
                self._tensor.copy_(tensor, non_blocking=True)
                self._event = after.record_event()
            tensor.record_stream(after)  # its memory is not used again before the copy is over

    def array(self) -> np.ndarray:
        """Wait for the copy, and return it as an array of pageable memory."""
        out: np.ndarray = self._tensor.numpy()
        if self._event is None:
            return out
        self._event.synchronize()
        return out.copy()  # page-locked memory is scarce, and results may be kept


@contextmanager
def exact(device: Device) -> Iterator[None]:
    """Have products be of true float32 here: TF32 and autocast off, and restored after."""
    import torch

    # Settings are of the process; callers hold the slot of a product that runs alone.
    matmuls: list[Any] = [torch.backends.cuda.matmul]
    matmuls.append(getattr(torch.backends.mkldnn, "matmul", torch.backends.mkldnn))
    settings = [m for m in matmuls if hasattr(m, "fp32_precision")]
    before = [m.fp32_precision for m in settings]
    legacy = None if settings else torch.get_float32_matmul_precision()
    place = torch.device(device.name)
    try:
        for matmul in settings:
            matmul.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.inference_mode(), torch.autocast(place.type, enabled=False):
            yield
    finally:
        for matmul, precision in zip(settings, before, strict=True):
            matmul.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


@lru_cache(maxsize=4)
def device_rate(device: Device, dtype: np.dtype) -> float:
    """Return operations a second of a product on a device, measured now; infinite where it is not.

    On a cluster it is the workers that have the device.
    """
    import torch

    cuda = device.name != "cpu"
    if cuda and not torch.cuda.is_available():
        return float("inf")
    side = 4096 if cuda else 512
    panel = torch.ones((side, side), dtype=getattr(torch, dtype.name), device=device.name)
    taken = []
    with product_slot(many=False), exact(device):
        for _ in range(5):
            began = time.perf_counter()
            product = panel.T @ panel
            if cuda:
                torch.cuda.synchronize(product.device)
            taken.append(time.perf_counter() - began)
    return float(2 * side**3 / min(taken))


def gradientless() -> Any:
    """Return the context in which tensors made in `exact` may be added to."""
    import torch

    return torch.inference_mode()


def out_of_memory(device: Device, what: str) -> MemoryBudgetError:
    """Return the error that a device was full in the middle, though the plan was within bounds."""
    return MemoryBudgetError(
        f"the device {device.name!r} ran out of memory within {what}, and again once what lkarray "
        f"keeps there was freed, though {format_bytes(device.budget)} were allowed: others use it "
        f"too; set device_memory= to less, {format_bytes(device.budget // 2)} say"
    )


def unless_full(work: Callable[[], Any]) -> Any:
    """Return what ``work`` gives; None, and nothing is left there, where the device's memory ends.

    The error is gone by then, and with it the frames that hold on to tensors.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _is_full(error):
            raise
    release()
    return None


def _is_full(error: Exception) -> bool:
    import torch

    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def release() -> None:
    """Free the panels that this process keeps on devices, and what torch holds for later."""
    import torch

    DEVICE_PANELS.forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
