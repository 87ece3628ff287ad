"""Modes of a stream of gradients, by Oja's rule: frozen at each time, and followed to the next."""

from __future__ import annotations

import copy

import dask
import dask.array as da
import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, NATURAL, POSITIVE, checked
from lkarray.engine import Operand
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.schema import EXAMPLE, MODE, PARAM, TIME
from lkarray.tensors import Losses, as_gradients


class OjaModes:
    r"""The leading right singular directions of a stream of matrices, by Oja's rule (1989).

    Each batch :math:`\Phi` of n rows turns the directions :math:`v_k`, before they are made
    orthonormal again, by

    .. math:: v_k \leftarrow v_k + \frac{\gamma}{(1 - \gamma) \lambda_k} \Phi'\Phi v_k / n

    with the running energies :math:`\lambda_k`. So the step of each mode is in units of its own
    energy: no scale of the gradients needs to be known, weak modes converge as strong ones do,
    and after few batches, which count alike, :math:`\gamma` is the learning rate. (With this step
    it is the history PCA of Yang, Hsieh and Wang 2018.)

    Parameters
    ----------
    k
        Directions.
    learning_rate
        Weight of a batch against all before it, between 0 and 1.
    seed
        Of the directions that the first batch leaves open.

    Attributes
    ----------
    directions
        ``(param, k)``, orthonormal, by descending energy; ``None`` before the first batch.
    energies
        ``(k,)``, float64: running mean of the squared projection of a row on each.
    """

    def __init__(self, k: int, *, learning_rate: float = 0.1, seed: int = 0) -> None:
        if not 0 < learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1, not {learning_rate}")
        self.k, self.learning_rate, self.seed = k, learning_rate, seed
        self.directions: np.ndarray | None = None
        self.energies = np.zeros(k)
        self.batches = 0

    def update(self, batch: np.ndarray) -> None:
        """Turn the directions towards a batch, shape ``(rows, param)``."""
        self.batches += 1
        if self.directions is None:
            self._start(batch)
            return
        step = max(1 / self.batches, self.learning_rate)
        v = self.directions
        pull = batch.T @ ((batch @ v) * v.dtype.type(step / len(batch)))
        pull += v * ((1 - step) * self.energies).astype(v.dtype)
        self.directions, energies, _ = np.linalg.svd(pull, full_matrices=False)
        self.energies = energies.astype(np.float64)

    def _start(self, batch: np.ndarray) -> None:
        _, s, rows = np.linalg.svd(batch, full_matrices=False)
        rank = min(self.k, len(s))
        noise = np.random.default_rng(self.seed).standard_normal((batch.shape[1], self.k))
        basis = np.concatenate([rows[:rank].T, noise.astype(batch.dtype)], axis=1)
        self.directions = np.linalg.qr(basis[:, : self.k])[0]
        squares = s[:rank].astype(np.float64) ** 2 / len(batch)
        self.energies = np.concatenate([squares, np.zeros(self.k - rank)])

    def squares(self, batch: np.ndarray) -> np.ndarray:
        """Return the squared norms of a batch's projection, and of the batch."""
        if self.directions is None:
            return np.array([np.nan, np.nan])
        matrices = batch @ self.directions, batch
        return np.array([np.square(matrix, dtype=np.float64).sum() for matrix in matrices])

    def energy(self, batch: np.ndarray) -> float:
        """Return the share of a batch's norm that its projection holds; NaN of none.

        See Anonymous 2026, A.8.
        """
        return _share(self.squares(batch))


@checked(batch_size=COUNT, learning_rate=POSITIVE, seed=NATURAL)
def online_modes(
    G: Losses, k: int, *, learning_rate: float = 0.1, batch_size: int = 128, seed: int = 0
) -> xr.Dataset:
    r"""Return modes that follow the gradients through training, lazily.

    Parameters
    ----------
    G
        Gradients ``(time, example, param)``.
    k
        Modes.
    learning_rate
        Weight of a batch against all before it: batches count alike until there are
        ``1 / learning_rate`` of them, and from then on about as many are remembered.
    batch_size
        Examples of a batch, in their order; best whole chunks.
    seed
        Of the directions that the first batch leaves open.

    Returns
    -------
    xarray.Dataset
        ``direction(time, mode, param)``, orthonormal, as they are at the end of each time, the
        entry of each of largest magnitude positive; ``energy_captured(time)``, the share
        :math:`|V \Phi|_F / |\Phi|_F` of a time's gradients that the directions frozen at the
        time before hold; NaN at the first. Compute both at once.

    Raises
    ------
    SchemaError
        ``G`` lacks a dim, or has another.
    ValueError
        ``k`` is not between 1 and the number of parameters, or an option is out of range.
    NonFiniteError
        On computing: a gradient is NaN or infinite.

    Notes
    -----
    Times follow each other in a chain of tasks; ``6 T M P k`` operations, the data read once, a
    batch and two sets of directions (P k each) at a time; the result holds T of them.
    `mode_coefficients` projects on them; `lkarray.modes` and `parameter_modes` are exact.

    References
    ----------
    - Anonymous 2026, A.8: "Path-Integrated Loss-Gradient Kernels".
    - Oja 1989: "Neural networks, principal components, and subspaces", International Journal of
      Neural Systems 1.
    - Yang, Hsieh and Wang 2018: "History PCA: a new algorithm for streaming PCA", arXiv:1802.05447.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> followed = lk.online_modes(G, 1).compute()
    >>> followed["energy_captured"].values.round(4).tolist()
    [nan, 0.7568]
    """
    x = as_gradients(G, need=(TIME, EXAMPLE, PARAM))
    if x.ndim != 3:
        raise SchemaError(f"online_modes takes (time, example, param), not {x.dims}; select first")
    if not 1 <= k <= x.sizes[PARAM]:
        raise ValueError(f"k must be between 1 and {x.sizes[PARAM]}, the parameters, not {k}")
    read = Operand(x, over=(PARAM,), each=(TIME,), rows=EXAMPLE, center=None, cosine=False)
    source = dask.delayed(read, traverse=False)
    state = dask.delayed(OjaModes(k, learning_rate=learning_rate, seed=seed), traverse=False)
    follow, direction, energy = (dask.delayed(f) for f in (_follow, _directions, _last))
    directions, energies = [], []
    for t in range(x.sizes[TIME]):
        pair = follow(state, source, t, batch_size)
        state = pair[0]
        directions.append(da.from_delayed(direction(state), (k, x.sizes[PARAM]), read.dtype))
        energies.append(da.from_delayed(energy(pair), (), np.float64))
    return xr.Dataset(
        {
            "direction": ((TIME, MODE, PARAM), da.stack(directions)),
            "energy_captured": (TIME, da.stack(energies)),
        },
        coords=sample_coords(x, TIME) | sample_coords(x, PARAM) | {MODE: np.arange(k)},
        attrs={"learning_rate": learning_rate, "batch_size": batch_size, "seed": seed},
    )


def _follow(state: OjaModes, source: Operand, t: int, batch_size: int) -> tuple[OjaModes, float]:
    """Return the modes after one time, and the share of its energy that those before held."""
    frozen, state = state, copy.copy(state)
    whole = ((0, source.shape[0]),)
    squares = np.zeros(2)
    for start in range(0, source.n, batch_size):
        rows = slice(start, min(start + batch_size, source.n))
        # Each is read once: nothing to keep.
        batch = source.panel((t,), rows, (whole,), 0, 0).T
        squares += frozen.squares(batch)
        state.update(batch)
    return state, _share(squares)


def _share(squares: np.ndarray) -> float:
    inside, whole = squares.tolist()
    return float((inside / whole) ** 0.5) if whole > 0 else float("nan")


def _directions(state: OjaModes) -> np.ndarray:
    assert state.directions is not None
    v = state.directions
    top = np.take_along_axis(v, np.abs(v).argmax(0)[None], 0)
    return np.transpose(v * np.where(top < 0, -1, 1).astype(v.dtype))


def _last(pair: tuple[OjaModes, float]) -> np.ndarray:
    return np.asarray(pair[1])
