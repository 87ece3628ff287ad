"""``x.lk.correlation()``: the public functions of labelled data as methods, and nothing more."""

from __future__ import annotations

from typing import Any

import xarray as xr

from lkarray import kernels
from lkarray.analysis import audits, gradients, losses
from lkarray.results import Result
from lkarray.tensors import Losses, as_losses, contracted


class LossMethods:
    """The functions of lkarray that take losses."""

    _losses: Losses

    def covariance(self, y: Losses | None = None, **options: Any) -> xr.DataArray:
        """See `lkarray.covariance`."""
        return losses.covariance(self._losses, y, **options)

    def correlation(self, y: Losses | None = None, **options: Any) -> xr.DataArray:
        """See `lkarray.correlation`."""
        return losses.correlation(self._losses, y, **options)

    def influence(self, query: Losses, **options: Any) -> xr.DataArray:
        """See `lkarray.influence`."""
        return losses.influence(self._losses, query, **options)

    def neighbors(self, k: int = 30, **options: Any) -> xr.Dataset:
        """See `lkarray.neighbors`."""
        return kernels.neighbors(self._losses, k, **options)

    def svd(self, k: int, **options: Any) -> xr.Dataset:
        """See `lkarray.svd`; ``over`` is ``("chain", "draw")``, or ``"mode"`` of features."""
        x = as_losses(self._losses, features=True)
        return kernels.svd(x, k, **({"over": contracted(x)} | options))

    def cka(self, other: Losses, **options: Any) -> xr.DataArray:
        """See `lkarray.cka`."""
        return kernels.cka(self._losses, other, **options)

    def group_mean(self, groups: Any, **options: Any) -> xr.DataArray:
        """See `lkarray.group_mean`."""
        return kernels.group_mean(self._losses, groups, **options)

    def residualize(self, groups: Any = "label") -> xr.DataArray:
        """See `lkarray.residualize`."""
        return losses.residualize(self._losses, groups)

    def taxonomic_lift(self, taxonomy: Any, label: str = "label", **options: Any) -> xr.Dataset:
        """See `lkarray.taxonomic_lift`; ``k=`` neighbours of other labels are searched."""
        from lkarray.analysis.hierarchy import taxonomic_lift

        return taxonomic_lift(self._losses, taxonomy, label, **options)

    def correlation_by_distance(
        self, taxonomy: Any, label: str = "label", **options: Any
    ) -> xr.Dataset:
        """See `lkarray.correlation_by_distance`."""
        from lkarray.analysis.hierarchy import correlation_by_distance

        return correlation_by_distance(self._losses, taxonomy, label, **options)

    def loss_gain(self) -> xr.DataArray:
        """See `lkarray.loss_gain`."""
        return losses.loss_gain(self._losses)

    def loss_variance(self) -> xr.DataArray:
        """See `lkarray.loss_variance`."""
        return losses.loss_variance(self._losses)

    def singular_fluctuation(self, **options: Any) -> xr.DataArray:
        """See `lkarray.singular_fluctuation`."""
        return losses.singular_fluctuation(self._losses, **options)

    def diagnostics(self, **options: Any) -> xr.Dataset:
        """See `lkarray.diagnostics`."""
        return losses.diagnostics(self._losses, **options)

    def log_odds(self) -> xr.Dataset:
        """See `lkarray.log_odds`."""
        return losses.log_odds(self._losses)

    def judge(self, **options: Any) -> Losses:
        """See `lkarray.judge`."""
        return losses.judge(self._losses, **options)

    def reliability(self, **options: Any) -> xr.DataArray:
        """See `lkarray.reliability`."""
        return losses.reliability(self._losses, **options)

    def llc(self, **options: Any) -> xr.DataArray:
        """See `lkarray.llc`."""
        return losses.llc(self._losses, **options)


class GradientMethods:
    """The functions of lkarray that take gradients."""

    _gradients: Losses

    def lgk(self, y: Losses | None = None, **options: Any) -> xr.DataArray:
        """See `lkarray.lgk`."""
        return gradients.lgk(self._gradients, y, **options)

    def plgk(self, y: Losses | None = None, **options: Any) -> xr.DataArray:
        """See `lkarray.plgk`."""
        return gradients.plgk(self._gradients, y, **options)

    def ips(self, y: Losses | None = None, **options: Any) -> xr.DataArray:
        """See `lkarray.ips`."""
        return gradients.ips(self._gradients, y, **options)

    def temporal_kernel(self, **options: Any) -> xr.DataArray:
        """See `lkarray.temporal_kernel`."""
        return gradients.temporal_kernel(self._gradients, **options)

    def modes(self, k: int, **options: Any) -> xr.Dataset:
        """See `lkarray.modes`."""
        return gradients.modes(self._gradients, k, **options)

    def params(self, pattern: Any) -> xr.Dataset:
        """See `lkarray.params`."""
        return kernels.params(self._gradients, pattern)


class AuditMethods:
    """The functions of lkarray that take an audit, or its influence."""

    _audit: Result

    def completeness(self) -> xr.Dataset:
        """See `lkarray.completeness`."""
        return audits.completeness(self._audit)

    def most_influential(self, k: int = 25, **options: Any) -> xr.Dataset:
        """See `lkarray.most_influential`."""
        return audits.most_influential(self._audit, k, **options)

    def concentration(self) -> xr.DataArray:
        """See `lkarray.concentration`."""
        return audits.concentration(self._audit)

    def net_influence(self, **options: Any) -> xr.DataArray:
        """See `lkarray.net_influence`."""
        return audits.net_influence(self._audit, **options)

    def gross_influence(self, **options: Any) -> xr.DataArray:
        """See `lkarray.gross_influence`."""
        return audits.gross_influence(self._audit, **options)


class Accessor(LossMethods, GradientMethods, AuditMethods):
    """``.lk`` of a DataTree, a Dataset and a DataArray, whichever of the three it holds.

    Each method is the function of the same name with this object as its first argument.
    """

    def __init__(self, held: xr.DataTree | xr.Dataset | xr.DataArray) -> None:
        # What it is shows when a function is asked of it: a tree may hold losses and an audit.
        self._losses = self._gradients = self._audit = held


def register() -> None:
    """Register the accessor on the three xarray types, once."""
    pairs = (
        (xr.DataArray, xr.register_dataarray_accessor),
        (xr.Dataset, xr.register_dataset_accessor),
        (xr.DataTree, xr.register_datatree_accessor),
    )
    for kind, decorate in pairs:
        if not hasattr(kind, "lk"):
            decorate("lk")(Accessor)
