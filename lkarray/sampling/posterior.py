"""The local posterior around a trained model (Adam et al. 2025a, section 2.2)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lkarray.arguments import NATURAL
from lkarray.nn.batches import MapDataset
from lkarray.nn.copying import refuse_uncopyable
from lkarray.nn.losses import LossFunction, per_example_loss
from lkarray.nn.modes import gradients_on
from lkarray.nn.trainable import moving_names
from lkarray.nn.weights import with_weights


class LocalPosterior:
    r"""The Gibbs posterior of a model's weights, localised at its trained weights w*.

    .. math:: p(w) \propto \exp\big(-n\beta\, L_n(w) - \tfrac{\gamma}{2} \|w - w^*\|^2\big)

    with :math:`L_n` the mean per-example loss over the training set (Adam et al. 2025a, section
    2.2; Adam et al. 2025b, eq. 1).

    Parameters
    ----------
    model
        Any trained module; its present weights are w*. It is never changed. One in bfloat16 or
        float16 is sampled in a float32 copy.
    train_set
        Map-style dataset of what the loss is averaged over: of ``(input, target)``; of dicts,
        with which the model is called by keyword, and whose ``labels`` are the target (the whole
        dict is, where there are none); or of tensors, each its own target.
    loss
        ``"cross_entropy"``, ``"binary_cross_entropy"`` (of one logit, with targets 0 and 1),
        ``"mse"``, ``"next_token"`` (of each token: ``loss(chain, draw, sample, token)``),
        ``"next_token_mean"`` (its mean over each sequence), or a callable
        ``(model_output, target) -> (batch,)``. Outputs with ``logits``, as Hugging Face's, need
        no adapter. Steps descend the mean over examples of each one's mean loss. What does not
        count is left out of that: targets of -100 (of positions too), and tokens under an
        attention mask of 0. The loss of such a token is NaN, which ``loss.mean("token")`` leaves
        out; for kernels of tokens, ``loss.stack(position=("sample", "token"))
        .reset_index("position").dropna("position")``, lazy but for one look at what is NaN. An
        example of which nothing counts has no loss, and is refused with its index.
    nbeta
        n times the inverse temperature beta of the papers: multiplies the *mean* loss.
    gamma
        Localisation strength, the precision of the Gaussian around w*.
    trainable
        Names or patterns of the parameters that move (``"blocks.1.*"``), or parts of tensors
        (``"attn.weight[0:32, :]"``, one head): the refined probe. ``None`` moves all that
        require grad.

    Raises
    ------
    TypeError
        ``model`` is no module, or ``loss`` neither a name nor a callable.
    ValueError
        ``nbeta`` or ``gamma`` is negative, both are zero, the loss is unknown, no parameter
        moves, or the module holds something that cannot be copied.
    NonFiniteError
        A weight is NaN or infinite.

    References
    ----------
    - Adam et al. 2025a, section 2.2: "The Loss Kernel", arXiv:2509.26537.
    - Adam et al. 2025b, eq. 1: "Studying Data Complexity ... with Bayesian Probes".
    - docs/methods/laplace.md.

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> posterior = lk.LocalPosterior(model, data, nbeta=10.0, gamma=100.0)
    >>> posterior.nbeta, posterior.gamma
    (10.0, 100.0)
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: MapDataset,
        loss: str | LossFunction = "cross_entropy",
        nbeta: float = 20.0,
        gamma: float = 4000.0,
        trainable: str | Iterable[str] | None = None,
    ) -> None:
        self._set(nbeta, gamma)
        self.trainable = moving_names(model, trainable)
        refuse_uncopyable(model)
        self.model = model
        self.train_set = train_set
        self.loss = per_example_loss(loss)

    def tempered(self, *, nbeta: float | None = None, gamma: float | None = None) -> LocalPosterior:
        """Return the same posterior with another nbeta or gamma."""
        other = copy.copy(self)
        other._set(self.nbeta if nbeta is None else nbeta, self.gamma if gamma is None else gamma)
        return other

    def _set(self, nbeta: float, gamma: float) -> None:
        nbeta = NATURAL.check_float("nbeta", nbeta)
        gamma = NATURAL.check_float("gamma", gamma)
        if nbeta == 0 and gamma == 0:
            raise ValueError("nbeta and gamma are both 0, which leaves nothing to sample from")
        self.nbeta, self.gamma = nbeta, gamma

    def moving(self, trainable: str | Iterable[str]) -> LocalPosterior:
        """Return the same posterior with other parameters moving."""
        return self._with(self.model, trainable)

    def at(
        self, weights: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
    ) -> LocalPosterior:
        """Return the same posterior around other weights.

        Parameters
        ----------
        weights
            A module of the same kind, a state dict, or a file that holds one (read with
            ``weights_only=True``).

        Raises
        ------
        ValueError
            The file is none that holds a state dict, or that does not fit the model.
        """
        if isinstance(weights, nn.Module):
            return self._with(weights, self.trainable)
        with gradients_on():
            return self._with(with_weights(self.model, weights), self.trainable)

    def _with(self, model: nn.Module, trainable: str | Iterable[str]) -> LocalPosterior:
        other = copy.copy(self)
        other.model, other.trainable = model, moving_names(model, trainable)
        return other

    def __repr__(self) -> str:
        return (
            f"LocalPosterior({type(self.model).__name__}, loss={self.loss.name!r}, "
            f"nbeta={self.nbeta:g}, gamma={self.gamma:g}, tensors={len(self.trainable)})"
        )
