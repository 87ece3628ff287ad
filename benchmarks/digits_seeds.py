"""The digits study on seeds it was not tuned on: how its numbers vary.

Settings were chosen on seed 0. Prints one row a metric: mean, standard deviation, range.
Runs are kept in ``runs/digits-seed-N``, so an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from lkarray.workflow import find_workflow

ROWS = {
    "AUROC of flipped labels, loss variance": ("auroc_flipped", "loss_variance"),
    "AUROC of flipped labels, loss gain": ("auroc_flipped", "loss_gain"),
    "AUROC of flipped labels, loss at w* (baseline)": ("auroc_flipped", "loss_at_center"),
    "mean loss gain, flipped / clean": ("loss_gain_ratio_flipped_to_clean",),
    "nearest neighbour has the same label": ("nearest_neighbor", "same_label"),
    "  chance": ("nearest_neighbor", "chance_same_label"),
    "nearest neighbour shows the same digit": ("nearest_neighbor", "same_true_class"),
    "  chance ": ("nearest_neighbor", "chance_same_true_class"),
    "flip's nearest of another label: same digit": (
        "flipped_nearest_of_another_label",
        "same_true_class",
    ),
    "  chance  ": ("flipped_nearest_of_another_label", "chance_same_true_class"),
    "agreement of half kernels": ("agreement_of_half_kernels",),
    "accuracy on flipped training labels": ("accuracy", "flipped"),
    "accuracy held out": ("accuracy", "held_out"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    study = find_workflow("digits")
    runs = []
    for seed in options.seeds:
        folder = options.out / f"digits-{options.preset}-seed-{seed}"
        study.run(study.Config.build(options.preset, [f"seed={seed}"]), folder, progress=False)
        runs.append(json.loads((folder / "report" / "metrics.json").read_text()))
    print(f"{'seeds ' + str(options.seeds):50} {'mean':>8} {'sd':>8} {'least':>8} {'most':>8}")
    for name, path in ROWS.items():
        values = np.array([_get(metrics, path) for metrics in runs])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        print(
            f"{name:50} {values.mean():8.3f} {spread:8.3f} {values.min():8.3f} {values.max():8.3f}"
        )


def _get(metrics: dict, path: tuple[str, ...]) -> float:
    for key in path:
        metrics = metrics[key]
    return float(metrics)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
