"""Modes of a network's gradients: what attacks move, over training, and the correction by them.

Stages of `adversarial` (PLGK 6.3 from "Mode decomposition" on, A.8, A.9, A.14).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.attacks import ATTACKS, KINDS, Pairs, attack, lengths, noise_like
from lkarray_workflows.shared.recorded import last_hidden, logits_of, losses_of
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import store

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Config, Paths

#: What is done to perturbed images before they are shown to the network again (table 2).
CURES = (
    "cured adversarial",
    "cured random",
    "adversarial + random",
    "signs at random",
    "attacked again",
)
DRAWS = 4  # of random signs
SENSITIVE = 50  # modes whose sensitivity to the input is measured (figures 16, 17)


def by_modes(config: Config, paths: Paths, show: bool) -> None:
    """Decompose the training gradients at the end, and see what of the modes each input has."""
    run_, pairs = paths.run, Pairs.load(paths.pairs)
    trace = run_.trace()
    last = [trace.steps]
    labels = run_.images("train").tensors[1].numpy()[: config.features]
    G = lk.gradient_features(
        trace,
        np.arange(config.features),
        last,
        coords={"label": labels},
        store=paths.store,
        name="train_end",
        progress=show,
    )
    found = lk.modes(G.isel(time=0), config.modes).compute()
    mean = lk.mean_gradient(trace, last).isel(time=0)
    found = with_drive(found, mean, trace.train.n, config.features)
    inputs = lk.gradient_features(
        trace,
        pairs.data(),
        last,
        coords=pairs.coords(),
        store=paths.store,
        name="inputs_end",
        progress=show,
    )
    coefficients = lk.mode_coefficients(found, inputs.isel(time=0)).compute()
    store.put(paths.store, "modes", found.drop_vars("left"))
    store.put(paths.store, "coefficients", coefficients)
    felt = lk.mode_sensitivity(
        trace, found.isel(mode=slice(SENSITIVE)), pairs.data(), trace.steps
    ).assign_coords(kind=("example", pairs.coords()["kind"]))
    store.put(paths.store, "sensitivity", felt)
    of = {kind: coefficients[coefficients["kind"] == kind] for kind in KINDS}
    top = {"mode": slice(SENSITIVE)}
    shifts = {}
    for kind in ("adversarial", "random"):
        part = felt["sensitivity"][felt["kind"] == kind]
        shifts[kind] = lk.mode_shifts(
            found.isel(top), of["clean"].isel(top), of[kind].isel(top), part
        )
        store.put(paths.store, f"shifts_{kind}", shifts[kind])
    ratio = lk.cancellation_ratio(found, coefficients)
    store.put(paths.store, "cancellation_end", ratio)
    energy = float((G["gradient"].astype(np.float64) ** 2).sum())
    share = np.cumsum(found["singular_value"].values ** 2) / energy
    losses = {kind: losses_of(run_.final(), pairs.data([kind])) for kind in KINDS}
    raw, corrected = (felt[name].values for name in ("sensitivity", "corrected"))
    paths.modes.write_text(
        json.dumps(
            {
                "energy": {str(k): float(share[k - 1]) for k in (10, SENSITIVE, config.modes)},
                "losses": {k: [float(np.mean(v)), float(np.median(v))] for k, v in losses.items()},
                "fooled": pairs.fooled,
                "cancellation": {kind: _by_count(ratio, kind) for kind in KINDS},
                "paired_cancellation": {
                    kind: _paired(ratio, "adversarial", kind, losses)
                    for kind in KINDS
                    if kind != "adversarial"
                },
                "shifts": {kind: _described(part) for kind, part in shifts.items()},
                "shift_ratio": float(
                    shifts["adversarial"]["shift"].mean() / shifts["random"]["shift"].mean()
                ),
                "sensitivity_top_10_over_rest": float(raw[:, :10].mean() / raw[:, 10:].mean()),
                "corrected_top_10_over_rest": float(
                    np.nanmean(corrected[:, :10]) / np.nanmean(corrected[:, 10:])
                ),
                "subset_signs_agree": _signs(G, found, config.leading),
            }
        )
    )


def with_drive(modes: xr.Dataset, mean: xr.DataArray, count: int, rows: int = 1) -> xr.Dataset:
    """Return modes with the drive of all ``count`` training images, and the alignment to match.

    Those of the ``rows`` images that gave the modes would be their sampling error, where training
    has nearly converged. Singular values grow as the root of the number of images.
    """
    # In the directions' own precision: as float64 they may not fit.
    along = xr.dot(modes["direction"], mean.astype(modes["direction"].dtype), dim="param")
    out = modes.assign(drive=count * along.astype(np.float64))
    if "singular_value" not in modes:
        return out
    return out.assign(alignment=out["drive"] / modes["singular_value"] / (count / rows) ** 0.5)


def _signs(G: xr.Dataset, found: xr.Dataset, leading: int) -> float:
    """Return how many leading modes have the same sign of drive in the images that gave them."""
    own = lk.mode_coefficients(found, G.isel(time=0)).sum("example").values[:leading]
    return float((np.sign(own) == np.sign(found["drive"].values[:leading])).mean())


def _by_count(ratio: xr.DataArray, kind: str) -> dict[str, float]:
    part = ratio[ratio["kind"] == kind].mean("example")
    return {str(k): float(part.isel(mode=k - 1)) for k in (10, SENSITIVE, ratio.sizes["mode"])}


def _paired(
    ratio: xr.DataArray, kind: str, other: str, losses: dict[str, np.ndarray]
) -> dict[str, float | int | None]:
    """Return the mean difference of two kinds' ratios, with all modes, and its standard error.

    Natural errors count where their loss is within a tenth of that of the image that they stand
    beside: where none is, there is nothing to compare.
    """
    kinds = ratio["kind"].values
    last = ratio.isel(mode=-1).values
    gaps = last[kinds == kind] - last[kinds == other]
    kept = np.isfinite(gaps)
    if other == "natural error":
        kept &= np.abs(np.log(losses[kind] / losses[other])) < np.log(1.1)
    count = int(kept.sum())
    return {
        "mean": float(gaps[kept].mean()) if count else None,
        "error": float(gaps[kept].std(ddof=1) / count**0.5) if count > 1 else None,
        "pairs": count,
    }


def _described(shifts: xr.Dataset) -> dict[str, Any]:
    factors = shifts["factor"].values.astype(str).tolist()
    pairs = (("shift", "drive"), ("drive", "sensitivity"), ("shift", "sensitivity"))
    effective = shifts["effective_modes"].values.tolist()
    return {
        "effective_modes": dict(zip(factors, effective, strict=True)),
        "correlation": {
            f"{a}, {b}": float(shifts["correlation"].sel(factor=a, factor_2=b)) for a, b in pairs
        },
        "rank_correlation": {
            f"{a}, {b}": float(shifts["rank_correlation"].sel(factor=a, factor_2=b))
            for a, b in pairs
        },
        "top_5_share": float(np.sort(shifts["share"].values)[::-1][:5].sum()),
    }


def over_time(config: Config, paths: Paths, show: bool) -> None:
    """Kernel-regime metrics, losses, cancellation by online modes, and sensitivity over time."""
    run_, pairs = paths.run, Pairs.load(paths.pairs)
    trace = run_.trace()
    steps, epochs = paths.epochs(config.times)
    options: dict[str, Any] = {"store": paths.store, "progress": show}
    G = lk.gradient_features(trace, np.arange(config.features), steps, name="train", **options)
    inputs = lk.gradient_features(
        trace, pairs.data(), steps, name="inputs", coords=pairs.coords(), **options
    )
    hidden = lk.activations(
        trace, np.arange(config.features), steps, module=last_hidden(run_.untrained())
    )
    metrics = (
        xr.Dataset(
            {
                "features": lk.feature_overlap(G),
                "subspace": lk.subspace_overlap(G, 10),
                "activations": lk.activation_overlap(hidden),
            }
        )
        .drop_attrs()
        .compute()
    )
    losses = xr.DataArray(
        run_.losses_along(pairs.data(), steps),
        dims=("time", "example"),
        name="loss",
        coords={"kind": ("example", inputs["kind"].values)},
    )
    online = lk.online_modes(G, config.modes).compute()
    # Frozen at one time, the directions are asked about the next (A.8). A view: they are large.
    later = {"time": slice(1, None)}
    frozen = online[["direction"]].isel(time=slice(-1)).assign_coords(time=online["time"][1:])
    mean = lk.mean_gradient(trace, steps, progress=show).isel(later)
    frozen = with_drive(frozen, mean, trace.train.n)
    coefficients = lk.mode_coefficients(frozen, inputs.isel(later)).compute()
    ratio = lk.cancellation_ratio(frozen, coefficients)
    sensitivity = _sensitivity_over_time(config, paths, G, steps)
    for name, value in (
        ("regime", metrics),
        ("losses", losses),
        ("cancellation", ratio),
        ("sensitivity_over_time", sensitivity),
        ("captured", online["energy_captured"]),
    ):
        store.put(paths.store, name, value)
    captured = online["energy_captured"].values
    paths.time.write_text(
        json.dumps(
            {
                "epochs": epochs.tolist(),
                "half_way": {
                    str(name): int(epochs[int(np.argmax(values.values > 0.5))])
                    for name, values in metrics.items()
                },
                "captured": [None if np.isnan(x) else float(x) for x in captured],
                "cancellation_last_half": {
                    kind: float(
                        np.nanmean(
                            ratio.isel(mode=-1, time=slice(ratio.sizes["time"] // 2, None)).values[
                                :, (ratio["kind"] == kind).values
                            ]
                        )
                    )
                    for kind in KINDS
                },
            }
        )
    )


def _sensitivity_over_time(
    config: Config, paths: Paths, G: xr.Dataset, steps: Sequence[int], count: int = 6
) -> xr.Dataset:
    """Return the sensitivity of the leading modes, and of the others, at some of the times."""
    pairs, trace = Pairs.load(paths.pairs), paths.run.trace()
    chosen = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    rows = []
    for t in chosen:
        found = lk.modes(G.isel(time=int(t)), SENSITIVE).compute()
        felt = lk.mode_sensitivity(trace, found, pairs.data(), steps[int(t)])
        rows.append(
            xr.Dataset(
                {
                    f"{name} {part}": felt[name].isel(mode=at).mean("mode")
                    for name in ("sensitivity", "corrected")
                    for part, at in (("top 10", slice(10)), ("rest", slice(10, None)))
                }
            )
            .drop_attrs()
            .drop_vars("example")
            .reset_coords(drop=True)
        )
    return xr.concat(rows, "time").assign_coords(
        kind=("example", pairs.coords()["kind"]), step=("time", [steps[int(t)] for t in chosen])
    )


# --- the correction ---------------------------------------------------------------------------


def cure(config: Config, paths: Paths, show: bool) -> None:
    """Shift mode coefficients against the drives, by small changes of the inputs; and controls."""
    run_, pairs, seed = paths.run, Pairs.load(paths.pairs), paths.run.seed
    trace, model = run_.trace(), run_.final()
    found = lk.open(paths.store)["derived/modes"].to_dataset().load()
    leading = found.isel(mode=slice(config.leading))
    clean, labels = pairs.images["clean"], pairs.labels["clean"]
    norm: Any = ATTACKS[config.attack][1]
    draws = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, config.leading))

    def corrected(kind: str, modes: xr.Dataset) -> torch.Tensor:
        images = pairs.images[kind]
        moved: torch.Tensor = lk.shift_modes(
            trace,
            modes,
            TensorDataset(images, labels),
            trace.steps,
            shift=config.shift,
            radius=config.correction,
            norm=norm,
            steps=config.correction_steps,
            away_from=images - clean,
        )
        return moved

    adversarial = pairs.images["adversarial"]
    moved = {
        "cured adversarial": corrected("adversarial", leading),
        "cured random": corrected("random", leading),
    }
    turned = [corrected("adversarial", leading.assign(drive=("mode", signs))) for signs in draws]
    moved["signs at random"] = turned[0]
    change = moved["cured adversarial"] - adversarial
    moved["adversarial + random"] = noise_like(adversarial, change, config.attack, seed + 1)
    said = logits_of(model, adversarial).argmax(1)
    again, _ = attack(
        model, adversarial, said, kind=config.attack, radius=config.correction, seed=seed
    )
    moved["attacked again"] = again
    arrays: dict[str, Any] = {kind: images.numpy() for kind, images in moved.items()}
    np.savez(paths.cured, **arrays)
    every = {kind: pairs.images[kind] for kind in KINDS[:3]} | {kind: moved[kind] for kind in CURES}
    data = TensorDataset(torch.cat(list(every.values())), labels.repeat(len(every)))
    steps, epochs = paths.epochs(config.times)
    losses = xr.DataArray(
        run_.losses_along(data, steps),
        dims=("time", "example"),
        name="loss",
        coords={
            "kind": ("example", np.repeat(list(every), len(labels)).astype(object)),
            "epoch": ("time", epochs),
        },
    )
    store.put(paths.store, "cured_losses", losses)
    right = {kind: logits_of(model, images).argmax(1) == labels for kind, images in every.items()}
    # One draw of signs may be nearly the true one: the accuracy is the mean over draws.
    accuracy = {kind: float(found.double().mean()) for kind, found in right.items()}
    accuracy["signs at random"] = float(
        np.mean(
            [
                float((logits_of(model, images).argmax(1) == labels).double().mean())
                for images in turned
            ]
        )
    )
    sizes = {
        kind: every[kind] - pairs.images["random" if kind == "cured random" else "adversarial"]
        for kind in CURES
    }
    cosine = torch.cosine_similarity(change.flatten(1), (adversarial - clean).flatten(1), dim=1)
    paths.cure.write_text(
        json.dumps(
            {
                "accuracy": accuracy,
                "losses": {
                    kind: float(losses_of(model, TensorDataset(images, labels)).mean())
                    for kind, images in every.items()
                },
                "cosine": {"mean": float(cosine.mean()), "deviation": float(cosine.std())},
                "l2_of_attack": float(lengths(adversarial - clean).mean()),
                "l2": {kind: float(lengths(x).mean()) for kind, x in sizes.items()},
                "largest": {kind: float(x.abs().max()) for kind, x in sizes.items()},
                "pairs": len(labels),
            }
        )
    )
