"""Private copies of modules, also of those that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: What `copy.deepcopy` takes as it is.
_ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    torch.dtype,
    torch.device,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
#: A module's own dicts, which are no part of its attributes' names.
_INNER = {"_parameters", "_buffers", "_modules"}


def copy_module(model: Module) -> Module:
    """Return a copy of a module that shares nothing with it.

    Tensors that were computed and kept (an activation, the weight of ``weight_norm`` or ``prune``)
    are copied without their history, which `copy.deepcopy` refuses.

    Raises
    ------
    ValueError
        Something that it holds cannot be copied; the message names the attribute.
    """
    memo: dict[int, Any] = {
        id(tensor): _loose(tensor) for _, tensor in _tensors(model) if not _copies(tensor)
    }
    return _deepcopy(model, memo)


def refuse_uncopyable(model: nn.Module) -> None:
    """Raise ``ValueError`` for a module that `copy_module` would refuse; copies no tensor."""
    _deepcopy(model, {id(tensor): tensor for _, tensor in _tensors(model)})


def _deepcopy(model: Module, memo: dict[int, Any]) -> Module:
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:  # whatever the attributes' own classes raise
        name = _culprit(model, memo)
        raise ValueError(
            f"the model cannot be copied: its {name!r} is of a kind that copy.deepcopy refuses "
            f"({type(error).__name__}: {error}). Take it out of the module before (set it to None, "
            "clear or detach what is kept), make the module anew and load its state_dict(), or "
            "give the attribute's class a __deepcopy__"
        ) from error


def _loose(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor without its history."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):  # kept from inside a transform
        tensor = functorch.get_unwrapped(tensor)
    with torch.no_grad():
        return tensor.detach().clone()


def _copies(tensor: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.is_leaf and not wrapped


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a module holds, with their places."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", model)]
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
        left += _inside(name, value)


def _inside(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return what a value holds, by the place of each."""
    inside: list[tuple[str, Any]] = []
    if isinstance(value, (Tensor, *_ATOMS)):
        return inside
    if isinstance(value, Mapping):
        inside += [(f"{name}[{key!r}]", entry) for key, entry in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
        inside += [(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    elif isinstance(value, types.MethodType):
        inside.append((name, value.__self__))
    attributes = getattr(value, "__dict__", {})
    for key, attribute in attributes.items():
        if isinstance(value, nn.Module) and key in _INNER:
            inside += [(_join(name, inner), p) for inner, p in attribute.items()]
        else:
            inside.append((_join(name, key), attribute))
    return inside


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else str(key)


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str:
    """Return the place of the innermost part that cannot be copied."""
    name, value, seen = "", model, {id(model)}
    while True:
        for place, inner in _inside(name, value):
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            try:
                copy.deepcopy(inner, dict(memo))
            except Exception:
                name, value = place, inner
                break
        else:
            return name or type(model).__name__
