"""Stores: create, open, commit, verify, lock. Knows nothing of torch.

A store is one Zarr v3 group that any Zarr reader can open. `layout` says how arrays are
laid out, `commit` when a draw counts, `reading` what of it a user sees, `verifying` whether
everything that counts is really there, and `locking` who may write.
"""

from lkarray.store.commit import ChainRegion, Record, read_record
from lkarray.store.derived import put
from lkarray.store.fingerprints import refuse_changes
from lkarray.store.layout import (
    create_losses,
    drop_unfinished,
    finish,
    grow,
    stored,
    stored_fingerprint,
)
from lkarray.store.location import as_store, describe, open_root, writing
from lkarray.store.locking import file_lock, writer_lock
from lkarray.store.reading import open_store
from lkarray.store.verifying import Problem, verify

__all__ = [
    "ChainRegion",
    "Problem",
    "Record",
    "as_store",
    "create_losses",
    "describe",
    "drop_unfinished",
    "file_lock",
    "finish",
    "grow",
    "open_root",
    "open_store",
    "put",
    "read_record",
    "refuse_changes",
    "stored",
    "stored_fingerprint",
    "verify",
    "writer_lock",
    "writing",
]
