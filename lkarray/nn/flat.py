"""A model whose trainable parameters are one vector, for one chain or a stack of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lkarray.nn.copying import copy_module
from lkarray.nn.losses import PerExampleLoss
from lkarray.nn.modes import gradients_on
from lkarray.nn.trainable import moving_parts

#: Weights of these are sampled in a float32 copy.
_NARROW = (torch.bfloat16, torch.float16)


class FlatModel:
    """A private copy of a module whose moving parameters, and gradients, are flat vectors.

    The copy is in eval mode: dropout is off and BatchNorm uses its stored statistics. The
    user's module is never changed. Tied parameters are one stretch of the vector, so they
    move together. A model in bfloat16 or float16 is copied to float32.

    Parameters
    ----------
    model
        Any module, on one device.
    trainable
        Names or patterns of parameters that move, as in `lkarray.LocalPosterior`.
    device
        Where the copy lives; ``None`` leaves it where the model is.
    width
        Number of chains in the stack: of rows of ``theta``. More than one are evaluated at
        once through ``torch.func``.

    Attributes
    ----------
    theta
        Shape ``(width, param)``. Parameters are views of it: writing one moves the other.
    grad
        The same shape. Where the width is 1, gradients are views of it: backward adds to an
        existing ``.grad`` in place, so it fills by itself.
    mask
        Boolean, shape ``(param,)``: the elements that move; ``None`` where all do.
    names, sizes
        Name and number of elements of each moving parameter, in the order of the vector.

    Raises
    ------
    TypeError
        ``model`` is no module.
    ValueError
        No parameter moves, a pattern matches none, or their dtypes or devices differ; or the
        module holds something that cannot be copied.
    NonFiniteError
        A weight is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trainable: str | Iterable[str] | None = None,
        device: torch.device | str | None = None,
        width: int = 1,
    ) -> None:
        masks = moving_parts(model, trainable)
        with gradients_on():  # tensors made in inference mode would never have a gradient
            self._copy(model, masks, device, width)

    def _copy(
        self,
        model: nn.Module,
        masks: dict[str, Tensor | None],
        device: torch.device | str | None,
        width: int,
    ) -> None:
        self.module = copy_module(model).eval()
        if any(p.dtype in _NARROW for p in self.module.parameters()):
            self.module.float()
        config: Any = getattr(self.module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # Hugging Face's keys and values of past tokens: never read
        if device is not None:
            self.module.to(device)
        self.names = tuple(masks)
        self._parameters = dict(self.module.named_parameters())
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self._moving = [self._parameters[name] for name in masks]
        first = self._moving[0]
        self.sizes = tuple(p.numel() for p in self._moving)
        self.theta = first.detach().new_empty((width, sum(self.sizes)))
        self.grad = torch.zeros_like(self.theta)
        self.mask = _join_masks(list(masks.values()), self._moving)
        # The parameters lie one behind the other, each of them whole, in the module's order.
        for row in self.theta:
            torch.cat([p.detach().flatten() for p in self._moving], out=row)
        self._stretches: list[slice] = []
        start = 0
        for size in self.sizes:
            self._stretches.append(slice(start, start + size))
            start += size
        self._leaves = self._make_leaves() if width > 1 else {}
        for parameter in self._moving:
            parameter.requires_grad_(width == 1)
        self.bind(0)

    def _make_leaves(self) -> dict[str, Tensor]:
        """Return the stacked parameters: views of ``theta``."""
        leaves = {}
        for name, stretch, like in zip(self.names, self._stretches, self._moving, strict=True):
            shape = (self.width, *like.shape)
            leaf = self.theta[:, stretch].view(shape).detach().requires_grad_()
            leaves[name] = leaf
        return leaves

    def bind(self, row: int) -> nn.Module:
        """Let the module's parameters be those of one row of the stack; return the module."""
        for parameter, stretch in zip(self._moving, self._stretches, strict=True):
            parameter.data = self.theta[row, stretch].view(parameter.shape)
            if parameter.requires_grad:
                parameter.grad = self.grad[row, stretch].view(parameter.shape)
        return self.module

    def load(self, vector: Tensor | np.ndarray, places: Mapping[str, slice] | None = None) -> None:
        """Give the first chain the parameters that a vector holds.

        Parameters
        ----------
        vector
            Shape ``(param,)``.
        places
            Where in it each parameter lies, by name, those that do not move included; ``None``
            takes it for a row of ``theta``.
        """
        values = torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector
        if places is None:
            self.theta[0].copy_(values)
            return
        for name, place in places.items():
            parameter = self._parameters[name]
            parameter.data.copy_(values[place].view(parameter.shape))

    @property
    def width(self) -> int:
        """Number of chains in the stack."""
        return len(self.theta)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.theta.device

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is taken with respect to: parameters, stacked where there is a stack."""
        return list(self._leaves.values()) or list(self._moving)

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return tensors shaped like ``leaves`` as one of shape ``(width, param)``."""
        return torch.cat([tensor.reshape(self.width, -1) for tensor in tensors], dim=1)

    def unflatten(self, vectors: Tensor) -> list[Tensor]:
        """Return ``(width, param)`` as tensors shaped like ``leaves``."""
        pairs = zip(vectors.split(self.sizes, dim=1), self.leaves, strict=True)
        return [stretch.reshape(leaf.shape) for stretch, leaf in pairs]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return one chain's vector ``(param,)`` by the names of the moving parameters: views."""
        parts = zip(self.names, self._stretches, self._moving, strict=True)
        return {name: vector[stretch].view(like.shape) for name, stretch, like in parts}

    def slope(self, number: Tensor) -> Tensor:
        """Return the gradient of one number by the parameters, ``(param,)``, dense.

        Zero by those that the number does not depend on.
        """
        if not number.requires_grad:
            return torch.zeros_like(self.theta[0])
        slopes = torch.autograd.grad(number, self.leaves, materialize_grads=True)
        return torch.cat([dense(slope).reshape(-1) for slope in slopes])

    def whole_slope(self, number: Tensor) -> Tensor:
        """Return the same by a whole backward pass, which a reentrant checkpoint asks for."""
        self.grad.zero_()
        if number.requires_grad:
            number.backward()
        slope = self.grad[0].clone()
        self.grad.zero_()  # whoever runs backward next adds to what is there
        return slope

    def __call__(self, inputs: Tensor | dict[str, Tensor]) -> object:
        """Run the module, with the parameters of the row that is bound."""
        return self.module(**inputs) if isinstance(inputs, dict) else self.module(inputs)

    def losses(
        self,
        loss: PerExampleLoss,
        inputs: Tensor | dict[str, Tensor],
        target: Tensor | dict[str, Tensor],
        *,
        shared: bool,
    ) -> Tensor:
        """Return the losses of every chain, shape ``(width, batch, ...)``.

        Parameters
        ----------
        loss
            Of (output, target).
        inputs, target
            A batch of every chain's own, ``(width, batch, ...)``; or one for all,
            ``(batch, ...)``, if ``shared``, as always where the width is 1.
        shared
            Whether all chains see the same batch.
        """
        if self.width == 1:
            return loss(self(inputs), target).unsqueeze(0)

        def of_chain(parameters: dict[str, Tensor], x: object, y: object) -> Tensor:
            args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
            return loss(functional_call(self.module, parameters, args, kwargs), y)

        own = None if shared else 0  # vmap over the chains: of theirs, or of all alike
        return vmap(of_chain, in_dims=(0, own, own))(self._leaves, inputs, target)


def _join_masks(masks: list[Tensor | None], moving: list[nn.Parameter]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    moves = [
        torch.ones(p.numel(), dtype=torch.bool, device="cpu") if mask is None else mask.flatten()
        for mask, p in zip(masks, moving, strict=True)
    ]
    return torch.cat(moves).to(moving[0].device)


def dense(tensor: Tensor) -> Tensor:
    """Return a gradient as a plain tensor: that of ``nn.Embedding(sparse=True)`` is none."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


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
