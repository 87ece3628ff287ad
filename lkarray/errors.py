"""The errors that callers may want to tell apart.

A bad argument is a plain ``ValueError`` or ``TypeError``; what concerns a store or a run
has a name here. Every message says what is wrong, where, and what to do next.
"""

from __future__ import annotations


class LkarrayError(Exception):
    """Base of every error that lkarray names itself."""


class SchemaError(LkarrayError, ValueError):
    """A variable, dim or coordinate is missing, misnamed or of the wrong kind."""


class NonFiniteError(LkarrayError, ValueError):
    """A loss, a weight or a kernel operand holds NaN or infinity."""


class MemoryBudgetError(LkarrayError, ValueError):
    """The computation cannot run within the memory budget that was set."""


class DeviceError(LkarrayError, RuntimeError):
    """A device that was asked for is not there, or cannot be used."""


class StoreError(LkarrayError, OSError):
    """A store cannot be created, read or written."""


class StoreVersionError(StoreError):
    """The store was written by a newer lkarray than this one."""


class DamagedError(StoreError):
    """What a store holds is damaged: metadata or a chunk is missing, unreadable, or was changed.

    Attributes
    ----------
    what
        The fault alone, without the store and the remedy; ``None`` where it is not told apart.
    """

    what: str | None = None


class FingerprintError(StoreError, ValueError):
    """The store holds a run made with other settings, weights or data."""


class GroupError(StoreError, ValueError):
    """A group of a store cannot be written: it is lkarray's own, or holds something else."""


class LockedError(StoreError):
    """Another process is writing to the store, or running in the folder."""


class SettingsError(LkarrayError, ValueError):
    """Settings of a study do not fit each other, its data, or the run that it was given."""


class ClusterError(LkarrayError, RuntimeError):
    """A cluster cannot be reached or started, or does not run what the client runs."""


class MissingPackageError(LkarrayError, ModuleNotFoundError):
    """An optional package is not installed; the message has the extra that brings it."""


class MissingCorpusError(LkarrayError, LookupError):
    """A corpus that a taxonomy is read from is not installed."""


class DivergedError(LkarrayError, ArithmeticError):
    """Every chain turned non-finite, so there is nothing to compute from."""


class UnreliableWarning(UserWarning):
    """What is computed comes from draws that are few, or that do not sample the posterior."""
