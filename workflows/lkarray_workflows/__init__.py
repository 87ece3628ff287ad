"""Studies: one file each, run by ``lkarray run NAME``."""
