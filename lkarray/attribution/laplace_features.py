"""`laplace`: features whose inner products are the loss kernel of a Gaussian posterior."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from zarr.storage import MemoryStore

from lkarray import progress as bars
from lkarray import store as stores
from lkarray.arguments import NATURAL, Limits, checked
from lkarray.attribution.feature_maker import FeatureMaker, Sketch, gradient_batch, moving
from lkarray.attribution.feature_request import FeatureRequest
from lkarray.attribution.outcome_scalars import OUTCOMES, outcome_scalars
from lkarray.engine.plan import memory_budget
from lkarray.errors import FingerprintError
from lkarray.labels import given_coords
from lkarray.nn import Batches, FlatModel
from lkarray.nn.batches import MapDataset, check_dataset, check_workers
from lkarray.sampling.devices import choose_device, numerics
from lkarray.sampling.laplace_law import LaplaceLaw, laplace_law
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.stacking import evaluation_rows
from lkarray.store.features import (
    GROUP,
    FeatureLayout,
    FeatureWriter,
    open_features,
    stored_features,
    whole,
)
from lkarray.store.location import StoreLike
from lkarray.store.nodes import group_at
from lkarray.store.seals import described
from lkarray.values import one_of

_COMMIT_SECONDS = 30.0
_COMPARED = 256  # samples of which halves are compared


@checked(rank=NATURAL, step_size=NATURAL, smooth=Limits(least=0, most=100_000), seed=NATURAL)
def laplace(
    posterior: LocalPosterior,
    observed: MapDataset,
    *,
    outcome: str = "log_odds",
    rank: int = 100,
    step_size: float = 0.0,
    sketch: int | None = 65_536,
    smooth: int = 0,
    seed: int = 0,
    coords: Mapping[str, Any] | None = None,
    store: StoreLike | None = None,
    memory: int | str | None = None,
    device: torch.device | str | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Return features of inputs whose kernel is the loss kernel of the posterior's Gaussian limit.

    .. math:: \phi_i = \Sigma^{1/2} g_i, \quad \Sigma = (n\beta H + \gamma)^{-1}

    with :math:`g_i` the gradient of input i's outcome at w*, and H the Gauss-Newton matrix of the
    mean training loss, of which the leading eigenpairs are kept. No chain is run: one backward pass
    an input stands for all draws. ``lk.correlation(features)`` is the loss correlation kernel to
    first order in the width of the posterior, of the loss and of any smooth function of it; and
    ``covariance``, ``neighbors``, ``save``, ``svd``, ``cka``, ``group_mean``, ``histogram`` and
    ``taxonomic_lift`` take features wherever they take losses. They are not centred, and nothing
    is divided by their number.

    Parameters
    ----------
    posterior
        The model at w*, its training set, nbeta and gamma.
    observed
        Map-style dataset: n samples.
    outcome
        What is differentiated: ``"log_odds"`` against the target (of cross-entropy, and of next
        tokens their mean over each sequence), ``"residual"`` (of squared error of one output), or
        ``"loss"``. Kernels R do not depend on it; covariances have its scale.
    rank
        Eigenpairs of the curvature; fewer where the data give no more. 0 takes ``Sigma = I /
        gamma``, and reads no training data.
    step_size
        eps: 0 is the posterior's own law, another the stationary law of SGLD with this step size,
        which the predictions of ``lk.sample(..., control=...)`` have.
    sketch
        Numbers to which features of P parameters are count-sketched. They are kept whole where P is
        no larger, where all n of them fit into ``memory``, or for ``None``. A store that was begun
        keeps to what was chosen there.
    smooth
        Average gradients over this many draws of ``N(w*, Sigma)``, two or more; 0 takes them at w*.
        It may grow from call to call with the same store, and no draw is done again.
    seed
        Of the sketch, of the draws, and of the curvature's block.
    coords
        Labels of the samples, as for `lkarray.sample`.
    store
        Where features are written, block of samples by block; ``None`` keeps them in memory. A
        run that was killed goes on, and gives the same numbers.
    memory
        Byte budget; ``LKARRAY_MEMORY`` or a quarter of the memory by default.
    device
        Where gradients are taken; ``None`` takes CUDA where there is one.
    num_workers
        Processes that read the data sets' items, as for `lkarray.sample`.
    progress
        Whether to show progress bars.

    Returns
    -------
    xarray.Dataset
        ``feature(mode, sample)``, lazy, with the samples' labels. With ``smooth``, the mean over
        draws, and ``feature_half(half, mode, sample)``, the means over even and over odd draws:
        products of the two, ``lk.covariance(h.isel(half=0), h.isel(half=1))``, have no noise of
        draws in common, while the kernel of the mean has a bias of order ``1 / smooth``.
        Attributes: ``rank`` and the share of the curvature's trace in it, ``captured``; the largest
        ``|H v - h v|`` over h, ``residual``; ``sketch`` (``"none"`` where features are exact);
        ``draws``; and of smoothed ones ``halves_agree``, the correlation over pairs of R from
        either half (of up to 256 samples), and ``reliability``, that of the whole (Spearman-Brown).

    Raises
    ------
    ValueError, TypeError
        An argument is bad, the loss has no such outcome, or gamma is 0.
    NonFiniteError
        A gradient is NaN or infinite; the samples are named, and blocks before them are kept.
    FingerprintError
        The store holds features of other settings, weights or data, which are named.
    MemoryBudgetError
        The budget holds neither a gradient nor the curvature's basis, or the features where no
        store is given; the message has the number that would do.

    Notes
    -----
    Curvature: ``2 rank + 24`` products with the Gauss-Newton matrix of up to 1,024 training items,
    each some three gradients; ``(2 rank + 16) P`` numbers. Features: n gradients a draw, ``2 P
    rank`` operations each, and one pass of P additions for the sketch.

    References
    ----------
    - docs/methods/laplace.md.
    - Weinberger et al. 2009: "Feature hashing for large scale multitask learning", arXiv:0902.2206.
    - Hu et al. 2025: "GraSS: scalable data attribution with gradient sparsification and sparse
      projection", arXiv:2505.18976.

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> posterior = lk.LocalPosterior(model, data, nbeta=10.0, gamma=100.0)
    >>> features = lk.laplace(posterior, data, progress=False)
    >>> dict(features["feature"].sizes)
    {'mode': 17, 'sample': 8}
    >>> lk.correlation(features).dims
    ('sample', 'sample_2')
    """
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(f"posterior must be lk.LocalPosterior, not {type(posterior).__name__}")
    check_dataset(observed, "observed")
    one_of("outcome", outcome, OUTCOMES)
    if sketch is not None and sketch < 1:
        raise ValueError(f"sketch must be at least 1, or None, not {sketch}")
    if smooth == 1:
        raise ValueError("smooth must be 0, or 2 or more: one draw has no halves to compare")
    asked = FeatureRequest(
        posterior=posterior,
        outcome=outcome,
        rank=rank,
        step_size=step_size,
        sketch=sketch,
        smooth=smooth,
        seed=seed,
        budget=memory_budget(memory),
        in_memory=store is None,
    )
    asked.check()
    place = MemoryStore() if store is None else stores.as_store(store)
    labels = given_coords(coords, len(observed))
    with bars.showing(progress):
        return _laplace(asked, observed, labels, place, device, check_workers(num_workers))


def _laplace(
    asked: FeatureRequest,
    observed: MapDataset,
    labels: dict[str, np.ndarray],
    place: Any,
    device: torch.device | str | None,
    workers: int,
) -> xr.Dataset:
    posterior, target = asked.posterior, asked.smooth or 1
    chosen = choose_device(device, None)
    data = Batches(observed, name="observed", device=chosen, num_workers=workers)
    train = None
    if asked.bends:
        own = observed is posterior.train_set
        train = data if own else _train(posterior, chosen, workers)
    flat = FlatModel(posterior.model, trainable=posterior.trainable, device=chosen)
    dtype = str(flat.theta.dtype).removeprefix("torch.")
    fingerprint = asked.fingerprint(data, train, labels, dtype)
    root = stored_features(place, fingerprint)
    if root is None or not whole(root, target):
        with stores.writer_lock(place):
            before = None if root is None else described(group_at(root, GROUP))
            threads = torch.get_num_threads() if before is None else int(before["threads"])
            with numerics(threads):
                root = _made(asked, flat, data, train, labels, place, fingerprint, before)
    return _opened(root)


def _train(posterior: LocalPosterior, device: torch.device, workers: int) -> Batches:
    return Batches(posterior.train_set, name="train_set", device=device, num_workers=workers)


def _made(
    asked: FeatureRequest,
    flat: FlatModel,
    data: Batches,
    train: Batches | None,
    labels: Mapping[str, np.ndarray],
    place: Any,
    fingerprint: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> Any:
    """Make what is missing in a store; return its root."""
    counts = asked.posterior.loss.counts
    if counts is not None:
        data.refuse_uncounted(counts)
    size = asked.sketched(flat, data.n) if before is None else before["sketch"]
    batch = gradient_batch(flat, asked.budget) if before is None else int(before["batch"])
    modes = moving(flat) if size == "none" else int(size)
    each = asked.require_memory(flat, data.n, modes)
    law = _law(asked, flat, train)
    kept = None
    if size != "none":
        kept = Sketch(flat.theta.shape[1], modes, seed=asked.seed, device=flat.device)
    scalars = outcome_scalars(asked.outcome, asked.posterior.loss)
    maker = FeatureMaker(flat, data, scalars, law, kept, seed=asked.seed, batch=batch)
    layout = FeatureLayout(
        samples=data.n,
        modes=modes,
        halves=asked.halves,
        rows=asked.rows(each, data.n),
        dtype=str(fingerprint["precision"]),
        coords=labels,
        attrs=_described(asked, law, size)
        | {key: fingerprint[key] for key in ("weights", "observed_data")}
        | {"batch": batch, "threads": torch.get_num_threads()},
    )
    if before is not None and before["law"] != law.identity:
        raise FingerprintError(
            f"{stores.describe(place)}: the curvature is not to the last bit that of the stored "
            "features, so that blocks would not fit together: go on with the device and the "
            "versions that it was begun with, or use another path"
        )
    writer = FeatureWriter(place, layout, fingerprint)
    _write(maker, writer, asked)
    stores.finish(writer.root)
    return writer.root


def _described(asked: FeatureRequest, law: LaplaceLaw, size: int | str) -> dict[str, Any]:
    """Return the attributes that features carry."""
    posterior, curvature = asked.posterior, law.curvature
    known = {}
    if len(curvature.values):
        known = {
            "captured": curvature.captured,
            "curvature": curvature.values.tolist(),
            "residual": float((curvature.residuals / curvature.values).max()),
        }
    return {
        "outcome": asked.outcome,
        "loss": posterior.loss.name,
        "nbeta": posterior.nbeta,
        "gamma": posterior.gamma,
        "rank": len(curvature.values),
        "step_size": asked.step_size,
        "sketch": size,
        "law": law.identity,
    } | known


def _law(asked: FeatureRequest, flat: FlatModel, train: Batches | None) -> LaplaceLaw:
    posterior = asked.posterior
    if train is None:
        flattened = posterior.tempered(nbeta=0.0)
        eps = asked.step_size
        return laplace_law(flattened, flat, None, 0, rank=0, step_size=eps, seed=asked.seed)
    if posterior.loss.counts is not None:
        train.refuse_uncounted(posterior.loss.counts)
    batch = evaluation_rows(flat, train)
    options: dict[str, Any] = {"rank": asked.rank, "step_size": asked.step_size, "seed": asked.seed}
    return laplace_law(posterior, flat, train, batch, **options)


def _write(maker: FeatureMaker, writer: FeatureWriter, asked: FeatureRequest) -> None:
    """Add the draws that are missing to each block."""
    target = asked.smooth or 1
    missing = sum(
        (rows.stop - rows.start) * (target - int(draws))
        for rows, draws in zip(writer.blocks, writer.draws, strict=True)
    )
    with bars.bar("features", total=missing, unit="gradient") as bar:
        for block, rows in enumerate(writer.blocks):
            done = int(writer.draws[block])
            if done == target:
                continue
            sums, last = writer.sums(block), time.monotonic()
            for draw in range(done, target):
                maker.move(draw if asked.smooth else None)
                sums[draw % len(sums)] += maker.features(rows)
                bar.update(rows.stop - rows.start)
                # When it is committed moves no number: sums are stored as they are added up.
                if draw + 1 == target or time.monotonic() - last > _COMMIT_SECONDS:
                    writer.commit(block, sums, draw + 1)
                    last = time.monotonic()


def _opened(root: Any) -> xr.Dataset:
    ds = open_features(root)
    for name in ("batch", "threads"):
        ds.attrs.pop(name, None)
    if "feature_half" in ds:
        agree = _agreement(ds["feature_half"])
        ds.attrs |= {"halves_agree": agree, "reliability": 2 * agree / (1 + agree)}
    return ds


def _agreement(halves: xr.DataArray) -> float:
    """Return the correlation over pairs of samples of R from either half; NaN of few samples."""
    n = halves.sizes["sample"]
    if n < 3:
        return float("nan")
    chosen = np.unique(np.linspace(0, n - 1, min(n, _COMPARED)).astype(int))
    pairs = np.triu_indices(len(chosen), 1)
    kernels = []
    for half in range(2):
        x = halves.isel(half=half, sample=chosen).transpose("sample", "mode").values
        norms = np.linalg.norm(x, axis=1)
        scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        kernels.append(((x @ x.T) * scale * scale[:, None])[pairs])
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*kernels)[0, 1])
