"""Which parameters of a model move: by name, by pattern, or by part of a tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lkarray.errors import NonFiniteError
from lkarray.values import several, text

_PART = re.compile(r"(?P<name>.+)\[(?P<index>[^\[\]]*:[^\[\]]*)\]")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def moving_names(model: nn.Module, trainable: str | Iterable[str] | None) -> list[str]:
    """Return what moves, spelled out: full names, and ``name[index]`` for parts of tensors."""
    return _spelled(moving_indices(model, trainable))


def moving_parts(
    model: nn.Module, trainable: str | Iterable[str] | None
) -> dict[str, Tensor | None]:
    """Return the names of the parameters that move, with a mask where only a part of one does.

    Parameters
    ----------
    model
        Any module.
    trainable
        Names or patterns (``"fc*.weight"``), each possibly with the index of a part, which has
        a colon (``"attn.weight[0:32, :]"``); ``None`` takes all that require grad.

    Raises
    ------
    TypeError
        ``model`` is no module.
    ValueError
        A pattern matches nothing or its index does not fit, no parameter moves, or the moving
        ones have several dtypes or devices.
    NonFiniteError
        A weight is NaN or infinite.
    """
    indices = moving_indices(model, trainable)
    parameters = dict(model.named_parameters())
    return {
        name: None if parts is None else _mask(parameters[name], name, parts)
        for name, parts in indices.items()
    }


def moving_indices(
    model: nn.Module, trainable: str | Iterable[str] | None
) -> dict[str, list[str] | None]:
    """Return, in the model's order, what moves of each parameter: indices, or ``None`` for all."""
    require_module(model)
    parameters = dict(model.named_parameters())
    moving: dict[str, list[str] | None] = {}
    if trainable is None:
        moving = {name: None for name, p in parameters.items() if p.requires_grad}
        if not moving:
            raise ValueError(
                f"the model has no trainable parameters ({len(parameters)} in all); give it some, "
                "call requires_grad_(True), or name them with trainable=[...]"
            )
    else:
        patterns = [trainable] if isinstance(trainable, str) else several("trainable", trainable)
        for pattern in patterns:
            part = _PART.fullmatch(text("trainable", pattern))
            for name in _matches(model, part["name"] if part else pattern):
                if part is None:
                    moving[name] = None
                elif (before := moving.setdefault(name, [])) is not None:
                    before.append(part["index"])
        # In the model's order, whatever the patterns': the vector must not depend on how they
        # were written.
        moving = {name: moving[name] for name in parameters if name in moving}
        if not moving:
            raise ValueError(f"trainable names no parameter; choose from {sorted(parameters)}")
    _check(model, [parameters[name] for name in moving])
    return moving


def require_module(model: object) -> None:
    """Raise ``TypeError`` unless it is a module; say what to do with what is given for it."""
    if isinstance(model, nn.Module):
        return
    remedy = ""
    if isinstance(model, Mapping):
        remedy = (
            ": a state dict holds no code. Make the module, model.load_state_dict(...), and give"
        )
    elif isinstance(model, (str, os.PathLike)):
        remedy = (
            f" ({str(model)!r}): make the module and "
            "model.load_state_dict(torch.load(path, weights_only=True)), and give"
        )
    raise TypeError(
        f"model must be a torch.nn.Module, not {type(model).__name__}"
        + (f"{remedy} the module" if remedy else "")
    )


def _spelled(indices: dict[str, list[str] | None]) -> list[str]:
    out = []
    for name, parts in indices.items():
        out += [name] if parts is None else [f"{name}[{part}]" for part in parts]
    return out


def _matches(model: nn.Module, pattern: str) -> set[str]:
    # A tied parameter has several names; it moves under the first if any of them matches.
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = list(model.named_parameters(remove_duplicate=False))
    matches = {first[id(p)] for name, p in aliases if fnmatchcase(name, pattern)}
    if not matches:
        raise ValueError(
            f"trainable: {pattern!r} matches none of {sorted(name for name, _ in aliases)}"
        )
    return matches


def _mask(parameter: Tensor, name: str, parts: list[str]) -> Tensor:
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device="cpu")
    for part in parts:
        try:
            mask[tuple(_axis(text) for text in part.split(","))] = True
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"trainable: [{part}] does not index {name!r} of shape {tuple(parameter.shape)} "
                f"({error}); write it as in '{name}[0:2]'"
            ) from None
    if not bool(mask.any()):
        raise ValueError(
            f"trainable: {parts} selects no element of {name!r}, of shape {tuple(parameter.shape)}"
        )
    return mask


def _axis(text: str) -> slice | int:
    if ":" not in text:
        return int(text)
    return slice(*(int(bound) if bound.strip() else None for bound in text.split(":")))


def _check(model: nn.Module, moving: list[nn.Parameter]) -> None:
    kinds = {(p.dtype, p.device) for p in moving}
    wide = {torch.float32 if dtype in _FLOATS[2:] else dtype for dtype, _ in kinds}
    if len(wide) > 1 or len({device for _, device in kinds}) > 1:
        raise ValueError(
            f"the moving parameters have several dtypes or devices: {sorted(map(str, kinds))}; "
            "convert the model with .to(...) first"
        )
    if not wide <= set(_FLOATS):
        raise ValueError(f"parameters are {wide.pop()}; sampling needs real floats: use .float()")
    made = [name for name, p in model.named_parameters() if p.is_inference()]
    if made:
        raise ValueError(
            f"the model's weights ({made[0]!r} first) were made under torch.inference_mode(), and "
            "such tensors can never have a gradient; make or load the model outside of it"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"the model's {name!r} holds NaN or infinity; load a finite checkpoint"
            )
