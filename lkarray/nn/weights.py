"""Weights from elsewhere: a state dict, or a file that holds one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkarray.nn.copying import copy_module

#: Lines and characters of torch's message that are told: it names every tensor of the model.
_TOLD, _SHOWN = 3, 400


def with_weights(model: nn.Module, weights: Any) -> nn.Module:
    """Return a copy of a model with other weights: a state dict, or a file that holds one.

    Raises
    ------
    ValueError
        The file cannot be read as a state dict, or the state dict does not fit the model.
    TypeError
        ``weights`` is neither.
    """
    state, name = _read(weights)
    # A copy, since load_state_dict writes into the module that it is given.
    other = copy_module(model)
    try:
        other.load_state_dict(state)
    except Exception as error:  # whatever its values are
        raise ValueError(_misfit(other, state, name, error)) from None
    return other


def _read(weights: Any) -> tuple[Mapping[str, Any], str]:
    """Return a state dict, and what to call it."""
    if isinstance(weights, Mapping):
        return weights, "the state dict"
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights must be a state dict, a file that holds one, or a module, not "
            f"{type(weights).__name__}"
        )
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle's, zip's and torch's, whatever the file is
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{path} does not hold a state dict that can be read without running code "
            f"({type(error).__name__}: {lines[0][:200]}). Save one with "
            "torch.save(model.state_dict(), path); of a whole module that was saved, load it "
            "where it is trusted and save its state_dict()"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds {type(state).__name__}, not a state dict; save model.state_dict()"
        )
    return state, str(path)


def _misfit(model: nn.Module, state: Mapping[str, Any], name: str, error: Exception) -> str:
    """Return what to say of a state dict that a model cannot have."""
    keys, known = [str(key) for key in state], model.state_dict()
    inside = [str(key) for key, value in state.items() if isinstance(value, Mapping)]
    if inside and not set(keys) & set(known):
        return (
            f"{name} is no state dict: it holds {keys[:5]}; give what is under {inside[0]!r}, if "
            "that is the model's state_dict()"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:_TOLD]
    return (
        f"{name} does not fit {type(model).__name__}: {' '.join(lines)[:_SHOWN]}. Give the "
        "state_dict() of a model of the same kind"
    )
