"""The local posterior around a trained model (loss-kernel section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lkarray.nn.batches import MapDataset
from lkarray.nn.flat import moving_parameters
from lkarray.nn.losses import per_example_loss


class LocalPosterior:
    r"""The Gibbs posterior of a model's weights, localised at its trained weights w*.

    .. math:: p(w) \propto \exp\big(-n\beta\, L_n(w) - \tfrac{\gamma}{2} \|w - w^*\|^2\big)

    with :math:`L_n` the mean per-example loss over the training set (loss-kernel section 2.2;
    Bayesian-probes eq. 1).

    Parameters
    ----------
    model
        Any trained module; its present weights are w*. It is never changed.
    train_set
        Map-style dataset of ``(input, target)``: what the loss is averaged over.
    loss
        ``"cross_entropy"``, ``"mse"``, or a callable ``(output, target) -> (batch,)``.
    nbeta
        n times the inverse temperature beta of the papers: multiplies the *mean* loss.
    gamma
        Localisation strength, the precision of the Gaussian around w*.
    trainable
        Names or patterns of the parameters that move; ``None`` moves all that require grad.

    Raises
    ------
    TypeError
        ``model`` is no module, or ``loss`` neither a name nor a callable.
    ValueError
        ``nbeta`` or ``gamma`` is negative, both are zero, the loss is unknown, or no
        parameter moves.
    NonFiniteError
        A weight is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: MapDataset,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        nbeta: float = 20.0,
        gamma: float = 4000.0,
        trainable: str | Iterable[str] | None = None,
    ) -> None:
        for name, value in {"nbeta": nbeta, "gamma": gamma}.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
        if nbeta == 0 and gamma == 0:
            raise ValueError("nbeta and gamma are both 0, which leaves nothing to sample from")
        self.trainable = moving_parameters(model, trainable)
        self.model = model
        self.train_set = train_set
        self.loss = per_example_loss(loss)
        self.nbeta = float(nbeta)
        self.gamma = float(gamma)

    def __repr__(self) -> str:
        return (
            f"LocalPosterior({type(self.model).__name__}, loss={self.loss.name!r}, "
            f"nbeta={self.nbeta:g}, gamma={self.gamma:g}, tensors={len(self.trainable)})"
        )
