"""What must hold before sampling, and what must be equal before it is resumed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkarray import schema
from lkarray.arguments import at_least
from lkarray.errors import FingerprintError
from lkarray.labels import given_coords
from lkarray.nn import Batches, FlatModel, Outcome
from lkarray.nn.batches import MapDataset, check_dataset, fresh
from lkarray.sampling.control import predicted_outcome
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.samplers import Sampler

#: Precisions that the observed forward pass may run in; losses are float32 all the same.
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_TRIED = 6  # items of which it is seen whether their losses are their own


def check_types(posterior: object, sampler: object) -> None:
    """Raise ``TypeError`` unless both are what `sample` takes."""
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(f"posterior must be lk.LocalPosterior, not {type(posterior).__name__}")
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"sampler must be one such as lk.SGLD(step_size=...), not {type(sampler).__name__}"
        )


def check_independent(sampler: Sampler, burn_in: int, thin: int) -> None:
    """Raise unless independent draws are taken without burn-in and thinning."""
    if sampler.independent and (burn_in or thin != 1):
        raise ValueError(
            f"draws of {type(sampler).__name__} are independent: they have no burn-in and leave "
            f"nothing to thin; pass burn_in=0 and thin=1, not {burn_in} and {thin}"
        )


def check_options(
    autocast: str | None,
    chains_per_device: int | str,
    observables: Mapping[str, Any] | None,
    *,
    compiled: bool,
) -> None:
    """Raise unless the options of `sample` are among those there are."""
    if compiled and chains_per_device not in ("auto", 1):
        raise ValueError(
            "compile=True is for chains that run one at a time; use chains_per_device=1 with it"
        )
    if autocast not in (None, *AUTOCAST):
        raise ValueError(f"autocast must be None or one of {list(AUTOCAST)}, not {autocast!r}")
    if chains_per_device != "auto":
        at_least("chains_per_device", chains_per_device, 1)
    for name, function in (observables or {}).items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)) or str(name) in schema.RESERVED:
            raise ValueError(f"observables: {name!r} must be a name that lkarray has no use for")
        if not callable(function):
            raise TypeError(f"observables[{name!r}] must be a function of the model")


def observed_sets(
    observed: MapDataset | Mapping[str, MapDataset],
) -> dict[str, MapDataset]:
    """Return the observed sets by group: ``losses``, then ``losses_<name>``."""
    if not isinstance(observed, Mapping):
        check_dataset(observed, "observed")
        return {schema.LOSSES: observed}
    if not observed:
        raise ValueError("observed is empty; give at least one dataset")
    sets = {}
    for place, (name, dataset) in enumerate(observed.items()):
        if not re.fullmatch(r"\w+", str(name)):
            raise ValueError(f"observed: {name!r} must be made of letters, digits and underscores")
        check_dataset(dataset, f"observed[{name!r}]")
        sets[f"{schema.LOSSES}_{name}" if place else schema.LOSSES] = dataset
    return sets


def observed_labels(
    observed: MapDataset | Mapping[str, MapDataset],
    sets: Mapping[str, MapDataset],
    coords: Mapping[str, Any] | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the labels of the observed sets by group."""
    if not isinstance(observed, Mapping):
        return {group: given_coords(coords, len(sets[group])) for group in sets}
    unknown = set(coords or {}) - set(observed)
    if unknown:
        raise ValueError(
            f"coords: {sorted(map(str, unknown))} name no observed set; with several sets, give "
            f"labels by their names, {list(observed)}"
        )
    return {
        group: given_coords((coords or {}).get(name), len(dataset))
        for name, (group, dataset) in zip(observed, sets.items(), strict=True)
    }


def check_loss(
    posterior: LocalPosterior, flat: FlatModel, data: Batches, name: str, *, gradient: bool
) -> None:
    """Try the model, the loss and its gradient on the first few items.

    Raises
    ------
    ValueError
        The model or the loss fails, has no gradient, gives other losses when it is asked again,
        or an example's loss depends on the others in its batch.
    """
    loss = posterior.loss
    inputs, target = data.take(np.arange(min(2, data.n)))
    with torch.set_grad_enabled(gradient):
        try:
            output = flat(fresh(inputs, target)[0])
        except Exception as error:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else sorted(inputs)
            raise ValueError(
                f"the model failed on the first items of {name}, inputs of shape {shape}: {error}"
            ) from error
        loss.check(output, fresh(inputs, target)[1], min(2, data.n))
        if gradient and not loss.per_example(output, target).requires_grad:
            raise ValueError(
                f"loss {loss.name!r} has no gradient with respect to what is trainable, "
                f"{posterior.trainable}; use a differentiable loss, and parameters that the model "
                "uses"
            )
    _check_independence(posterior, flat, data, name)


def check_outcomes(
    outcomes: Iterable[Outcome], posterior: LocalPosterior, flat: FlatModel, data: Batches
) -> None:
    """Try outcomes on the first two items, in turn, as they are recorded.

    Raises
    ------
    ValueError, TypeError
        One fails, has no number for each loss, or is no outcome of the loss.
    """
    inputs, target = data.take(np.arange(min(2, data.n)))
    inputs, target = fresh(inputs, target)
    with torch.no_grad():
        output = flat(inputs)
        losses = posterior.loss(output, target).clone()
        for outcome in outcomes:
            outcome.check(losses, output, target)


def refuse_taken(
    outcomes: Iterable[Outcome],
    labels: Mapping[str, Mapping[str, Any]],
    others: Iterable[str],
    *,
    predicted: bool = False,
) -> None:
    """Raise where an outcome, or its value at w*, has the name of something else in the store.

    ``labels`` are those of samples, by group, and ``others`` further names that are taken;
    ``predicted`` says whether one of them has predictions too.
    """
    outcomes = list(outcomes)
    ours = [name for o in outcomes for name in (o.name, schema.at_center(o.name))]
    if predicted:
        ours.append(schema.prediction(predicted_outcome(outcomes)).name)
    known = {*schema.RESERVED, schema.SAMPLE, *others}
    known |= {name for of_set in labels.values() for name in of_set}
    cased, folded = {name.casefold() for name in known}, [name.casefold() for name in ours]
    taken = sorted(  # some file systems do not tell the case
        n for n in ours if n.casefold() in cased or folded.count(n.casefold()) > 1
    )
    if taken:
        raise ValueError(
            f"outcomes: {taken[0]!r} is the name of something else in the store (a dim, a label, "
            "an observable, or a value at w*); choose another name"
        )


def _check_independence(
    posterior: LocalPosterior, flat: FlatModel, data: Batches, name: str
) -> None:
    """Compare losses in one batch with those of the same items in other company and order."""
    count = min(_TRIED, data.n)
    everyone = np.arange(count)

    def losses(rows: np.ndarray) -> Tensor:
        inputs, target = data.take(rows)
        return flat.losses(posterior.loss, inputs, target, shared=True)[0].double()

    # Rounding differs with the size and the order of a batch; what mixes examples shows far more.
    with torch.no_grad():
        together = losses(everyone)
        again = losses(everyone)
        turned = losses(everyone[::-1].copy()).flip(0)
        half = losses(everyone[: (count + 1) // 2])
    if not _close(together, again):
        raise ValueError(
            f"the model gives other losses for the same items of {name} when it is asked again: "
            "something is random even in eval mode, dropout that ignores model.eval(), say; turn "
            "it off"
        )
    for other, what in ((turned, "order"), (half, "company")):
        if not _close(together[: len(other)], other):
            raise ValueError(
                f"the losses of {name} change with the {what} in which items stand in a batch, so "
                "they are no losses of single examples: a BatchNorm without running statistics, "
                f"or a loss ({posterior.loss.name}) that mixes examples; replace it"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    scale = max(float(a.nan_to_num(0, 0, 0).abs().max()), 1e-30)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def refuse_other_center(stored: np.ndarray, now: np.ndarray, where: str, name: str) -> None:
    """Raise unless the values at w* are those stored: whatever a hash cannot see shows there."""
    loss = name == schema.LOSS.name
    # Not to the last bit: another kind of processor may go on with a run. An outcome near zero is
    # a difference of larger numbers.
    atol = 1e-6 if loss else 1e-4 * float(np.abs(stored).max(initial=0, where=~np.isnan(stored)))
    differ = ~np.isclose(stored, now, rtol=1e-4, atol=atol, equal_nan=True)
    if loss and differ.any() and (stored[differ] == 0).all() and np.isnan(now[differ]).all():
        raise FingerprintError(
            f"{where} was begun by an lkarray that stored padding as tokens of loss 0, which means "
            "over tokens count; padding is NaN now, and one store cannot hold both. It opens as it "
            "is (leave padding out by losses.where(center_loss != 0)). Nothing was touched: "
            "sample into another path"
        )
    if differ.any():
        stored, now = stored.reshape(len(stored), -1), now.reshape(len(now), -1)
        first = int(np.argmax(differ.reshape(len(stored), -1).any(1)))
        stored, now = stored[:, 0], now[:, 0]
        raise FingerprintError(
            f"{where}: the {'losses' if loss else name} at w* are not those stored (first at "
            f"sample position {first}: stored {stored[first]:g}, now {now[first]:g}), so the "
            "model, the loss or the data behave otherwise than when it was made. Nothing was "
            "touched: use another path"
        )
