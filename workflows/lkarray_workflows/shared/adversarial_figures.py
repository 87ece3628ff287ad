"""The figures of `adversarial`: figures 8 to 20 and 27 of Anonymous 2026."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

import lkarray as lk
from lkarray import plots, workflow
from lkarray_workflows.shared.attacks import KINDS, Pairs
from lkarray_workflows.shared.recorded import Trained

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Study

CURVES = (*KINDS[:3], "cured adversarial", "cured random", "adversarial + random")


def figures(study: Study, run: Trained) -> list[workflow.Figure]:
    """Return the figures of the first network."""
    return [
        *influence_figures(study),
        *training_figures(study),
        *mode_figures(study, run),
        *cancellation_figures(study),
    ]


def stored(study: Study, name: str) -> xr.Dataset:
    """Return a result that the study stored."""
    node: xr.Dataset = lk.open(study.path("analysis.zarr"))[f"derived/{name}"].to_dataset()
    return node.load()


def epochs_of(study: Study) -> np.ndarray:
    """Return the epochs at which the study asks over time."""
    return np.asarray(study.read("time.json")["epochs"])


def of_kinds(sums: xr.Dataset) -> xr.Dataset:
    """Return the sums of the inputs, without those on the way to two of them."""
    return sums.isel(audit=np.isin(sums["kind"].values.astype(object), KINDS))


def influence_figures(study: Study) -> list[workflow.Figure]:
    """Return the inputs, and how influence on perturbed ones compares with that on clean ones."""
    pairs, pair = Pairs.load(study.path("pairs.npz")), stored(study, "first_pair")
    sums, layered = stored(study, "influence_sums"), stored(study, "layer_sums")
    audit = study.read("audit.json")
    return [
        workflow.Figure(
            "inputs",
            "Inputs",
            "Clean, attacked, and with as much noise (figure 8).",
            image_table(pairs),
        ),
        workflow.Figure(
            "influence",
            "Influence on clean and on perturbed images",
            "Each dot a training image, of one pair; and of all pairs the correlations (figure 9).",
            plots.influence_against(
                pair["clean"].values,
                {k: pair[k].values for k in ("adversarial", "random")},
                {k: np.asarray(v) for k, v in audit["correlation"].items()},
            ),
        ),
        workflow.Figure(
            "layers",
            "By layer and epoch",
            "Net influence above, gross below (figure 10).",
            plots.groups_along(
                {
                    f"{name}, {kind}": layered[kind].isel(layer=i)
                    for kind in ("net", "gross")
                    for i, name in enumerate(layered["layer"].values.tolist())
                },
                by="kind",
                along="epoch",
                ylabel="influence (nats)",
                rows=2,
            ),
        ),
        workflow.Figure(
            "path",
            "From clean to adversarial",
            "When gross influence came, by position on the way, "
            "and how much there was (figure 11).",
            path_figure(sums),
        ),
    ]


def training_figures(study: Study) -> list[workflow.Figure]:
    """Return influence over training, and the kernel regime."""
    epochs, grouped = epochs_of(study), of_kinds(stored(study, "influence_sums"))
    time_ = stored(study, "losses").assign_coords(time=epochs)
    gross_at = _at_epochs(grouped["gross"], epochs)
    return [
        workflow.Figure(
            "magnitude",
            "Influence and loss",
            "Gross influence within each epoch, and losses (figure 12).",
            plots.groups_along(
                {"gross influence": grouped["gross"].rename(epoch="time"), "loss": time_["loss"]},
                by="kind",
                along="time",
                xlabel="epoch",
                ylabel="nats",
            ),
        ),
        workflow.Figure(
            "cumulative",
            "Net and gross influence so far",
            "(figure 13)",
            plots.groups_along(
                {"net": grouped["net so far"], "gross": grouped["gross so far"]},
                by="kind",
                along="epoch",
                ylabel="influence (nats)",
            ),
        ),
        workflow.Figure(
            "regime",
            "Kernel regime",
            "Overlap with the end, against gross influence and loss (figure 14).",
            plots.regime(
                {str(k): v for k, v in stored(study, "regime").data_vars.items()},
                {"gross influence": gross_at, "loss": time_["loss"]},
                by="kind",
                labels=epochs,
                ylabels=("gross influence within the epoch (nats)", "loss (nats)"),
            ),
        ),
    ]


def mode_figures(study: Study, run: Trained) -> list[workflow.Figure]:
    """Return which modes perturbations move, and how sensitive modes are."""
    shifts = [stored(study, f"shifts_{kind}") for kind in ("adversarial", "random")]
    felt, over = stored(study, "sensitivity"), stored(study, "sensitivity_over_time")
    over = over.assign_coords(time=np.searchsorted(run.epochs(), over["step"].values))
    return [
        workflow.Figure(
            "shifts",
            "Modes that perturbations move",
            "Colour and size: mean change of the "
            "coefficient (figures 15 and 27). The scales differ.",
            plots.mode_scatter(shifts[0], other=shifts[1]),
        ),
        workflow.Figure(
            "sensitivity",
            "Sensitivity of mode coefficients to the input",
            "Raw, and divided by the norm of the loss gradient (figure 16).",
            plots.groups_along(
                {"raw": felt["sensitivity"], "corrected": felt["corrected"]},
                by="kind",
                along="mode",
                xlabel="mode",
                ylabel="norm of the slope",
                logy=True,
                spread=False,
            ),
        ),
        workflow.Figure(
            "sensitivity_time",
            "Sensitivity over training",
            "Mean of the 10 leading modes, and of the next 40 (figure 17).",
            plots.groups_along(
                {
                    f"{title}, {group}": over[f"{name} {group}"]
                    for name, title in (("sensitivity", "raw"), ("corrected", "corrected"))
                    for group in ("top 10", "rest")
                },
                by="kind",
                along="time",
                xlabel="epoch",
                ylabel="norm of the slope",
                rows=2,
                logy=True,
                spread=False,
            ),
        ),
    ]


def cancellation_figures(study: Study) -> list[workflow.Figure]:
    """Return how far pushes of modes cancel, and what the corrections do."""
    pairs, epochs = Pairs.load(study.path("pairs.npz")), epochs_of(study)
    ratio = stored(study, "cancellation")["cancellation_ratio"].assign_coords(time=epochs[1:])
    late = ratio.isel(time=int(0.8 * (len(epochs) - 1)))
    end = stored(study, "cancellation_end")["cancellation_ratio"]
    losses = stored(study, "cured_losses")["loss"]
    losses = losses.assign_coords(time=losses["epoch"].values)
    losses = losses[:, np.isin(losses["kind"].values.astype(object), CURVES)]
    cured = study.load("cured.npz")
    return [
        workflow.Figure(
            "cancellation",
            "Cancellation of modes",
            "|sum| / sum of magnitudes of the modes' pushes: "
            "low is cancellation. Over training with online modes, against how many modes are "
            "counted late in it, and the same with the modes of the end (figure 18).",
            cancellation_figure(ratio, late, end),
        ),
        workflow.Figure(
            "cure",
            "Losses of corrected images over training",
            "The corrections were made for the final network (figure 19).",
            plots.groups_along(
                {"means of images": losses},
                by="kind",
                along="time",
                xlabel="epoch",
                ylabel="loss (nats)",
                spread=False,
            ),
        ),
        workflow.Figure(
            "cured", "What the corrections look like", "(figure 20)", image_table(pairs, cured)
        ),
    ]


def cancellation_figure(ratio: xr.DataArray, late: xr.DataArray, end: xr.DataArray) -> Any:
    """Draw the ratio over training, and over the number of modes."""
    over = ratio.isel(mode=-1, drop=True)
    return plots.groups_along(
        {
            f"{ratio.sizes['mode']} modes, over training": over,
            f"epoch {int(late['time'])}, online modes": late.drop_vars("time"),
            "end of training, its own modes": end,
        },
        by="kind",
        along=("time", "mode", "mode"),
        xlabel=("epoch", None, None),
        ylabel="cancellation ratio",
        spread=False,
    )


def path_figure(sums: xr.Dataset) -> Any:
    """Draw what is of the points between a clean image and its perturbed forms."""
    gross: dict[str, xr.DataArray] = {}
    totals: dict[str, xr.DataArray] = {}
    for kind in ("adversarial", "random"):
        way = sums.isel(audit=(sums["kind"] == f"path {kind}").values)
        coords = {"position": way["position"].values, "epoch": way["epoch"].values}
        values = way["gross"].transpose("audit", "epoch").values
        gross[kind] = xr.DataArray(values, dims=("position", "epoch"), coords=coords)
        whole = way["gross so far"].isel(epoch=-1).values
        totals[kind] = xr.DataArray(whole, dims="position", coords={"position": coords["position"]})
    return plots.influence_along_path(gross["adversarial"], totals)


def image_table(pairs: Pairs, cured: Any = None, count: int = 4) -> Any:
    """Show some pairs, and what was made of them."""

    def plain(image: Any) -> np.ndarray:
        return np.asarray(torch.as_tensor(image).permute(1, 2, 0).squeeze(-1))

    columns = {kind: [plain(x) for x in pairs.images[kind][:count]] for kind in KINDS[:3]}
    if cured is None:
        columns["attack"] = [
            a - c for a, c in zip(columns["adversarial"], columns["clean"], strict=True)
        ]
        columns["noise"] = [a - c for a, c in zip(columns["random"], columns["clean"], strict=True)]
    else:
        for kind in ("cured adversarial", "adversarial + random"):
            columns[kind] = [plain(x) for x in cured[kind][:count]]
        columns["correction"] = [
            a - c for a, c in zip(columns["cured adversarial"], columns["adversarial"], strict=True)
        ]
    return plots.image_rows(list(zip(*columns.values(), strict=True)), list(columns))


def _at_epochs(x: xr.DataArray, epochs: np.ndarray) -> xr.DataArray:
    """Return what came within the epochs that begin at some; nothing after the last."""
    within = np.minimum(epochs, x.sizes["epoch"] - 1)
    taken = x.isel(epoch=within).rename(epoch="time").assign_coords(time=epochs)
    return taken.where(taken["time"] < x.sizes["epoch"])
