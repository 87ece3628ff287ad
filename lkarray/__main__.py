"""``python -m lkarray``: the same as the command ``lkarray``."""

from lkarray.cli import main

if __name__ == "__main__":
    main(prog_name="lkarray")
