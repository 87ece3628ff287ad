"""Modes of a network's gradients: what attacks move, over training, and the correction by them.

Stages of `adversarial` (Anonymous 2026, 6.3 from "Mode decomposition" on, A.8, A.9, A.14).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import store, workflow
from lkarray_workflows.shared.attacks import KINDS, Pairs
from lkarray_workflows.shared.recorded import Trained, last_hidden, losses_of

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Config

SENSITIVE = 50  # modes whose sensitivity to the input is measured (figures 16, 17)


def by_modes(study: workflow.Study[Config], run: Trained) -> None:
    """Decompose the training gradients at the end, and see what of the modes each input has."""
    config, path = study.config, study.path("analysis.zarr")
    pairs, trace = Pairs.load(study.path("pairs.npz")), run.trace()
    G, modes = modes_at_end(run, config.features, config.modes, path, study.show)
    inputs = lk.gradient_features(
        trace,
        pairs.data(),
        [trace.steps],
        coords=pairs.coords(),
        name="inputs_end",
        store=path,
        progress=study.show,
    )
    coefficients = lk.mode_coefficients(modes, inputs.isel(time=0)).compute()
    store.put(path, "modes", modes.drop_vars("left"))
    store.put(path, "coefficients", coefficients)
    felt = lk.mode_sensitivity(
        trace, modes.isel(mode=slice(SENSITIVE)), pairs.data(), trace.steps
    ).assign_coords(kind=("example", pairs.coords()["kind"]))
    store.put(path, "sensitivity", felt)
    shifts = shifts_of(modes, coefficients, felt)
    for kind, shift in shifts.items():
        store.put(path, f"shifts_{kind}", shift)
    ratio = lk.cancellation_ratio(modes, coefficients)
    store.put(path, "cancellation_end", ratio)
    energy = float((G["gradient"].astype(np.float64) ** 2).sum())
    share = np.cumsum(modes["singular_value"].values ** 2) / energy
    losses = {kind: losses_of(run.final(), pairs.data([kind])) for kind in KINDS}
    metrics = {
        "energy": {str(k): float(share[k - 1]) for k in (10, SENSITIVE, config.modes)},
        "losses": {k: [float(np.mean(v)), float(np.median(v))] for k, v in losses.items()},
        "fooled": pairs.fooled,
        **cancellation_numbers(ratio, losses),
        **shift_numbers(shifts),
        **sensitivity_numbers(felt),
        "subset_signs_agree": _signs(G, modes, config.leading),
    }
    study.write("modes.json", metrics)


def modes_at_end(
    run: Trained, features: int, count: int, path: Path, show: bool
) -> tuple[xr.Dataset, xr.Dataset]:
    """Return gradients of some training images at the end, and their modes with all images' drive.

    The gradients are stored in ``path``.
    """
    trace = run.trace()
    last = [trace.steps]
    G = lk.gradient_features(
        trace,
        np.arange(features),
        last,
        coords={"label": run.images("train").tensors[1].numpy()[:features]},
        name="train_end",
        store=path,
        progress=show,
    )
    modes = lk.modes(G.isel(time=0), count).compute()
    mean = lk.mean_gradient(trace, last).isel(time=0)
    return G, with_drive(modes, mean, trace.train.n, features)


def shifts_of(
    modes: xr.Dataset, coefficients: xr.DataArray, felt: xr.Dataset
) -> dict[str, xr.Dataset]:
    """Return what each kind of perturbation does to the leading modes' coefficients."""
    # Examples of one kind stand beside those of another by their pairs, not by their numbers.
    coefficients, top = coefficients.drop_vars("example"), {"mode": slice(SENSITIVE)}
    by_kind = {kind: coefficients[coefficients["kind"] == kind].isel(top) for kind in KINDS}
    return {
        kind: lk.mode_shifts(
            modes.isel(top),
            by_kind["clean"],
            by_kind[kind],
            felt["sensitivity"][felt["kind"] == kind],
        )
        for kind in ("adversarial", "random")
    }


def cancellation_numbers(ratio: xr.DataArray, losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return how far the modes' pushes cancel, of each kind, and against attacked images."""
    others = [kind for kind in KINDS if kind != "adversarial"]
    return {
        "cancellation": {kind: _by_count(ratio, kind) for kind in KINDS},
        "paired_cancellation": {
            kind: _paired(ratio, "adversarial", kind, losses) for kind in others
        },
    }


def shift_numbers(shifts: dict[str, xr.Dataset]) -> dict[str, Any]:
    """Return what is counted of the shifts, and how much larger those of attacks are."""
    attacked, noisy = (shifts[kind]["shift"].mean() for kind in ("adversarial", "random"))
    return {
        "shifts": {kind: _described(shift) for kind, shift in shifts.items()},
        "shift_ratio": float(attacked / noisy),
    }


def sensitivity_numbers(felt: xr.Dataset) -> dict[str, float]:
    """Return how much more sensitive the leading modes are than the next."""
    raw, corrected = (felt[name].values for name in ("sensitivity", "corrected"))
    return {
        "sensitivity_top_10_over_rest": float(raw[:, :10].mean() / raw[:, 10:].mean()),
        "corrected_top_10_over_rest": float(
            np.nanmean(corrected[:, :10]) / np.nanmean(corrected[:, 10:])
        ),
    }


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


def _signs(G: xr.Dataset, modes: xr.Dataset, leading: int) -> float:
    """Return how many leading modes have the same sign of drive in the images that gave them."""
    own = lk.mode_coefficients(modes, G.isel(time=0)).sum("example").values[:leading]
    return float((np.sign(own) == np.sign(modes["drive"].values[:leading])).mean())


def _by_count(ratio: xr.DataArray, kind: str) -> dict[str, float]:
    mean = ratio[ratio["kind"] == kind].mean("example")
    return {str(k): float(mean.isel(mode=k - 1)) for k in (10, SENSITIVE, ratio.sizes["mode"])}


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


def over_time(study: workflow.Study[Config], run: Trained) -> None:
    """Kernel-regime metrics, losses, cancellation by online modes, and sensitivity over time."""
    config, path = study.config, study.path("analysis.zarr")
    pairs, trace = Pairs.load(study.path("pairs.npz")), run.trace()
    steps, epochs = run.times(config.times)
    options: dict[str, Any] = {"store": path, "progress": study.show}
    G = lk.gradient_features(trace, np.arange(config.features), steps, name="train", **options)
    inputs = lk.gradient_features(
        trace, pairs.data(), steps, name="inputs", coords=pairs.coords(), **options
    )
    metrics = regime_of(run, G, steps, config.features)
    losses = xr.DataArray(
        run.losses_along(pairs.data(), steps),
        dims=("time", "example"),
        name="loss",
        coords={"kind": ("example", inputs["kind"].values)},
    )
    online = lk.online_modes(G, config.modes).compute()
    # Frozen at one time, the directions are asked about the next (A.8). A view: they are large.
    later = {"time": slice(1, None)}
    frozen = online[["direction"]].isel(time=slice(-1)).assign_coords(time=online["time"][1:])
    mean = lk.mean_gradient(trace, steps, progress=study.show).isel(later)
    frozen = with_drive(frozen, mean, trace.train.n)
    coefficients = lk.mode_coefficients(frozen, inputs.isel(later)).compute()
    ratio = lk.cancellation_ratio(frozen, coefficients)
    for name, value in (
        ("regime", metrics),
        ("losses", losses),
        ("cancellation", ratio),
        ("sensitivity_over_time", _sensitivity_over_time(study, run, G, steps)),
        ("captured", online["energy_captured"]),
    ):
        store.put(path, name, value)
    half_way = {
        str(name): int(epochs[int(np.argmax(values.values > 0.5))])
        for name, values in metrics.items()
    }
    numbers = {
        "epochs": epochs.tolist(),
        "half_way": half_way,
        "captured": [None if np.isnan(x) else float(x) for x in online["energy_captured"].values],
        "cancellation_last_half": {kind: _last_half(ratio, kind) for kind in KINDS},
    }
    study.write("time.json", numbers)


def regime_of(run: Trained, G: xr.Dataset, steps: Sequence[int], count: int) -> xr.Dataset:
    """Return the kernel-regime metrics at some steps."""
    hidden = lk.activations(
        run.trace(), np.arange(count), steps, module=last_hidden(run.untrained())
    )
    metrics = xr.Dataset(
        {
            "features": lk.feature_overlap(G),
            "subspace": lk.subspace_overlap(G, 10),
            "activations": lk.activation_overlap(hidden),
        }
    )
    return metrics.drop_attrs().compute()


def _last_half(ratio: xr.DataArray, kind: str) -> float:
    late = ratio.isel(mode=-1, time=slice(ratio.sizes["time"] // 2, None)).values
    return float(np.nanmean(late[:, (ratio["kind"] == kind).values]))


def _sensitivity_over_time(
    study: workflow.Study[Config], run: Trained, G: xr.Dataset, steps: Sequence[int], count: int = 6
) -> xr.Dataset:
    """Return the sensitivity of the leading modes, and of the others, at some of the times."""
    pairs, trace = Pairs.load(study.path("pairs.npz")), run.trace()
    times = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    by_time = []
    for t in times:
        modes = lk.modes(G.isel(time=int(t)), SENSITIVE).compute()
        felt = lk.mode_sensitivity(trace, modes, pairs.data(), steps[int(t)])
        by_time.append(
            xr.Dataset(
                {
                    f"{name} {group}": felt[name].isel(mode=chosen).mean("mode")
                    for name in ("sensitivity", "corrected")
                    for group, chosen in (("top 10", slice(10)), ("rest", slice(10, None)))
                }
            )
            .drop_attrs()
            .drop_vars("example")
            .reset_coords(drop=True)
        )
    return xr.concat(by_time, "time").assign_coords(
        kind=("example", pairs.coords()["kind"]), step=("time", [steps[int(t)] for t in times])
    )
