"""The report of `adversarial`: table 2 of Anonymous 2026, and the claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lkarray_workflows.shared.adversarial_figures import figures
from lkarray_workflows.shared.attacks import KINDS
from lkarray_workflows.shared.images import CLASSES
from lkarray_workflows.shared.recorded import Trained

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Study

#: Accuracies of table 2; of 32 images of MNIST.
TABLE_2 = {
    "clean": "100%",
    "random": "100%",
    "adversarial": "0%",
    "cured adversarial": "87.5%",
    "cured random": "100%",
    "adversarial + random": "15.6%",
}
Row = tuple[str, str, str]
#: The file of each stage's numbers, of the first network.
_NUMBERS = ("modes", "cure", "audit", "layers", "outputs", "time")


def claims(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say what the controls decide: the number of each network, and whether all have its sign."""
    cures = [network["cure"]["accuracy"] for network in every]
    gaps = {
        f"the correction restores more than {control} does": [
            accuracy["cured adversarial"] - accuracy[control] for accuracy in cures
        ]
        for control in ("adversarial + random", "signs at random", "attacked again")
    }
    for kind in ("clean", "random", "natural error"):
        means = [network["modes"]["paired_cancellation"][kind]["mean"] for network in every]
        of_equal = " of equal loss" if kind == "natural error" else ""
        gaps[f"adversarial images cancel more than {kind} images{of_equal}"] = [
            -mean for mean in means if mean is not None
        ]
    return {
        claim: {
            "differences": differences,
            "mean": float(np.mean(differences)) if differences else None,
            "holds": len(differences) == len(every) and min(differences) > 0,
        }
        for claim, differences in gaps.items()
    }


def report(study: Study, networks: Sequence[tuple[Study, Trained]]) -> None:
    """Write the report folder."""
    config, path = study.config, study.path("analysis.zarr")
    numbers = [
        {name: home.read(f"{name}.json") for name in (_NUMBERS[:2] if later else _NUMBERS)}
        for later, (home, _) in enumerate(networks)
    ]
    decided = claims(numbers)
    study.report(
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
        metrics={"networks": numbers, "claims": decided},
        rows=[
            *correction_rows(numbers),
            *cancellation_rows(numbers),
            *claim_rows(decided),
            *audit_rows(numbers[0]),
            *mode_rows(numbers),
        ],
        figures=figures(study, networks[0][1]),
        next_steps=f'tree = lk.open("{path}")\n'
        'lk.cancellation_ratio(tree["derived/modes"].to_dataset(), ...)',
    )


def listed(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Return a number of each network, as a row has it."""
    return ", ".join(form.format(value) for value in values)


def correction_rows(networks: Sequence[dict[str, Any]]) -> list[Row]:
    """Return how right the networks are of each kind of images, and how large corrections are."""
    first, modes = networks[0], [network["modes"] for network in networks]
    return [
        (
            "Attack fools the network",
            listed([network["fooled"] for network in modes], "{:.1%}"),
            "",
        ),
        *(
            (
                f"Right: {kind}",
                listed([network["cure"]["accuracy"][kind] for network in networks], "{:.1%}")
                + over_networks([network["cure"]["accuracy"][kind] for network in networks]),
                f"paper: {TABLE_2[kind]}" if kind in TABLE_2 else "control",
            )
            for kind in first["cure"]["accuracy"]
        ),
        (
            "Cosine of attack and correction",
            listed([network["cure"]["cosine"]["mean"] for network in networks], "{:.2f}"),
            "paper: -0.3",
        ),
        (
            "Norm of the correction over that of the attack",
            listed(
                [
                    network["cure"]["l2"]["cured adversarial"] / network["cure"]["l2_of_attack"]
                    for network in networks
                ],
                "{:.2f}",
            ),
            "",
        ),
    ]


def cancellation_rows(networks: Sequence[dict[str, Any]]) -> list[Row]:
    """Return losses, sizes of changes, and how far the modes' pushes cancel."""
    first, modes = networks[0], [network["modes"] for network in networks]
    most = list(first["modes"]["cancellation"]["clean"])[-1]  # modes that are counted
    return [
        *(
            (
                f"Loss, mean and median: {kind}",
                "; ".join("{:.2f}, {:.2f}".format(*network["losses"][kind]) for network in modes),
                "",
            )
            for kind in KINDS
        ),
        *(
            (
                f"Change by {kind}: mean length, largest of a pixel",
                "; ".join(
                    f"{network['cure']['l2'][kind]:.2f}, {network['cure']['largest'][kind]:.2f}"
                    for network in networks
                ),
                "",
            )
            for kind in first["cure"]["l2"]
        ),
        (
            "Pairs whose natural error has nearly the same loss",
            listed(
                [network["paired_cancellation"]["natural error"]["pairs"] for network in modes],
                "{}",
            ),
            "",
        ),
        *(
            (
                f"Cancellation ratio, {most} modes: {kind}",
                listed([list(network["cancellation"][kind].values())[-1] for network in modes]),
                "paper: adversarial lowest (figure 18)",
            )
            for kind in KINDS
        ),
    ]


def claim_rows(decided: dict[str, Any]) -> list[Row]:
    """Return what the controls decide."""
    return [
        *(
            (
                claim,
                ("none" if judged["mean"] is None else f"{judged['mean']:+.3f}")
                + f": {'holds' if judged['holds'] else 'does NOT hold'}",
                "by network: " + listed(judged["differences"], "{:+.3f}"),
            )
            for claim, judged in decided.items()
        ),
    ]


def audit_rows(first: dict[str, Any]) -> list[Row]:
    """Return what the audits of the first network say."""
    return [
        (
            "Loss audit: mean error, correlation",
            f"{first['audit']['mre']:.4f}, {first['audit']['lc']:.7f}",
            "paper: 0.01, 0.999997",
        ),
        (
            "Prediction audit: mean error, correlation",
            f"{first['outputs']['mre']:.4f}, {first['outputs']['lc']:.8f}",
            "paper: 0.019, 0.9999999",
        ),
        *(
            (
                f"Influence on {kind} against clean: median correlation, slope",
                f"{np.median(first['audit']['correlation'][kind]):.3f}, "
                f"{np.median(first['audit']['slope'][kind]):.2f}",
                "paper: above 0.6" if kind == "adversarial" else "",
            )
            for kind in ("adversarial", "random")
        ),
        *(
            (
                f"Gross and net influence, |net| / gross: {kind}",
                f"{first['audit']['gross'][kind]:.4g}, {first['audit']['net'][kind]:+.3f} nats, "
                f"{first['audit']['net_over_gross'][kind]:.2e}",
                "",
            )
            for kind in KINDS
        ),
    ]


def mode_rows(networks: Sequence[dict[str, Any]]) -> list[Row]:
    """Return which modes perturbations shift, and how sensitive modes are."""
    modes = [network["modes"] for network in networks]
    shifts = [network["shifts"]["adversarial"] for network in modes]
    return [
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
            listed([network["shift_ratio"] for network in modes], "{:.1f}"),
            "paper: about 80",
        ),
        (
            "Sensitivity, 10 leading modes over the next 40: raw, corrected by the loss gradient",
            "; ".join(
                f"{network['sensitivity_top_10_over_rest']:.1f}, "
                f"{network['corrected_top_10_over_rest']:.1f}"
                for network in modes
            ),
            "paper: significantly above 1",
        ),
        (
            "Drives of the leading modes whose sign a subset of images gets right",
            listed([network["subset_signs_agree"] for network in modes], "{:.0%}"),
            "",
        ),
    ]


def over_networks(shares: Sequence[float]) -> str:
    """Return the mean share of the networks and its 95% interval over them (Student's t).

    Networks differ by more than their images do, so images of all of them are not counted together.
    """
    from scipy.stats import t

    mean, count = float(np.mean(shares)), len(shares)
    if count < 2:
        return ""
    half = float(t.ppf(0.975, count - 1) * np.std(shares, ddof=1) / np.sqrt(count))
    return f"; mean {mean:.1%} [{max(mean - half, 0):.1%}, {min(mean + half, 1):.1%}]"
