"""What a run was made with: what must be equal for a resume to give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Layout:
    """What was chosen where a run began, and last bits depend on: the same run keeps to it.

    Attributes
    ----------
    device
        Where it ran; ``None`` here and below is not chosen yet.
    threads
        Of torch.
    chains_per_device
        The width of its stacks.
    train_rows
        Items of the training set that go through the model at once.
    eval_rows
        The same of each observed set, by group.
    """

    device: str | None = None
    threads: int | None = None
    chains_per_device: int | None = None
    train_rows: int | None = None
    eval_rows: Mapping[str, int] = field(default_factory=dict)

    def of_chains(self) -> Layout:
        """Return the layout of the same chains where other sets are observed."""
        return replace(self, eval_rows={})


@dataclass(frozen=True)
class RecordedObservable:
    """A function that was recorded: a hash of what it does, and the shape of one value."""

    function: str
    shape: list[int]


@dataclass(frozen=True)
class RecordedOutcome:
    """An outcome that was recorded: its name or a hash of what it does, its link and units."""

    function: str
    link: str
    units: str


@dataclass(frozen=True)
class Fingerprint:
    """What is stored of how a run was made; fields in the order of the stored JSON.

    ``lkarray`` and ``torch`` are versions; ``weights``, ``train_data``, ``observed_data`` and
    ``coords`` are hashes, the last two by group. Of a store that an older lkarray wrote, what it
    did not store is ``None``.
    """

    # The order is that of the stored JSON, which must stay as it is.
    lkarray: str
    torch: str
    weights: str
    train_data: str
    observed_data: Mapping[str, str]
    coords: Mapping[str, str]
    observables: Mapping[str, RecordedObservable]
    loss: str
    nbeta: float
    gamma: float
    trainable: list[str]
    sampler: Mapping[str, Any]
    state: list[str]
    burn_in: int
    thin: int
    batch_size: int
    seed: int
    device: str
    hardware: str
    precision: str
    autocast: str | None
    compile: bool
    matmul_precision: str
    chains_per_device: int
    eval_rows: Mapping[str, int]
    train_rows: int
    threads: int
    # Beside losses; of a run that records these alone nothing is stored.
    outcomes: Mapping[str, RecordedOutcome] = field(default_factory=dict)
    # Of the law that chains start in: rank and hash. Of chains that start at w* nothing is stored.
    start: Mapping[str, Any] | None = None
    # Of the linear chains beside them: rank and hash of their law, and what they predict.
    control: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Fingerprint:
        """Return the fingerprint that a store holds."""
        values: dict[str, Any] = {entry.name: stored.get(entry.name) for entry in fields(cls)}
        observables = values["observables"] or {}
        values["observables"] = {n: RecordedObservable(**o) for n, o in observables.items()}
        outcomes = values["outcomes"] or {}
        values["outcomes"] = {n: RecordedOutcome(**o) for n, o in outcomes.items()}
        return cls(**values)

    def stored(self) -> dict[str, Any]:
        """Return what a store holds of it: plain values."""
        values = asdict(self)
        if not self.outcomes:
            del values["outcomes"]
        for name in ("start", "control"):
            if values[name] is None:
                del values[name]
        return values

    def of_chains(self) -> dict[str, Any]:
        """Return what a replay shares with the run that it replays, whatever is observed."""
        return {name: value for name, value in self.stored().items() if name in _OF_CHAINS}

    def of_observed(self) -> dict[str, Any]:
        """Return the same, and what was observed."""
        names = (*_OF_CHAINS, "observed_data", "observables", "outcomes", "control")
        return {name: value for name, value in self.stored().items() if name in names}

    @property
    def layout(self) -> Layout:
        """Where the run began, which the same run keeps to."""
        return Layout(
            device=self.device,
            threads=self.threads,
            chains_per_device=self.chains_per_device,
            train_rows=self.train_rows,
            eval_rows=self.eval_rows or {},
        )


#: What of a fingerprint the numbers of a chain depend on; device and threads move last bits only.
_OF_CHAINS = frozenset(
    {
        "lkarray",
        "torch",
        "weights",
        "train_data",
        "loss",
        "nbeta",
        "gamma",
        "trainable",
        "sampler",
        "burn_in",
        "thin",
        "batch_size",
        "seed",
        "start",
        "precision",
        "matmul_precision",
        "chains_per_device",
        "train_rows",
    }
)
