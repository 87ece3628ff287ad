"""Layers whose per-example gradients are products of what goes in and what comes back.

A layer that adds up ``W a`` over positions has, for one example, the gradient ``sum_l b_l a_l'``
of its weight: ``a`` its inputs, ``b`` the gradient of the loss by its outputs. Each layer here
says how its input becomes ``a``; everything else is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Kinds of factors: a matrix ``b a'``, the two sides of a convolution, a row picked by an index,
#: or an element-wise scale.
MATRIX, CONVOLUTION, ROWS, SCALE = "matrix", "convolution", "rows", "scale"


@dataclass(frozen=True)
class Factors:
    """What one call of a layer leaves of each example.

    Attributes
    ----------
    kind
        ``MATRIX``: ``a`` is ``(example, group, position, in)``; ``CONVOLUTION``: the padded images
        ``(example, channel, height, width)``; ``ROWS``: indices ``(example, position)``; ``SCALE``:
        like ``b``.
    a
        Of the inputs.
    b
        Gradient by the outputs, ``(example, group, position, out)``; ``(example, channel, height,
        width)`` of a convolution, and ``(example, position, out)`` of the other kinds.
    layer
        Of a convolution.
    """

    kind: str
    a: Tensor
    b: Tensor
    layer: Any = None

    @property
    def single(self) -> bool:
        """Whether there is one position and one group: the gradient is of rank one."""
        return self.kind == MATRIX and self.a.shape[1] == self.a.shape[2] == 1


#: Makes factors of the module, its input, the gradient of its output, and the examples.
Rule = Callable[[Any, Tensor, Tensor, int], Factors]


def _linear(module: nn.Linear, a: Tensor, b: Tensor, n: int) -> Factors:
    shape = (n, 1, -1)
    return Factors(MATRIX, a.reshape(*shape, a.shape[-1]), b.reshape(*shape, b.shape[-1]))


def _conv(module: nn.Conv1d | nn.Conv2d, a: Tensor, b: Tensor, n: int) -> Factors:
    flat = isinstance(module, nn.Conv1d)
    mode = module.padding_mode
    pads = module._reversed_padding_repeated_twice
    if any(pads):
        a = F.pad(a, pads, mode="constant" if mode == "zeros" else mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if flat:
        a, b = a.unsqueeze(2), b.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    if b.shape[2] * b.shape[3] > 1:
        return Factors(CONVOLUTION, a, b, module)
    patches = F.unfold(a, kernel, dilation=dilation, stride=stride)  # (n, in * kernel, position)
    groups = module.groups
    return Factors(
        MATRIX,
        patches.view(n, groups, -1, patches.shape[-1]).transpose(2, 3),
        b.reshape(n, groups, module.out_channels // groups, -1).transpose(2, 3),
    )


def _embedding(module: nn.Embedding, a: Tensor, b: Tensor, n: int) -> Factors:
    if module.padding_idx is not None:
        b = b * (a != module.padding_idx).unsqueeze(-1)
    return Factors(ROWS, a.reshape(n, -1), b.reshape(n, -1, b.shape[-1]))


def _layer_norm(module: nn.LayerNorm, a: Tensor, b: Tensor, n: int) -> Factors:
    scaled = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    size = module.weight.numel()
    return Factors(SCALE, scaled.reshape(n, -1, size), b.reshape(n, -1, size))


def _rms_norm(module: nn.RMSNorm, a: Tensor, b: Tensor, n: int) -> Factors:
    scaled = F.rms_norm(a, module.normalized_shape, eps=module.eps)
    size = module.weight.numel()
    return Factors(SCALE, scaled.reshape(n, -1, size), b.reshape(n, -1, size))


def _group_norm(module: nn.GroupNorm, a: Tensor, b: Tensor, n: int) -> Factors:
    return _by_channel(F.group_norm(a, module.num_groups, eps=module.eps), b, n)


def _batch_norm(module: Any, a: Tensor, b: Tensor, n: int) -> Factors:
    scaled = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _by_channel(scaled, b, n)


def _by_channel(scaled: Tensor, b: Tensor, n: int) -> Factors:
    channels = scaled.shape[1]
    both = (t.reshape(n, channels, -1).transpose(1, 2) for t in (scaled, b))
    return Factors(SCALE, *both)


#: Layers by their exact type: a subclass may compute anything.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}


def rule_of(module: nn.Module) -> Rule | None:
    """Return how a layer's factors are made, ``None`` if only ``torch.func`` knows."""
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return None  # statistics of the batch couple its examples
    return RULES.get(type(module))


def fits(module: Any, a: Tensor, b: Tensor, n: int) -> bool:
    """Say whether a layer's input and output can be those of ``n`` examples, side by side."""
    kind = type(module)
    if kind in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm):
        width = b.shape[-1] if kind in (nn.Linear, nn.Embedding) else module.weight.numel()
        return b.numel() % (n * width) == 0 and a.numel() % n == 0
    return len(a) == len(b) == n


def add_weight(f: Factors, out: Tensor, *, fresh: bool) -> None:
    """Write the gradient of a layer's weight to ``out``, ``(example, elements)``; add if not fresh.

    ``2 example position elements`` operations.
    """
    n = len(f.b)
    if f.kind == MATRIX:
        view = out.view(n, f.a.shape[1], f.b.shape[3], f.a.shape[3])
        if f.single and fresh:
            torch.mul(f.b[:, 0, 0, :, None], f.a[:, 0, 0, None, :], out=view[:, 0])
            return
        product = torch.matmul(f.b.transpose(2, 3), f.a)
        view.copy_(product) if fresh else view.add_(product)
    elif f.kind == CONVOLUTION:
        product = _convolved(f).reshape(n, -1)
        out.copy_(product) if fresh else out.add_(product)
    elif f.kind == ROWS:
        if fresh:
            out.zero_()
        view = out.view(n, -1, f.b.shape[2])
        view.scatter_add_(1, f.a.unsqueeze(-1).expand_as(f.b), f.b)
    else:
        product = (f.a * f.b).sum(1)
        out.copy_(product) if fresh else out.add_(product)


def _convolved(f: Factors) -> Tensor:
    """Return the gradient of a convolution's weight, ``(example, *weight)``.

    Pixels are copied once for each column of the kernel, and not for each of its rows too: the
    pixels of one row of the kernel are then rows of these copies as they lie.
    """
    layer, n = f.layer, len(f.b)
    line = (1,) if layer.weight.ndim == 3 else ()  # of Conv1d: images of one row
    (rows, columns), (down, right), (dy, dx) = (
        (*line, *sizes) for sizes in (layer.kernel_size, layer.stride, layer.dilation)
    )
    batch, inputs = n * layer.groups, layer.in_channels // layer.groups
    high, wide = f.b.shape[2:]
    images = f.a.reshape(batch, inputs, *f.a.shape[2:])
    # (batch, in, row of the image, position, column of the kernel), no copy yet
    windows = images.unfold(3, (columns - 1) * dx + 1, right)[..., ::dx][:, :, :, :wide]
    copies = windows.permute(0, 1, 4, 2, 3).contiguous()
    back = f.b.reshape(batch, -1, high * wide)  # (batch, out, position)
    products = []
    for row in range(rows):
        first = row * dy
        seen = copies[:, :, :, first : first + (high - 1) * down + 1 : down]
        products.append(torch.bmm(back, seen.reshape(batch, -1, high * wide).transpose(1, 2)))
    slopes = torch.stack(products, 2)  # (batch, out, row, in * column)
    shape = (batch, back.shape[1], rows, inputs, columns)
    return slopes.view(shape).transpose(2, 3).reshape(n, *layer.weight.shape)


def add_bias(f: Factors, out: Tensor, *, fresh: bool) -> None:
    """Write the gradient of a layer's bias to ``out``, ``(example, elements)``."""
    over = (-2, -1) if f.kind == CONVOLUTION else -2
    total = f.b.sum(over).reshape(len(f.b), -1)
    out.copy_(total) if fresh else out.add_(total)


def rank_one_products(f: Factors, g: Factors) -> Tensor:
    """Return the inner products of two sets' weight gradients, of rank one each, ``(n, m)``.

    The ghost dot product (Anonymous 2026, A.2.8): ``(a a') (b b')``, ``2 n m (in + out)``
    operations.
    """
    return (f.a[:, 0, 0] @ g.a[:, 0, 0].T) * (f.b[:, 0, 0] @ g.b[:, 0, 0].T)
