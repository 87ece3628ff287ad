"""Losses sampled with devinterp, as a tree like lkarray's own. Needs neither torch nor devinterp.

The layout is that of devinterp 2.0: a flat Zarr v3 group, with ``loss_<name>(chain, draw,
batch_<name>, token_pos)`` and ``input_ids_<name>`` for each observable, what was kept of the
minibatches, and the settings in the attribute ``metadata``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.arguments import checked
from lkarray.errors import DivergedError, SchemaError, StoreError
from lkarray.store.location import ENTRIES, StoreLike, as_store, describe, local_path

logger = logging.getLogger("lkarray")

#: Names that only such a tree has.
TRAINING, INIT_LOSS, STEP_LOSS, STEP = "training", "init_loss", "step_loss", "step"
INPUT_IDS, POSITION = "input_ids", "position"

_CHAIN, _DRAW, _TOKEN_POS = "chain", "draw", "token_pos"
_SAMPLERS = {"sgmcmc_sgld": "SGLD", "rmsprop_sgld": "RMSpropSGLD"}
#: Settings that lkarray's posterior and samplers lack, with the values that leave them out.
_NEUTRAL = {
    "noise_level": 1.0,
    "llc_weight_decay": 0.0,
    "bounding_box_size": None,
    "init_noise": None,
}


@checked()
def from_devinterp(path: StoreLike) -> xr.DataTree:
    """Open a store that devinterp 2 sampled, lazily.

    Parameters
    ----------
    path
        The ``output_path`` of ``devinterp.slt.sampling.sample``: a folder, a URL that fsspec
        understands, or a Zarr store.

    Returns
    -------
    xarray.DataTree
        - ``losses``, of the first observable, and ``losses_<name>``, of each further one:
          ``loss(chain, draw, sample, token)``, float32, in nats, with a coordinate
          ``input_ids(sample, position)``. A loss belongs to the token that is predicted, so
          there is one less than positions. Attributes: ``nbeta``, ``gamma`` (devinterp's
          localization), ``sampler``, ``burn_in``, ``thin``, ``batch_size``, ``seed``,
          ``observable``.
        - ``sample_stats``: ``minibatch_loss(chain, draw)``.
        - ``training``: ``init_loss(chain, token)``, the mean over minibatches of training
          sequences before the first step, and ``step_loss(chain, step)``, that of each step's
          minibatch.

        Dask arrays have one chunk per stored chunk. Chains that failed are left out, which is
        logged and kept in the attribute ``hidden``; to see it, one chunk of each is read.

    Raises
    ------
    StoreError
        There is no store, it is not devinterp's, or its sampling was interrupted.
    SchemaError
        An array or a setting is missing, or an array has other dims than devinterp 2.0 writes.
    DivergedError
        Every chain failed.

    Notes
    -----
    ``tree["losses"].loss.mean("token")`` are the losses of sequences, still lazy.

    ``nbeta`` means what it does in `lkarray.LocalPosterior`: it multiplies a minibatch's mean
    loss, here over all its tokens. Of each ``thin`` steps devinterp's draw follows the first,
    lkarray's the last.

    There is no ``center_loss``, and so no `lkarray.loss_gain`: devinterp records the loss at w*
    of training minibatches, not of what is observed. Its own estimate of the learning
    coefficient is ``nbeta * (step_loss.mean() - init_loss.mean())``, of the group ``training``.
    """
    root = _open(path)
    where = describe(root.store)
    settings, names = _metadata(root, where)
    attrs = _attributes(settings, where)
    flat = xr.open_zarr(root.store, consolidated=False, chunks={}, zarr_format=3)
    groups = {}
    for place, name in enumerate(names):
        group = f"{schema.LOSSES}_{name}" if place else schema.LOSSES
        groups[group] = _losses(flat, name, where).assign_attrs(attrs | {"observable": name})
    good, hidden = _whole_chains([ds[schema.LOSS.name] for ds in groups.values()], where)
    groups |= _statistics(flat, where)
    tree = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={"devinterp": dict(settings)})}
        | {group: ds.isel(chain=good) if hidden else ds for group, ds in groups.items()},
        name="devinterp",
    )
    if hidden:
        logger.warning("%s: %s", where, "; ".join(hidden))
        tree.attrs["hidden"] = hidden
    return tree


def _open(path: StoreLike) -> zarr.Group:
    store = as_store(path)
    where, folder = describe(store), local_path(store)
    try:
        root = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    except (FileNotFoundError, NotADirectoryError):
        if folder is not None and (folder / ".zgroup").exists():
            raise StoreError(
                f"{where} is of Zarr version 2, and so of a devinterp before 2.0; sample again "
                "with devinterp 2"
            ) from None
        raise StoreError(
            f"there is no Zarr group at {where}; give the output_path that devinterp's sample() "
            "was called with"
        ) from None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the root metadata of {where} cannot be read ({error}); restore zarr.json from a copy"
        ) from None
    if ENTRIES in root.attrs:
        raise StoreError(f"{where} is a store of lkarray itself; open it with lk.open")
    return root


def _metadata(root: zarr.Group, where: str) -> tuple[Mapping[str, Any], list[str]]:
    """Return the sampler's settings and the names of the observables."""
    metadata: Any = root.attrs.get("metadata")
    config = metadata.get("config") if isinstance(metadata, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(config.get("sampler"), Mapping):
        raise StoreError(
            f"{where} is not a store of devinterp 2: its root has no attribute "
            f"metadata['config']['sampler'] (it has {sorted(root.attrs)}). Open other Zarr stores "
            "with xarray, and name their dims chain, draw and sample"
        )
    if root.attrs.get("completed") != 1:
        raise StoreError(
            f"the sampling of {where} was interrupted: its attribute 'completed' is missing, and "
            "draws may be too. devinterp cannot resume it; delete it and sample again"
        )
    names = list(dict.fromkeys(str(entry["obs_id"]) for entry in config.get("observables", ())))
    if not names:
        raise SchemaError(
            f"{where} has no observables, so it holds no losses of observed sequences; sample "
            "again with observables={'name': dataset}"
        )
    return config["sampler"], names


def _attributes(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings under lkarray's names, for the attributes of the losses."""
    try:
        method = settings["sampling_method"]
        options = dict(settings["sampling_method_kwargs"] or {})
        sampler: dict[str, Any] = {
            "name": _SAMPLERS.get(method, method),
            "step_size": float(settings["lr"]),
        }
        if method == "rmsprop_sgld":
            # What devinterp takes where nothing was given; its V starts at 0 uncorrected.
            sampler["decay"] = float(options.pop("alpha", 0.99))
            sampler["damping"] = float(options.pop("eps", 0.1))
            sampler["bias_correction"] = False
        changed = {k: settings[k] for k, v in _NEUTRAL.items() if settings.get(k, v) != v}
        return {
            "nbeta": float(settings["n_beta"]),
            "gamma": float(settings["localization"]),
            "sampler": sampler | options | changed,
            "burn_in": int(settings["num_burnin_steps"]),
            "thin": int(settings["num_steps_bw_draws"]),
            "batch_size": int(settings["batch_size"])
            * int(settings["gradient_accumulation_steps"]),
            "seed": int(settings["init_seed"]),
        }
    except KeyError as error:
        raise SchemaError(
            f"{where}: setting {error} is missing from metadata['config']['sampler'], so this is "
            "no store of devinterp 2.0; sample again with devinterp 2.0 or newer"
        ) from None


def _array(flat: xr.Dataset, name: str, dims: tuple[str, ...], where: str) -> xr.DataArray:
    if name not in flat:
        raise SchemaError(
            f"{where}: array {name!r} is missing; there are {sorted(map(str, flat.data_vars))}. "
            "Copy the store whole, or sample again"
        )
    if flat[name].dims != dims:
        raise SchemaError(
            f"{where}: array {name!r} has dims {flat[name].dims}, where devinterp 2.0 has {dims}; "
            "open it with xarray and rename its dims to chain, draw, sample and token"
        )
    return flat[name]


def _losses(flat: xr.Dataset, name: str, where: str) -> xr.Dataset:
    """Return one observable as a group of losses."""
    batch = f"batch_{name}"
    loss = _array(flat, f"loss_{name}", (_CHAIN, _DRAW, batch, _TOKEN_POS), where)
    ids = _array(flat, f"input_ids_{name}", (batch, "token"), where)
    loss = loss.rename({batch: schema.SAMPLE, _TOKEN_POS: schema.TOKEN})
    index = {dim: np.arange(loss.sizes[dim]) for dim in (*schema.POSTERIOR, schema.SAMPLE)}
    ds = loss.assign_attrs(schema.LOSS.attrs()).to_dataset(name=schema.LOSS.name)
    # A coordinate, so that all variables of the group have chains and draws.
    return ds.assign_coords(
        index | {INPUT_IDS: ids.rename({batch: schema.SAMPLE, "token": POSITION}).variable}
    )


def _statistics(flat: xr.Dataset, where: str) -> dict[str, xr.Dataset]:
    """Return what was recorded of the minibatches, averaged over their sequences and tokens."""
    draws = _array(flat, "sampling_loss", (_CHAIN, _DRAW, "batch", _TOKEN_POS), where)
    dims = (_CHAIN, STEP, "batch_sampling", _TOKEN_POS)
    steps = _array(flat, "sampling_loss_micro", dims, where)
    initial = _array(flat, "init_loss", (_CHAIN, _TOKEN_POS), where)
    index = {dim: np.arange(draws.sizes[dim]) for dim in schema.POSTERIOR}
    spec = schema.MINIBATCH_LOSS
    stats = {spec.name: draws.mean(["batch", _TOKEN_POS]).assign_attrs(spec.attrs())}
    training = {
        INIT_LOSS: initial.rename({_TOKEN_POS: schema.TOKEN}).assign_attrs(
            long_name="mean loss of training minibatches at the start", units=spec.units
        ),
        STEP_LOSS: steps.mean(["batch_sampling", _TOKEN_POS]).assign_attrs(
            long_name="mean loss of the step's minibatch", units=spec.units
        ),
    }
    return {
        schema.SAMPLE_STATS: xr.Dataset(stats, index),
        TRAINING: xr.Dataset(training, {schema.CHAIN: index[schema.CHAIN]}),
    }


def _whole_chains(losses: list[xr.DataArray], where: str) -> tuple[list[int], list[str]]:
    """Return the chains that reached their last draw, and what leaving out the others hides.

    A chain that turns non-finite stops, and what it did not write reads as NaN.
    """
    last = [loss[:, -1, 0, 0].compute().values for loss in losses]
    whole = np.isfinite(np.stack(last)).all(0)
    bad = np.flatnonzero(~whole).tolist()
    if not whole.any():
        raise DivergedError(
            f"every chain of {where} failed before its last draw; sample again with a smaller lr, "
            "or a larger localization"
        )
    hidden = [f"chains {bad} diverged and are left out"] if bad else []
    return np.flatnonzero(whole).tolist(), hidden
