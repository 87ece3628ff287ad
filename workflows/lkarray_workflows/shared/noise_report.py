"""What the study of noise says: tables, and agreement against draws and seconds as figures."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lkarray import workflow
from lkarray_workflows.shared.estimates import ESTIMATES, WANTED


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""

    def text(value: float | None, unit: str) -> str:
        return "not reached" if value is None else f"{value:.3g} {unit}"

    rows = []
    for kernel in metrics["kernels"]:
        rows.append(
            (
                f"gamma {kernel['gamma']:g}: the 10 nearest that have the same label",
                ", ".join(f"{name} {value:.2f}" for name, value in kernel["same_label"].items()),
                "",
            )
        )
        for name, points in kernel["curves"].items():
            rows.append(
                (
                    f"gamma {kernel['gamma']:g}: {name}",
                    text(kernel["draws_needed"][name], "draws")
                    + ", "
                    + text(kernel["seconds_needed"][name], "s"),
                    f"at {points[-1]['draws']} draws: {points[-1]['agreement']:.3f}",
                )
            )
    return rows


def draw_curves(metrics: dict[str, Any], what: str) -> Figure:
    """Draw agreement with the reference against draws or seconds, a panel a gamma."""
    kernels = metrics["kernels"]
    figure = Figure(figsize=(4.6 * len(kernels) + 1.6, 4.4), layout="constrained")
    colors = ["#717581", "#3f90da", "#832db6", "#bd1f01", "#ffa90e"]
    styles: dict[str, Any] = {}
    for name, color in zip(ESTIMATES, colors, strict=True):
        styles[name] = {"color": color, "marker": "o"}
        styles[f"Laplace draws, {name}"] = {"color": color, "marker": "s", "ls": "--"}
    styles["gradients at w*"] = {"color": "#94a4a2", "marker": "*", "ms": 11, "ls": ""}
    styles["gradients, smoothed"] = {"color": "#e76300", "marker": "^"}
    for axes, kernel in zip(
        figure.subplots(1, len(kernels), squeeze=False)[0], kernels, strict=True
    ):
        for name, points in kernel["curves"].items():
            axes.plot(
                [p[what] for p in points],
                [p["agreement"] for p in points],
                label=name,
                **({"ms": 4, "lw": 1.3} | styles[name]),
            )
        axes.axhline(WANTED, color="black", lw=0.8, ls=":")
        axes.set(
            xscale="log",
            ylim=(0, 1.03),
            xlabel=what,
            title=f"gamma {kernel['gamma']:g}",
        )
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("agreement with R of a long run")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def report(study: workflow.Study[Any]) -> None:
    """Write the report folder."""
    config, metrics = study.config, study.read("metrics.json")
    what = "LeNet-5, MNIST" if config.dataset == "mnist" else "one hidden layer, digits"
    study.report(
        title="What a draw is worth",
        summary=[
            f"{what}: {config.observed} held-out images, nbeta {config.nbeta:g}. R of losses from "
            "one half of the chains is the reference; agreement is the correlation over pairs of "
            "images, divided by the root of the reference's reliability. The dotted line is that "
            "of an estimate of reliability 0.9. Seconds hold what an estimate needs: burn-in, and "
            "with a control its predictions and features.",
        ],
        metrics=metrics,
        rows=rows_of(metrics),
        figures=[
            workflow.Figure(
                f"against_{what}",
                f"Against {what}",
                f"Agreement with the reference, by {what} spent.",
                draw_curves(metrics, what),
            )
            for what in ("draws", "seconds")
        ],
        next_steps=f'tree = lk.open("{study.path(f"gamma-{config.gammas[0]:g}/sampled.zarr")}")\n'
        'lk.correlation(tree["losses"], estimator="gaussian")',
    )
