"""A model whose trainable parameters are one vector."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lkarray.errors import NonFiniteError


class FlatModel:
    """A private copy of a module whose moving parameters, and gradients, are flat vectors.

    The copy is in eval mode: dropout is off and BatchNorm uses its stored statistics. The
    user's module is never changed. Tied parameters are one stretch of the vector, so they
    move together.

    Parameters
    ----------
    model
        Any module. Parameters that move must be float32 or float64, on one device.
    trainable
        Names or patterns (``"fc*.weight"``) of parameters that move; ``None`` moves those
        with ``requires_grad``.
    device
        Where the copy lives; ``None`` leaves it where the model is.

    Attributes
    ----------
    theta, grad
        Shape ``(param,)``. The module's parameters and their gradients are views of these:
        writing one moves the other.
    names, sizes
        Name and number of elements of each moving parameter, in the order of the vector.

    Raises
    ------
    TypeError
        ``model`` is no module.
    ValueError
        No parameter moves, a pattern matches none, or their dtypes differ or are too narrow.
    NonFiniteError
        A weight is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trainable: str | Iterable[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        names = moving_parameters(model, trainable)
        self.module = copy.deepcopy(model).eval()
        if device is not None:
            self.module.to(device)
        self.names = tuple(names)
        parameters = dict(self.module.named_parameters())
        moving = [parameters[name] for name in names]
        first = moving[0]
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.sizes = tuple(p.numel() for p in moving)
        self.theta = torch.empty(sum(self.sizes), dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.theta)
        start = 0
        for parameter in moving:
            stretch = slice(start, start + parameter.numel())
            view = self.theta[stretch].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.requires_grad_(True)
            # Backward adds to an existing .grad in place, so the vector fills by itself.
            parameter.grad = self.grad[stretch].view(parameter.shape)
            start = stretch.stop

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.theta.device

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the module."""
        out: Tensor = self.module(inputs)
        return out


def moving_parameters(model: nn.Module, trainable: str | Iterable[str] | None) -> list[str]:
    """Return the names of the parameters that move, checked; see `FlatModel`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    parameters = dict(model.named_parameters())
    if trainable is None:
        names = [name for name, p in parameters.items() if p.requires_grad]
        if not names:
            raise ValueError(
                f"the model has no trainable parameters ({len(parameters)} in all); give it some, "
                "call requires_grad_(True), or name them with trainable=[...]"
            )
    else:
        patterns = [trainable] if isinstance(trainable, str) else list(trainable)
        # A tied parameter has several names; it moves under the first if any of them matches.
        first = {id(parameter): name for name, parameter in parameters.items()}
        aliases = list(model.named_parameters(remove_duplicate=False))
        chosen = set()
        for pattern in patterns:
            matches = {first[id(p)] for name, p in aliases if fnmatchcase(name, pattern)}
            if not matches:
                raise ValueError(
                    f"trainable: {pattern!r} matches none of {sorted(name for name, _ in aliases)}"
                )
            chosen |= matches
        names = [name for name in parameters if name in chosen]
        if not names:
            raise ValueError(f"trainable names no parameter; choose from {sorted(parameters)}")
    _check(model, {name: parameters[name] for name in names})
    return names


def _check(model: nn.Module, moving: dict[str, nn.Parameter]) -> None:
    kinds = {(p.dtype, p.device) for p in moving.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"the moving parameters have several dtypes or devices: {sorted(map(str, kinds))}; "
            "convert the model with .to(...) first"
        )
    ((dtype, _),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"parameters are {dtype}; sampling needs float32: convert with .float()")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"the model's {name!r} holds NaN or infinity; load a finite checkpoint"
            )


def hash_weights(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer, stored or not, and of the structure."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the raw bytes of a tensor of any dtype, copied to the CPU where needed."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
