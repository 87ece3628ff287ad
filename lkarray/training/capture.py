"""What one optimizer step did: the gradient before and after clipping, and the realised update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lkarray.nn.flat import dense
from lkarray.store.trace_layout import FIELDS
from lkarray.training.optimizers import carried, rule_of

#: Relative difference that rounding may make, by dtype.
_ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}


class Capture:
    """Flat views of the moving parameters, their gradients, and the optimizer's state.

    Parameters
    ----------
    parameters
        The moving parameters, by name, in the order of the flat vector.
    optimizer
        Has exactly these parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.optimizer, self.rule = optimizer, rule_of(optimizer)
        self.vectors, self.scalars = carried(optimizer)
        sizes = [p.numel() for p in self.parameters]
        ends = np.cumsum(sizes).tolist()
        self.places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        first = self.parameters[0]
        self.raw = first.detach().new_zeros(ends[-1])
        self._raws = [
            self.raw[place].view(p.shape)
            for place, p in zip(self.places, self.parameters, strict=True)
        ]
        self.group_of = self._groups()

    def _groups(self) -> list[int]:
        owner = {
            id(p): g for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]
        }
        return [owner[id(p)] for p in self.parameters]

    def theta(self) -> Tensor:
        """Return a copy of the parameters as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def keep_raw(self, index: int) -> None:
        """Copy the gradient that a backward pass left in one parameter."""
        gradient = self.parameters[index].grad
        if gradient is not None:
            self._raws[index].copy_(dense(gradient.detach()))

    def applied(self) -> Tensor:
        """Return the gradients that the optimizer will apply, as one vector.

        The optimizer passes over a parameter without a gradient: to a rule without memory and
        decay that is a gradient of zero.
        """
        named = zip(self.names, self.parameters, self.group_of, strict=True)
        missing = [n for n, p, g in named if p.grad is None and not self._forgets(g)]
        if missing:
            raise ValueError(
                f"{missing} had no gradient at optimizer.step(), so the optimizer passed over them "
                "and their momentum; freeze parameters that the loss does not reach "
                "(requires_grad_(False)) or leave them out of the optimizer, and where only some "
                "batches reach them, set .grad to zeros in the others"
            )
        parts = [
            p.new_zeros(p.numel()) if p.grad is None else dense(p.grad.detach()).reshape(-1)
            for p in self.parameters
        ]
        return torch.cat(parts).detach()

    def _forgets(self, g: int) -> bool:
        """Say whether a gradient of zero would leave the parameters of a group as they are."""
        group = self.optimizer.param_groups[g]
        memory = self.rule.vectors(group) or self.rule.scalars
        return not memory and not float(group.get("weight_decay", 0))

    def buffered(self) -> list[bool]:
        """Say which parameters have a momentum buffer now."""
        return [self.optimizer.state[p].get("momentum_buffer") is not None for p in self.parameters]

    def coefficients(self, buffered: list[bool]) -> np.ndarray:
        """Return the scalars of the step just taken, ``(group, field)``."""
        rows = np.full((len(self.optimizer.param_groups), len(FIELDS)), np.nan)
        first: dict[int, tuple[float, ...]] = {}
        for p, g, had in zip(self.parameters, self.group_of, buffered, strict=True):
            group, state = self.optimizer.param_groups[g], self.optimizer.state[p]
            own = (had, *(float(state[name]) for name in self.scalars))
            if g not in first:
                first[g] = own
                options = group.get("weight_decay", 0), group.get("betas", (0, np.nan))[1]
                update = self.rule.coefficients(group, state, had)
                rows[g] = (*astuple(update), *map(float, options))
            elif own != first[g]:
                raise ValueError(
                    f"the parameters of group {g} of the optimizer are at different steps of their "
                    "own; begin recording before training, or put them in groups of their own"
                )
        return rows

    def denominator(self) -> Tensor | None:
        """Return what the step just taken divided by, as one vector."""
        if self.rule.denominator is None:
            return None
        parts = [
            self.rule.denominator(self.optimizer.param_groups[g], self.optimizer.state[p])
            for p, g in zip(self.parameters, self.group_of, strict=True)
        ]
        return torch.cat([part.detach().reshape(-1) for part in parts])

    def buffer(self) -> Tensor | None:
        """Return ``b`` of the step just taken as one vector, if every group has one."""
        parts = []
        for p, g in zip(self.parameters, self.group_of, strict=True):
            name = self.rule.buffer(self.optimizer.param_groups[g])
            if name is None:
                return None
            parts.append(self.optimizer.state[p][name].reshape(-1))
        return torch.cat(parts)

    def spread(self, by_group: np.ndarray) -> Tensor:
        """Return a number of each group as a vector over the parameters."""
        counts = [place.stop - place.start for place in self.places]
        values = np.repeat(np.asarray(by_group)[self.group_of], counts)
        return torch.from_numpy(values).to(self.raw)

    # --- the optimizer's state as vectors ---------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return what the optimizer carries, flat; NaN where it carries nothing yet."""
        out = {}
        for name in self.vectors:
            flat = torch.full_like(self.raw, torch.nan)
            for p, place in zip(self.parameters, self.places, strict=True):
                value = self.optimizer.state[p].get(name) if p in self.optimizer.state else None
                if value is not None:
                    flat[place] = value.reshape(-1)
            out[name] = flat.cpu().numpy()
        if self.scalars:
            rows = np.full((len(self.parameters), len(self.scalars)), np.nan)
            for i, p in enumerate(self.parameters):
                own = self.optimizer.state.get(p, {})
                for j, name in enumerate(self.scalars):
                    if name in own:
                        rows[i, j] = float(own[name])
            out["scalars"] = rows
        return out

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Set parameters and optimizer to a stored state; see `state`."""
        with torch.no_grad():
            theta = torch.from_numpy(np.array(state["parameters"]))
            for p, place in zip(self.parameters, self.places, strict=True):
                p.copy_(theta[place].view(p.shape))
        for i, (p, place) in enumerate(zip(self.parameters, self.places, strict=True)):
            own: dict[str, Any] = {}
            for j, name in enumerate(self.scalars):
                value = state["scalars"][i, j]
                if not np.isnan(value):
                    own[name] = torch.tensor(value, dtype=torch.get_default_dtype(), device="cpu")
            for name in self.vectors:
                part = torch.from_numpy(np.array(state[name][place]))
                if not bool(torch.isnan(part).any()):
                    own[name] = part.view(p.shape).to(p.device, memory_format=torch.preserve_format)
            self.optimizer.state[p] = own


def clipping(
    raw: Tensor, applied: Tensor, places: list[slice]
) -> tuple[np.ndarray, float, Tensor | None]:
    """Return what was done to a gradient before it was applied.

    Returns
    -------
    factors
        Of each tensor, ``(tensor,)``: ones where nothing was done.
    bound
        Of clipping by value, if exactly that was done; infinite otherwise.
    diagonal
        Factors element by element, where one for each tensor does not tell it; 0/0 is 1.
    """
    ones = np.ones(len(places))
    if torch.equal(raw, applied):
        return ones, np.inf, None
    whole = _exact_factor(raw, applied)
    if whole is not None:
        return ones * whole, np.inf, None
    tolerance = _ROUNDING.get(raw.dtype, 1e-2)
    factors = ones.copy()
    for i, place in enumerate(places):
        g, h = raw[place], applied[place]
        exact = _exact_factor(g, h)
        if exact is None:
            wide = g.double()
            square = float(wide @ wide)
            exact = float(wide @ h.double()) / square if square else 1.0
            if float((h - exact * g).abs().max()) > tolerance * float(h.abs().max()):
                break
        factors[i] = exact
    else:
        return factors, np.inf, None
    bound = float(applied.abs().max())
    diagonal = torch.where(
        raw == 0, torch.ones_like(raw, dtype=torch.float64), applied.double() / raw
    )
    exact_bound = torch.equal(raw.clamp(-bound, bound), applied)
    return ones, bound if exact_bound else np.inf, diagonal


def _exact_factor(raw: Tensor, applied: Tensor) -> float | None:
    """Return the number that times ``raw`` is ``applied``, to the last bit; or ``None``."""
    if torch.equal(raw, applied):
        return 1.0
    top = int(raw.abs().argmax())
    if float(raw[top]) == 0:
        return None
    guess = applied[top] / raw[top]
    for factor in (guess, *_neighbours(guess)):
        if torch.equal(raw * factor, applied):
            return float(factor)
    return None


def _neighbours(value: Tensor, reach: int = 3) -> list[Tensor]:
    near_by = []
    for end in (-torch.inf, torch.inf):
        near = value
        for _ in range(reach):
            near = torch.nextafter(near, torch.full_like(near, end))
            near_by.append(near)
    return near_by
