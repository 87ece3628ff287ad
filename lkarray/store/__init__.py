"""Stores: create, open, commit, verify, lock. Knows nothing of torch.

A store is one Zarr v3 group that any Zarr reader can open. `layout` and `trace_layout` say how
arrays are laid out, `commit` when a draw counts and `trajectory` when a step does, `reading` what
of it a user sees, `verifying` whether everything that counts is really there, and `locking` who may
write.
"""

from lkarray.store.arrays import finish, require_space, stored
from lkarray.store.commit import ChainRegion, Record, read_record, read_records, require_sound
from lkarray.store.derived import put
from lkarray.store.fingerprints import refuse_changes
from lkarray.store.gradients import discard_gradients
from lkarray.store.layout import LossSet, create_run, drop_unfinished, grow, stored_fingerprint
from lkarray.store.location import as_store, describe, open_root, writing
from lkarray.store.locking import file_lock, region_lock, writer_lock
from lkarray.store.parts import create_parts, part_store, parts_of
from lkarray.store.problems import Problem
from lkarray.store.reading import open_rectangle, open_store
from lkarray.store.trajectory import discard_trace
from lkarray.store.verifying import verify

__all__ = [
    "ChainRegion",
    "LossSet",
    "Problem",
    "Record",
    "as_store",
    "create_parts",
    "create_run",
    "describe",
    "discard_gradients",
    "discard_trace",
    "drop_unfinished",
    "file_lock",
    "finish",
    "grow",
    "open_rectangle",
    "open_root",
    "open_store",
    "part_store",
    "parts_of",
    "put",
    "read_record",
    "read_records",
    "refuse_changes",
    "region_lock",
    "require_sound",
    "require_space",
    "stored",
    "stored_fingerprint",
    "verify",
    "writer_lock",
    "writing",
]
