"""Ask which inputs a trained network treats alike, and which examples made it so.

lkarray turns a trained model into labelled tensors of per-sample losses on disk, and
computes kernels, neighbours and maps from them with Dask, larger than memory.

>>> import lkarray as lk
>>> lk.SGLD(step_size=1e-5)
SGLD(step_size=1e-05, schedule=None)

The names below are the public ones. Those of the torch half (`LocalPosterior`, `SGLD`,
`sample`), of hierarchies (`Taxonomy`), `embed` and `plots` load their libraries on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lkarray import accessor as _accessor
from lkarray import errors
from lkarray._version import __version__
from lkarray.analysis.audits import (
    audit_modes,
    completeness,
    concentration,
    extend_audit,
    gross_influence,
    most_influential,
    net_influence,
)
from lkarray.analysis.gradients import (
    activation_overlap,
    angle_distance,
    cancellation_ratio,
    chord_distance,
    difficulty_table,
    feature_overlap,
    hidden_similarity,
    influence_over_time,
    ips,
    ips_scores,
    lgk,
    lntk,
    mode_coefficients,
    mode_shifts,
    modes,
    online_modes,
    parameter_modes,
    plgk,
    pntk,
    subspace_overlap,
    temporal_kernel,
    temporal_modes,
)
from lkarray.analysis.losses import (
    at_equal_reliability,
    correlation,
    covariance,
    diagnostics,
    extrapolated,
    influence,
    judge,
    llc,
    log_odds,
    loss_gain,
    loss_variance,
    mcse,
    reliability,
    residualize,
    singular_fluctuation,
)
from lkarray.devinterp import from_devinterp
from lkarray.interop import to_arviz
from lkarray.kernels import (
    cka,
    cka_curve,
    eigh,
    energy_rank,
    frobenius,
    gram,
    group_mean,
    histogram,
    ledoit_wolf,
    linear_operator,
    neighbors,
    params,
    participation_ratio,
    svd,
    unfold,
)
from lkarray.planning import plan
from lkarray.presets import PRESETS, preset
from lkarray.saving import save
from lkarray.store import discard_gradients, discard_trace, verify
from lkarray.store import open_store as open  # noqa: A004

if TYPE_CHECKING:
    from lkarray import cluster, plots
    from lkarray.analysis.hierarchy import (
        Taxonomy,
        attribute_lift,
        color_groups,
        correlation_by_distance,
        taxonomic_lift,
        taxonomy_distance,
    )
    from lkarray.attribution.influence_functions import influence_functions
    from lkarray.attribution.laplace_features import laplace
    from lkarray.attribution.tracin import gradient_similarity, tracin, tracin_in_run
    from lkarray.attribution.trak import trak
    from lkarray.auditing.audit import audit
    from lkarray.auditing.reconstruct import reconstruction
    from lkarray.embedding import embed, similarity_by_distance
    from lkarray.sampling import (
        SGHMC,
        SGLD,
        InformedLangevin,
        Laplace,
        LocalPosterior,
        Outcome,
        RMSpropSGLD,
        observe,
        repair,
        sample,
        schedules,
        suggest,
    )
    from lkarray.training import (
        activations,
        gradient_factors,
        gradient_features,
        gradient_plan,
        mean_gradient,
        mode_sensitivity,
        open_trace,
        record,
        shift_modes,
        snapshot,
    )

_LAZY = {
    "audit": "lkarray.auditing",
    "reconstruction": "lkarray.auditing",
    "tracin": "lkarray.attribution",
    "tracin_in_run": "lkarray.attribution",
    "trak": "lkarray.attribution",
    "laplace": "lkarray.attribution",
    "gradient_similarity": "lkarray.attribution",
    "influence_functions": "lkarray.attribution",
    "InformedLangevin": "lkarray.sampling",
    "Laplace": "lkarray.sampling",
    "LocalPosterior": "lkarray.sampling",
    "Outcome": "lkarray.sampling",
    "RMSpropSGLD": "lkarray.sampling",
    "SGHMC": "lkarray.sampling",
    "SGLD": "lkarray.sampling",
    "observe": "lkarray.sampling",
    "repair": "lkarray.sampling",
    "sample": "lkarray.sampling",
    "suggest": "lkarray.sampling",
    "embed": "lkarray.embedding",
    "similarity_by_distance": "lkarray.embedding",
    "activations": "lkarray.training",
    "gradient_factors": "lkarray.training",
    "gradient_features": "lkarray.training",
    "gradient_plan": "lkarray.training",
    "mean_gradient": "lkarray.training",
    "mode_sensitivity": "lkarray.training",
    "open_trace": "lkarray.training",
    "record": "lkarray.training",
    "shift_modes": "lkarray.training",
    "snapshot": "lkarray.training",
    "Taxonomy": "lkarray.analysis.hierarchy",
    "attribute_lift": "lkarray.analysis.hierarchy",
    "color_groups": "lkarray.analysis.hierarchy",
    "correlation_by_distance": "lkarray.analysis.hierarchy",
    "taxonomic_lift": "lkarray.analysis.hierarchy",
    "taxonomy_distance": "lkarray.analysis.hierarchy",
}

_MODULES = {
    "cluster": "lkarray.cluster",
    "plots": "lkarray.plots",
    "schedules": "lkarray.sampling.schedules",
}

__all__ = [
    "PRESETS",
    "SGHMC",
    "SGLD",
    "InformedLangevin",
    "Laplace",
    "LocalPosterior",
    "Outcome",
    "RMSpropSGLD",
    "Taxonomy",
    "__version__",
    "activation_overlap",
    "activations",
    "angle_distance",
    "at_equal_reliability",
    "attribute_lift",
    "audit",
    "audit_modes",
    "cancellation_ratio",
    "chord_distance",
    "cka",
    "cka_curve",
    "cluster",
    "color_groups",
    "completeness",
    "concentration",
    "correlation",
    "correlation_by_distance",
    "covariance",
    "diagnostics",
    "difficulty_table",
    "discard_gradients",
    "discard_trace",
    "eigh",
    "embed",
    "energy_rank",
    "errors",
    "extend_audit",
    "extrapolated",
    "feature_overlap",
    "frobenius",
    "from_devinterp",
    "gradient_factors",
    "gradient_features",
    "gradient_plan",
    "gradient_similarity",
    "gram",
    "gross_influence",
    "group_mean",
    "hidden_similarity",
    "histogram",
    "influence",
    "influence_functions",
    "influence_over_time",
    "ips",
    "ips_scores",
    "judge",
    "laplace",
    "ledoit_wolf",
    "lgk",
    "linear_operator",
    "llc",
    "lntk",
    "log_odds",
    "loss_gain",
    "loss_variance",
    "mcse",
    "mean_gradient",
    "mode_coefficients",
    "mode_sensitivity",
    "mode_shifts",
    "modes",
    "most_influential",
    "neighbors",
    "net_influence",
    "observe",
    "online_modes",
    "open",
    "open_trace",
    "parameter_modes",
    "params",
    "participation_ratio",
    "plan",
    "plgk",
    "plots",
    "pntk",
    "preset",
    "reconstruction",
    "record",
    "reliability",
    "repair",
    "residualize",
    "sample",
    "save",
    "schedules",
    "shift_modes",
    "similarity_by_distance",
    "singular_fluctuation",
    "snapshot",
    "subspace_overlap",
    "suggest",
    "svd",
    "taxonomic_lift",
    "taxonomy_distance",
    "temporal_kernel",
    "temporal_modes",
    "to_arviz",
    "tracin",
    "tracin_in_run",
    "trak",
    "unfold",
    "verify",
]

_accessor.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'lkarray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
