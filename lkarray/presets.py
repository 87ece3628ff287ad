"""Settings of the experiments of Adam et al. 2025a and 2025b, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lkarray.arguments import checked


@dataclass(frozen=True)
class Preset:
    """One row of a paper's table 1.

    Attributes
    ----------
    source
        Where it stands.
    nbeta, gamma
        Of the posterior; ``gamma`` is None where the paper varies it.
    step_size
        eps of SGLD.
    batch_size, chains, draws, burn_in
        As in `lkarray.sample`.
    """

    source: str
    nbeta: float
    gamma: float | None
    step_size: float
    batch_size: int
    chains: int
    draws: int
    burn_in: int

    @property
    def posterior(self) -> dict[str, Any]:
        """What `lkarray.LocalPosterior` takes: ``LocalPosterior(model, data, **p.posterior)``.

        Raises
        ------
        ValueError
            The paper varies gamma: give one.
        """
        if self.gamma is None:
            raise ValueError(
                f"{self.source} varies gamma; pass one, with nbeta={self.nbeta:g}, yourself"
            )
        return {"nbeta": self.nbeta, "gamma": self.gamma}

    @property
    def sampling(self) -> dict[str, Any]:
        """What `lkarray.sample` takes: ``sample(posterior, observed, store=..., **p.sampling)``."""
        from lkarray.sampling import SGLD

        return {
            "sampler": SGLD(step_size=self.step_size),
            "batch_size": self.batch_size,
            "chains": self.chains,
            "draws": self.draws,
            "burn_in": self.burn_in,
        }


_KERNEL, _PROBES = "loss-kernel, table 1", "Bayesian probes, table 1"

#: By paper and experiment.
PRESETS = {
    "loss-kernel/modular-arithmetic": Preset(
        f"{_KERNEL} (section 3)", 500, 30_000, 2e-7, 512, 30, 800, 200
    ),
    "loss-kernel/imagenet": Preset(f"{_KERNEL} (section 4)", 20, 4_000, 5e-5, 256, 15, 500, 100),
    "loss-kernel/imagenet-mislabeled": Preset(
        f"{_KERNEL} (appendix D.4)", 20, 4_000, 1e-5, 256, 8, 1000, 100
    ),
    "loss-kernel/imagenet-gamma-sweep": Preset(
        f"{_KERNEL} (appendix D.3)", 20, None, 1e-4, 256, 5, 1200, 2000
    ),
    "bayesian-probes/mnist": Preset(f"{_PROBES} (MNIST)", 10, 30, 5e-3, 64, 5, 500, 10),
    "bayesian-probes/mnist-mislabeled": Preset(
        f"{_PROBES} (mislabeled MNIST)", 10, 30, 5e-3, 64, 1, 500, 100
    ),
    "bayesian-probes/imagenet": Preset(f"{_PROBES} (ImageNet)", 10, 1_000, 1e-4, 64, 30, 1000, 100),
}


@checked()
def preset(name: str) -> Preset:
    """Return the settings of a paper's experiment.

    Parameters
    ----------
    name
        One of `PRESETS`, for example ``"loss-kernel/imagenet"``.

    Returns
    -------
    Preset
        ``posterior``, what `lkarray.LocalPosterior` takes, and ``sampling``, what
        `lkarray.sample` takes, as dicts; and each setting by its name.

    Raises
    ------
    ValueError
        There is none of that name; the message lists them.

    Examples
    --------
    >>> import lkarray as lk
    >>> lk.preset("loss-kernel/imagenet").posterior
    {'nbeta': 20, 'gamma': 4000}
    """
    if name not in PRESETS:
        raise ValueError(f"name: there is no preset {name!r}; choose from {sorted(PRESETS)}")
    return PRESETS[name]
