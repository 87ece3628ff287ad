"""The report of `adversarial`: figures 8 to 20 and 27 of PLGK, table 2, and the claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.attacks import KINDS, Pairs
from lkarray_workflows.shared.images import CLASSES

import lkarray as lk
from lkarray import plots, workflow

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Config, Paths

#: Accuracies of table 2; of 32 images of MNIST.
TABLE_2 = {
    "clean": "100%",
    "random": "100%",
    "adversarial": "0%",
    "cured adversarial": "87.5%",
    "cured random": "100%",
    "adversarial + random": "15.6%",
}
CURVES = (*KINDS[:3], "cured adversarial", "cured random", "adversarial + random")
#: The file of each stage's numbers, of the first network.
_NUMBERS = ("modes", "cure", "audit", "layers", "outputs", "time")


def claims(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say what the controls decide: the number of each network, and whether all have its sign."""
    cures = [of["cure"]["accuracy"] for of in every]
    gaps = {
        f"the correction restores more than {control} does": [
            one["cured adversarial"] - one[control] for one in cures
        ]
        for control in ("adversarial + random", "signs at random", "attacked again")
    }
    for kind in ("clean", "random", "natural error"):
        found = [of["modes"]["paired_cancellation"][kind]["mean"] for of in every]
        of_equal = " of equal loss" if kind == "natural error" else ""
        gaps[f"adversarial images cancel more than {kind} images{of_equal}"] = [
            -gap for gap in found if gap is not None
        ]
    return {
        claim: {
            "differences": found,
            "mean": float(np.mean(found)) if found else None,
            "holds": len(found) == len(every) and min(found) > 0,
        }
        for claim, found in gaps.items()
    }


def report(config: Config, every: Sequence[Paths], state: workflow.Run) -> None:
    """Write the report folder."""
    first = every[0]
    numbers = [
        {
            name: json.loads(getattr(paths, name).read_text())
            for name in (_NUMBERS if paths is first else _NUMBERS[:2])
        }
        for paths in every
    ]
    decided = claims(numbers)
    index = first.folder / "report"
    workflow.write_report(
        workflow.Report(
            title="Adversarial inputs, and influences that cancel",
            summary=[
                f"{config.network} on {CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}; {config.pairs} images attacked by {config.attack} "
                f"within {config.radius:g}, {config.seeds} networks. A claim holds if the "
                "difference has its sign for every network. The paper's numbers are of MNIST.",
                f"Modes are the first {config.modes} of the gradients of {config.features:,} "
                "training images, their drives those of the whole training set. A cancellation "
                "ratio of 1 is no cancellation. The size of the shift and the radius of the "
                "correction, which the paper does not give, were chosen on a network of seed 0.",
            ],
            metrics={
                "networks": numbers,
                "claims": decided,
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows(numbers, decided),
            figures=figures(config, first),
            settings=config.model_dump(mode="json"),
            next_steps=f'tree = lk.open("{first.store}")\n'
            'lk.cancellation_ratio(tree["derived/modes"].to_dataset(), ...)',
        ),
        index,
    )


def rows(every: Sequence[dict[str, Any]], decided: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top: what, ours by network, the paper's."""
    one = every[0]

    def listed(values: Sequence[float], form: str = "{:.3f}") -> str:
        return ", ".join(form.format(value) for value in values)

    modes = [of["modes"] for of in every]
    shifts = [of["shifts"]["adversarial"] for of in modes]
    found = [
        ("Attack fools the network", listed([of["fooled"] for of in modes], "{:.1%}"), ""),
        *(
            (
                f"Right: {kind}",
                listed([of["cure"]["accuracy"][kind] for of in every], "{:.1%}")
                + pooled([(of["cure"]["accuracy"][kind], of["cure"]["pairs"]) for of in every]),
                f"paper: {TABLE_2[kind]}" if kind in TABLE_2 else "control",
            )
            for kind in one["cure"]["accuracy"]
        ),
        (
            "Cosine of attack and correction",
            listed([of["cure"]["cosine"]["mean"] for of in every], "{:.2f}"),
            "paper: -0.3",
        ),
        (
            "Norm of the correction over that of the attack",
            listed(
                [
                    of["cure"]["l2"]["cured adversarial"] / of["cure"]["l2_of_attack"]
                    for of in every
                ],
                "{:.2f}",
            ),
            "",
        ),
        *(
            (
                f"Loss, mean and median: {kind}",
                "; ".join("{:.2f}, {:.2f}".format(*of["losses"][kind]) for of in modes),
                "",
            )
            for kind in KINDS
        ),
        *(
            (
                f"Change by {kind}: mean length, largest of a pixel",
                "; ".join(
                    f"{of['cure']['l2'][kind]:.2f}, {of['cure']['largest'][kind]:.2f}"
                    for of in every
                ),
                "",
            )
            for kind in one["cure"]["l2"]
        ),
        (
            "Pairs whose natural error has nearly the same loss",
            listed([of["paired_cancellation"]["natural error"]["pairs"] for of in modes], "{}"),
            "",
        ),
        *(
            (
                f"Cancellation ratio, {list(one['modes']['cancellation'][kind])[-1]} modes: {kind}",
                listed([list(of["cancellation"][kind].values())[-1] for of in modes]),
                "paper: adversarial lowest (figure 18)",
            )
            for kind in KINDS
        ),
        *(
            (
                claim,
                ("none" if of["mean"] is None else f"{of['mean']:+.3f}")
                + f": {'holds' if of['holds'] else 'does NOT hold'}",
                "by network: " + listed(of["differences"], "{:+.3f}"),
            )
            for claim, of in decided.items()
        ),
        (
            "Loss audit: mean error, correlation",
            f"{one['audit']['mre']:.4f}, {one['audit']['lc']:.7f}",
            "paper: 0.01, 0.999997",
        ),
        (
            "Prediction audit: mean error, correlation",
            f"{one['outputs']['mre']:.4f}, {one['outputs']['lc']:.8f}",
            "paper: 0.019, 0.9999999",
        ),
        *(
            (
                f"Influence on {kind} against clean: median correlation, slope",
                f"{np.median(one['audit']['correlation'][kind]):.3f}, "
                f"{np.median(one['audit']['slope'][kind]):.2f}",
                "paper: above 0.6" if kind == "adversarial" else "",
            )
            for kind in ("adversarial", "random")
        ),
        *(
            (
                f"Gross and net influence, |net| / gross: {kind}",
                f"{one['audit']['gross'][kind]:.4g}, {one['audit']['net'][kind]:+.3f} nats, "
                f"{one['audit']['net_over_gross'][kind]:.2e}",
                "",
            )
            for kind in KINDS
        ),
        (
            "Effective modes of shift, drive, their product",
            "; ".join(
                ", ".join(
                    f"{s['effective_modes'][k]:.1f}" for k in ("shift", "drive", "contribution")
                )
                for s in shifts
            ),
            "paper: 6 to 10, 6 to 10, 2.4",
        ),
        (
            "Share of the 5 largest contributions",
            listed([s["top_5_share"] for s in shifts], "{:.0%}"),
            "paper: 84%",
        ),
        *(
            (
                f"Correlation over modes: {a}, {b}",
                listed([s["correlation"][f"{a}, {b}"] for s in shifts], "{:.2f}"),
                f"paper: {paper}",
            )
            for a, b, paper in (("shift", "drive", "0.80"), ("drive", "sensitivity", "0.72"))
        ),
        (
            "Adversarial over random shift",
            listed([of["shift_ratio"] for of in modes], "{:.1f}"),
            "paper: about 80",
        ),
        (
            "Sensitivity, 10 leading modes over the next 40: raw, corrected by the loss gradient",
            "; ".join(
                f"{of['sensitivity_top_10_over_rest']:.1f}, {of['corrected_top_10_over_rest']:.1f}"
                for of in modes
            ),
            "paper: significantly above 1",
        ),
        (
            "Drives of the leading modes whose sign a subset of images gets right",
            listed([of["subset_signs_agree"] for of in modes], "{:.0%}"),
            "",
        ),
    ]
    return found


def pooled(shares: Sequence[tuple[float, int]]) -> str:
    """Return the share of the images of all networks, and its 95% interval (Wilson's)."""
    from scipy.stats import binomtest

    of = sum(count for _, count in shares)
    right = sum(share * count for share, count in shares)
    found = binomtest(round(right), of).proportion_ci(method="wilson")
    return f"; together {right / of:.1%} [{found.low:.1%}, {found.high:.1%}]"


def figures(config: Config, paths: Paths) -> list[workflow.Figure]:
    """Return the figures of the first network."""
    tree = lk.open(paths.store)["derived"]

    def of(name: str) -> xr.Dataset:
        found: xr.Dataset = tree[name].to_dataset().load()
        return found

    epochs = np.asarray(json.loads(paths.time.read_text())["epochs"])
    pairs, cured = Pairs.load(paths.pairs), np.load(paths.cured)
    sums, layered = of("influence_sums"), of("layer_sums")
    groups = np.isin(sums["kind"].values.astype(object), KINDS)
    grouped = sums.isel(audit=groups)
    shifts = [of(f"shifts_{kind}") for kind in ("adversarial", "random")]
    pair, audit = of("first_pair"), json.loads(paths.audit.read_text())
    time_ = of("losses").assign_coords(time=epochs)
    ratio = of("cancellation")["cancellation_ratio"].assign_coords(time=epochs[1:])
    late = ratio.isel(time=int(0.8 * (len(epochs) - 1)))
    end = of("cancellation_end")["cancellation_ratio"]
    felt = of("sensitivity")
    over = of("sensitivity_over_time")
    over = over.assign_coords(time=np.searchsorted(paths.run.epochs(), over["step"].values))
    losses = of("cured_losses")["loss"]
    losses = losses.assign_coords(time=losses["epoch"].values)
    losses = losses[:, np.isin(losses["kind"].values.astype(object), CURVES)]
    gross_at = _at_epochs(grouped["gross"], epochs)
    named: list[tuple[str, str, str, Any]] = [
        (
            "inputs",
            "Inputs",
            "Clean, attacked, and with as much noise (figure 8).",
            image_table(pairs),
        ),
        (
            "influence",
            "Influence on clean and on perturbed images",
            "Each dot a training image, of one pair; and of all pairs the correlations (figure 9).",
            plots.influence_against(
                pair["clean"].values,
                {k: pair[k].values for k in ("adversarial", "random")},
                {k: np.asarray(v) for k, v in audit["correlation"].items()},
            ),
        ),
        (
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
        (
            "path",
            "From clean to adversarial",
            "When gross influence came, by position on the way, "
            "and how much there was (figure 11).",
            path_figure(sums),
        ),
        (
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
        (
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
        (
            "regime",
            "Kernel regime",
            "Overlap with the end, against gross influence and loss (figure 14).",
            plots.regime(
                {str(k): v for k, v in of("regime").data_vars.items()},
                {"gross influence": gross_at, "loss": time_["loss"]},
                by="kind",
                labels=epochs,
                ylabels=("gross influence within the epoch (nats)", "loss (nats)"),
            ),
        ),
        (
            "shifts",
            "Modes that perturbations move",
            "Colour and size: mean change of the "
            "coefficient (figures 15 and 27). The scales differ.",
            plots.mode_scatter(shifts[0], other=shifts[1]),
        ),
        (
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
        (
            "sensitivity_time",
            "Sensitivity over training",
            "Mean of the 10 leading modes, and of the next 40 (figure 17).",
            plots.groups_along(
                {
                    f"{title}, {part}": over[f"{name} {part}"]
                    for name, title in (("sensitivity", "raw"), ("corrected", "corrected"))
                    for part in ("top 10", "rest")
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
        (
            "cancellation",
            "Cancellation of modes",
            "|sum| / sum of magnitudes of the modes' pushes: "
            "low is cancellation. Over training with online modes, against how many modes are "
            "counted late in it, and the same with the modes of the end (figure 18).",
            cancellation_figure(ratio, late, end),
        ),
        (
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
        ("cured", "What the corrections look like", "(figure 20)", image_table(pairs, cured)),
    ]
    return [workflow.Figure(*one) for one in named]


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
        part = sums.isel(audit=(sums["kind"] == f"path {kind}").values)
        coords = {"position": part["position"].values, "epoch": part["epoch"].values}
        values = part["gross"].transpose("audit", "epoch").values
        gross[kind] = xr.DataArray(values, dims=("position", "epoch"), coords=coords)
        whole = part["gross so far"].isel(epoch=-1).values
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
    at = np.minimum(epochs, x.sizes["epoch"] - 1)
    found = x.isel(epoch=at).rename(epoch="time").assign_coords(time=epochs)
    return found.where(found["time"] < x.sizes["epoch"])
