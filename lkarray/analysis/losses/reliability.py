"""How far a kernel would agree with one from other draws, and comparisons where that is equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import xarray as xr

from lkarray.arguments import COUNT, NATURAL, REPEATS, SHARE, checked
from lkarray.engine import Operand, as_device
from lkarray.engine.blocks import squares, sums
from lkarray.engine.devices import Device, made_on
from lkarray.engine.passes import Passes, gram_step
from lkarray.engine.strips import make_strips
from lkarray.engine.tasks import Key
from lkarray.kernels.operands import CENTERS, degrees_of_freedom, free_dim
from lkarray.schema import CHAIN, DRAW, POSTERIOR
from lkarray.tensors import Losses, as_losses
from lkarray.values import one_of
from lkarray.waiting import computed, workers_awaited

Statistic = Callable[[xr.DataArray], Any]


@checked(splits=COUNT, seed=NATURAL)
def reliability(
    losses: Losses,
    *,
    splits: int = 10,
    center: str = "pooled",
    seed: int = 0,
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return how reliable the correlation kernel is, from all its draws, lazily.

    The correlation, over pairs of samples, of R with R from as many other draws. Of two halves of
    the chains it is measured, r, and stepped up to all draws (Spearman 1910, and Brown):

    .. math:: \rho = f r / (1 + (f - 1) r), \quad f = C / \lfloor C / 2 \rfloor

    Its root bounds how far R can correlate with anything noise-free.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``: n samples, S draws.
    splits
        Divisions of the chains into halves whose r is averaged: all that there are, where they
        are fewer (3 of 4 chains, 10 of 6), else as many at random. A lone chain has one division,
        into its first and its second half, which autocorrelation makes too much alike.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``, as for `covariance`, of each half.
    seed
        Of the random divisions.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `gram`.

    Returns
    -------
    xarray.DataArray
        ``reliability``, 0-d float64: 1 is free of noise, 0 is noise. NaN where R does not vary over
        pairs. The coordinate ``halves`` is r; attributes: ``splits``, and ``halves_of``,
        ``"chains"`` or ``"draws"``.

    Raises
    ------
    ValueError
        Halves have too few draws to centre.
    SchemaError
        Dims are missing.

    Notes
    -----
    One pass over the data and about ``3 n S**2 / 2`` operations a split (n x n kernels instead,
    where n is less than the draws of a half). Samples whose losses do not vary do not count.

    References
    ----------
    - Spearman 1910: "Correlation calculated from faulty data",
      doi:10.1111/j.2044-8295.1910.tb00206.x.
    - docs/methods/uncertainty.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> rng = np.random.default_rng(0)
    >>> signal = rng.normal(size=(4, 100, 3)) @ rng.normal(size=(3, 20))
    >>> losses = xr.DataArray(signal, dims=("chain", "draw", "sample"))
    >>> bool(lk.reliability(losses) > 0.95)
    True
    """
    x = as_losses(losses)
    rows = free_dim(x, "losses", POSTERIOR, ())
    one_of("center", center, CENTERS)
    place = as_device(device, device_memory)
    divided, kind = divisions(x, splits, seed)
    made = [_agreement(pair, rows, center, memory, place) for pair in divided]
    passes = Passes("reliability", *(keys for keys, _ in made))
    blocks = [passes.block(data, (0,)) for _, data in made]
    factor = 2.0 if kind == "draws" else x.sizes[CHAIN] / (x.sizes[CHAIN] // 2)
    whole = passes.array([passes.then(_stepped_up, blocks, factor)], (2,), np.float64)
    about = {"over": list(POSTERIOR), "center": center, "splits": len(divided), "halves_of": kind}
    return xr.DataArray(
        whole[1],
        coords={"halves": ((), whole[0])},
        name="reliability",
        attrs=about | made_on(place, np.result_type(x.dtype, np.float32)),
    )


def divisions(
    x: xr.DataArray, splits: int, seed: int
) -> tuple[list[tuple[xr.DataArray, xr.DataArray]], str]:
    """Return pairs of disjoint halves of the chains, equally large; or of a lone chain's draws."""
    chains = x.sizes[CHAIN]
    if chains == 1:
        half = x.sizes[DRAW] // 2
        first, second = slice(0, half), slice(half, 2 * half)
        return [(x.isel({DRAW: first}), x.isel({DRAW: second}))], "draws"
    half = chains // 2
    # An odd chain is left out in turn; the first of the others is always in the first half.
    number = comb(chains - chains % 2, half) // 2 * (chains if chains % 2 else 1)
    chosen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    if number <= splits:
        for used in combinations(range(chains), 2 * half):
            for rest in combinations(used[1:], half - 1):
                one = (used[0], *rest)
                chosen.append((one, tuple(c for c in used if c not in one)))
    else:
        rng = np.random.default_rng(seed)
        known = set()
        while len(chosen) < splits:
            order = rng.permutation(chains)[: 2 * half].tolist()
            pair = sorted((tuple(sorted(order[:half])), tuple(sorted(order[half:]))))
            if str(pair) not in known:
                known.add(str(pair))
                chosen.append((pair[0], pair[1]))
    parts = [tuple(x.isel({CHAIN: list(half)}) for half in pair) for pair in chosen]
    return [(one, two) for one, two in parts], "chains"


def _agreement(
    pair: tuple[xr.DataArray, xr.DataArray],
    rows: str,
    center: str,
    memory: int | str | None,
    place: Device | None,
) -> tuple[list[str], Any]:
    """Return the correlation over pairs of samples of R from two sets of draws, ``(1,)``, lazy."""
    operands = []
    for x in pair:
        degrees_of_freedom(x, POSTERIOR, center)
        operands.append(Operand(x, over=POSTERIOR, each=(), rows=rows, center=center, cosine=True))
    n, draws = operands[0].n, int(np.prod(operands[0].shape))
    passes = Passes("agreement", operands, memory, place)
    if n >= draws:  # then Grams of the draws are smaller than the kernels
        held = 3 * 12 * draws**2
        needs = {"held": held, "alone": 2 * held}
        strips = make_strips(*operands, memory=memory, rows=True, needs=needs, device=place)
        total: Key = passes.then(_of_grams, passes.total(strips, _grams))
    else:
        kernels = []
        for operand in operands:
            needs = {"held": 12 * n * n, "kept": 16 * n * n, "alone": 32 * n * n}
            strips = make_strips(operand, memory=memory, rows=False, needs=needs, device=place)
            kernels.append(passes.total(strips, gram_step))
        total = passes.then(_of_kernels, kernels)
    data = passes.array([total], (1,), np.float64)
    return [operand.token for operand in operands], data


def _grams(blocks: tuple[Any, ...], span: slice) -> tuple[Any, ...]:
    """Return what the sums of squares and products of two kernels follow from."""
    a, b = blocks  # each (draws, samples of the strip)
    own = [squares(side, 0) for side in (a, b)]  # 1, or 0 where a sample's losses do not vary
    counts = np.array([own[0] @ own[1], own[0] @ own[0], own[1] @ own[1], *map(np.sum, own)])
    return a @ b.T, a @ a.T, b @ b.T, sums(a, 1), sums(b, 1), counts


def _of_grams(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    both, one, two, first, second, counts = parts
    products = [(gram**2).sum() - own for gram, own in zip((both, one, two), counts, strict=False)]
    means = [side @ side - own for side, own in zip((first, second), counts[3:], strict=True)]
    return _correlation(products, means, counts[0] * (counts[0] - 1))


def _of_kernels(kernels: list[np.ndarray]) -> np.ndarray:
    varies = (np.diagonal(kernels[0]) > 0.5) & (np.diagonal(kernels[1]) > 0.5)
    off = ~np.eye(int(varies.sum()), dtype=bool)
    a, b = (kernel[np.ix_(varies, varies)][off] for kernel in kernels)
    return _correlation([a @ b, a @ a, b @ b], [a.sum(), b.sum()], len(a))


def _correlation(products: list[float], means: list[float], pairs: float) -> np.ndarray:
    """Return Pearson's correlation from sums over ordered pairs: of a b, a a and b b; a and b."""
    if pairs < 2:
        return np.full(1, np.nan)
    cross = products[0] - means[0] * means[1] / pairs
    own = [square - mean**2 / pairs for square, mean in zip(products[1:], means, strict=True)]
    if min(own) <= 1e-12 * pairs:
        return np.full(1, np.nan)
    return np.full(1, cross / np.sqrt(own[0] * own[1]))


def _stepped_up(agreements: list[np.ndarray], factor: float) -> np.ndarray:
    """Return the mean agreement of halves, and by Spearman and Brown that of all draws."""
    r = float(np.mean(agreements))
    return np.array([r, spearman_brown(r, factor)])


def spearman_brown(r: float, factor: float) -> float:
    """Return the reliability of ``factor`` times the draws."""
    below = 1 + (factor - 1) * r
    return factor * r / below if below > 0 else np.nan


@workers_awaited("computed")
@checked(losses=None, splits=COUNT, stretches=REPEATS, seed=NATURAL, level=SHARE)
def at_equal_reliability(
    losses: Mapping[str, Losses],
    statistic: Statistic,
    *,
    target: float | None = None,
    stretches: int = 4,
    splits: int = 10,
    level: float = 0.95,
    seed: int = 0,
    memory: int | str | None = None,
) -> xr.Dataset:
    r"""Return a statistic of several kernels at one reliability, so that noise is no difference.

    Lifts, shares of neighbours and means over classes depend on how noisy a kernel is: a number
    that rises with gamma, or over training, may only say that draws were worth more there. Each
    kernel is taken from so much of its draws that its `reliability` is that of the least reliable
    one: a stretch of the share

    .. math:: \phi = \rho^* (1 - \rho) / (\rho (1 - \rho^*))

    of every chain (Spearman and Brown solved for the draws); a stretch rather than every other
    draw, since neighbouring draws repeat each other.

    Parameters
    ----------
    losses
        Loss tensors ``(chain, draw, sample)`` by name.
    statistic
        Takes such a tensor, gives a number: ``lambda x: lk.taxonomic_lift(x, tree,
        delete_chains=False)["pooled_lift"].sel(depth=4)``.
    target
        The reliability to compare at, between 0 and the least there is; by default that.
    stretches
        Places along the chains at which a shortened kernel is taken; their mean counts.
    splits, seed, memory
        As for `reliability`.
    level
        Of the intervals.

    Returns
    -------
    xarray.Dataset
        Computed, over ``kernel``: ``value``; ``standard_error``, from leaving chains out one at a
        time (NaN below three chains), and its interval ``low``, ``high`` of Student's t;
        ``plain``, the statistic of all draws; ``reliability`` of all draws, ``reached``, that of
        the stretches (their mean), which says whether the thinning did what it should; and
        ``share``, of the draws that were used. The attribute ``target``.

    Raises
    ------
    TypeError
        ``statistic`` is no function.
    ValueError
        It fails or gives no number, there are no kernels, ``target`` cannot be reached, or a
        kernel is nothing but noise (reliability of 0 or less).

    Notes
    -----
    Costs ``stretches (C + 1)`` evaluations of the statistic a kernel of C chains, and
    ``stretches + 1`` reliabilities.

    References
    ----------
    - Spearman 1910: "Correlation calculated from faulty data",
      doi:10.1111/j.2044-8295.1910.tb00206.x.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(4, 200, 3)) @ rng.normal(size=(3, 20))
    >>> kernels = {
    ...     str(noise): xr.DataArray(
    ...         shared + noise * rng.normal(size=shared.shape), dims=("chain", "draw", "sample")
    ...     )
    ...     for noise in (1, 4)
    ... }
    >>> near = lambda x: lk.neighbors(x, 1)["similarity"].mean()
    >>> fair = lk.at_equal_reliability(kernels, near)
    >>> float(fair["share"][1]), bool(fair["share"][0] < 0.5)
    (1.0, True)
    """
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError("losses must be a mapping from names to loss tensors, with one at least")
    if not callable(statistic):
        raise TypeError(f"statistic must be a function of losses, not {type(statistic).__name__}")
    tensors = {str(name): as_losses(x, name=f"losses[{name!r}]") for name, x in losses.items()}
    options: dict[str, Any] = {"splits": splits, "seed": seed, "memory": memory}
    whole = {name: float(computed(reliability(x, **options))) for name, x in tensors.items()}
    poor = {name: round(rho, 3) for name, rho in whole.items() if not rho > 0}
    if poor:
        raise ValueError(
            f"no draws are few enough to compare with noise: reliability is {poor}; take more "
            "draws there, or leave these kernels out"
        )
    least = min(whole.values())
    target = least if target is None else float(target)
    if not 0 < target <= least:
        raise ValueError(
            f"target must lie between 0 and {least:.3g}, the least reliability there is, not "
            f"{target}"
        )
    rows = {
        name: _shortened(x, statistic, _share(whole[name], target), stretches, level, options)
        for name, x in tensors.items()
    }
    columns = {key: [row[key] for row in rows.values()] for key in next(iter(rows.values()))}
    columns["reliability"] = list(whole.values())
    return xr.Dataset(
        {name: ("kernel", np.asarray(values, float)) for name, values in columns.items()},
        coords={"kernel": list(tensors)},
        attrs={"target": target, "stretches": stretches, "level": level, "seed": seed},
    )


def evaluated(statistic: Statistic, x: xr.DataArray) -> float:
    """Return what a statistic gives of losses; raise where that is no number."""
    try:
        return float(computed(xr.DataArray(statistic(x))))
    except Exception as error:
        raise ValueError(
            f"statistic fails on losses {dict(x.sizes)}, or gives no number "
            f"({type(error).__name__}: {error}); it takes losses and gives one number, such as "
            'lambda x: lk.neighbors(x, 10)["similarity"].mean()'
        ) from error


def _share(rho: float, target: float) -> float:
    if rho >= 1 or target >= rho:
        return 1.0
    return target * (1 - rho) / (rho * (1 - target))


def _shortened(
    x: xr.DataArray,
    statistic: Statistic,
    share: float,
    stretches: int,
    level: float,
    options: dict[str, Any],
) -> dict[str, float]:
    """Return a row of the table: the statistic of stretches of the draws, and its error."""
    from scipy.stats import t

    draws, chains = x.sizes[DRAW], x.sizes[CHAIN]
    length = min(max(round(share * draws), 2), draws)
    starts = np.unique(np.linspace(0, draws - length, stretches).round().astype(int)).tolist()
    parts = [x.isel({DRAW: slice(start, start + length)}) for start in starts]

    def mean(of: list[xr.DataArray]) -> float:
        return float(np.mean([evaluated(statistic, part) for part in of]))

    value, error = mean(parts), np.nan
    if chains > 2:
        left = [
            mean([part.isel({CHAIN: [c for c in range(chains) if c != gone]}) for part in parts])
            for gone in range(chains)
        ]
        error = float(np.sqrt((chains - 1) * np.var(left)))
    half = float(t.ppf(0.5 + level / 2, max(chains - 1, 1))) * error
    reached = [float(computed(reliability(part, **options))) for part in parts]
    return {
        "value": value,
        "standard_error": error,
        "low": value - half,
        "high": value + half,
        "plain": value if length == draws else mean([x]),
        "reached": float(np.mean(reached)),
        "share": length / draws,
    }
