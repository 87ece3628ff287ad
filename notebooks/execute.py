"""Run the notebooks and keep their outputs: ``python notebooks/execute.py [NAME ...]``.

Each runs with the kernel python3 in an empty temporary folder, two threads, and is written back
without what differs from run to run: times of execution, versions, the kernel's name.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parent
LIMIT = 120  # seconds
#: The commands of this environment, `lkarray` among them, come first.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
}


def execute(path: Path, folder: Path | str) -> nbformat.NotebookNode:
    """Return a notebook as run in a folder, without metadata of this run and machine."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:  # not ports, which others could listen to
        sockets_only = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        NotebookClient(
            notebook,
            timeout=LIMIT,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            coalesce_streams=True,
            config=Config({"KernelManager": sockets_only}),
        ).execute(env=os.environ | ENVIRONMENT)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def main(names: list[str]) -> None:
    """Run the notebooks named (all by default) and write them back."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.name not in names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            notebook = execute(path, folder)
            seconds = time.monotonic() - start
        nbformat.write(notebook, path)
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
