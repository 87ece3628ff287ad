"""Do client, scheduler and workers run the same software? Asked before any work starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lkarray.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client

#: What a worker must have, in the client's version.
REQUIRED = (
    "cloudpickle",
    "dask",
    "distributed",
    "lkarray",
    "msgpack",
    "numcodecs",
    "numpy",
    "xarray",
    "zarr",
)

#: What a worker may lack, but may not have in another version.
OPTIONAL = ("obstore", "scipy", "torch")

#: What a scheduler must have: it never runs lkarray's own code.
_SCHEDULER = ("cloudpickle", "dask", "distributed", "msgpack")


def mismatches(client: Client, *, needs: Iterable[str] = ()) -> list[str]:
    """Return what differs between the client and its cluster, one line each.

    Parameters
    ----------
    client
        A connected client.
    needs
        Optional packages that the work ahead needs on every worker: ``"torch"`` to sample.

    Notes
    -----
    One round trip to the scheduler and each worker; nothing is imported and no code is sent, so
    that it also works where the versions of Python differ.
    """
    needs = set(needs)
    answers: Any = client.get_versions(check=False, packages=[*REQUIRED, *OPTIONAL])
    here = answers["client"]["packages"]
    lines = _differences("the scheduler", here, answers["scheduler"]["packages"], _SCHEDULER, ())
    same: dict[tuple[str, ...], list[str]] = {}
    for address, answer in sorted(answers["workers"].items()):
        if answer is None:
            continue  # it left while it was asked
        told = _differences("", here, answer["packages"], REQUIRED, OPTIONAL, needs)
        same.setdefault(tuple(told), []).append(address)
    for said, addresses in same.items():
        more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
        lines += [f"worker {addresses[0]}{more}: {line}" for line in said]
    return lines


def refuse_mismatch(client: Client, *, needs: Iterable[str] = ()) -> None:
    """Raise unless the cluster runs what the client runs.

    Parameters
    ----------
    client
        A connected client.
    needs
        Optional packages that every worker must have.

    Raises
    ------
    ClusterError
        A package or Python differs, or is missing on a worker; each difference is named.
    """
    if not hasattr(client, "get_versions"):
        raise TypeError(f"client must be a Dask client, not {type(client).__name__}")
    lines = mismatches(client, needs=needs)
    if lines:
        raise ClusterError(
            "client and cluster do not run the same software, so nothing was started:\n  "
            + "\n  ".join(lines)
            + "\nInstall the same versions everywhere (pip install -c constraints.txt ...)"
        )


def _differences(
    where: str,
    here: dict[str, Any],
    there: dict[str, Any],
    required: Iterable[str],
    optional: Iterable[str],
    needs: Iterable[str] = (),
) -> list[str]:
    lead = f"{where}: " if where else ""
    out = []
    if _minor(here["python"]) != _minor(there["python"]):
        out.append(f"{lead}Python {_minor(there['python'])}, here {_minor(here['python'])}")
    for name in (*required, *optional):
        ours, theirs = here.get(name), there.get(name)
        if theirs is None and (name in needs or (name in required and ours is not None)):
            out.append(f"{lead}{name} is not installed, here {ours}")
        elif None not in (ours, theirs) and ours != theirs:
            out.append(f"{lead}{name} {theirs}, here {ours}")
    return out


def _minor(version: str) -> str:
    return ".".join(str(version).split(".")[:2])
