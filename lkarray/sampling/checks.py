"""What must hold before sampling, and what must be equal before it is resumed."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from lkarray._version import __version__
from lkarray.errors import FingerprintError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.flat import hash_weights
from lkarray.sampling.chain import Schedule, Target
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.samplers import SGLD


def check_types(posterior: object, sampler: object) -> None:
    """Raise ``TypeError`` unless both are what `sample` takes."""
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(f"posterior must be lk.LocalPosterior, not {type(posterior).__name__}")
    if not isinstance(sampler, SGLD):
        raise TypeError(f"sampler must be lk.SGLD(step_size=...), not {type(sampler).__name__}")


def at_least(name: str, value: object, least: int) -> int:
    """Return ``value`` as an int of at least ``least``, or raise and name it."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def check_loss(
    posterior: LocalPosterior, flat: FlatModel, data: Batches, name: str, *, gradient: bool
) -> None:
    """Try the model, the loss and its gradient on the first two items."""
    inputs, target = data.take(np.arange(min(2, data.n)))
    with torch.set_grad_enabled(gradient):
        try:
            output = flat(inputs)
        except Exception as error:
            raise ValueError(
                f"the model failed on the first items of {name}, inputs of shape "
                f"{tuple(inputs.shape)}: {error}"
            ) from error
        posterior.loss.check(output, target)
        if gradient and not posterior.loss(output, target).requires_grad:
            raise ValueError(
                f"loss {posterior.loss.name!r} has no gradient with respect to what is trainable, "
                f"{posterior.trainable}; use a differentiable loss, and parameters that the model "
                "uses"
            )


def choose_device(
    asked: torch.device | str | None, before: Mapping[str, Any] | None
) -> torch.device:
    """Return the device asked for, or the stored one, or CUDA where there is one."""
    if asked is not None:
        chosen = torch.device(asked)
    elif before is not None:
        chosen = torch.device(before["device"])
    else:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {chosen} was asked for or stored, but CUDA is not available")
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def make_fingerprint(
    posterior: LocalPosterior,
    target: Target,
    sampler: SGLD,
    schedule: Schedule,
    *,
    batch_size: int | None,
    seed: int,
    labels: Mapping[str, np.ndarray],
    threads: int,
) -> dict[str, Any]:
    """Return what must be equal for a resume to give the same numbers."""
    n = target.train.n
    digest = hashlib.sha256()
    for name, values in sorted(labels.items()):
        digest.update(repr((name, values.tolist())).encode())
    device = target.flat.device
    return {
        "lkarray": __version__,
        "torch": torch.__version__,
        "weights": hash_weights(posterior.model),
        "train_data": target.train.identity,
        "observed_data": target.observed.identity,
        "coords": digest.hexdigest()[:16],
        "loss": posterior.loss.name,
        "nbeta": posterior.nbeta,
        "gamma": posterior.gamma,
        "trainable": posterior.trainable,
        "sampler": {"name": type(sampler).__name__} | asdict(sampler),
        "burn_in": schedule.burn_in,
        "thin": schedule.thin,
        "batch_size": n if batch_size is None else min(batch_size, n),
        "seed": seed,
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(target.center.dtype).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "stacking": "one chain at a time",
        "eval_rows": target.eval_rows,
        "threads": threads,
    }


def check_center(stored: np.ndarray, now: np.ndarray, where: str) -> None:
    """Raise unless the losses at w* are those stored: whatever a hash cannot see shows there."""
    differ = ~np.isclose(stored, now, rtol=1e-4, atol=1e-6)
    if differ.any():
        first = int(np.argmax(differ))
        raise FingerprintError(
            f"{where}: the losses at w* are not those stored (first at sample position {first}: "
            f"stored {stored[first]:g}, now {now[first]:g}), so the model, the loss or the data "
            "behave otherwise than when it was made. Nothing was touched: use another path"
        )


@contextmanager
def numerics(threads: int) -> Iterator[None]:
    """Run with gradients on and the stored number of threads, on which last bits depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cudnn = torch.backends.cudnn
    try:
        with (
            torch.enable_grad(),
            cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True),
        ):
            yield
    finally:
        torch.set_num_threads(before)
